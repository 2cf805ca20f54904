"""The preset dictionary a credential's certificates are compressed with (wire version 1).

Most of a certificate is the same in every certificate: tags, lengths, OIDs, flags. Deflate (RFC 1951) with
this text in its window spends one or two bytes where plain deflate spends the whole thing. Each piece below
is a run of bytes that stands in our certificates in just that order; deflate refers to what is near more
cheaply, so the pieces every leaf needs come last.

The dictionary is part of the wire format: changing one byte of it needs a new version byte (`BLOB_VERSION` in
sectool.identity.blob). A test pins its SHA-256.
"""

from __future__ import annotations

from sectool.identity.der import oid
from sectool.identity.extensions import CONSTRAINTS_OID, LABELS_OID

_ECDSA_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")
_ED25519 = bytes.fromhex("300506032b6570")
_SPKI_P256 = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d03010703420004")
_SIGNATURE = (
    bytes.fromhex("03480030450220") + bytes.fromhex("0349003046022100") + bytes.fromhex("0348003045022100")
)
_SERIAL = bytes.fromhex("a003020102020901")

_LABELS = (
    b"|staging|test|dev*,role=,service=,release=,cluster=,component=,namespace=,container=,image=,pod=,vuln=none,"
    b"class=,data=pci,owner=platform,team=shop,team=security,tenant=,track=stable,version=1.0.0,version=2,"
    b"tier=database,tier=cache,tier=frontend,tier=backend,region=us-east-1,region=eu-central-1,region=eu-west-1,"
    b"zone=us-east-1a,zone=eu-central-1b,zone=eu-west-1a,zone=a,user=postgres,user=nobody,user=www-data,user=root,"
    b"unit=postgresql.service,unit=nginx.service,unit=docker-,.scope,unit=user@1000.service,unit=sshd.service,"
    b"exe=bash,exe=postgres,exe=nginx,exe=java,exe=node,exe=curl,exe=python3.11,app=db,app=cache,app=api,app=web,"
    b"env=dev,env=staging,env=production,env=prod,exe=,user=,unit=,zone="
)


def _validity(start: str, end: str) -> bytes:
    """A certificate's Validity with typical digits."""
    return b"\x30\x1e\x17\x0d" + start.encode() + b"Z\x17\x0d" + end.encode() + b"Z"


def _build() -> bytes:
    constraints = b"".join(
        (
            b"\x30\x82\x01\x00" + oid(CONSTRAINTS_OID.dotted_string) + b"\x04\x81\x80\x0c\x81\x80",
            b"/host/host1/;app=*;team=*;*=*;env=dev|test|staging;env=prod;exe=*;unit=*;user=*;zone=*;region=*",
        )
    )
    ca_extensions = b"".join(
        (
            bytes.fromhex("a381ff3081ff"),
            bytes.fromhex("301306 03551d23 040c 300a 8008 40"),
            bytes.fromhex("301106 03551d0e 040a 0408 40"),
            bytes.fromhex("301206 03551d13 0101ff 0408 3006 0101ff 020100"),
            bytes.fromhex("300e06 03551d0f 0101ff 0404 03020106"),
            bytes.fromhex("301d06 03551d11 0416 3014 86") + b"\x12spiffe://example.org",
        )
    )
    host = b"".join(
        (
            b"\x30\x82\x02\x00\x30\x82\x01\xa0" + _SERIAL + _ECDSA_SHA256,
            bytes.fromhex("301631143012060355040a0c0b") + b"example.org",
            _validity("260101000000", "270101000000"),
            bytes.fromhex("3010310e300c06035504030c05") + b"host1",
            _SPKI_P256 + ca_extensions + constraints + _ECDSA_SHA256 + _SIGNATURE,
        )
    )
    leaf = b"".join(
        (
            b"\x30\x82\x01\xc0\x30\x82\x01\x68" + _SERIAL + _ECDSA_SHA256,
            bytes.fromhex("3010310e300c06035504030c05") + b"host1",
            _validity("260101000000", "260101010000") + b"\x30\x00" + _SPKI_P256,
            bytes.fromhex("a382010030820100"),
            bytes.fromhex("301306 03551d23 040c 300a 8008 40"),
            bytes.fromhex("300e06 03551d0f 0101ff 0404 03020780"),
            bytes.fromhex("301d06 03551d25 0416 3014 06082b06010505070301 06082b06010505070302"),
            bytes.fromhex("300c06 03551d13 0101ff 0402 3000"),
            bytes.fromhex("303006 03551d11 0101ff 0426 3024 8622") + b"spiffe://example.org/host/web1/wl/",
            b"\x30\x81\x80" + oid(LABELS_OID.dotted_string) + b"\x04\x81\x80\x0c\x81\x80",
        )
    )
    return b"".join((_ED25519, host, _LABELS, leaf))


DICTIONARY = _build()
