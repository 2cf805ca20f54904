"""Settings are strict: every mistake is named with its place, nothing is ignored."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectool.agent.settings import Settings, load_settings, parse_settings
from sectool.errors import DocumentError, SectoolError


def test_no_file_means_defaults(tmp_path: Path) -> None:
    assert load_settings(tmp_path / "sectool.yaml") == Settings()


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_empty_means_defaults(text: str) -> None:
    assert parse_settings(text) == Settings()


def test_everything_can_be_set() -> None:
    settings = parse_settings(
        "enforced_networks: [10.0.0.0/8, 'fd00::/8']\nqueue: 7\nworkers: 2\nmask: 0xff00\n"
        "reject: true\nsvid_lifetime_s: 600\n"
        "clock_skew_s: 0\nsyn_rate: 50\nactivation_timeout_s: 2\nsocket_group: adm\n"
        "suites: [chacha20-poly1305, aes-256-gcm]\nresolvers: [10.0.0.53/32]\n"
        "other_protocols: [51, esp]\n"
    )
    assert settings == Settings(
        enforced_networks=("10.0.0.0/8", "fd00::/8"),
        queue=7,
        workers=2,
        mask=0xFF00,
        reject=True,
        svid_lifetime_s=600,
        clock_skew_s=0,
        resolvers=("10.0.0.53/32",),
        syn_rate=50,
        activation_timeout_s=2,
        suites=("chacha20-poly1305", "aes-256-gcm"),
        other_protocols=(50, 51),
        socket_group="adm",
    )


@pytest.mark.parametrize(
    ("text", "where", "says"),
    [
        ("rejct: true", "1:1", "unknown setting 'rejct'"),
        ("other_protocols: [50, 17]", "1:18", "17 is judged by policy"),
        ("other_protocols: [nonsense]", "1:18", "neither an IP protocol's name nor a number"),
        ("other_protocols: 50", "1:18", "a list of IP protocols"),
        ("resolvers: [dns.example]", "1:12", "not a network"),
        ("reject: true\nreject: false", "2:1", "given twice"),
        ("reject: 1", "1:9", "true or false"),
        ("queue: true", "1:8", "whole number"),
        ("queue: 70000", "1:8", "0 to 65000"),
        ("\nenforced_networks: [10.0.0.1/8]", "2:20", "not a network"),
        ("enforced_networks: 10.0.0.0/8", "1:20", "list of networks"),
        ("- reject", "1:1", "setting: value"),
        ("reject: [", "1:", "not YAML"),
        ("? [a]\n: 1", "1:3", "unknown setting"),
        ("mask: 3", "1:7", "three bits"),
        ("mark: 1", "1:1", "unknown setting"),
        ("socket_group: ''", "1:15", "a name"),
        ("suites: aes-256-gcm", "1:9", "list of cipher suites"),
        ("suites: [rot13]", "1:9", "there are aes-256-gcm, chacha20-poly1305"),
        ("suites: [aes-256-gcm, aes-256-gcm]", "1:9", "twice"),
        ("reject: !!python/name:os.system", "1:9", ""),
    ],
)
def test_mistakes_have_a_place(text: str, where: str, says: str) -> None:
    with pytest.raises(DocumentError) as caught:
        parse_settings(text, "s.yaml")
    assert caught.value.where.startswith(f"s.yaml:{where}")
    assert says in caught.value.message


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "sectool.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SectoolError, match=r"sectool\.yaml"):
        load_settings(path)


@given(st.text())
def test_any_text_gives_settings_or_a_document_error(text: str) -> None:
    try:
        assert isinstance(parse_settings(text), Settings)
    except DocumentError as error:
        assert error.message
