"""The filter grammar: its three forms say the same, and errors show the place."""

from __future__ import annotations

import ipaddress
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectool.events import Action, DropReason
from sectool.filters import (
    FLAGS,
    SIDED,
    Address,
    Clause,
    Field,
    Filter,
    FilterError,
    InNetwork,
    IsEncrypted,
    IsProtocol,
    IsReason,
    IsVerdict,
    LabelMatch,
    Pattern,
    PortRange,
    Side,
    Value,
    parse_text,
    parse_tokens,
)

NAMES = st.from_regex(r"[a-z][a-z0-9.*/_-]{0,10}", fullmatch=True)
KEYS = st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True)
LABELS = st.lists(st.tuples(KEYS, st.none() | KEYS | st.just("")), min_size=1, max_size=3)
VALUES: dict[Field, st.SearchStrategy[Value]] = {
    Field.LABEL: LABELS.map(lambda items: LabelMatch(tuple(items))),
    Field.IDENTITY: NAMES.map(lambda n: Pattern(f"spiffe://{n}")),
    Field.WORKLOAD: st.text("ab *-", min_size=1).map(Pattern),
    Field.IP: st.ip_addresses().map(Address),
    Field.NET: st.tuples(st.ip_addresses(), st.integers(0, 32)).map(
        lambda pair: InNetwork(ipaddress.ip_network(pair, strict=False))
    ),
    Field.PORT: st.tuples(st.integers(0, 65535), st.integers(0, 65535)).map(
        lambda p: PortRange(min(p), max(p))
    ),
    Field.VERDICT: st.sampled_from([a for a in Action if a]).map(IsVerdict),
    Field.REASON: st.sampled_from([r for r in DropReason if r]).map(IsReason),
    Field.PROTOCOL: st.integers(0, 255).map(IsProtocol),
    Field.ENCRYPTED: st.booleans().map(IsEncrypted),
}


LIKE_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["label", "ip", "from", "a=b", "::1", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["field", "side", "any", "not", "x"]), inner, max_size=4)
    ),
    max_leaves=10,
)


@st.composite
def clauses(draw: st.DrawFn) -> Clause:
    field = draw(st.sampled_from(list(Field)))
    side = draw(st.sampled_from(list(Side))) if field in SIDED else Side.ANY
    negated = draw(st.booleans())
    many = st.lists(VALUES[field], min_size=1, max_size=1 if negated else 3, unique=True)
    return Clause(field, side, tuple(draw(many)), negated)


@st.composite
def filters(draw: st.DrawFn) -> Filter:
    found = draw(st.lists(clauses(), max_size=5))
    wanted = {(c.field, c.side): c for c in found if not c.negated}
    return Filter((*wanted.values(), *(c for c in found if c.negated)))


@given(filter_=filters())
def test_every_form_says_the_same(filter_: Filter) -> None:
    assert Filter.from_json(filter_.to_json()) == filter_
    assert parse_text(str(filter_)) == filter_
    tokens = ["--not" if word == "not" else f"--{word}" for word in shlex.split(str(filter_))]
    tokens = ["--unencrypted" if t == "--encrypted=no" else t for t in tokens]
    tokens = ["--encrypted" if t == "--encrypted=yes" else t for t in tokens]
    assert parse_tokens(tokens) == filter_


@given(
    text=st.text(max_size=60)
    | st.lists(st.sampled_from([*FLAGS, "=", "a", "!", "not", '"', " ", "1", ","])).map("".join)
)
def test_any_text_is_a_filter_or_an_error_with_a_place(text: str) -> None:
    """Invariant: parse_text gives a filter or FilterError whose place lies in the text."""
    try:
        parse_text(text)
    except FilterError as error:
        assert 0 <= error.start <= error.end <= len(text)


@given(data=LIKE_JSON)
def test_any_json_is_a_filter_or_an_error(data: object) -> None:
    """Invariant: from_json gives a filter or FilterError."""
    try:
        Filter.from_json(data)
    except FilterError as error:
        assert error.message


def test_repeated_widens_different_narrows_not_negates_the_next() -> None:
    got = parse_tokens(
        ["--from-label", "app=web", "--from-label=app=api", "--not", "--to-port", "443", "--verdict", "deny"]
    )
    assert got == Filter(
        (
            Clause(Field.LABEL, Side.FROM, (LabelMatch((("app", "web"),)), LabelMatch((("app", "api"),)))),
            Clause(Field.VERDICT, Side.ANY, (IsVerdict(Action.DENY),)),
            Clause(Field.PORT, Side.TO, (PortRange(443, 443),), True),
        )
    )
    assert parse_text("from-label=app=web from-label=app=api not to-port=443 verdict=deny") == got
    assert parse_text("from-label=app=web !to-port=443 from-label=app=api verdict=deny") == got
    assert not parse_text("  ")
    assert parse_text("reason=default-deny") == parse_text("reason=DEFAULT_DENY")
    assert parse_text("unencrypted") == parse_text("encrypted=no")


@pytest.mark.parametrize(
    ("text", "place", "word"),
    [
        ("verdict=deny frm-label=app=web", "frm-label", "from-label"),
        ("port=99999", "99999", "port"),
        ("port=9-1", "9-1", "port"),
        ("verdict=denied", "denied", "deny"),
        ("reason=defaultdeny", "defaultdeny", "default_deny"),
        ("  ip=10.0.0.256 verdict=deny", "10.0.0.256", "IP"),
        ("label=?", "?", ""),
        ("verdict=deny net=10.0.0.0/99", "10.0.0.0/99", "CIDR"),
        ("workload=", "workload=", "workload"),
        ("protocol=sctpx", "sctpx", "tcp"),
        ("verdict=deny not", "t", ""),
        ('workload="a b', '"a b', ""),
        ("deny", "deny", ""),
    ],
)
def test_errors_show_the_place(text: str, place: str, word: str) -> None:
    with pytest.raises(FilterError) as refused:
        parse_text(text)
    assert text[refused.value.start : refused.value.end] == place
    assert word in refused.value.hint or word in refused.value.message


@pytest.mark.parametrize(
    "tokens", [["--nope"], ["verdict"], ["--verdict"], ["--not"], ["--encrypted=yes"], ["--port", "x"]]
)
def test_bad_tokens(tokens: list[str]) -> None:
    with pytest.raises(FilterError):
        parse_tokens(tokens)
