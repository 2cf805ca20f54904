"""Labels of several sources: whose word counts, and what is said of the others."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectool.errors import DocumentError
from sectool.labels import LabelError
from sectool.origins import RESERVED, Merged, Origin, Source, merge, refusal, reserved_by
from sectool.policy import parse

HOST = Source(Origin.HOST, {"env": "prod", "zone": "a"}, "host enrolment")


def test_the_stronger_source_wins_and_the_weaker_is_told() -> None:
    document = Source(Origin.OPERATOR, {"env": "dev", "app": "web"}, "Workload web")
    found = merge([document, HOST])
    assert dict(found.labels) == {"app": "web", "env": "dev", "zone": "a"}
    assert found.origins == {"app": Origin.OPERATOR, "env": Origin.OPERATOR, "zone": Origin.HOST}
    assert [(o.key, o.value, o.name, o.by) for o in found.left_out] == [
        ("env", "prod", "host enrolment", Origin.OPERATOR)
    ]


def test_equal_claims_are_no_conflict() -> None:
    assert merge([HOST, Source(Origin.OPERATOR, {"env": "prod"})]).left_out == ()


@pytest.mark.parametrize(
    "key", ["exe", "user", "unit", "image", "container", "container.name", "k8s.pod", "domain"]
)
def test_an_attested_key_is_nobody_elses_even_when_nothing_is_attested(key: str) -> None:
    for origin in (Origin.CONTEXT, Origin.HOST, Origin.OPERATOR):
        found = merge([Source(origin, {key: "lie"})])
        assert key not in found.labels
        assert found.left_out[0].by is Origin.ATTESTED
        assert key in refusal(key, origin)
    assert merge([Source(Origin.ATTESTED, {key: "so"})]).labels[key] == "so"
    assert refusal(key, Origin.ATTESTED) == ""


def test_findings_are_not_for_operators_to_claim_away() -> None:
    found = merge([Source(Origin.CONTEXT, {"vuln": "critical"}), Source(Origin.OPERATOR, {"vuln": "none"})])
    assert found.labels["vuln"] == "critical"
    assert found.origins["vuln"] is Origin.CONTEXT


@pytest.mark.parametrize("key", ["executable", "k8s", "k8sx.pod", "containers", "app.exe", "vuln-fix"])
def test_keys_that_only_look_alike_are_free(key: str) -> None:
    assert reserved_by(key) is None


def test_labels_outside_the_alphabet_are_refused() -> None:
    with pytest.raises(LabelError, match="not valid"):
        merge([Source(Origin.HOST, {"a b": "c"})])


_keys = st.sampled_from([k + "x" if k.endswith(".") else k for k in RESERVED] + ["a", "b", "c"])
_sources = st.lists(
    st.builds(Source, st.sampled_from(Origin), st.dictionaries(_keys, st.sampled_from("pqr"), max_size=4)),
    max_size=4,
)


@given(_sources)
def test_a_label_never_counts_from_an_origin_that_may_not_give_it(sources: list[Source]) -> None:
    found: Merged = merge(sources)
    assert set(found.origins) == set(found.labels)
    for key, origin in found.origins.items():
        assert refusal(key, origin) == ""
        claims = [s for s in sources if key in s.labels and not refusal(key, s.origin)]
        assert max(list(Origin).index(s.origin) for s in claims) == list(Origin).index(origin)
        assert any(s.origin is origin and s.labels[key] == found.labels[key] for s in claims)


def test_the_order_of_sources_of_different_origins_does_not_matter() -> None:
    sources = [Source(o, {"a": o.value, "exe": o.value, "vuln": o.value}) for o in Origin]
    results = {merge(order).labels for order in itertools.permutations(sources)}
    assert [str(r) for r in results] == ["a=attested,exe=attested,vuln=context"]


@pytest.mark.parametrize("key", ["exe", "k8s.namespace", "vuln"])
def test_a_document_that_claims_a_reserved_label_is_refused_where_it_stands(key: str) -> None:
    text = f"kind: Workload\nname: web\nmatch: {{user: www-data}}\nlabels:\n  app: web\n  {key}: lie\n"
    with pytest.raises(DocumentError, match=r"web\.yaml:6:3") as refused:
        parse(text, "web.yaml")
    assert f"label {key} is" in refused.value.message
