"""The bits of packet and connection marks that are ours, and what their values say.

value       on a connection (connmark)                      on a packet that the worker sends through again
ALLOWED     released: the kernel carries it                 save to the connection
PASSING     -                                               this packet only
ENCRYPTED   records, super-packets to the bulk queue        save to the connection
SMALL       records, one a segment, by the normal queue     save to the connection
REQUEUE     -                                               into the normal queue, which splits it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sectool.errors import UsageError

MASK: Final = 0x70000000


@dataclass(frozen=True, slots=True)
class Marks:
    """The values within `mask`, which has three bits or more; the lowest three are used."""

    mask: int = MASK

    def __post_init__(self) -> None:
        if not 0 < self.mask <= 0xFFFFFFFF or self.mask.bit_count() < 3:
            raise UsageError(
                f"mask {self.mask:#x} does not do",
                "it needs three bits of a 32-bit mark that nothing else uses, e.g. 0x70000000",
            )

    def _bits(self, number: int) -> int:
        """The mask's bits that stand for the binary digits of `number`."""
        out, left = 0, self.mask
        while number:
            lowest = left & -left
            out |= lowest if number & 1 else 0
            left ^= lowest
            number >>= 1
        return out

    @property
    def allowed(self) -> int:
        """See the table above."""
        return self._bits(0b001)

    @property
    def passing(self) -> int:
        """See the table above."""
        return self._bits(0b010)

    @property
    def encrypted(self) -> int:
        """See the table above."""
        return self._bits(0b100)

    @property
    def small(self) -> int:
        """See the table above."""
        return self._bits(0b101)

    @property
    def requeue(self) -> int:
        """See the table above."""
        return self._bits(0b110)
