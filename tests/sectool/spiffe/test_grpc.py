"""What a server says of a call's outcome; the rest is tested with the Workload API and its clients."""

from __future__ import annotations

from pathlib import Path

import pytest

from sectool.spiffe.grpc import GrpcError, _check_status


@pytest.mark.parametrize("status", ["", "-1", "x", "²", "9" * 5000])
def test_a_status_that_is_none_is_an_error_of_the_call(status: str) -> None:
    with pytest.raises(GrpcError, match="does not answer as gRPC does"):
        _check_status({":status": "200", "grpc-status": status}, Path("s"))
