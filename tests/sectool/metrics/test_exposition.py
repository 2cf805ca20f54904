"""The text format, read back by Prometheus' own parser."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from sectool.metrics.exposition import Family, Kind, text


def read(exposition: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Samples by name and labels, as the parser of another project understands them."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
    }


VALUES = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\r"), max_size=12)


@settings(max_examples=60)
@given(
    help_=VALUES,
    samples=st.dictionaries(VALUES, st.integers(0, 1 << 60) | st.floats(), max_size=5),
)
def test_what_is_written_is_read(help_: str, samples: dict[str, float]) -> None:
    """Invariant: every label and value comes back, whatever is in them."""
    family = Family("x_y", Kind.GAUGE, help_, tuple(((("a", k), ("b", "")), v) for k, v in samples.items()))
    back = read(text([family]))
    assert {dict(labels)["a"] for _, labels in back} == set(samples)
    for label, value in samples.items():
        found = back["x_y", (("a", label), ("b", ""))]
        assert float(found) == float(value) or (math.isnan(found) and math.isnan(value))


def test_types_and_help_are_said() -> None:
    families = [
        Family("a_total", Kind.COUNTER, "How many\nthere\\are.", (((), 3),)),
        Family("b", Kind.GAUGE, "No samples.", ()),
    ]
    assert text(families) == "# HELP a_total How many\\nthere\\\\are.\n# TYPE a_total counter\na_total 3\n"
    (family,) = text_string_to_metric_families(text(families))
    assert (family.type, family.documentation) == ("counter", "How many\nthere\\are.")


@pytest.mark.parametrize(
    ("name", "kind", "label"),
    [("a-b", Kind.GAUGE, "x"), ("", Kind.GAUGE, "x"), ("a", Kind.GAUGE, "x y"), ("a", Kind.COUNTER, "x"),
     ("a_total", Kind.GAUGE, "x")],
)  # fmt: skip
def test_names_that_are_none_are_refused(name: str, kind: Kind, label: str) -> None:
    with pytest.raises(ValueError, match=r"name|_total"):
        Family(name, kind, "", ((((label, "v"),), 1),))
