"""Metadata services of clouds, spoken by a server at 169.254.169.254 in a namespace of its own."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from sectool.context.cloud import Place, ask
from tests.kernel.conftest import Namespace, make_namespace

pytestmark = pytest.mark.kernel

TOKEN = "AQAEAGVn-token_value=="
IDENTITY = {
    "accountId": "123456789012", "architecture": "x86_64", "availabilityZone": "eu-central-1a",
    "imageId": "ami-1", "instanceId": "i-0123456789abcdef0", "instanceType": "m7i.large",
    "pendingTime": "2026-03-01T00:00:00Z", "region": "eu-central-1", "version": "2017-09-30",
}  # fmt: skip
GOOGLE = {
    "id": 8472013459,
    "machineType": "projects/1/machineTypes/e2-small",
    "zone": "projects/1/zones/europe-west3-b",
}
AZURE = {
    "compute": {"location": "westeurope", "zone": "2", "vmId": "0b1c-77", "vmSize": "Standard_B2s"},
    "network": {},
}

Answer = tuple[int, dict[str, str], bytes]
Speak = Callable[[str, str, dict[str, str]], Answer]
NO: Answer = (404, {}, b"")


def ok(document: Any, **headers: str) -> Answer:
    return 200, {k.replace("_", "-"): v for k, v in headers.items()}, json.dumps(document).encode()


def aws(method: str, path: str, headers: dict[str, str]) -> Answer:
    """IMDSv2, with version 1 switched off."""
    if (method, path) == ("PUT", "/latest/api/token"):
        seconds = headers.get("x-aws-ec2-metadata-token-ttl-seconds", "")
        return (200, {}, TOKEN.encode()) if seconds.isdigit() else (400, {}, b"")
    if headers.get("x-aws-ec2-metadata-token") != TOKEN:
        return 401, {}, b""
    return ok(IDENTITY) if path == "/latest/dynamic/instance-identity/document" else NO


def gcp(method: str, path: str, headers: dict[str, str]) -> Answer:
    if headers.get("metadata-flavor") != "Google" or "x-forwarded-for" in headers:
        return 403, {}, b""
    found = method == "GET" and path == "/computeMetadata/v1/instance/?recursive=true"
    return ok(GOOGLE, Metadata_Flavor="Google") if found else NO


def azure(method: str, path: str, headers: dict[str, str]) -> Answer:
    if headers.get("metadata") != "true":
        return 400, {}, b""
    return ok(AZURE) if (method, path) == ("GET", "/metadata/instance?api-version=2021-02-01") else NO


@contextmanager
def serving(space: Namespace, speak: Speak) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            headers = {k.lower(): v for k, v in self.headers.items()}
            status, more, body = speak(self.command, self.path, headers)
            self.send_response(status)
            for name, value in {**more, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = _answer  # noqa: N815

        def log_message(self, *_: Any) -> None:
            return

    with space.enter():
        server = ThreadingHTTPServer(("169.254.169.254", 80), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        with space.enter():
            yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def link() -> Iterator[Namespace]:
    with make_namespace("cloud") as space:
        space.run("ip", "addr", "add", "169.254.169.254/32", "dev", "lo")
        yield space


@pytest.mark.parametrize(
    ("speak", "place"),
    [
        (aws, Place("aws", "eu-central-1", "eu-central-1a", "i-0123456789abcdef0", "m7i.large")),
        (gcp, Place("gcp", "europe-west3", "europe-west3-b", "8472013459", "e2-small")),
        (azure, Place("azure", "westeurope", "westeurope-2", "0b1c-77", "Standard_B2s")),
    ],
)
def test_each_cloud_is_asked_in_its_own_words(link: Namespace, speak: Speak, place: Place) -> None:
    with serving(link, speak):
        assert ask() == place
    labels = place.labels()
    assert labels["zone"] == place.zone
    assert set(labels) == {"cloud", "region", "zone", "instance"}


@pytest.mark.parametrize(
    "answer",
    [
        NO,
        (200, {}, b""),
        (200, {}, b"[]"),
        (200, {}, b"<html>"),
        ok({}),
        ok({"compute": []}),
        (200, {}, b"x" * 300_000),
    ],
)
def test_who_answers_otherwise_is_no_cloud(link: Namespace, answer: Answer) -> None:
    with serving(link, lambda *_: answer):
        assert ask() is None


def test_hostile_values_make_harmless_labels(link: Namespace) -> None:
    hostile = {
        **IDENTITY,
        "region": "x\x1b[31m,env=prod",
        "instanceId": ["i"],
        "availabilityZone": "z" * 9999,
    }

    def speak(method: str, path: str, headers: dict[str, str]) -> Answer:
        return ok(hostile) if "document" in path else aws(method, path, headers)

    with serving(link, speak):
        place = ask()
    assert place is not None
    assert place.labels() == {"cloud": "aws", "region": "x__31m_env_prod", "zone": "z" * 128}


def test_nobody_there_is_soon_known(namespace: Namespace) -> None:
    with namespace.enter():
        assert ask() is None
