"""Cases, rows and wires of the datapath's bench, and what the rivals are told."""

from __future__ import annotations

import stat
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from sectool.errors import UsageError
from tests.bench import datapath
from tests.bench.rivals import haproxy, nebula, nginx, openvpn, stunnel, wireguard_go
from tests.bench.rivals.certificates import Authority
from tests.bench.rivals.rival import BULK, ECHO, FAR, LOOPBACK, NEAR, secret
from tests.bench.rows import check
from tests.bench.wire import Wire

FILES = Path("/files")
SERVER = "10.77.0.2"


def test_every_rival_has_a_module_and_every_policy_a_file() -> None:
    for case in datapath.CASES.values():
        assert not case.rival or callable(import_module(f"tests.bench.rivals.{case.rival}").start)
        assert not case.policy or (datapath.HERE / case.policy).is_file()
        assert not (case.rival and case.policy)


def test_every_module_of_a_rival_is_measured() -> None:
    files = {file.stem for file in (datapath.HERE / "rivals").glob("*.py")} - {"rival", "certificates"}
    assert files == {case.rival for case in datapath.CASES.values() if case.rival}


def test_cases_keep_their_order_and_unknown_ones_are_refused() -> None:
    assert list(datapath.select(["nginx", "bare"])) == ["bare", "nginx"]
    assert datapath.select([]) == datapath.CASES
    with pytest.raises(UsageError, match="no case ipsec"):
        datapath.select(["bare", "ipsec"])


def test_rows_compare_each_round_with_bare_and_with_what_the_datapath_is_held_against() -> None:
    rows = check(
        datapath.summarize(
            {
                "bare": [
                    {"throughput_1": 40.0, "connect_errors": 0},
                    {"throughput_1": 20.0, "connect_errors": 0},
                ],
                "encrypted": [
                    {"throughput_1": 4.0, "connect_errors": 0},
                    {"throughput_1": 4.0, "connect_errors": 1},
                ],
                "nginx": [
                    {"throughput_1": 8.0, "connect_errors": 0},
                    {"throughput_1": 5.0, "connect_errors": 0},
                ],
            }
        )
    )
    found = {(r["case"], r["metric"]): r for r in rows}
    assert len(found) == len(rows), "a case and metric name one row"
    assert found["bare", "throughput_1"]["ratio"] is None
    assert found["encrypted", "throughput_1"]["ratio"] == pytest.approx(0.15)
    assert found["encrypted", "throughput_1 beside nginx"]["ratio"] == pytest.approx(0.65)
    assert found["encrypted", "connect_errors"]["median"] == 0.5
    assert ("nginx", "connect_errors") not in found


def test_rows_without_bare_have_no_ratio() -> None:
    (row,) = datapath.summarize({"plain": [{"throughput_1": 4.0}]})
    assert row["ratio"] is None


def test_what_the_datapath_is_held_against_is_measured() -> None:
    for case, other, metrics in datapath.BESIDE:
        assert {case, other} <= set(datapath.CASES)
        assert set(metrics) <= set(datapath.UNITS)


def test_a_wire_loses_segments_and_not_super_packets() -> None:
    with pytest.raises(ValueError, match="super-packets"):
        Wire(loss=0.01)
    wire = Wire(segments=True, gro=True, loss=0.001)
    assert wire.routed
    assert wire.losing()[-3:] == ["0.001", "-j", "DROP"]
    assert wire.offloads() == ["tso", "off", "gro", "on"]
    assert Wire().offloads() == []


def test_the_bridge_that_becomes_a_router_is_there_only_for_loss() -> None:
    routed = {name for name, case in datapath.CASES.items() if datapath.topology(case).bridge}
    assert routed == {"encrypted-loss1", "encrypted-loss01", "wireguard-go-loss1"}


def test_certificates_are_p256_for_both_sides_with_a_name() -> None:
    authority = Authority()
    certificate, key = authority.issue("server")
    leaf = x509.load_pem_x509_certificate(certificate.encode())
    leaf.verify_directly_issued_by(authority.certificate)
    public = leaf.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert isinstance(public.curve, ec.SECP256R1)
    assert load_pem_private_key(key.encode(), None).public_key() == public
    usages = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usages) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["server"]


def test_secrets_are_root_s_alone_and_never_written_over(tmp_path: Path) -> None:
    file = secret(tmp_path / "key", "k")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        secret(file, "another")


@pytest.mark.parametrize("module", [stunnel, haproxy, nginx])
def test_proxies_ask_for_tls_1_3_and_for_certificates_of_both_sides(module: object) -> None:
    client, server = (module.config(host, SERVER, FILES) for host in ("client", "server"))  # type: ignore[attr-defined]
    for text in (client, server):
        assert "TLSv1.3" in text
        assert "TLSv1.2" not in text
        assert str(FILES / "ca.pem") in text
    for port in (BULK, ECHO):
        assert f"{LOOPBACK}:{NEAR[port]}" in client
        assert f"{SERVER}:{FAR[port]}" in client
        assert f"{SERVER}:{FAR[port]}" in server
        assert f"{LOOPBACK}:{port}" in server
    demands = ("requireCert = yes", "verify required", "ssl_verify_client on")
    assert any(demand in server for demand in demands)
    checks = ("checkHost = server", "verifyhost server", "proxy_ssl_verify on")
    assert any(one in client for one in checks)


def test_nginx_resumes_sessions_with_large_buffers() -> None:
    assert "proxy_ssl_session_reuse on" in nginx.config("client", SERVER, FILES)
    assert "ssl_session_cache shared" in nginx.config("server", SERVER, FILES)
    assert "proxy_buffer_size 64k" in nginx.config("server", SERVER, FILES)


def test_wireguard_knows_its_peer() -> None:
    lines = wireguard_go.config("own", "peer", SERVER, "10.78.0.2").splitlines()
    assert "PrivateKey = own" in lines
    assert "PublicKey = peer" in lines
    assert f"Endpoint = {SERVER}:{wireguard_go.PORT}" in lines


def test_nebula_uses_aes_and_knows_its_peer() -> None:
    told = yaml.safe_load(nebula.config(FILES, "10.78.0.2", SERVER))
    assert told["cipher"] == "aes"
    assert told["tun"]["mtu"] == 1300
    assert told["static_host_map"] == {"10.78.0.2": [f"{SERVER}:{nebula.PORT}"]}


def test_openvpn_stays_in_userspace_with_aes() -> None:
    for host, role in (("client", "tls-client"), ("server", "tls-server")):
        lines = openvpn.config(host, "10.77.0.1", SERVER, FILES).splitlines()
        assert {role, "disable-dco", "data-ciphers AES-256-GCM", "mode p2p", f"remote {SERVER}"} <= set(lines)
