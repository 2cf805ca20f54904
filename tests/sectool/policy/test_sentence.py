"""The sentence: every element, every refusal with its place, and the round trip through canonical text."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.errors import DocumentError
from sectool.policy.condition import Condition, LabelRef
from sectool.policy.selector import Anyone, Cidr, Clause, Fqdn, Labels, NamedNet, Op, Selector
from sectool.policy.sentence import Sentence, Until, Verb, parse_sentence
from sectool.policy.service import ICMP6_NAMES, ICMP_NAMES, Service
from sectool.policy.tokens import RESERVED

APP = Labels((Clause("app", Op.EQ, ("web",)),))
DB = Labels((Clause("app", Op.EQ, ("db",)),))
DAY = 86_400_000_000


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("allow app=web to call app=db", Sentence(Verb.ALLOW, APP, DB)),
        ("deny app=web to call app=db", Sentence(Verb.DENY, APP, DB)),
        ("audit app=web to call app=db", Sentence(Verb.AUDIT, APP, DB)),
        ("require encryption for app=web to call app=db", Sentence(Verb.REQUIRE, APP, DB)),
        ("allow any to call any", Sentence(Verb.ALLOW, Anyone(), Anyone())),
        (
            "allow app=web to call app=db on tcp/5432",
            Sentence(Verb.ALLOW, APP, DB, (Service(6, 5432, 5432),)),
        ),
        ("allow app=web to call app=db encrypted", Sentence(Verb.ALLOW, APP, DB, encrypted=True)),
        (
            "audit app=web to call app=db on udp/53,tcp/53 encrypted",
            Sentence(Verb.AUDIT, APP, DB, (Service(17, 53, 53), Service(6, 53, 53)), encrypted=True),
        ),
        (
            "deny app=web to call any where source.zone != destination.zone and source.n > 3",
            Sentence(
                Verb.DENY,
                APP,
                Anyone(),
                conditions=(
                    Condition(LabelRef("source", "zone"), "!=", LabelRef("destination", "zone")),
                    Condition(LabelRef("source", "n"), ">", "3"),
                ),
            ),
        ),
        (
            "allow app=web to call app=db until 2026-12-31",
            Sentence(
                Verb.ALLOW,
                APP,
                DB,
                until=Until("2026-12-31", int(datetime(2027, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000),
            ),
        ),
        (
            'deny app=web to call app=db because "PCI \\"1.2\\" \\\\ ü: #1"',
            Sentence(Verb.DENY, APP, DB, because='PCI "1.2" \\ ü: #1'),
        ),
    ],
)
def test_elements(text: str, sentence: Sentence) -> None:
    assert parse_sentence(text) == sentence
    assert str(sentence) == text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("allow  app == web\tto call\n app = db", "allow app=web to call app=db"),
        ("allow env in ( a , b ) to call x notin(c)", "allow env in (a,b) to call x notin (c)"),
        ("allow app=web to call app=db on tcp/1, tcp/2", "allow app=web to call app=db on tcp/1,tcp/2"),
        (
            "deny a to call b where source.x!=destination.x and source.y==1",
            "deny a to call b where source.x != destination.x and source.y = 1",
        ),
        ("allow a to call b until 2026-12-31T23:00:00+01:00", "allow a to call b until 2026-12-31T22:00:00Z"),
        (
            "allow a to call b until 2026-12-31t23:00:00.5z",
            "allow a to call b until 2026-12-31T23:00:00.500000Z",
        ),
        ("allow a to call fqdn:API.Example.COM.", "allow a to call fqdn:api.example.com"),
        ("allow a to call net:FD00::/8", "allow a to call net:fd00::/8"),
        ("allow a to call b on icmp/8", "allow a to call b on icmp/echo-request"),
        ("allow a to call b on tcp/1-65535", "allow a to call b on tcp/1-65535"),
        ("allow on=1,to=call to call where=any", "allow on=1,to=call to call where=any"),
    ],
)
def test_canonical_text(text: str, canonical: str) -> None:
    assert str(parse_sentence(text)) == canonical
    assert parse_sentence(canonical) == parse_sentence(text)


def test_until_date_is_the_end_of_that_day_in_utc() -> None:
    until = parse_sentence("allow a to call b until 2026-02-28").until
    assert until is not None
    assert until.us == int(datetime(2026, 3, 1, tzinfo=UTC).timestamp()) * 1_000_000
    until = parse_sentence("allow a to call b until 9999-12-31").until
    assert until is not None
    assert until.us % DAY == 0


@pytest.mark.parametrize(
    ("text", "column", "message", "hint"),
    [
        ("", 1, "found the end", ""),
        ("alow a to call b", 1, "expected 'allow', 'deny', 'audit' or 'require", "did you mean 'allow'?"),
        ("Allow a to call b", 1, "found 'Allow'", "did you mean 'allow'?"),
        ("require a", 9, "expected 'encryption' after 'require'", ""),
        ("require encryption a", 20, "expected 'for' after 'require encryption'", ""),
        ("allow to call b", 7, "expected who may call, found 'to'", "write labels"),
        ("allow", 6, "found the end", "write labels"),
        ("allow a call b", 9, "expected 'to' after the calling side, found 'call'", ""),
        ("allow a to b", 12, "expected 'call' after 'to', found 'b'", ""),
        ("allow a to cal b", 12, "expected 'call'", "did you mean 'call'?"),
        ("allow a to call", 16, "expected the called side, found the end", ""),
        ("allow a to call b on", 21, "expected a service, found the end", "tcp/443"),
        ("allow a to call b for x", 19, "found 'for'", ""),
        ("allow a to call b encryptd", 19, "found 'encryptd'", "did you mean 'encrypted'?"),
        ("allow a to call b encrypted on tcp/1", 29, "twice or out of order", "the order is"),
        ("allow a to call b encrypted encrypted", 29, "twice or out of order", ""),
        ("allow a and b to call c", 9, "expected 'to'", ""),
        ("allow a to call b and c", 19, "'and' cannot stand here", "joined by ','"),
        ("deny a to call b encrypted", 18, "never encrypted", "remove"),
        ("require encryption for a to call b encrypted", 36, "already says so", "remove"),
        ("allow a to call b until", 24, "expected a date after 'until', found the end", "2026-12-31"),
        ("allow a to call b until tomorrow", 25, "expected a date", ""),
        ("allow a to call b until 2026-13-01", 25, "expected a date", ""),
        ("allow a to call b until 2026-12-31T10:00:00", 25, "expected a date", ""),
        ("allow a to call b until 2026-12-31T10:00:60Z", 25, "expected a date", ""),
        ("allow a to call b until 0001-01-01T00:00:00+01:00", 25, "outside the years", ""),
        ("allow a to call b because", 26, "expected a quoted text after 'because'", ""),
        ("allow a to call b because x", 27, "expected a quoted text after 'because'", ""),
        ('allow a to call b because ""', 27, "the reason is empty", ""),
        ('allow a to call b because "x', 27, "never closed", "single quotes"),
        ('allow a to call b because "\\n"', 28, "\\n is not an escape", ""),
        ('allow a to call b because "a\nb"', 27, "may not span lines", ""),
        ('allow a to call b because "x" y', 31, "found 'y'", ""),
        ('allow a to call b because "\x1b[2J"', 28, "U+001B", "remove it"),
        ('allow a to call b because "\u202e"', 28, "U+202E", "remove it"),
        (f'allow a to call b because "{"x" * 501}"', 27, "501 characters", ""),
        ("allow ä to call b", 7, "'ä' cannot stand here", "ASCII"),
        ("allow a; to call b", 8, "';' cannot stand here", "one sentence"),
        ("allow a to call 'b'", 17, '"\'" cannot stand here', "quoted with"),
        ("allow a" + " " * 4096 + "to call b", 1, "at most 4096", ""),
    ],
)
def test_refusals(text: str, column: int, message: str, hint: str) -> None:
    with pytest.raises(DocumentError) as caught:
        parse_sentence(text, "r")
    error = caught.value
    assert message in error.message
    assert hint in error.hint
    before = text[: column - 1]
    line = before.count("\n") + 1
    assert error.where == f"r:{line}:{column - (before.rfind(chr(10)) + 1)}"


# --- round trip ---------------------------------------------------------------------------------------------

_ALNUM = "abcXYZ019"
keys = st.builds(
    lambda a, b, c: a + b + c,
    st.sampled_from(_ALNUM),
    st.text(_ALNUM + "._/-", max_size=6),
    st.sampled_from(_ALNUM),
) | st.sampled_from(sorted(RESERVED))
values = st.just("") | st.builds(
    lambda a, b, c: a + b + c,
    st.sampled_from(_ALNUM + "_/"),
    st.text(_ALNUM + "._/@:+-", max_size=6),
    st.sampled_from(_ALNUM + "_"),
)
prefixes = st.builds(lambda a, b: a + b, st.sampled_from(_ALNUM), st.text(_ALNUM + "._/-", max_size=6))
lists = st.lists(values, min_size=1, max_size=4, unique=True).map(tuple)
clauses = st.one_of(
    st.builds(lambda k, v, op: Clause(k, op, (v,)), keys, values, st.sampled_from([Op.EQ, Op.NE])),
    st.builds(lambda k, v, op: Clause(k, op, v), keys, lists, st.sampled_from([Op.IN, Op.NOTIN])),
    keys.filter(lambda k: k not in RESERVED).map(lambda k: Clause(k, Op.EXISTS)),
    keys.map(lambda k: Clause(k, Op.ABSENT)),
    st.builds(lambda k, p: Clause(k, Op.PREFIX, (p,)), keys, prefixes),
)
labels = st.lists(clauses, min_size=1, max_size=4, unique_by=lambda c: c.key).map(lambda c: Labels(tuple(c)))
v4 = st.builds(
    lambda a, n: ipaddress.ip_network((a, n), strict=False), st.integers(0, 2**32 - 1), st.integers(0, 32)
)
v6 = st.builds(
    lambda a, n: ipaddress.ip_network((a | 1 << 127, n), strict=False),
    st.integers(0, 2**128 - 1),
    st.integers(0, 128),
)
hosts = st.lists(st.from_regex(r"[a-z_][a-z0-9_]{0,4}", fullmatch=True), min_size=1, max_size=3).map(".".join)
selectors: st.SearchStrategy[Selector] = st.one_of(
    labels,
    st.just(Anyone()),
    st.from_regex(r"[A-Za-z][A-Za-z0-9._-]{0,5}[A-Za-z0-9]", fullmatch=True).map(NamedNet),
    (v4 | v6).map(Cidr),
    st.builds(Fqdn, hosts, st.booleans()),
)
ports = st.integers(1, 65535)
services = st.one_of(
    st.builds(lambda p, a, b: Service(p, min(a, b), max(a, b)), st.sampled_from([6, 17]), ports, ports),
    st.sampled_from([Service(6), Service(17), Service(1, 0, 255), Service(58, 0, 255)]),
    st.builds(
        lambda p, t, c: Service(p, t, t, c),
        st.sampled_from([1, 58]),
        st.integers(0, 255),
        st.none() | st.integers(0, 255),
    ),
    st.sampled_from([Service(1, t, t, c) for t, c in ICMP_NAMES.values()]),
    st.sampled_from([Service(58, t, t, c) for t, c in ICMP6_NAMES.values()]),
)
refs = st.builds(LabelRef, st.sampled_from(["source", "destination"]), keys)
conditions = st.one_of(
    st.builds(
        Condition,
        refs,
        st.sampled_from(["=", "!="]),
        values | st.sampled_from(["source.x", "destination.y", "and"]),
    ),
    st.builds(
        Condition,
        refs,
        st.sampled_from(["<", ">", "<=", ">="]),
        st.from_regex(
            r"[0-9]{1,9}(\.[0-9]{1,3})?|([0-9]{1,3}[wdhms]){1,3}|20[0-9]{2}-1[0-2]-[0-2][1-9]", fullmatch=True
        ),
    ),
    st.builds(Condition, refs, st.sampled_from(["=", "!=", "<", ">", "<=", ">="]), refs),
).filter(lambda c: c.left != c.right)


@st.composite
def sentences(draw: st.DrawFn) -> Sentence:
    verb = draw(st.sampled_from(list(Verb)))
    until = draw(
        st.none()
        | st.dates().map(lambda d: f"{d:%Y-%m-%d}".rjust(10, "0"))
        | st.datetimes(timezones=st.just(UTC)).map(lambda t: t.isoformat().replace("+00:00", "Z"))
    )
    parsed = parse_sentence(f"allow a to call b until {until}").until if until else None
    text = st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs", "Zl", "Zp"]), max_size=20)
    return Sentence(
        verb,
        draw(selectors),
        draw(selectors),
        tuple(draw(st.lists(services, max_size=3, unique=True))),
        draw(st.booleans()) if verb in (Verb.ALLOW, Verb.AUDIT) else False,
        tuple(draw(st.lists(conditions, max_size=2, unique=True))),
        parsed,
        draw(text.filter(lambda t: bool(t.strip()) or not t)),
    )


@settings(max_examples=400, deadline=None)
@given(sentences())
def test_parse_takes_back_what_print_gives(sentence: Sentence) -> None:
    text = str(sentence)
    assert parse_sentence(text) == sentence
    assert str(parse_sentence(text)) == text


_WORDS = st.sampled_from(
    [
        *sorted(RESERVED),
        "app=web",
        "net:x",
        "net:10.0.0.0/8",
        "fqdn:*.a",
        "tcp/1",
        "icmp/echo-request",
        ",",
        "(",
        ")",
        "!",
        "=",
        "!=",
        "<",
        '"x"',
        '"',
        "\\",
        "source.a",
        "7d",
        "2026-01-01",
        "\x00",
        "é",
        "*",
        "net:",
        "tcp/",
        "1.2.3.4/33",
    ]
)


@settings(max_examples=400, deadline=None)
@given(
    st.text(max_size=60)
    | st.lists(_WORDS, max_size=14).map(" ".join)
    | st.lists(_WORDS, max_size=14).map("".join)
)
def test_any_text_is_a_sentence_or_a_document_error(text: str) -> None:
    try:
        sentence = parse_sentence(text)
    except DocumentError as error:
        assert error.message
        return
    assert parse_sentence(str(sentence)) == sentence
