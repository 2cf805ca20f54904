"""Who gets to the console in a browser: nobody without the token, and the token counts once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tui.gate import COOKIE, Entry, Gate

HOST = "127.0.0.1:8000"
HOSTS = frozenset({HOST, "localhost:8000"})
OURS = {"Host": HOST}


def gate() -> Gate:
    return Gate(HOSTS)


def test_the_token_counts_once_and_for_the_page_alone() -> None:
    here = gate()
    token = here.token
    assert here.enter("/ws", {"token": token}, {}, OURS) is Entry.REFUSED
    assert here.enter("/", {"token": token}, {}, OURS) is Entry.ADMITTED
    assert here.enter("/", {"token": token}, {}, OURS) is Entry.REFUSED
    assert here.enter("/", {"token": ""}, {}, OURS) is Entry.REFUSED
    for path in ("/", "/ws", "/static/js/textual.js"):
        assert here.enter(path, {}, {COOKIE: here.session}, OURS) is Entry.KNOWN
        assert here.enter(path, {}, {COOKIE: here.session[:-1]}, OURS) is Entry.REFUSED
        assert here.enter(path, {}, {COOKIE: token}, OURS) is Entry.REFUSED


def test_other_names_and_other_pages_are_refused_before_any_secret_is_looked_at() -> None:
    here = gate()
    known = {COOKIE: here.session}
    assert here.enter("/ws", {}, known, {**OURS, "Origin": f"http://{HOST}"}) is Entry.KNOWN
    for headers in (
        {},
        {"Host": "evil.example:8000"},
        {"Host": "127.0.0.1"},
        {**OURS, "Origin": "http://evil.example"},
        {**OURS, "Origin": "null"},
        {**OURS, "Origin": f"https://{HOST}"},
        {**OURS, "Origin": "http://127.0.0.1:9000"},
    ):
        assert here.enter("/ws", {}, known, headers) is Entry.REFUSED, headers
        assert here.enter("/", {"token": here.token}, {}, headers) is Entry.REFUSED, headers
    assert here.token  # none of these has used it up


def test_secrets_are_not_in_what_is_printed_of_it() -> None:
    here = gate()
    assert here.token not in repr(here)
    assert here.session not in repr(here)
    assert gate().token != here.token


texts = st.text(max_size=60)


@given(texts, st.dictionaries(texts, texts, max_size=3), st.dictionaries(texts, texts, max_size=3), texts)
def test_nothing_else_gets_in(path: str, query: dict[str, str], cookies: dict[str, str], host: str) -> None:
    for headers in ({"Host": host}, OURS):
        assert gate().enter(path, query, cookies, headers) is Entry.REFUSED
