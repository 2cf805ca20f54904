"""Shared by the policy tests: short ways to documents, and errors with their exact place."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sectool.errors import DocumentError

Refused = Callable[[Callable[[], object]], DocumentError]


@pytest.fixture
def refused() -> Refused:
    """Call something that must raise DocumentError; gives the error, its excerpt checked against its place."""

    def call(action: Callable[[], object]) -> DocumentError:
        with pytest.raises(DocumentError) as caught:
            action()
        error = caught.value
        _, line, column = error.where.rsplit(":", 2)
        assert int(line) >= 1
        assert int(column) >= 1
        if error.excerpt:
            shown, caret = error.excerpt.split("\n")
            assert caret.strip() == "^"
            assert len(caret) <= len(shown) + 1
        return error

    return call
