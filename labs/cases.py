"""The demo's connections as a table: who calls whom, what the program must see, and what must be on record.

Each case is judged twice: by the exit code and words of a real client, and by the events that the enforcers
on both ends recorded. `labs.incidents` has the cases that are more than one connection.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from labs.topology import ADS, API, DB_NAME, SHOP

CURL = ("curl", "-sS", "--connect-timeout", "2", "--max-time", "5")
TIMED_OUT = {"curl": 28, "psql": 2}  # exit codes of a client whose SYN nobody answered
QUERY = "select count(*), sum(amount) from orders"
REFUSED = {"curl": 7, "psql": 2}


@dataclass(frozen=True, slots=True)
class Seen:
    """An event that must be on record at `host`. Empty fields are not looked at."""

    host: str
    action: str  # allow, deny, audit
    reason: str = ""  # drop_reason, in lower case
    rule: str = ""  # part of the sentence that decided
    peer: str = ""  # part of the other side's SPIFFE ID
    cipher: str = ""  # suite of an encrypted flow
    peer_reason: str = ""  # the drop_reason the other side's enforcer told us, under its seal

    def __str__(self) -> str:
        why = f"{self.reason} ({self.peer_reason})" if self.peer_reason else self.reason
        words = [f"{self.host}: {self.action}", why, self.cipher, f"[{self.rule}]" if self.rule else ""]
        return " ".join(filter(None, words))


@dataclass(frozen=True, slots=True)
class Case:
    """One connection. `exit` is the client's exit code; `says` must be in its output (stdout or stderr)."""

    name: str
    what: str
    host: str
    labels: tuple[str, ...]
    command: tuple[str, ...]
    exit: int
    says: str
    port: int
    events: tuple[Seen, ...]


def _curl(address: str, *options: str, port: int = 80) -> tuple[str, ...]:
    host = f"[{address}]" if ":" in address else address
    return (*CURL, *options, f"http://{host}:{port}/")


def _psql(address: str) -> tuple[str, ...]:
    where = f"host={address} user=shop dbname=postgres connect_timeout=2"
    return ("psql", "-X", "-At", where, "-c", QUERY)


def _by_name(name: str, port: int) -> tuple[str, ...]:
    """curl by a name that the system's resolver asks the partner's name server for."""
    ask = f"mount -t tmpfs none /mnt && echo nameserver {_OUT4} > /mnt/resolv.conf"
    fetch = shlex.join((*CURL, f"http://{name}:{port}/"))
    return (
        "unshare", "--mount", "sh", "-c",
        f"{ask} && mount --bind /mnt/resolv.conf /etc/resolv.conf && exec {fetch}",
    )  # fmt: skip


def _refused(host: str, reason: str) -> Seen:
    """At the calling side: the other side refused, and said why."""
    return Seen(host, "deny", "peer_denied", peer_reason=reason)


_web, _db, _batch, _plain = (SHOP.host(name) for name in ("web", "db", "batch", "plain"))
_OUT4, _OUT6 = str(_plain.v4[1].ip), str(_plain.v6[1].ip)
_ORDERS = "1000|3000"
AES = "aes_256_gcm"
DOMAIN = "spiffe://lab.example/"
_BATCH = ("app=batch", "env=prod")

HTTP = "allow zone=back to call app=web on tcp/80"
SQL = "allow app=web to call app=db on tcp/5432 encrypted"
GUARD = "deny env=dev to call env=prod"
CRAWLER = "deny app=crawler to call app=web"
DNS = "allow app=web to call app=resolver on udp/53 encrypted"
REPORT = "audit app=report to call app=db on tcp/5432"

CASES: tuple[Case, ...] = (
    Case(
        "allowed, IPv4",
        "a batch job fetches a page from nginx on web",
        "batch", _BATCH, _curl(_web.ip4), 0, "hello from web", 80,
        (Seen("batch", "allow", rule=HTTP, peer=DOMAIN), Seen("web", "allow", rule=HTTP, peer=DOMAIN)),
    ),
    Case(
        "allowed, IPv6",
        "the same over IPv6",
        "batch", _BATCH, _curl(_web.ip6), 0, "hello from web", 80,
        (Seen("batch", "allow", rule=HTTP), Seen("web", "allow", rule=HTTP)),
    ),
    Case(
        "allowed, encrypted",
        "the web application queries PostgreSQL on db; the rule wants it encrypted, the programs know nothing of it",
        "web", ("app=web",), _psql(_db.ip4), 0, _ORDERS, 5432,
        (Seen("web", "allow", rule=SQL, cipher=AES), Seen("db", "allow", rule=SQL, cipher=AES)),
    ),
    Case(
        "denied by default",
        "the batch job tries the database; no rule speaks of it",
        "batch", _BATCH, _psql(_db.ip4), TIMED_OUT["psql"], "timeout expired", 5432,
        (Seen("db", "deny", "default_deny"), _refused("batch", "default_deny")),
    ),
    Case(
        "denied by guardrail",
        "a dev job labelled app=web, which an intent lets in; but the guardrail says dev never calls prod",
        "batch", ("app=web", "env=dev"), _psql(_db.ip4), TIMED_OUT["psql"], "timeout expired", 5432,
        (Seen("db", "deny", "guardrail_deny", GUARD), _refused("batch", "guardrail_deny")),
    ),
    Case(
        "denied by intent",
        "the shop's own deny rule keeps its crawler out, although a wider rule would allow it",
        "batch", ("app=crawler", "env=prod"), _curl(_web.ip6), TIMED_OUT["curl"], "Failed to connect", 80,
        (Seen("web", "deny", "intent_deny", CRAWLER), _refused("batch", "intent_deny")),
    ),
    Case(
        "denied with a RST",
        "web has `reject: true`: its programs learn at once that somebody denied them",
        "web", ("app=report",), _curl(_batch.ip4, port=5201), REFUSED["curl"], "Failed to connect", 5201,
        (Seen("batch", "deny", "default_deny"), _refused("web", "default_deny")),
    ),
    Case(
        "denied identity",
        "rogue has the right labels, vouched for by a trust domain nobody here trusts",
        "rogue", ("app=web",), _psql(_db.ip4), TIMED_OUT["psql"], "timeout expired", 5432,
        (Seen("db", "deny", "untrusted_domain"),),
    ),
    Case(
        "no identity",
        "plain runs no enforcer and calls from inside the enforced network (web answers with a RST, too)",
        "plain", (), _curl(_web.ip4, "--interface", _plain.ip4), REFUSED["curl"], "Failed to connect", 80,
        (Seen("web", "deny", "no_identity"),),
    ),
    Case(
        "network rule, inbound",
        "the same program from its partner address (IPv6), which a net: rule lets in",
        "plain", (), _curl(_web.ip6, "--interface", _OUT6), 0, "hello from web", 80,
        (Seen("web", "allow", rule="allow net:partner to call app=web on tcp/80"),),
    ),
    Case(
        "network rule, outbound",
        "the web application calls the partner, who has no enforcer; the SYN leaves bare",
        "web", ("app=web",), _curl(_OUT4, port=8080), 0, "hello from outside", 8080,
        (Seen("web", "allow", rule="allow app=web to call net:partner on tcp/8080"),),
    ),
    Case(
        "UDP, encrypted",
        "the web application asks the shop's name server; question and answer are encrypted datagrams",
        "web", ("app=web",), ("dig", "+short", "+time=2", "+tries=1", f"@{_batch.ip4}", DB_NAME), 0, _db.ip4, 53,
        (Seen("web", "allow", rule=DNS, cipher=AES), Seen("batch", "allow", rule=DNS, cipher=AES)),
    ),
    Case(
        "UDP, denied",
        "a report asks it, too; no rule says so",
        "web", ("app=report",), ("dig", "+short", "+time=1", "+tries=1", f"@{_batch.ip4}", DB_NAME), 9,
        "no servers could be reached", 53,
        (Seen("batch", "deny", "default_deny"), _refused("web", "default_deny")),
    ),
    Case(
        "by name",
        "the mailer may call the partner's API, known by its name: the enforcer has seen the answer of the name server",
        "web", ("app=mailer",), _by_name(API, 8080), 0, "hello from outside", 8080,
        (Seen("web", "allow", rule=f"allow app=mailer to call fqdn:{API} on tcp/8080"),),
    ),
    Case(
        "by another name",
        "the same server on the same port under a name that no rule allows",
        "web", ("app=mailer",), _by_name(ADS, 8080), REFUSED["curl"], "Failed to connect", 8080,
        (Seen("web", "deny", "default_deny"),),
    ),
    Case(
        "audited",
        "a report reads the database: let through, and marked, until somebody decides",
        "web", ("app=report",), _psql(_db.ip6), 0, _ORDERS, 5432,
        (
            Seen("web", "audit", rule=REPORT),
            Seen("db", "audit", rule=REPORT),
        ),
    ),
)  # fmt: skip
