"""The messages of the SPIFFE Workload API (workloadapi.proto of the specification), for protobuf.

Described here rather than generated, so that nothing has to be kept in step with a compiler: field numbers and types
are what goes over the wire. Messages that only JWT and WIT methods use are left out, like those methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

SERVICE: Final = "SpiffeWorkloadAPI"  # without package: its name on the wire
FETCH_SVID: Final = f"/{SERVICE}/FetchX509SVID"
FETCH_BUNDLES: Final = f"/{SERVICE}/FetchX509Bundles"
UNSUPPORTED: Final = tuple(
    f"/{SERVICE}/{name}"
    for name in ("FetchJWTSVID", "FetchJWTBundles", "ValidateJWTSVID", "FetchWITSVID", "FetchWITBundles")
)

_STRING, _BYTES, _MESSAGE = (
    FieldDescriptorProto.TYPE_STRING,
    FieldDescriptorProto.TYPE_BYTES,
    FieldDescriptorProto.TYPE_MESSAGE,
)
_ONE, _MANY = FieldDescriptorProto.LABEL_OPTIONAL, FieldDescriptorProto.LABEL_REPEATED


def _field(
    message: DescriptorProto, name: str, number: int, kind: Any, label: Any = _ONE, of: str = ""
) -> None:
    field = message.field.add(name=name, number=number, type=kind, label=label)
    if of:
        field.type_name = of


def _map(message: DescriptorProto, name: str, number: int) -> None:
    """`map<string, bytes>` is a repeated message with a key and a value (protobuf, "Maps")."""
    entry_name = "".join(part.capitalize() for part in name.split("_")) + "Entry"
    entry = message.nested_type.add(name=entry_name)
    entry.options.map_entry = True
    _field(entry, "key", 1, _STRING)
    _field(entry, "value", 2, _BYTES)
    _field(message, name, number, _MESSAGE, _MANY, f".{message.name}.{entry_name}")


def _file() -> FileDescriptorProto:
    file = FileDescriptorProto(name="sectool/workloadapi.proto", syntax="proto3")
    svid = file.message_type.add(name="X509SVID")
    _field(svid, "spiffe_id", 1, _STRING)
    _field(svid, "x509_svid", 2, _BYTES)
    _field(svid, "x509_svid_key", 3, _BYTES)
    _field(svid, "bundle", 4, _BYTES)
    _field(svid, "hint", 5, _STRING)
    answer = file.message_type.add(name="X509SVIDResponse")
    _field(answer, "svids", 1, _MESSAGE, _MANY, ".X509SVID")
    _field(answer, "crl", 2, _BYTES, _MANY)
    _map(answer, "federated_bundles", 3)
    bundles = file.message_type.add(name="X509BundlesResponse")
    _field(bundles, "crl", 1, _BYTES, _MANY)
    _map(bundles, "bundles", 2)
    return file


_pool = DescriptorPool()
_pool.Add(_file())

X509SVIDResponse: type[Any] = GetMessageClass(_pool.FindMessageTypeByName("X509SVIDResponse"))
X509BundlesResponse: type[Any] = GetMessageClass(_pool.FindMessageTypeByName("X509BundlesResponse"))

__all__ = [
    "FETCH_BUNDLES",
    "FETCH_SVID",
    "SERVICE",
    "UNSUPPORTED",
    "DecodeError",
    "Message",
    "X509BundlesResponse",
    "X509SVIDResponse",
    "bundles_response",
    "svid_response",
]


def svid_response(
    spiffe_id: str, chain: bytes, key: bytes, bundle: bytes, federated: Mapping[str, bytes]
) -> bytes:
    """One SVID: DER chain with the leaf first, PKCS #8 key, DER roots; and other domains' roots by SPIFFE ID."""
    message = X509SVIDResponse()
    message.svids.add(spiffe_id=spiffe_id, x509_svid=chain, x509_svid_key=key, bundle=bundle)
    message.federated_bundles.update(federated)
    return bytes(message.SerializeToString(deterministic=True))


def bundles_response(bundles: Mapping[str, bytes]) -> bytes:
    """DER roots by SPIFFE ID of their trust domain."""
    message = X509BundlesResponse()
    message.bundles.update(bundles)
    return bytes(message.SerializeToString(deterministic=True))
