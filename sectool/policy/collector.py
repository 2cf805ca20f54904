"""Python's garbage collector, held off while a large set of objects is made that will all stay.

It would walk the growing set again and again and find nothing: of the time to compile ten thousand rules it takes half.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def held() -> Iterator[None]:
    """No collection meanwhile, if there would be any. Reference counts free what they can as always."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
