"""Documents: what is taken, every refusal with its exact place, files, and no crash on mutated input."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.errors import DocumentError, Exit, UsageError
from sectool.labels import LabelSet
from sectool.policy import DocumentSet, Mode, load, parse
from sectool.policy.documents import join
from sectool.policy.yamlpos import MAX_TEXT

FULL = """\
kind: Policy                 # a developer's intent
name: shop
owner: team-shop
mode: enforce
description: |
  What the shop
  needs.
rules:
  - allow app=web to call app=db on tcp/5432 encrypted
  - allow net:internet to call app=web on tcp/443
  - 'audit app=batch to call app=db on tcp/5432 until 2026-12-31 because "migration: OPS-812 #3"'
---
kind: Guardrail
name: baseline
owner: security
mode: stage
rules:
  - deny env=dev to call env=prod because "PCI 1.2.1"
  - require encryption for any to call any where source.zone != destination.zone
---
kind: Network
name: internet
cidrs: [0.0.0.0/0, "::/0"]
except: [10.0.0.0/8, "fc00::/7"]
---
kind: Workload
name: web
match: {systemd.unit: nginx.service, executable: /usr/sbin/nginx*}
labels: {app: web, version: 1.10, on: no}
---
kind: Test
name: shop works
mode: off
allow: ["app=web,env=prod -> app=db,env=prod tcp/5432 encrypted"]
deny:
  - app=web,env=dev -> app=db,env=prod tcp/5432
"""


def test_all_kinds() -> None:
    documents = parse(FULL, "full.yaml")
    assert len(documents) == 5
    (shop,) = documents.policies
    assert (shop.name, shop.owner, shop.mode, shop.where) == (
        "shop",
        "team-shop",
        Mode.ENFORCE,
        "full.yaml:2:7",
    )
    assert shop.description == "What the shop\nneeds."
    assert [rule.where for rule in shop.rules] == ["full.yaml:9:5", "full.yaml:10:5", "full.yaml:11:5"]
    assert shop.rules[2].sentence.because == "migration: OPS-812 #3"
    (baseline,) = documents.guardrails
    assert baseline.mode is Mode.STAGE
    (internet,) = documents.networks
    assert list(map(str, internet.spec.excepts)) == ["10.0.0.0/8", "fc00::/7"]
    (web,) = documents.workloads
    assert web.labels == LabelSet({"app": "web", "version": "1.10", "on": "no"})  # words stay words
    (test,) = documents.tests
    assert [(e.allow, e.where) for e in test.expectations] == [
        (True, "full.yaml:34:9"),
        (False, "full.yaml:36:5"),
    ]
    assert test.mode is Mode.OFF


P = "kind: Policy\nname: p\nowner: o\n"
R = P + "rules:\n"
G = "kind: Guardrail\nname: g\nowner: o\nrules:\n"
N = "kind: Network\nname: n\n"
W = "kind: Workload\nname: w\n"
T = "kind: Test\nname: t\n"
OK = "- allow a to call b\n"


@pytest.mark.parametrize(
    ("text", "place", "message", "hint"),
    [
        # YAML
        ("kind: [", "2:1", "not readable as YAML", ""),
        ("a: b: c", "1:5", "mapping values", "quoted as a whole"),
        ("\tkind: x", "1:1", "not readable as YAML", ""),
        ("kind: Policy\nname: a\nname: b", "3:1", "'name' is given twice", "line 2"),
        ("a: &x 1", "1:4", "anchor &x", "write the value out"),
        ("a: *x", "1:4", "alias *x", "write the value out"),
        ("kind: !!str Policy", "1:7", "tag tag:yaml.org,2002:str", "remove the tag"),
        ("kind: !x Policy", "1:7", "tag !x", ""),
        ("%YAML 1.1\n---\nkind: x", "1:1", "directives", ""),
        ("? [a]\n: b", "1:3", "cannot be a key", ""),
        ("a: {b: {c: {d: {e: {f: {g: {h: {i: {j: {k: {l: {}}}}}}}}}}}}", "1:48", "more than 12 levels", ""),
        ("[" * 5000, "1:13", "more than 12 levels", ""),
        ("kind: Policy\nname: x\x1b[2J", "2:8", "U+001B", "remove it"),
        ("kind: Policy\rname: x", "1:13", "U+000D", ""),
        ("kind: \u2028", "1:7", "U+2028", ""),
        ("kind: \ud800", "1:7", "U+D800", ""),
        ("x" * (MAX_TEXT + 1), "1:1", "at most", "split"),
        # document frame
        ("- a", "1:1", "must be a mapping", ""),
        ("word", "1:1", "must be a mapping", ""),
        ("name: x", "1:1", "no 'kind'", "Policy, Guardrail"),
        ("kind: Polcy", "1:7", "no kind 'Polcy'", "did you mean 'Policy'?"),
        ("kind: policy", "1:7", "no kind 'policy'", "did you mean 'Policy'?"),
        ("kind: Frob", "1:7", "no kind 'Frob'", "the kinds are"),
        ("kind: [Policy]", "1:7", "must be a text, not a list", ""),
        ("kind:", "1:6", "a kind is empty", ""),
        (P + "mod: stage\nrules: []", "4:1", "a Policy has no field 'mod'", "did you mean 'mode'?"),
        (P + "zzz: 1", "4:1", "no field 'zzz'", "its fields are"),
        ("kind: Policy\nowner: o\nrules: []", "1:1", "no 'name'", "name: "),
        ("kind: Policy\nname:\nowner: o", "2:6", "'name' is empty", ""),
        ("kind: Policy\nname: {a: b}\nowner: o", "2:7", "not a mapping", ""),
        ("kind: Policy\nname: p!\nowner: o\nrules: [a]", "2:7", "'p!' is not a name", "at most 63"),
        (f"kind: Policy\nname: {'p' * 64}\nowner: o\nrules: [a]", "2:7", "is not a name", ""),
        ("kind: Policy\nname: p\nrules:\n" + OK, "1:1", "no 'owner'", "owner: "),
        ("kind: Policy\nname: p\nowner: ~\nrules:\n" + OK, "3:8", "'owner' is empty", ""),
        ("kind: Policy\nname: p\nowner: ''\nrules:\n" + OK, "3:8", "'owner' is empty", ""),
        (
            'kind: Policy\nname: p\nowner: "o\\e[31m"\nrules:\n' + OK,
            "3:10",
            "U+001B may not stand in 'owner'",
            "",
        ),
        ('kind: Policy\nname: p\nowner: "\\u0078\\u202e"\nrules:\n' + OK, "3:15", "U+202E", ""),
        (f"kind: Policy\nname: p\nowner: {'o' * 121}\nrules:\n" + OK, "3:8", "at most 120", ""),
        (P + f"description: {'d' * 2001}\nrules:\n" + OK, "4:14", "at most 2000", ""),
        (P + 'description: "a\\tb"\nrules:\n' + OK, "4:16", "U+0009", ""),
        (P + "mode: staged\nrules:\n" + OK, "4:7", "no mode 'staged'", "did you mean 'stage'?"),
        (P + "mode: yes\nrules:\n" + OK, "4:7", "no mode 'yes'", ""),
        # rules
        (P, "1:1", "no 'rules'", "at least one"),
        (P + "rules:", "4:1", "'rules' is empty", ""),
        (P + "rules: []", "4:8", "'rules' is empty", ""),
        (P + "rules: allow a to call b", "4:8", "must be a list", "- "),
        (P + "rules: {a: b}", "4:8", "must be a list", ""),
        (R + "- [a]", "5:3", "a rule must be a text, not a list", ""),
        (R + "-", "5:2", "a rule is empty", ""),
        (R + '- allow a to call b because "x: y"', "5:3", "not a mapping", "single quotes"),
        (R + '- allow a to call b because "x #y"', "5:29", "never closed", " #"),
        (R + OK + "- allow a to cal b", "6:14", "expected 'call'", "did you mean 'call'?"),
        (R + "- allow app = web to call b on http/1", "5:32", "'http' is not a protocol", ""),
        (R + OK + "- allow  a to call b", "6:3", "given twice", "<text>:5:3"),
        (R + "- require encryption for a to call b", "5:3", "a Policy cannot require", "Guardrail"),
        (G + "- allow a to call b", "5:3", "a Guardrail cannot allow", "Policy"),
        (G + "- audit a to call b", "5:3", "a Guardrail cannot audit", ""),
        # places inside quoted and folded texts
        (R + "- 'allow a to call b because \"it''s\" frob'", "5:38", "found 'frob'", ""),
        (R + '- "allow a to call b because \\"\\u00e9\\" frob"', "5:41", "found 'frob'", ""),
        (R + '- "allow a to call b \\\n   frob"', "6:4", "found 'frob'", ""),
        (R + "- >-\n  allow a\n  to call b\n  frob", "8:3", "found 'frob'", ""),
        (R + "- |\n  allow a\n   to cal b", "7:7", "found 'cal'", ""),
        (R + "- allow a\n  to call\n    b:c on tcp/1", "7:5", "'b:c' is not valid", "b=c"),
        ("# é𝄞\n" + R + "- allow é𝄞 to call b", "6:9", "'é' cannot stand here", ""),
        (R + "- allow a to call", "5:18", "found the end", ""),
        (R + "- 'allow a to call'", "5:19", "found the end", ""),
        # references
        (R + "- allow net:nt to call net:nt2", "5:13", "no Network named 'nt'", "define it"),
        (
            R + "- allow a to call net:ofice\n---\n" + N.replace("n\n", "office\n") + "cidrs: [10.0.0.0/8]",
            "5:23",
            "no Network named 'ofice'",
            "did you mean 'office'?",
        ),
        (T + "allow: ['app=a -> net:x tcp/1']", "3:23", "no Network named 'x'", ""),
        (R + OK + "---\n" + R + OK, "8:7", "a Policy named 'p' exists already", "<text>:2:7"),
        # networks
        (N, "1:1", "no 'cidrs'", ""),
        (N + "cidrs: []", "3:8", "'cidrs' is empty", ""),
        (N + "cidrs: [10.0.0.1/8]", "3:9", "bits set beyond", "10.0.0.0/8"),
        (N + "cidrs: [10.0.0.1]", "3:9", "no prefix length", "10.0.0.1/32"),
        (N + "cidrs: [10.0.0.0/33]", "3:9", "prefix length '33'", "0 to 32"),
        (N + "cidrs: [10.0.0.0/255.0.0.0]", "3:9", "prefix length '255.0.0.0'", ""),
        (N + "cidrs: [office]", "3:9", "not an IP network", ""),
        (N + "cidrs: ['::1']", "3:9", "no prefix length", "::1/128"),
        (N + "cidrs: ['fe80::1%eth0/128']", "3:9", "zone", ""),
        (N + "cidrs: ['::ffff:10.0.0.0/104']", "3:9", "IPv4 addresses in IPv6 clothes", "10.0.0.0/8"),
        (N + "cidrs: [10.0.0.0/8, 10.0.0.0/8]", "3:21", "given twice", ""),
        (N + "cidrs: [10.0.0.0/8]\nexcept: [11.0.0.0/8]", "4:10", "not inside any of cidrs", ""),
        (N + "cidrs: [10.0.0.0/8]\nexcept: ['::/0']", "4:10", "not inside any of cidrs", ""),
        (N + "cidrs: [10.0.0.0/8]\nexcept: [10.0.0.0/9, 10.128.0.0/9]", "2:7", "holds no address", ""),
        ("kind: Network\nname: 1n\ncidrs: [10.0.0.0/8]", "2:7", "not a network name", "net:"),
        ("kind: Network\nname: a b\ncidrs: [10.0.0.0/8]", "2:7", "not a network name", ""),
        (N + "mode: off\ncidrs: [10.0.0.0/8]", "3:1", "no field 'mode'", ""),
        # workloads
        (W + "labels: {a: b}", "1:1", "no 'match'", ""),
        (W + "match: {}\nlabels: {a: b}", "3:8", "at least one entry", ""),
        (W + "match:\nlabels: {a: b}", "3:1", "at least one entry", ""),
        (W + "match: [a]\nlabels: {a: b}", "3:8", "at least one entry", ""),
        (
            W + "match: {systemd.unti: a.service}\nlabels: {a: b}",
            "3:9",
            "'systemd.unti'",
            "did you mean 'systemd.unit'?",
        ),
        (W + "match: {pid: 1}\nlabels: {a: b}", "3:9", "cannot be matched by 'pid'", "it can by"),
        (W + "match: {user: }\nlabels: {a: b}", "3:15", "'user' is empty", ""),
        (W + "match: {user: a*}\nlabels: {a: b}", "3:16", "'*' cannot stand here", "executable, cgroup"),
        (W + "match: {executable: /a*b}\nlabels: {a: b}", "3:23", "'*' cannot stand here", ""),
        (W + "match: {executable: nginx}\nlabels: {a: b}", "3:21", "does not start with /", "full path"),
        (W + "match: {cgroup: system.slice}\nlabels: {a: b}", "3:17", "does not start with /", ""),
        (W + "match: {sha256: abc}\nlabels: {a: b}", "3:17", "not a SHA-256", "64 hex"),
        (W + "match: {systemd.unit: nginx}\nlabels: {a: b}", "3:23", "not a systemd unit", "nginx.service"),
        (W + "match: {user: 'a b'}\nlabels: {a: b}", "3:15", "not a user name", ""),
        (W + 'match: {executable: "/a\\x1b"}\nlabels: {a: b}', "3:24", "U+001B", ""),
        (W + "match: {user: a}", "1:1", "no 'labels'", ""),
        (W + "match: {user: a}\nlabels: {a b: c}", "4:10", "label key 'a b'", ""),
        (W + "match: {user: a}\nlabels: {a: b c}", "4:13", "value 'b c'", ""),
        (W + "match: {user: a}\nlabels: {a: b, a: c}", "4:16", "given twice", ""),
        (
            W + "match: {user: a}\nlabels: {" + ",".join(f"k{i}: v" for i in range(65)) + "}",
            "4:448",
            "more than 64",
            "",
        ),
        # tests
        (T, "1:1", "tests nothing", "at least one flow"),
        (T + "allow: []", "3:8", "'allow' is empty", ""),
        (T + "allow: [a=b tcp/1]", "3:18", "needs '->'", ""),
        (T + "deny: ['a=b -> c=d tcp/1 encrypted']", "3:26", "cannot be encrypted", ""),
        (T + "allow: ['a=b -> c=d']", "3:20", "expected a service", ""),
    ],
)
def test_refusals(text: str, place: str, message: str, hint: str) -> None:
    with pytest.raises(DocumentError) as caught:
        parse(text)
    error = caught.value
    assert message in error.message
    assert hint in error.hint
    assert error.where == f"<text>:{place}"
    assert error.exit_code is Exit.USAGE


def test_an_excerpt_points_at_the_word_and_is_safe_to_print() -> None:
    with pytest.raises(DocumentError) as caught:
        parse(R + "- allow a\tto cal b")
    assert caught.value.excerpt == "- allow a to cal b\n             ^"
    with pytest.raises(DocumentError) as caught:
        parse("kind: Policy\nname: x\x1b[2J")
    assert caught.value.excerpt == "name: x\ufffd[2J\n       ^"
    with pytest.raises(DocumentError) as caught:
        parse(R + "- allow " + "a," * 30 + "b to cal " + "c" * 200)
    shown, caret = caught.value.excerpt.split("\n")
    assert len(shown) == 100
    assert shown[len(caret) - 1 :].startswith("a,")


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "---\n---\n", "---\n~\n"])
def test_nothing_is_an_empty_set(text: str) -> None:
    documents = parse(text)
    assert len(documents) == 0
    assert documents.text == text


def test_crlf_and_names_shared_between_kinds() -> None:
    text = (R + OK + "---\n" + G + "- deny a to call b\n").replace("name: g", "name: p")
    assert len(parse(text)) == 2
    crlf = parse(text.replace("\n", "\r\n"))
    assert crlf.hash == parse(text).hash
    with pytest.raises(DocumentError) as caught:
        parse((R + "- allow a to cal b").replace("\n", "\r\n"))
    assert caught.value.where == "<text>:5:14"
    assert "\r" not in caught.value.excerpt


def test_the_text_of_a_set_parses_to_the_same_set_with_the_same_places(tmp_path: Path) -> None:
    first, second = FULL.split("---\n", 1)
    (tmp_path / "b.yaml").write_text(first.rstrip("\n"))
    (tmp_path / "a.yml").write_text("---\n" + second)
    (tmp_path / "ignored.txt").write_text("::")
    documents = load([tmp_path])
    again = parse(documents.text, "revision 3")
    assert again == documents
    assert (again.hash, again.text) == (documents.hash, documents.text)
    assert again.policies[0].where == f"{tmp_path}/b.yaml:2:7"
    assert documents.hash == parse(FULL).hash
    # the whole is one YAML stream too, whatever reads it
    assert parse("# edited by hand\n" + documents.text).hash == documents.hash


def test_a_file_line_inside_a_file_changes_no_meaning(tmp_path: Path) -> None:
    stored = load([_file(tmp_path, "a.yaml", FULL)]).text
    documents = load([_file(tmp_path, "b.yaml", stored)])
    assert documents.policies[0].where.startswith(f"{tmp_path}/b.yaml:3")
    assert parse(documents.text).hash == documents.hash
    assert parse(f"--- # file: no quotes\n{FULL}").hash == documents.hash


def _file(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_load_takes_each_file_once_and_strips_a_byte_order_mark(tmp_path: Path) -> None:
    path = _file(tmp_path, "a.yaml", b"\xef\xbb\xbf" + FULL.encode())
    assert len(load([path, tmp_path, path])) == 5


def test_duplicates_and_references_across_files(tmp_path: Path) -> None:
    one = _file(tmp_path, "1.yaml", R + "- allow a to call net:n\n")
    two = _file(tmp_path, "2.yaml", N + "cidrs: [10.0.0.0/8]\n")
    assert len(load([one, two])) == 2
    with pytest.raises(DocumentError, match="no Network named 'n'"):
        load([one])
    three = _file(tmp_path, "3.yaml", R + OK)
    with pytest.raises(DocumentError) as caught:
        load([three, one, two])
    assert caught.value.where == f"{one}:2:7"
    assert f"{three}:2:7" in caught.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"kind: Policy\nname: \xff", ":2: byte 0xff is not UTF-8")],
)
def test_unreadable_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load([path])
    assert message in caught.value.message
    assert caught.value.hint


def test_unreadable_places(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no policy file in folder"):
        load([tmp_path])
    with pytest.raises(UsageError, match="no such file: a\ufffdb"):
        load([Path("a\0b")])
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    with pytest.raises(UsageError):
        load([loop])


def test_merge() -> None:
    one, two = parse(R + OK, "1.yaml"), parse(N + "cidrs: [10.0.0.0/8]", "2.yaml")
    both = one.merge(two)
    assert len(both) == 2
    assert both == join([one, two])
    assert parse(both.text) == both
    with pytest.raises(DocumentError) as caught:
        both.merge(one)
    assert "exists already" in caught.value.message


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        (R + OK, R + "- 'allow  a to call b'", True),
        (R + OK, "# hi\n" + R + OK, True),
        (R + OK, R.replace("name: p", "name: q") + OK, False),
        (R + OK, R.replace("owner: o", "owner: p") + OK, False),
        (R + OK, P + "mode: stage\nrules:\n" + OK, False),
        (R + OK, P + "mode: enforce\nrules:\n" + OK, True),
        (R + OK, R + OK + "- allow a to call c", False),
        (R + OK + "- allow a to call c", R + "- allow a to call c\n" + OK, False),
        (N + "cidrs: [10.0.0.0/8, 11.0.0.0/8]", N + "cidrs: [11.0.0.0/8, 10.0.0.0/8]", True),
    ],
)
def test_the_hash_is_of_the_meaning(old: str, new: str, same: bool) -> None:
    assert (parse(old).hash == parse(new).hash) == same
    assert len(parse(old).hash) == 64


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_mutated_documents_parse_or_raise_a_document_error(data: st.DataObject) -> None:
    """Invariant: any text gives a set whose text parses to an equal set, or DocumentError; nothing else."""
    text = FULL
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        length = data.draw(st.sampled_from([0, 0, 1, 2, 10]))
        extra = data.draw(
            st.text(max_size=3)
            | st.sampled_from(
                ["\n", "\n---\n", "&a ", "*a", "!!x ", "\\", '"', "'", "- ", ": ", " #", "{", "]", "\t"]
            )
            | st.sampled_from(
                ["net:", "\r\n", "\u2028", "\ufeff", "%TAG ! x", "? ", "| ", "<<: ", "\x00", "-> "]
            )
        )
        text = text[:at] + extra + text[at + length :]
    try:
        documents = parse(text)
    except DocumentError as error:
        _, line, column = error.where.rsplit(":", 2)
        assert 1 <= int(line) <= text.count("\n") + 2
        assert int(column) >= 1
        return
    assert isinstance(documents, DocumentSet)
    assert parse(documents.text) == documents
