"""The packet path: queues, packet headers, handshake, verdicts."""
