"""The CA service: hosts join with one-time tokens, renew, and learn of roots and revocations, over TLS 1.3.

tokens    what lets a host join once: made, kept hashed, used up
service   requests in, answers out; no sockets
server    TLS, HTTP (h11), bounds
client    the joining host's end, and the agent's
"""
