"""The whole daemon on a real kernel, in a namespace of its own: up, policy, run, crashes, down."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

from .conftest import POLICY, Host, alive, until

pytestmark = pytest.mark.kernel

SERVER = (
    "import socket\n"
    "s = socket.create_server(('127.0.0.1', 5432))\n"
    "print('listening', flush=True)\n"
    "while True:\n"
    "    c, _ = s.accept()\n"
    "    c.sendall(b'hello')\n"
    "    c.close()\n"
)
CLIENT = (
    "import socket, sys\n"
    "try:\n"
    "    s = socket.create_connection(('127.0.0.1', 5432), timeout=float(sys.argv[1]))\n"
    "    sys.exit(0 if s.recv(5) == b'hello' else 5)\n"
    "except TimeoutError:\n"
    "    sys.exit(7)\n"
    "except ConnectionRefusedError:\n"
    "    sys.exit(6)\n"
)


def client(host: Host, label: str, timeout: float = 5.0) -> int:
    """Exit code of a client with this label: 0 served, 7 timed out."""
    return host.sectool("run", "--label", label, "--", sys.executable, "-c", CLIENT, timeout).code


@pytest.fixture
def server(shared: Host) -> object:
    process = shared.popen(
        sys.executable, "-m", "sectool", "run", "--label", "app=db", "--", sys.executable, "-c", SERVER,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    yield process
    process.kill()
    process.wait()


def test_policy_decides_by_identity_and_flows_tell_why(shared: Host, server: object) -> None:
    done = shared.apply(POLICY, "--reason", "first")
    assert done.code == 0, done
    assert client(shared, "app=web") == 0
    assert client(shared, "app=other", 0.5) == 7
    rows = until(
        lambda: [r for r in shared.json("flows")["items"] if r["drop_reason"] == "default_deny"
                 and "app=other" in ",".join(f"{k}={v}" for k, v in (r["source.labels"] or {}).items())],
        "the denied flow is on record",
    )  # fmt: skip
    assert rows[0]["event.action"] == "deny"
    assert rows[0]["destination.port"] == 5432
    allowed = shared.json("flows", "--verdict", "allow", "--from-label", "app=web")["items"]
    assert allowed[-1]["rule.text"] == "allow app=web to call app=db on tcp/5432"
    assert allowed[-1]["rule.owner"] == "team-shop"
    assert shared.json("flows", "--verdict", "allow", "--not", "--from-label", "app=web")["items"] == []


def test_metrics_say_what_status_says(shared: Host, server: object) -> None:
    """Printed, and scraped by a workload that policy lets connect."""
    scraped = POLICY + "  - allow app=prometheus to call app=metrics on tcp/9464\n"
    assert shared.apply(scraped).code == 0
    assert client(shared, "app=web") == 0
    allowed = (("verdict", "allow"), ("worker", "0"))
    until(
        lambda: samples(shared.ok("metrics").out).get(("sectool_flows_total", *allowed)),
        "the connection is counted",
    )
    sectool = (sys.executable, "-m", "sectool")
    exporter = shared.popen(
        *sectool, "run", "--label", "app=metrics", "--", *sectool, "metrics", "--listen", "127.0.0.1:9464",
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert exporter.stderr is not None
        url = exporter.stderr.readline().split()[-1]
        scrape = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=20).read().decode())"
        done = shared.sectool("run", "--label", "app=prometheus", "--", sys.executable, "-c", scrape, url)
        assert done.code == 0, done
        found = samples(done.out)
    finally:
        exporter.kill()
        exporter.wait()
    status = shared.status()
    assert found["sectool_up",] == found["sectool_enforcing",] == found["sectool_store_up",] == 1
    assert found["sectool_policy_revision",] == status["policy"]["revision"]
    assert found["sectool_workloads",] >= 2
    expiry = "sectool_certificate_expiry_time_seconds"
    assert found[expiry, ("certificate", "host_ca")] == status["host_ca_expires"] / 1e6
    assert found[expiry, ("certificate", "first_identity")] > 0
    assert found["sectool_store_bytes",] > 0
    assert found["sectool_ring_capacity", ("ring", "worker-0")] > 0


def samples(text: str) -> dict[tuple[object, ...], float]:
    """Samples by name and labels."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_same_policy_again_is_no_new_revision(shared: Host) -> None:
    first = shared.apply(POLICY, "-o", "json")
    again = shared.apply("# a comment changes nothing\n" + POLICY, "-o", "json")
    assert again.code == 0
    answer = json.loads(again.out)
    assert answer["schema"] == "sectool.policy-change/1"
    assert answer["unchanged"] is True
    assert answer["revision"] == json.loads(first.out)["revision"]


def test_a_dry_run_says_what_would_change_and_changes_nothing(shared: Host) -> None:
    shared.apply(POLICY)
    before = shared.json("policy", "history")["items"]
    done = shared.apply(POLICY.replace("5432", "5433"), "--dry-run")
    assert done.code == 0
    assert "tcp/5433" in done.out
    assert shared.json("policy", "history")["items"] == before


def test_history_grows_and_rollback_makes_a_new_revision(shared: Host) -> None:
    shared.apply(POLICY, "-r", "good")
    good = shared.status()["policy"]["revision"]
    shared.apply(POLICY.replace("5432", "1"), "-r", "mistake")
    assert shared.sectool("explain", "app=web -> app=db tcp/5432").code == 1
    diff = shared.sectool("policy", "diff", good)
    assert diff.code == 1
    assert "tcp/1" in diff.out
    done = shared.ok("policy", "rollback", good, "--reason", "that was wrong")
    assert f"revision {good + 2} is in force" in done.err
    assert shared.sectool("explain", "app=web -> app=db tcp/5432").code == 0
    items = shared.json("policy", "history")["items"]
    assert [i["reason"] for i in items[:2]] == ["that was wrong", "mistake"]
    assert items[0]["hash"] == shared.json("policy", "show", "--rev", good)["hash"]
    assert items[0]["author"] == "root"
    assert [i["active"] for i in items].count(True) == 1
    assert shared.sectool("policy", "rollback", 999).code == 1


def test_policy_events_are_on_record(shared: Host) -> None:
    shared.apply(POLICY.replace("shop", "shop2"), "-r", "renamed")
    revision = shared.status()["policy"]["revision"]
    events = until(
        lambda: [
            e
            for e in shared.json("events", "--type", "policy.*")["items"]
            if e["data"]["revision"] == revision
        ],
        "both events of the change",
    )
    until(
        lambda: len(shared.json("events", "--type", "policy.*", "--last", 2)["items"]) == 2,
        "applied and activated",
    )
    assert events[0]["type"] == "policy.applied"
    assert events[0]["data"]["author"] == "root"


def test_a_program_keeps_its_exit_code_and_signals(shared: Host) -> None:
    assert shared.sectool("run", "--", "sh", "-c", "exit 42").code == 42
    process = shared.popen(
        sys.executable, "-m", "sectool", "run", "-l", "app=x", "--", "sh", "-c", "echo ready; exec sleep 60",
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    names = [w["name"] for w in shared.json("workload", "list")["items"]]
    assert any(name.startswith("x") for name in names)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    until(
        lambda: all(not w["name"].startswith("x") for w in shared.json("workload", "list")["items"]),
        "x is gone",
    )


def test_a_program_can_run_as_another_user(shared: Host) -> None:
    done = shared.sectool("run", "--user", "nobody", "--", "sh", "-c", "id -un; id -G; echo $HOME")
    assert done.code == 0, done
    assert done.out.splitlines()[0] == "nobody"
    assert "0" not in done.out.splitlines()[1].split()
    assert shared.sectool("run", "--user", "st-nobody-there", "--", "true").code == 2
    missing = shared.sectool("run", "--", "st-no-such-program")
    assert missing.code == 2
    assert "no program 'st-no-such-program'" in missing.err


def test_labels_the_host_may_not_vouch_for_are_refused_at_once(shared: Host) -> None:
    done = shared.sectool("run", "--label", "env=prod", "--", "true")
    assert done.code == 2
    assert "may not vouch for env=prod" in done.err


def test_sql(shared: Host) -> None:
    assert shared.json("query", "SELECT 41 + 1 AS answer")["items"] == [{"answer": 42}]
    assert shared.sectool("query", "DELETE FROM flows").code == 2
    assert shared.sectool("query", "SELECT * FROM range(20000)").code == 4  # rows were left out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["flows", "--from-lable", "app=web"], "did you mean --from-label"),
        (["flows", "--port", "http"], "does not fit port"),
        (["flows", "--not"], "negates nothing"),
        (["flows", "--reason", "defaultdeny"], "did you mean"),
        (["flows", "--since", "soon"], "is not a time"),
        (["flows", "--first", "1", "--last", "1"], "exclude each other"),
        (["flows", "-f", "--until", "1m"], "goes on into the future"),
        (["flows", "stray"], "no filter 'stray'"),
        (["query", "SELEC 1"], "fails"),
        (["explain", "app=web => app=db"], "'->'"),
    ],
)
def test_mistakes_are_named(shared: Host, args: list[str], says: str) -> None:
    done = shared.sectool(*args)
    assert done.code == 2, done
    assert says in done.err + done.out


@pytest.mark.parametrize("output", ["table", "wide", "json", "jsonl", "csv", "yaml"])
def test_every_listing_in_every_format(shared: Host, output: str) -> None:
    for args in (["flows"], ["events"], ["identity", "list"], ["workload", "list"], ["policy", "history"]):
        done = shared.ok(*args, "-o", output)
        assert "\x1b" not in done.out  # not a terminal: plain
    assert "\x1b[" in shared.ok("--color", "always", "flows").out


def test_a_second_daemon_in_the_same_namespace_is_refused(shared: Host) -> None:
    done = shared.sectool("up", "--background")
    assert done.code == 1
    assert "is the sectool daemon of this network namespace already" in done.err
    assert "sectool down" in done.err
    assert shared.status()["state"] == "enforcing"
    elsewhere = shared.shell(
        sys.executable, "-m", "sectool", "--run", shared.folder / "other", "down"
    )  # another run folder's `down` leaves a living daemon alone
    assert elsewhere.code == 1
    assert shared.status()["rules_installed"]
    assert "SECTOOL" in shared.rules()


def test_a_killed_worker_comes_back_with_the_policy_and_that_is_on_record(shared: Host) -> None:
    shared.apply(POLICY)
    before = shared.status()
    os.kill(before["workers"][0]["pid"], signal.SIGKILL)
    after = until(
        lambda: (s := shared.status())["state"] == "enforcing" and s["workers"][0]["restarts"] and s,
        "it is back",
    )
    assert after["workers"][0]["pid"] != before["workers"][0]["pid"]
    assert after["workers"][0]["revision"] == before["policy"]["revision"]
    assert "SECTOOL" in shared.rules()
    kinds = until(
        lambda: (
            {"enforcer.degraded", "enforcer.recovered"}
            <= {e["type"] for e in shared.json("events", "--type", "enforcer.*")["items"]}
        ),
        "both events",
    )
    assert kinds


def test_a_killed_store_comes_back_and_loses_nothing(shared: Host) -> None:
    until(lambda: shared.json("events", "--type", "enforcer.start")["items"], "the first event")
    os.kill(shared.status()["store"]["pid"], signal.SIGKILL)
    after = until(
        lambda: (s := shared.status())["store"]["restarts"] and "error" not in s["store"] and s, "it is back"
    )
    assert after["enforcing"]
    assert len(shared.json("events", "--type", "enforcer.start")["items"]) == 1


def test_without_policy_everything_is_denied_and_that_is_said(host: Host) -> None:
    done = host.ok("up", "--background")
    assert "no policy has been applied yet: every connection is denied" in done.err
    assert "every connection is denied" in host.sectool("status").out
    assert host.sectool("policy", "show").code == 1
    listening = host.popen(sys.executable, "-c", SERVER, stdout=subprocess.PIPE)
    try:
        assert listening.stdout is not None
        assert listening.stdout.readline() == "listening\n"
        assert client(host, "app=web", 0.5) == 7
    finally:
        listening.kill()
        listening.wait()


def test_down_leaves_no_trace_and_everything_can_still_be_read(host: Host) -> None:
    before = host.rules()
    host.ok("up", "--background")
    assert "SECTOOL" in host.rules()
    host.apply(POLICY, "-r", "kept")
    status = host.status()
    done = host.ok("down")
    assert "no longer checked" in done.err
    assert host.rules() == before
    assert not alive(status["pid"])
    assert not alive(status["workers"][0]["pid"])
    assert not host.run.exists()
    assert host.json("policy", "history")["items"][0]["reason"] == "kept"
    offline = host.sectool("policy", "show")
    assert offline.code == 0
    assert "no daemon is running" in offline.err
    events = [e["type"] for e in host.json("events")["items"]]
    assert events[0] == "enforcer.start"
    assert events[-1] == "enforcer.stop"
    assert host.ok("explain", "app=web -> app=db tcp/5432").code == 0
    assert "nothing to do" in host.ok("down").err


def test_killed_the_rules_stay_a_restart_resumes_and_down_cleans_up_alone(host: Host) -> None:
    host.ok("up", "--background")
    host.apply(POLICY)
    before = host.rules()
    host.kill_daemon()
    assert [line for line in host.rules().splitlines() if "SECTOOL" in line] == [
        line for line in before.splitlines() if "SECTOOL" in line
    ]
    assert host.sectool("status").code == 3
    host.ok("up", "--background")  # over stale rules, sockets and rings
    assert host.status()["policy"]["revision"] == 1
    host.kill_daemon()
    done = host.ok("down")
    assert "kernel rules" in done.err
    assert "SECTOOL" not in host.rules()


def test_rules_that_somebody_flushes_are_put_back_and_that_is_on_record(shared: Host) -> None:
    def ours() -> list[str]:
        return sorted(
            line for line in shared.rules().splitlines() if "-j SECTOOL" in line or "SECTOOL-" in line
        )

    def told(kind: str) -> bool:
        recorded = shared.json("timeline", "--since", "5m")["items"]
        return any(e["type"] == kind and "kernel rules" in str(e) for e in recorded)

    before = ours()
    for command in ("iptables", "ip6tables"):
        shared.shell(command, "-t", "mangle", "-F")
    until(lambda: ours() == before, "the rules are back")
    until(lambda: told("enforcer.degraded"), "it is on record")
    until(lambda: not shared.status()["problems"], "all is well again")
    until(lambda: told("enforcer.recovered"), "that is on record, too")


def test_sigterm_is_an_orderly_stop_that_stays_closed(host: Host) -> None:
    process = host.popen(sys.executable, "-m", "sectool", "up", stderr=subprocess.PIPE)
    until(host.enforces, "it enforces")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "the kernel rules stay" in err
    assert "SECTOOL" in host.rules()
    assert not (host.run / "control.sock").exists()


def test_a_damaged_setting_or_key_stops_the_start_before_anything_is_touched(host: Host) -> None:
    (host.state / "sectool.yaml").write_text("reject: true\nenforce: yes\n")
    done = host.sectool("up", "--background")
    assert done.code == 2
    assert "sectool.yaml:2:1: unknown setting 'enforce'" in done.err
    (host.state / "sectool.yaml").unlink()
    (host.state / "host/host.key").chmod(0o644)
    done = host.sectool("up", "--background")
    assert done.code != 0
    assert "host.key" in done.err
    assert "SECTOOL" not in host.rules()


def test_members_of_the_socket_group_may_look_and_not_touch(host: Host) -> None:
    for folder in (host.folder, *host.folder.parents):
        if str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    (host.state / "sectool.yaml").write_text("socket_group: nogroup\n")
    host.ok("up", "--background")
    as_nobody = [
        "setpriv",
        "--reuid=nobody",
        "--regid=nogroup",
        "--clear-groups",
        sys.executable,
        "-m",
        "sectool",
    ]
    for args in (["status"], ["identity", "list"], ["flows"]):
        done = host.shell(*as_nobody, *args)
        assert done.code == 0, done
    program = (
        "import sys; from pathlib import Path; from sectool.api.client import Client\n"
        "try: Client(Path(sys.argv[1])).call('down')\n"
        "except Exception as e: print(e)\n"
    )
    done = host.shell(*as_nobody[:-2], "-c", program, host.run / "control.sock")
    assert "down is for root" in done.out
    assert host.status()["enforcing"]


def test_follow_shows_new_flows_as_they_come(shared: Host, server: object) -> None:
    shared.apply(POLICY)
    following = shared.popen(
        sys.executable, "-m", "sectool", "flows", "-f", "--last", "0", "--to-port", "5432", "-o", "jsonl",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    stdout = following.stdout
    assert stdout is not None
    lines: list[str] = []

    def one() -> bool:
        assert client(shared, "app=web") == 0
        ready, _, _ = select.select([stdout], [], [], 1.0)
        if ready:
            lines.append(stdout.readline())
        return bool(lines)

    try:
        until(one, "a new flow is shown")
        row = json.loads(lines[0])
        assert (row["schema"], row["event.action"], row["destination.port"]) == (
            "sectool.flow/1",
            "allow",
            5432,
        )
        following.send_signal(signal.SIGINT)
        _, err = following.communicate(timeout=20)
        assert (following.returncode, err) == (130, "")
    finally:
        following.kill()
        following.wait()


def test_a_worker_that_does_not_answer_is_told_of_and_a_late_switch_heals(shared: Host) -> None:
    shared.apply(POLICY)
    worker = shared.status()["workers"][0]["pid"]
    os.kill(worker, signal.SIGSTOP)
    try:
        done = shared.apply(POLICY.replace("shop", "late"), "-o", "json")
        assert done.code == 1
        assert "did not switch to revision" in json.loads(done.out)["problems"][0]
        assert shared.sectool("status").code == 1
        assert shared.status()["state"] == "degraded"
        again = json.loads(shared.apply(POLICY.replace("shop", "late"), "-o", "json").out)
        assert not again["unchanged"]  # the same text is tried again, not called unchanged
        assert again["problems"]
    finally:
        os.kill(worker, signal.SIGCONT)
    after = until(lambda: (s := shared.status())["state"] == "enforcing" and s, "it has switched")
    assert after["workers"][0]["revision"] == after["policy"]["revision"]
    shared.apply(POLICY)


def test_identities_are_renewed_while_running(host: Host) -> None:
    (host.state / "sectool.yaml").write_text("svid_lifetime_s: 10\n")
    host.ok("up", "--background")
    host.apply(POLICY)
    listening = host.popen(
        sys.executable, "-m", "sectool", "run", "-l", "app=db", "--", sys.executable, "-c", SERVER,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert listening.stdout is not None
        assert listening.stdout.readline() == "listening\n"
        assert client(host, "app=web") == 0
        first = next(i for i in host.json("identity", "list")["items"] if i["labels"].get("app") == "db")
        renewed = until(
            lambda: next(
                (i for i in host.json("identity", "list")["items"]
                 if i["labels"].get("app") == "db" and i["rotations"] >= 2), None
            ),
            "two renewals",
        )  # fmt: skip
        assert renewed["spiffe_id"] == first["spiffe_id"]
        assert renewed["serial"] != first["serial"]
        assert client(host, "app=web") == 0  # long after the first one has expired
        assert host.json("events", "--type", "identity.rotated")["items"]
    finally:
        listening.kill()
        listening.wait()


def test_a_restart_right_after_kill_9_waits_for_what_the_dead_one_still_holds(host: Host) -> None:
    host.ok("up", "--background")
    os.kill(host.status()["pid"], signal.SIGKILL)
    host.ok("up", "--background")
    assert until(lambda: (s := host.status())["state"] == "enforcing" and s, "it enforces")


def test_a_damaged_control_history_stops_the_start_and_is_left_as_it_is(host: Host) -> None:
    damaged = b"SQLite format 3\0" + b"\xff" * 5000
    (host.state / "control.sqlite").write_bytes(damaged)
    for args in (["up", "--background"], ["policy", "history"]):
        done = host.sectool(*args)
        assert done.code == 4, done
        assert "control.sqlite" in done.err
        assert "hint: " in done.err
    assert (host.state / "control.sqlite").read_bytes() == damaged
    assert "SECTOOL" not in host.rules()


def test_a_full_disk_refuses_the_policy_and_the_one_in_force_stays(host: Host) -> None:
    small = host.folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(small)], check=True)
    try:
        subprocess.run(["cp", "-a", f"{host.state}/.", str(small)], check=True)
        at = ("--state", small)
        host.ok(*at, "up", "--background")
        policy = host.folder / "policy.yaml"
        policy.write_text(POLICY)
        host.ok(*at, "policy", "apply", policy)
        with (small / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(b"x" * 4096)
        # Small enough to be read and large enough not to fit into what is left of a page.
        policy.write_text(
            POLICY + "".join(f"  - allow app=x{i} to call app=db on tcp/{i + 1}\n" for i in range(2000))
        )
        done = host.sectool(*at, "policy", "apply", policy)
        assert done.code == 4, done
        assert "control.sqlite" in done.err
        assert host.sectool(*at, "explain", "app=web -> app=db tcp/5432").code == 0
        status = host.json(*at, "status")
        assert status["policy"]["revision"] == status["workers"][0]["revision"] == 1
        (small / "filler").unlink()
        host.ok(*at, "policy", "apply", policy)
        host.ok(*at, "down")
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
