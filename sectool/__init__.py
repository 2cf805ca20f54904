"""sectool: workload identity in the TCP handshake, for plain Linux hosts."""

__version__ = "0.1.0"
