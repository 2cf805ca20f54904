"""Selectors: Kubernetes syntax plus prefixes, every clause's meaning, every refusal."""

from __future__ import annotations

import pytest

from sectool.errors import DocumentError
from sectool.policy.selector import Clause, Fqdn, Labels, Op, Selector, host_name, parse_selector
from sectool.policy.tokens import Reader
from sectool.policy.yamlpos import Scalar


def parse(text: str) -> Selector:
    reader = Reader(Scalar.whole(text, "s"))
    selector = parse_selector(reader, "a selector")
    assert reader.token.kind == "end"
    return selector


@pytest.mark.parametrize(
    ("text", "clause"),
    [
        ("app=web", Clause("app", Op.EQ, ("web",))),
        ("app==web", Clause("app", Op.EQ, ("web",))),
        ("app = web", Clause("app", Op.EQ, ("web",))),
        ("app!=web", Clause("app", Op.NE, ("web",))),
        ("app in (web)", Clause("app", Op.IN, ("web",))),
        ("app in (web, db,api)", Clause("app", Op.IN, ("web", "db", "api"))),
        ("app notin (web,db)", Clause("app", Op.NOTIN, ("web", "db"))),
        ("app", Clause("app", Op.EXISTS)),
        ("!app", Clause("app", Op.ABSENT)),
        ("! app", Clause("app", Op.ABSENT)),
        ("app=we*", Clause("app", Op.PREFIX, ("we",))),
        ("team=shop-*", Clause("team", Op.PREFIX, ("shop-",))),
        ('app=""', Clause("app", Op.EQ, ("",))),
        ('app in ("",web)', Clause("app", Op.IN, ("", "web"))),
        ("k8s.io/app-name=a_b.c/d@e:f+g", Clause("k8s.io/app-name", Op.EQ, ("a_b.c/d@e:f+g",))),
        ("version=1.10", Clause("version", Op.EQ, ("1.10",))),
        ("any=1", Clause("any", Op.EQ, ("1",))),
        ("any notin (x)", Clause("any", Op.NOTIN, ("x",))),
        ("in in (in)", Clause("in", Op.IN, ("in",))),
        ("domain=corp.example", Clause("domain", Op.EQ, ("corp.example",))),
    ],
)
def test_clauses(text: str, clause: Clause) -> None:
    assert parse(text) == Labels((clause,))
    assert parse(str(clause)) == Labels((clause,))


LABELS = {"app": "web", "env": "prod", "empty": ""}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("app=web", True),
        ("app=we", False),
        ("zone=a", False),
        ("app!=web", False),
        ("app!=db", True),
        ("zone!=a", True),
        ("app in (db,web)", True),
        ("app in (db)", False),
        ("zone in (a)", False),
        ("app notin (db)", True),
        ("app notin (web)", False),
        ("zone notin (a)", True),
        ("app", True),
        ("empty", True),
        ("zone", False),
        ("!zone", True),
        ("!app", False),
        ("app=w*", True),
        ("app=web*", True),
        ("app=webs*", False),
        ("zone=w*", False),
        ('empty=""', True),
        ('zone=""', False),
        ('zone!=""', True),
    ],
)
def test_what_a_clause_means(text: str, holds: bool) -> None:
    selector = parse(text)
    assert isinstance(selector, Labels)
    assert selector.clauses[0].holds(LABELS) == holds


@pytest.mark.parametrize(
    "text",
    [
        "any",
        "net:internet",
        "net:10.0.0.0/8",
        "net:fd00::/8",
        "net:::/0",
        "fqdn:a.example",
        "fqdn:*.a.example",
    ],
)
def test_single_selectors(text: str) -> None:
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    ("text", "column", "message", "hint"),
    [
        ("", 1, "expected a selector, found the end", "write labels"),
        ("=web", 1, "expected a selector, found '='", ""),
        ("app=", 5, "expected a value for label 'app', found the end", 'written ""'),
        ("app=,env=x", 5, "expected a value for label 'app'", ""),
        ("app= to", 6, "expected a value for label 'app', found 'to'", ""),
        ("app=web,", 9, "expected a further label clause", ""),
        ("app=web,,x", 9, "expected a further label clause", ""),
        ("app=web,any", 9, "expected a further label clause, found 'any'", ""),
        ("any,app=web", 4, "'any' stands alone", "cannot be combined"),
        ("net:x,app=web", 6, "'net:x' stands alone", ""),
        ("app=web,net:x", 9, "'net:x' is not valid", "net=x"),
        ("app=web,app=web", 9, "given twice", ""),
        ("app=web,app=db", 9, "can never hold together with 'app=web'", "app in (web,db)"),
        ("app in web", 8, "expected '(' after 'in'", ""),
        ("app in ()", 9, "expected a value", ""),
        ("app in (a", 10, "expected ',' or ')'", ""),
        ("app in (a b)", 11, "expected ',' or ')'", ""),
        ("app in (a,a)", 11, "given twice", ""),
        ("app in (a*)", 9, "value 'a*'", "only stand at the end"),
        ("app=*", 5, "asks for any value", "write just 'app'"),
        ("app!=a*", 6, "with = only", ""),
        ("app=a*b", 5, "value 'a*b'", "only stand at the end"),
        ("app=a-", 5, "value 'a-'", ""),
        ("app=" + "a" * 129, 5, "at most 128", ""),
        ("a" * 64 + "=b", 1, "at most 63", ""),
        ("-app=web", 1, "label key '-app'", ""),
        ("app>3", 4, "'>' cannot be used in a selector", "where source.app > "),
        ("!", 2, "expected a label key after '!'", ""),
        ("to", 1, "expected a selector, found 'to'", ""),
        ("ip:10.0.0.1", 1, "'ip:10.0.0.1'", "net:10.0.0.1/32"),
        ("ip:::1", 1, "'ip:::1'", "net:::1/128"),
        ("cidr:10.0.0.0/8", 1, "'cidr:", "did you mean 'net:10.0.0.0/8'?"),
        ("host:a.b", 1, "'host:a.b'", "did you mean 'fqdn:a.b'?"),
        ("app:web", 1, "'app:web'", "app=web"),
        ("net:", 1, "needs a name or a CIDR", "net:internet"),
        ("net:-x", 5, "'-x' is not a network name", ""),
        ("net:10.0.0.0", 5, "no prefix length", "10.0.0.0/32"),
        ("net:10.0.0.9/8", 5, "bits set", "10.0.0.0/8"),
        ("fqdn:", 6, "not a host name", ""),
        ("fqdn:a..b", 6, "not a host name", ""),
        ("fqdn:a.*.b", 6, "not a host name", "whole first part"),
        ("fqdn:*", 6, "not a host name", "whole first part"),
        ("fqdn:-a.b", 6, "not a host name", ""),
        ("fqdn:10.0.0.1", 6, "is an address", "e.g. fqdn"),
        (",".join(f"k{i}=v" for i in range(33)), 183, "more than 32 clauses", ""),
        (f"k in ({','.join(f'v{i}' for i in range(257))})", 1177, "more than 256 values", ""),
    ],
)
def test_refusals(text: str, column: int, message: str, hint: str) -> None:
    with pytest.raises(DocumentError) as caught:
        parse(text)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.where == f"s:1:{column}"


@pytest.mark.parametrize(
    ("selector", "name", "matches"),
    [
        (Fqdn("a.example"), "a.example", True),
        (Fqdn("a.example"), "b.a.example", False),
        (Fqdn("a.example", True), "b.a.example", True),
        (Fqdn("a.example", True), "c.b.a.example", True),
        (Fqdn("a.example", True), "a.example", False),
        (Fqdn("a.example", True), "xa.example", False),
    ],
)
def test_host_names(selector: Fqdn, name: str, matches: bool) -> None:
    assert selector.matches(frozenset({name, "other.test"})) == matches
    assert not selector.matches(frozenset())


def test_host_name_is_normalised() -> None:
    assert host_name("WWW.Example.COM.") == "www.example.com"
    with pytest.raises(ValueError, match="not a host name"):
        host_name("a" * 64 + ".b")
