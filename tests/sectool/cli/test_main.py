"""What a user meets: help, errors with the next step, exit codes; never a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sectool.cli import report
from sectool.cli.main import COMMANDS, main
from sectool.errors import DocumentError, SectoolError

from .conftest import Cli

GOOD = """\
kind: Policy
name: shop
owner: team-shop
rules:
  - allow app=web to call app=db on tcp/5432
---
kind: Test
name: works
allow: ["app=web -> app=db tcp/5432"]
deny: ["app=batch -> app=db tcp/5432"]
"""


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "shop.yaml"
    path.write_text(GOOD)
    return path


def test_help_lists_every_command_and_has_examples(cli: Cli) -> None:
    done = cli("--help")
    assert done.code == 0
    assert all(f"  {name} " in done.out for name in COMMANDS)
    assert "Examples:" in done.out


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"lab"}))
def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Example" in out
    assert f"sectool {name}" in out


def test_version(cli: Cli) -> None:
    assert cli("--version").out.startswith("sectool 0.")


def test_no_arguments_show_help_and_are_a_usage_error(cli: Cli) -> None:
    done = cli()
    assert (done.code, done.out) == (2, "")
    assert "Usage: sectool" in done.err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["flow"], "Did you mean 'flows'"),
        (["status", "--frob"], "No such option"),
        (["--color", "pink", "status"], "Invalid value"),
        (["policy", "rollback", "x"], "Invalid value"),
        (["policy", "test"], "Missing argument"),
        (["policy"], "Usage: sectool policy"),
        (["status", "-o", "xml"], "Invalid value"),
        (["run", "--label", "nolabel", "--", "true"], "is not a label"),
        (["run", "--label", "a=1", "--label", "a=2", "--", "true"], "given twice"),
        (["policy", "show", "--rev", "1", "--at", "1h"], "exclude each other"),
        (["policy", "show", "--at", "yesterdayish"], "is not a time"),
        (["ca", "init", "-d", "Not A Domain"], "trust domain"),
        (["host", "enroll", "--label", "x"], "is not a label"),
        (["host", "enroll", "--allow", "x"], "is not KEY=VALUE"),
        (["trust", "add", "other.example", "--bundle", "none.pem"], "cannot read"),
    ],
)
def test_usage_errors_exit_2_and_name_the_cause(cli: Cli, args: list[str], says: str) -> None:
    done = cli(*args)
    assert done.code == 2, done
    assert says in done.err
    assert done.out == ""


@pytest.mark.parametrize(
    "args", [["status"], ["policy", "show"], ["policy", "history"], ["policy", "list"], ["identity", "list"],
             ["workload", "list"], ["explain", "app=a -> app=b tcp/1"], ["run", "--", "true"], ["flows"],
             ["events"], ["query", "select 1"]],
)  # fmt: skip
def test_without_a_daemon_exit_3_and_the_next_step(cli: Cli, args: list[str]) -> None:
    done = cli(*args)
    assert done.code == 3, done
    assert done.err.startswith("error: ")
    assert "hint: " in done.err
    assert "sectool up" in done.err


def test_up_without_enrolment_says_what_to_do(cli: Cli) -> None:
    for args in (["up"], ["up", "--background"]):
        done = cli(*args)
        assert done.code == 2, done
        assert "no host CA here" in done.err
        assert "sectool host enroll" in done.err


@pytest.mark.parametrize(
    ("text", "where", "says"),
    [
        ("kind: Policy\nname: a\nowner: b\nrulez: []\n", ":4:1", "rulez"),
        ("kind: Policy\nname: a\nowner: b\nrules:\n  - allow app=web call app=db\n", ":5:19", "to"),
        ("kind: Policy\nname: a\nowner: b\nrules:\n  - allow app=we[b to call app=db\n", ":5:", ""),
        ("kind: Polizy\nname: a\n", ":1:7", "Polizy"),
        ("kind: Policy\nname: a\nowner: b\nmode: stag\nrules: [allow any to call any]\n", ":4:7", "stag"),
        ("a: [", ":2:1", "not readable as YAML"),
    ],
)
def test_a_bad_document_is_pointed_at(cli: Cli, tmp_path: Path, text: str, where: str, says: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    for args in (["test"], ["apply"], ["explain", "app=a -> app=b tcp/1", "--file"]):
        done = cli("policy", *args, "bad.yaml")
        assert done.code == 2, done
        assert f"bad.yaml{where}" in done.err
        assert says in done.err


def test_a_missing_file_is_named(cli: Cli) -> None:
    done = cli("policy", "test", "none.yaml")
    assert done.code == 2
    assert "none.yaml" in done.err


@pytest.mark.kernel
def test_wrong_permission_is_named(cli: Cli, policy: Path, tmp_path: Path) -> None:
    policy.chmod(0o000)
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, "-c",
         "import sys; from sectool.cli.main import main; sys.exit(main())", "policy", "test", str(policy)],
        capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 2, done
    assert "ermission" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.kernel
@pytest.mark.parametrize("args", [["up"], ["down"], ["run", "--", "true"]])
def test_users_are_told_which_privilege_is_missing_and_what_works(args: list[str]) -> None:
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, "-m", "sectool", *args],
        capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 2, done
    assert "needs root" in done.stderr
    assert "sudo" in done.stderr
    assert "without root you can use" in done.stderr


def test_policy_test_passes_and_fails_by_exit_code(cli: Cli, policy: Path) -> None:
    done = cli("policy", "test", policy)
    assert (done.code, done.out) == (0, "")
    assert "2 passed, 0 failed" in done.err
    policy.write_text(GOOD.replace("app=batch -> app=db", "app=web -> app=db"))
    done = cli("policy", "test", policy)
    assert done.code == 1
    assert "FAIL" in done.out


def test_policy_test_as_data(cli: Cli, policy: Path) -> None:
    import json

    document = json.loads(cli("policy", "test", policy, "-o", "json").out)
    assert document["schema"] == "sectool.policy-test/1"
    assert [item["passed"] for item in document["items"]] == [True, True]


def test_explain_from_a_file(cli: Cli, policy: Path) -> None:
    import json

    done = cli("explain", "app=web -> app=db tcp/5432", "--file", policy)
    assert done.code == 0
    assert "ALLOWED" in done.out
    done = cli("policy", "explain", "app=x -> app=db tcp/5432", "--file", policy, "-o", "json")
    assert done.code == 1
    answer = json.loads(done.out)
    assert (answer["verdict"], answer["reason"]) == ("deny", "default_deny")
    assert answer["sentence"].startswith("allow app=x to call app=db")


def test_diff_of_files(cli: Cli, policy: Path, tmp_path: Path) -> None:
    (tmp_path / "new.yaml").write_text(GOOD.replace("5432", "5433"))
    same = cli("policy", "diff", policy, policy)
    assert (same.code, same.out) == (0, "")
    done = cli("policy", "diff", policy, "new.yaml")
    assert done.code == 1
    assert "+   allow app=web to call app=db on tcp/5433" in done.out


def test_quiet_leaves_errors_only(cli: Cli, policy: Path) -> None:
    assert cli("-q", "policy", "test", policy).err == ""
    assert "error:" in cli("-q", "status").err


def test_ca_and_enrolment(cli: Cli, tmp_path: Path) -> None:
    assert cli("ca", "init", "--trust-domain", "shop.example").code == 0
    assert (tmp_path / "state/ca/root.key").stat().st_mode & 0o777 == 0o600
    again = cli("ca", "init", "--trust-domain", "shop.example")
    assert again.code == 2
    assert "already" in again.err
    assert cli("host", "enroll", "--name", "web-1", "--label", "env=dev", "--network", "10.0.0.0/8").code == 0
    assert (tmp_path / "state/host/host.key").stat().st_mode & 0o777 == 0o600


def test_a_reader_that_goes_away_is_no_failure(cli: Cli) -> None:
    done = subprocess.run(
        f"{sys.executable} -m sectool --help | head -c 10; echo ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.endswith("0\n")
    assert done.stderr == ""


def test_a_defect_is_one_line_with_a_trace_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("SECTOOL_DEBUG", raising=False)
    assert report.defect(ValueError("odd\x1b[2J")) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: a defect in sectool: ValueError: odd\\x1b[2J\nhint: ")
    (trace,) = tmp_path.glob("sectool-trace-*")
    assert "ValueError" in trace.read_text()
    assert trace.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("SECTOOL_DEBUG", "1")
    report.defect(ValueError("odd"))
    assert "ValueError: odd" in capsys.readouterr().err
    assert len(list(tmp_path.glob("sectool-trace-*"))) == 1


def test_errors_show_place_excerpt_and_hint_safely(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.report(DocumentError("f.yaml:1:2", "no\x9b", "do this", "line\n  ^")) == 2
    assert capsys.readouterr().err == "error: f.yaml:1:2: no\\x9b\nline\n  ^\nhint: do this\n"
    assert report.report(SectoolError("two\nlines")) == 1
    assert capsys.readouterr().err == "error: two\n  lines\n"


@pytest.mark.parametrize(("number", "code"), [(13, 2), (28, 4), (5, 1)])
def test_system_errors_are_put_in_words(number: int, code: int) -> None:
    error = report.from_os(OSError(number, os.strerror(number), "/some/file"))
    assert "/some/file" in error.message
    assert error.exit_code == code


def test_ctrl_c_exits_130_without_words(tmp_path: Path) -> None:
    """A command that waits (here for an answer on its socket) is interrupted as from a terminal.

    Whoever started these tests in the background may have had SIGINT ignored: env puts it back.
    """
    import socket

    (tmp_path / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "run/control.sock"))
        silent.listen()
        process = subprocess.Popen(
            ["env", "--default-signal=INT", sys.executable, "-m", "sectool", "--run", str(tmp_path / "run"),
             "status"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        silent.settimeout(30)
        connection, _ = silent.accept()  # now it waits for the answer
        with connection:
            connection.recv(1)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "")


def test_help_is_quick(cli: Cli) -> None:
    """The bound is far above what it takes (about 0.09 s); it catches DuckDB, scapy or Textual creeping in."""
    started = time.monotonic()
    cli("--help")
    assert time.monotonic() - started < 2.0
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "sectool", "--help"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert not loaded & {
        "duckdb",
        "numpy",
        "pyarrow",
        "scapy",
        "textual",
        "cryptography",
        "rich",
        "yaml",
        "pyroute2",
    }
