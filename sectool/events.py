"""Event vocabulary and the binary flow record shared by packet workers and store.

A worker writes one fixed-size record per flow phase into its ring (sectool.ring); the store turns batches of
them into columns. Names follow ECS, OCSF and Zeek where those have one. Everything textual is a 63-bit content
id (sectool.labels.stable_id) into a dictionary; dictionary entries and all other events travel through the
same ring as JSON blobs (see `Blob`), ahead of the first record that needs them.
"""

from __future__ import annotations

import struct
import time
from enum import IntEnum, StrEnum

import numpy as np

SCHEMA_VERSION = 1


class Kind(IntEnum):
    """What a ring slot holds."""

    EMPTY = 0
    FLOW = 1
    BLOB = 2  # first slot of a JSON blob: kind u8, 3 pad, length u32, then bytes
    BLOB_MORE = 3  # continuation slots of a blob are raw bytes; the kind byte is not written for them


class Phase(IntEnum):
    """Which moment of a flow a record tells of. One flow gives one VERDICT, any UPDATEs, at most one END."""

    VERDICT = 1
    UPDATE = 2
    END = 3


class Point(IntEnum):
    """observation_point: the side of the flow this host is on."""

    INITIATOR = 1
    RESPONDER = 2
    LOCAL = 3  # both: loopback


class Action(IntEnum):
    """event.action"""

    NONE = 0
    ALLOW = 1
    DENY = 2
    AUDIT = 3
    ERROR = 4


class Decider(IntEnum):
    """Which enforcer decided a denial."""

    LOCAL = 1
    PEER = 2


class Auth(IntEnum):
    """auth.method"""

    NONE = 0
    NOISE_IX = 1  # full handshake
    SESSION = 2  # resumed
    KERNEL = 3  # both ends on this host, attested by its kernel


class AuthResult(IntEnum):
    """auth.result"""

    NONE = 0
    CLAIMED = 1  # CA-signed credential seen, possession of its key not proven yet
    PROVEN = 2
    FAILED = 3


class Encryption(IntEnum):
    """encryption.state"""

    NONE = 0
    PLAIN = 1
    ENCRYPTED = 2


class Cipher(IntEnum):
    """encryption.cipher (also the wire's suite number)"""

    NONE = 0
    AES_256_GCM = 1
    CHACHA20_POLY1305 = 2


class ConnState(IntEnum):
    """Zeek's conn_state, as far as a host sees it."""

    NONE = 0
    S0 = 1  # attempt seen, no reply
    S1 = 2  # established, not ended
    SF = 3  # normal establishment and termination
    REJ = 4  # attempt rejected
    RSTO = 5  # established, originator aborted
    RSTR = 6  # established, responder aborted
    SH = 7  # half-open: handshake never proven
    OTH = 8  # no handshake seen (adopted flow)


class DropReason(IntEnum):
    """drop_reason. Numbers are stored and on the wire (refusals): never renumber, only append."""

    NONE = 0
    # policy
    DEFAULT_DENY = 1
    INTENT_DENY = 2
    GUARDRAIL_DENY = 3
    ENCRYPTION_UNAVAILABLE = 4
    PEER_DENIED = 5  # the other enforcer refused; its reason and rule are in peer_reason / peer_rule
    POLICY_CHANGED = 6  # a live flow cut by a later revision
    REVOKED_LIVE = 7
    # identity
    NO_IDENTITY = 20
    CREDENTIAL_MALFORMED = 21
    CREDENTIAL_OVERSIZED = 22
    CREDENTIAL_EXPIRED = 23
    CREDENTIAL_NOT_YET_VALID = 24
    UNTRUSTED_DOMAIN = 25
    UNTRUSTED_CHAIN = 26  # signature or issuer does not hold
    LABEL_NOT_PERMITTED = 27
    DELEGATION_INVALID = 28
    DELEGATION_EXPIRED = 29
    CREDENTIAL_REVOKED = 30
    KEY_USAGE_INVALID = 31
    SPIFFE_ID_INVALID = 32
    NO_LOCAL_IDENTITY = 33  # our own workload could not be identified
    NO_LISTENER = 34  # nothing listens on the port: there is no workload to decide for
    REVOCATION_STALE = 35  # the signed list that would say whether it is revoked has expired
    # handshake
    HANDSHAKE_MALFORMED = 40
    VERSION_UNSUPPORTED = 41
    HANDSHAKE_FORGED = 42  # message 2 or a refusal does not decrypt
    PROOF_INVALID = 43
    PROOF_MISSING = 44  # payload before proof, or no proof in time
    SYN_REPLAYED = 45
    HANDSHAKE_STALE = 46  # outside the clock window
    HANDSHAKE_TIMEOUT = 47
    SESSION_UNKNOWN = 48
    SESSION_FORGED = 49  # a tag or an answer under a session does not authenticate
    # packets and resources
    PACKET_MALFORMED = 60
    UNKNOWN_FLOW = 61
    RATE_LIMITED = 62
    TABLE_FULL = 63
    ENFORCER_STARTING = 64
    DENIED_BEFORE = 65  # retransmission of a SYN whose denial is recorded already
    INTERNAL_ERROR = 66  # the enforcer could not judge the packet; counted, and said in `status`
    # records (encrypted flows)
    RECORD_INVALID = 80
    RECORD_REPLAYED = 81
    RECORD_MISSING = 82
    DATAGRAM_OVERSIZED = 83


class Type(StrEnum):
    """event type of everything that is not a flow. A blob is `{"type": ..., "ts": microseconds, ...}`."""

    # dictionaries (no event of their own)
    # id, spiffe_id, trust_domain, labels_id, fingerprint, serial, not_before, not_after, issuer
    DICT_IDENTITY = "dict.identity"
    DICT_LABELS = "dict.labels"  # id, labels {k: v}
    DICT_WORKLOAD = "dict.workload"  # id, name, labels_id, uid, user, executable, sha256, unit, cgroup
    DICT_RULE = "dict.rule"  # id, policy, kind, owner, index, text, revision
    # events
    WORKLOAD_START = "workload.start"
    WORKLOAD_STOP = "workload.stop"
    WORKLOAD_CHANGE = "workload.change"
    IDENTITY_ISSUED = "identity.issued"
    IDENTITY_ROTATED = "identity.rotated"
    IDENTITY_REVOKED = "identity.revoked"
    POLICY_APPLIED = "policy.applied"
    POLICY_ACTIVATED = "policy.activated"
    POLICY_ROLLED_BACK = "policy.rolled_back"
    ENFORCER_START = "enforcer.start"
    ENFORCER_STOP = "enforcer.stop"
    ENFORCER_DEGRADED = "enforcer.degraded"
    ENFORCER_RECOVERED = "enforcer.recovered"
    EVENTS_LOST = "events.lost"  # where, count
    STORE_DAMAGED = "store.damaged"
    STORE_RETENTION = (
        "store.retention"  # what is kept from now on: actor, reason, the setting and the one before
    )
    STORE_PRUNED = (
        "store.pruned"  # sealed segments deleted: names, bytes, why (age, size, room, asked), actor
    )
    ALERT_RAISED = "alert.raised"
    ALERT_CLEARED = "alert.cleared"
    TRUST_CHANGED = "trust.changed"  # trust domains added, removed, or with other roots
    CAPTURE_STARTED = "capture.started"  # packets are copied: actor, reason, filter, payload, file
    CAPTURE_ENDED = "capture.ended"  # actor, packets, sha256
    VULN_CHANGED = "vuln.changed"  # known vulnerabilities imported or fixed
    MODE_CHANGED = "mode.changed"  # enforcing or observing from now on: mode, before, actor, reason
    BREAK_GLASS = "break_glass.begun"  # denial is suspended: actor, reason, until
    BREAK_GLASS_ENDED = "break_glass.ended"  # it is in force again: actor, why, seconds


FLAG_DEFAULT_DENY = 1
FLAG_ADOPTED = 2  # established before the enforcer started
FLAG_COALESCED = 4  # flow_count > 1: one record for many alike
FLAG_RESTORED = 8  # flow state came back from the journal after a restart
FLAG_OBSERVED = (
    16  # would have been denied for `drop_reason`, but nothing was enforced: it passed (action: audit)
)

# name, struct code. Natural alignment throughout, so that the struct, the dtype and the ring agree.
FIELDS: tuple[tuple[str, str], ...] = (
    ("kind", "B"),
    ("phase", "B"),
    ("point", "B"),
    ("action", "B"),
    ("transport", "B"),  # IP protocol number
    ("direction", "B"),  # 1 outbound, 2 inbound, 3 internal (loopback)
    ("auth_method", "B"),
    ("auth_result", "B"),
    ("encryption", "B"),
    ("cipher", "B"),
    ("conn_state", "B"),
    ("decider", "B"),
    ("pending_action", "B"),
    ("flags", "B"),
    ("drop_reason", "H"),
    ("peer_reason", "H"),
    ("source_port", "H"),  # ICMP: type
    ("destination_port", "H"),  # ICMP: code
    ("ip_version", "H"),  # 4 or 6
    ("policy_revision", "I"),  # 0: none
    ("flow_count", "I"),  # how many flows this record stands for
    ("missed", "I"),  # events lost by this worker so far
    ("pid", "I"),
    ("uid", "I"),  # 0xffffffff: unknown
    ("_pad", "I"),
    ("ts", "q"),  # when this record was written, UTC microseconds
    ("start", "q"),  # event.start
    ("end", "q"),  # event.end; 0 while open
    ("event_id", "16s"),  # UUIDv7 of the flow: the same in VERDICT, UPDATE and END
    ("source_ip", "16s"),  # IPv4 as ::ffff:a.b.c.d
    ("destination_ip", "16s"),
    ("community", "20s"),  # SHA-1 part of community id v1
    ("history", "12s"),  # Zeek history letters, NUL padded
    ("source_bytes", "Q"),
    ("source_packets", "Q"),
    ("destination_bytes", "Q"),
    ("destination_packets", "Q"),
    ("source_identity", "q"),  # ids: 0 means none
    ("destination_identity", "q"),
    ("source_labels", "q"),
    ("destination_labels", "q"),
    ("source_workload", "q"),  # local side only
    ("destination_workload", "q"),
    ("rule", "q"),
    ("peer_rule", "q"),
    ("pending_rule", "q"),
    ("policy_hash", "q"),
    ("cgroup", "Q"),  # cgroup v2 id of the local socket
)

_NUMPY = {"B": "u1", "H": "<u2", "I": "<u4", "q": "<i8", "Q": "<u8"}

FLOW_STRUCT = struct.Struct("<" + "".join(code for _, code in FIELDS))
FLOW_DTYPE = np.dtype([(n, _NUMPY.get(c) or f"V{c[:-1]}") for n, c in FIELDS])
SLOT_SIZE = FLOW_STRUCT.size
INDEX = {name: i for i, (name, _) in enumerate(FIELDS)}

assert FLOW_DTYPE.itemsize == SLOT_SIZE
assert SLOT_SIZE % 8 == 0


def now_us() -> int:
    """UTC wall clock in microseconds."""
    return time.time_ns() // 1000
