"""alerts.yaml is read strictly: every mistake has its place, its word and a way out."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.alerts.rules import MEANS, QUIET, How, When, load_alerts, parse_alerts
from sectool.cli.main import main
from sectool.errors import DocumentError, SectoolError, UsageError

EXAMPLE = """\
alerts:
  - name: someone new at the database
    when: new-pair
    to: app=db,env in (prod,staging)
    learn: 7d
    send: [ops, log]
  - {name: hammering, when: denied-burst, count: 500, within: 1m, hold: 30m, send: [page]}
  - {name: night shift, when: policy-change, hours: "08:00-18:00", days: [Mon, Fri], zone: Europe/Berlin}
  - {name: gaps, when: losses}
send:
  ops: {webhook: "https://hooks.example.org/sectool?x=1"}
  log: {syslog: local}
  far: {syslog: "udp://[::1]:514"}
  page: {command: [/usr/local/bin/page, --urgent]}
"""


def test_the_example() -> None:
    found = parse_alerts(EXAMPLE)
    assert [rule.when for rule in found.rules] == [
        When.NEW_PAIR, When.DENIED_BURST, When.POLICY_CHANGE, When.LOSSES,
    ]  # fmt: skip
    first, burst, night, _ = found.rules
    assert (str(first.destination), first.learn_us, first.send) == (
        "app=db,env in (prod,staging)", 7 * 86_400_000_000, ("ops", "log"),
    )  # fmt: skip
    assert (burst.count, burst.within_us, burst.hold_us) == (500, 60_000_000, 1_800_000_000)
    assert str(night.hours) == "Mon,Fri 08:00-18:00 Europe/Berlin"
    assert {t.name: (t.how, t.to) for t in found.targets.values()}["page"] == (
        How.COMMAND, ("/usr/local/bin/page", "--urgent"),
    )  # fmt: skip


def test_no_file_is_quiet(tmp_path: Path) -> None:
    assert load_alerts(tmp_path / "alerts.yaml") is QUIET
    assert not QUIET.targets
    assert all(not rule.send for rule in QUIET.rules)
    assert parse_alerts("# nothing\n").rules == ()


def test_a_file_that_others_can_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "alerts.yaml"
    path.write_text(EXAMPLE)
    path.chmod(0o664)
    with pytest.raises(UsageError, match="others than root can write"):
        load_alerts(path)
    path.chmod(0o600)
    assert load_alerts(path).rules == parse_alerts(EXAMPLE).rules


def test_every_kind_is_explained() -> None:
    assert set(MEANS) == set(When)


@pytest.mark.parametrize(
    ("text", "where", "says"),
    [
        ("alert: []", "1:1", "no field 'alert'"),
        ("alerts: x", "1:9", "must be a list"),
        ("alerts: [{name: a}]", "1:10", "'when' is missing"),
        ("alerts: [{when: losses}]", "1:10", "'name' is missing"),
        ("alerts: [{name: a, when: lossses}]", "1:26", "there is no alert 'lossses'"),
        ("alerts: [{name: a, when: losses, count: 3}]", "1:34", "a losses alert has no 'count'"),
        ("alerts: [{name: a, when: losses}, {name: a, when: losses}]", "1:42", "exists already"),
        ("alerts: [{name: a, when: scan, count: 0}]", "1:39", "not a number"),
        ("alerts: [{name: a, when: scan, count: 1001}]", "1:39", "from 1 to 1000"),
        ("alerts: [{name: a, when: scan, within: 2d}]", "1:40", "not a time"),
        ("alerts: [{name: a, when: scan, within: soon}]", "1:40", "not a time"),
        ("alerts: [{name: a, when: scan, from: 'net:x'}]", "1:38", "takes labels"),
        ("alerts: [{name: a, when: scan, from: 'a=1 b'}]", "1:43", "expected the end"),
        ("alerts: [{name: a, when: scan, from: 'a=='}]", "1:42", "a value"),
        ("alerts: [{name: a, when: losses, send: [ops]}]", "1:41", "no such target"),
        ("alerts: [{name: a, when: policy-change}]", "1:10", "'hours' is missing"),
        ("alerts: [{name: a, when: policy-change, hours: 8-18}]", "1:48", "are not hours"),
        ("alerts: [{name: a, when: policy-change, hours: '18:00-08:00'}]", "1:48", "end before they begin"),
        ("alerts: [{name: a, when: policy-change, hours: '08:00-25:00'}]", "1:48", "are not hours"),
        (
            "alerts: [{name: a, when: policy-change, hours: '08:00-18:00', zone: Nowhere}]",
            "1:69",
            "not a time zone",
        ),
        ("alerts: [{name: a, when: policy-change, hours: '08:00-18:00', days: [Mo]}]", "1:70", "not a day"),
        ("send: {a: {webhook: 'ftp://x/'}}", "1:21", "not an address"),
        ("send: {a: {webhook: 'https://u:p@x/'}}", "1:21", "no user and password"),
        ("send: {a: {syslog: 'udp://x'}}", "1:20", "not an address"),
        ("send: {a: {syslog: 'udp://x:99999'}}", "1:20", "not an address"),
        ("send: {a: {command: [page]}}", "1:22", "does not start with /"),
        ("send: {a: {command: /bin/page}}", "1:21", "a command is a list"),
        ("send: {a: {command: [/bin/x], syslog: local}}", "1:11", "one way to send"),
        ("send: {a: {mail: x}}", "1:12", "no field 'mail'"),
        ("send: []", "1:7", "must be a mapping"),
        ("alerts: []\n---\nalerts: []", "3:1", "second document"),
        ("alerts: [&a {name: x}]", "1:10", "anchor"),
    ],
)
def test_mistakes(text: str, where: str, says: str) -> None:
    with pytest.raises(DocumentError) as caught:
        parse_alerts(text)
    assert caught.value.where == f"alerts.yaml:{where}"
    assert says in caught.value.message
    assert caught.value.hint


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_file_is_refused_or_read_and_nothing_else(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(EXAMPLE) - 1))
    new = data.draw(st.text(max_size=3))
    text = EXAMPLE[:at] + new + EXAMPLE[at + data.draw(st.integers(0, 5)) :]
    try:
        parse_alerts(text)
    except SectoolError as error:
        assert error.message


def test_the_documentation_is_true() -> None:
    docs = Path(__file__).parents[3] / "docs"
    text = (docs / "alerts.md").read_text(encoding="utf-8")
    example = text.split("```yaml\n")[1].split("```")[0]
    assert {rule.when for rule in parse_alerts(example).rules} == set(When)
    for when, meaning in MEANS.items():
        assert f"| `{when}` | {meaning} |" in text
    defaults = parse_alerts("alerts: [{name: a, when: denied-burst}, {name: b, when: scan}]").rules
    assert f"`count` ({defaults[0].count}), `within` (1m)" in text
    assert f"`count` ({defaults[1].count}), `within` (1m)" in text


@pytest.mark.parametrize("number", [0, 1])
def test_pipeline_examples_call_commands_that_exist(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    import shlex

    import yaml

    text = (Path(__file__).parents[3] / "docs" / "ci.md").read_text(encoding="utf-8")
    block = text.split("```yaml\n")[1 + number].split("```")[0]
    assert yaml.safe_load(block)
    (line,) = [line for line in block.splitlines() if "sectool policy" in line]
    words = shlex.split(line.partition("sectool ")[2])
    assert words[:2] == ["policy", "check"]
    assert main(["policy", "check", "--help"]) == 0
    described = capsys.readouterr().out
    assert all(word in described for word in words if word.startswith("--"))
