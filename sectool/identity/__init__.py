"""Workload identity: SPIFFE ids, the trust domain's root, host CAs, SVIDs, credential blobs, verification.

The two entry points of the packet path are `Verifier.verify` (a peer's blob in, a `PeerIdentity` out) and
`Credential` (what one of our workloads presents). The agent uses `enrolment.load_host` and
`HostAuthority.issue`. Formats byte for byte: docs/identity.md.
"""
