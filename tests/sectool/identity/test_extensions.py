from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectool.errors import CredentialError
from sectool.events import DropReason
from sectool.identity.extensions import (
    ARC,
    MAX_EXTENSION,
    LabelConstraints,
    decode_constraints,
    decode_labels,
    encode_constraints,
    encode_labels,
)
from sectool.labels import LabelSet

KEYS = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,10}[A-Za-z0-9])?", fullmatch=True)
VALUES = st.from_regex(r"([A-Za-z0-9_/]([A-Za-z0-9._/@:+-]{0,20}[A-Za-z0-9_])?)?", fullmatch=True)
PATTERNS = st.tuples(KEYS, st.sampled_from(["", "*"])).map("".join) | st.just("*")
VALUE_PATTERNS = st.tuples(VALUES, st.sampled_from(["", "*"])).map("".join)


def test_the_arc_is_the_one_that_is_documented() -> None:
    assert ARC == "2.25.336749635520939184262624122604099643535"


def test_labels_are_one_utf8string_of_canonical_text() -> None:
    assert encode_labels(LabelSet({"b": "2", "a": "1"})) == b"\x0c\x07a=1,b=2"
    assert encode_labels(LabelSet()) == b"\x0c\x00"
    assert encode_labels(LabelSet({"a": "x" * 128})) == b"\x0c\x81\x82a=" + b"x" * 128


@given(st.dictionaries(KEYS, VALUES, max_size=40))
def test_labels_survive_the_way_there_and_back(labels: dict[str, str]) -> None:
    assert decode_labels(encode_labels(LabelSet(labels))) == labels


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x0c",
        b"\x0c\x80",
        b"\x0c\x04a=1",
        b"\x0c\x03a=1x",
        b"\x13\x03a=1",
        b"\x0c\x81\x03a=1",
        b"\x0c\x82\x00\x03a=1",
        b"\x0c\x07b=1,a=2",
        b"\x0c\x07a=1,a=2",
        b"\x0c\x04a=1,",
        b"\x0c\x04,a=1",
        b"\x0c\x01a",
        b"\x0c\x02=1",
        b"\x0c\x05a=1=2",
        b"\x0c\x04a=\xc3\xa4",
        b"\x0c\x82\xff\xff" + b"a" * 65535,
    ],
)
def test_labels_in_any_other_spelling_are_refused(data: bytes) -> None:
    with pytest.raises(CredentialError) as refused:
        decode_labels(data)
    assert refused.value.reason == DropReason.CREDENTIAL_MALFORMED


@given(
    st.binary(max_size=200)
    | st.text("a=,1b* ;|/", max_size=60).map(lambda t: bytes((12, len(t))) + t.encode())
)
def test_arbitrary_bytes_give_canonical_labels_or_a_refusal(data: bytes) -> None:
    try:
        labels = decode_labels(data)
    except CredentialError as error:
        assert error.reason == DropReason.CREDENTIAL_MALFORMED
    else:
        text = ",".join(f"{k}={v}" for k, v in labels.items())
        assert data.endswith(text.encode())
        assert list(labels) == sorted(labels)


@given(
    st.dictionaries(PATTERNS, st.lists(VALUE_PATTERNS, max_size=4), max_size=10),
    st.sampled_from(["", "/a/", "/a/b/"]),
)
def test_constraints_survive_the_way_there_and_back(allow: dict[str, list[str]], prefix: str) -> None:
    constraints = LabelConstraints(allow, prefix)
    again = decode_constraints(encode_constraints(constraints))
    assert again == constraints
    assert hash(again) == hash(constraints)


@given(
    st.binary(max_size=200)
    | st.text("a=,1b*;|/", max_size=60).map(lambda t: bytes((12, len(t))) + t.encode())
)
def test_arbitrary_bytes_give_canonical_constraints_or_a_refusal(data: bytes) -> None:
    try:
        constraints = decode_constraints(data)
    except CredentialError:
        return
    assert encode_constraints(constraints) == data


@pytest.mark.parametrize(
    "text",
    [
        "a;b",
        "/a;b",
        "/a/;b=1;b=2",
        "/a/;b=2|1",
        "/a/;b=1|1",
        "/a/;c;b",
        "/a/;b*c=1",
        "/a/;b=*c",
        "/a/;",
        "//;b",
        "/../;b",
        "/a/;b=x y",
    ],
)
def test_constraints_in_any_other_spelling_are_refused(text: str) -> None:
    with pytest.raises(CredentialError):
        decode_constraints(bytes((12, len(text))) + text.encode())


def test_constraints_beyond_the_limits_are_refused() -> None:
    with pytest.raises(CredentialError):
        LabelConstraints({f"k{i}": ("v",) for i in range(65)})
    with pytest.raises(CredentialError):
        LabelConstraints({"k": [f"v{i}" for i in range(65)]})
    with pytest.raises(CredentialError):
        encode_constraints(LabelConstraints({f"k{i}": ["v" * 100] for i in range(MAX_EXTENSION // 100)}))


CONSTRAINTS = LabelConstraints(
    {"*": ["*"], "env": ["dev", "test*"], "team.*": ["a"], "team.x*": ["b"], "secret": [], "empty": [""]},
    "/host/web1/",
)


@pytest.mark.parametrize(
    ("key", "value", "permitted"),
    [
        ("app", "anything", True),
        ("env", "dev", True),
        ("env", "testing", True),
        ("env", "prod", False),
        ("env", "", False),
        ("environment", "prod", True),  # env is a literal key, not a prefix
        ("team.a", "a", True),
        ("team.a", "b", False),
        ("team.xy", "b", True),
        ("team.xy", "a", False),  # the longest prefix alone counts
        ("secret", "x", False),
        ("secret", "", False),
        ("empty", "", True),
        ("empty", "x", False),
    ],
)
def test_the_most_specific_key_pattern_decides(key: str, value: str, permitted: bool) -> None:
    assert CONSTRAINTS.permits(key, value) is permitted


def test_a_key_that_nothing_names_is_not_permitted() -> None:
    assert not LabelConstraints({"env": ["dev"]}).permits("app", "web")
    assert not LabelConstraints({}).permits("app", "web")


@pytest.mark.parametrize(
    ("path", "permitted"),
    [
        ("/host/web1/wl/a", True),
        ("/host/web10/wl/a", False),
        ("/host/web1", False),
        ("/x", False),
        ("", False),
    ],
)
def test_paths_stay_below_the_prefix(path: str, permitted: bool) -> None:
    assert CONSTRAINTS.permits_path(path) is permitted
    assert LabelConstraints({}).permits_path(path)


@given(st.dictionaries(PATTERNS, st.lists(VALUE_PATTERNS, max_size=3), max_size=6), KEYS, VALUES)
def test_permits_agrees_with_the_rule_as_it_is_written(
    allow: dict[str, list[str]], key: str, value: str
) -> None:
    def covers(pattern: str, text: str) -> bool:
        return pattern == text or (pattern[-1:] == "*" and text[: len(pattern) - 1] == pattern[:-1])

    matching = [p for p in allow if covers(p, key)]
    best = max(matching, key=lambda p: (p == key, len(p)), default=None)
    expected = best is not None and any(covers(p, value) for p in allow[best])
    assert LabelConstraints(allow).permits(key, value) is expected
