"""WireGuard in userspace, as Debian has it."""

from __future__ import annotations

import base64

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from labs.lab import Lab
from tests.bench.rivals.rival import DEVICE, THROUGH_TUNNEL, TUNNEL, Endpoint, folder, launch, secret

PORT = 51820
MTU = 1420
# Its control socket has a fixed place: a mount namespace gives each its own, so that pairs do not meet there.
_SCRIPT = """\
set -e
mkdir -p /run/wireguard
mount -t tmpfs none /run/wireguard
wireguard-go -f {device} &
while [ ! -S /run/wireguard/{device}.sock ]; do kill -0 $!; sleep 0.05; done
wg setconf {device} {config}
ip address add {address}/24 dev {device}
ip link set {device} mtu {mtu} up
: >{done}
wait
"""


def config(own: str, peer: str, address: str, peer_tunnel: str) -> str:
    """What `wg setconf` reads: own private key, the peer's public key, underlay and tunnel addresses."""
    return (
        f"[Interface]\nPrivateKey = {own}\nListenPort = {PORT}\n"
        f"[Peer]\nPublicKey = {peer}\nEndpoint = {address}:{PORT}\nAllowedIPs = {peer_tunnel}/32\n"
    )


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def start(pair: Lab) -> Endpoint:
    """Bring the tunnel up on both hosts."""
    keys = {name: X25519PrivateKey.generate() for name in ("client", "server")}
    started = []
    for name, other in (("server", "client"), ("client", "server")):
        node = pair[name]
        own, peer = keys[name].private_bytes_raw(), keys[other].public_key().public_bytes_raw()
        text = config(_text(own), _text(peer), pair[other].host.ip4, TUNNEL[other])
        done = folder(node) / "up"
        script = _SCRIPT.format(
            device=DEVICE,
            config=secret(folder(node) / "wg.conf", text),
            address=TUNNEL[name],
            mtu=MTU,
            done=done,
        )
        started.append(launch(node, ["unshare", "--mount", "sh", "-c", script], done.exists))
    for service in started:
        service.wait()
    return THROUGH_TUNNEL
