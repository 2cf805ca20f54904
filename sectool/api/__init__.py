"""The local API: framing, client, server, and where its sockets are."""
