"""An input read as decisions: numbers, pieces, and changes to a genuine message. Every input is a valid script."""

from __future__ import annotations

STEPS = 64  # changes to one message


class Script:
    """Bytes taken from the front; when there are none left all numbers are 0."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def __bool__(self) -> bool:
        return self.at < len(self.data)

    def take(self, size: int) -> bytes:
        """The next bytes, at most so many."""
        piece = self.data[self.at : self.at + size]
        self.at += len(piece)
        return piece

    def below(self, limit: int) -> int:
        """A number from 0 to limit - 1, of two bytes if one does not do."""
        return int.from_bytes(self.take(1 if limit <= 256 else 2), "big") % max(1, limit)

    def piece(self) -> bytes:
        """Bytes behind their length in two bytes."""
        return self.take(int.from_bytes(self.take(2), "big"))

    def rest(self) -> bytes:
        """Everything that is left."""
        return self.take(len(self.data))

    def changed(self, base: bytes) -> bytes:
        """`base` after some changes: how many, then each with its place. None at all is the likeliest end."""
        out = bytearray(base)
        for _ in range(self.below(STEPS)):
            kind, at = self.below(6), self.below(len(out) or 1)
            match kind:
                case 0:
                    out[at : at + 1] = bytes((self.below(256),))
                case 1:
                    if at < len(out):
                        out[at] ^= 1 << self.below(8)
                case 2:
                    del out[at:]
                case 3:
                    out[at:at] = self.take(self.below(64))
                case 4:
                    del out[at : at + self.below(64)]
                case _:
                    out += self.take(self.below(64))
        return bytes(out)


def change(kind: int, at: int, *more: int, size: int = 0) -> bytes:
    """One change, as `Script.changed` reads it from a message of `size` bytes."""
    return bytes((kind,)) + at.to_bytes(1 if size <= 256 else 2, "big") + bytes(more)


FLIP = 1
CUT = 2
