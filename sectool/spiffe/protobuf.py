"""Message types of protobuf, described here rather than generated: nothing has to be kept in step with a compiler.

Field numbers and types are what goes over the wire, so they are all there is to a description. A field that is not
described is skipped when it comes.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

STRING: Final = FieldDescriptorProto.TYPE_STRING
BYTES: Final = FieldDescriptorProto.TYPE_BYTES
_MESSAGE: Final = FieldDescriptorProto.TYPE_MESSAGE
_ONE: Final = FieldDescriptorProto.LABEL_OPTIONAL
_MANY: Final = FieldDescriptorProto.LABEL_REPEATED

__all__ = ["BYTES", "STRING", "DecodeError", "Kind", "Message", "Messages"]


class Kind:
    """One message type while it is being described."""

    def __init__(self, message: DescriptorProto, package: str) -> None:
        self._message, self._package = message, package

    def scalar(self, name: str, number: int, kind: Any = STRING, *, many: bool = False) -> Kind:
        """A string or bytes, or several."""
        self._message.field.add(name=name, number=number, type=kind, label=_MANY if many else _ONE)
        return self

    def of(self, name: str, number: int, other: str, *, many: bool = False) -> Kind:
        """A message of a type of the same package, or several."""
        field = self._message.field.add(
            name=name, number=number, type=_MESSAGE, label=_MANY if many else _ONE
        )
        field.type_name = f".{self._package}.{other}" if self._package else f".{other}"
        return self

    def map(self, name: str, number: int, value: Any = STRING) -> Kind:
        """`map<string, …>`: a repeated message with a key and a value (protobuf, "Maps")."""
        entry_name = "".join(part.capitalize() for part in name.split("_")) + "Entry"
        entry = self._message.nested_type.add(name=entry_name)
        entry.options.map_entry = True
        Kind(entry, self._package).scalar("key", 1).scalar("value", 2, value)
        return self.of(name, number, f"{self._message.name}.{entry_name}", many=True)


class Messages:
    """The messages of one proto3 file. `package` is '' for none."""

    def __init__(self, name: str, package: str = "") -> None:
        self._file = FileDescriptorProto(name=name, syntax="proto3", package=package)
        self._package = package
        self._pool: DescriptorPool | None = None

    def describe(self, name: str) -> Kind:
        """A new message type; before the first `type`."""
        return Kind(self._file.message_type.add(name=name), self._package)

    def type(self, name: str) -> type[Any]:
        """The class of a message described before."""
        if self._pool is None:
            self._pool = DescriptorPool()
            self._pool.Add(self._file)
        full = f"{self._package}.{name}" if self._package else name
        return GetMessageClass(self._pool.FindMessageTypeByName(full))
