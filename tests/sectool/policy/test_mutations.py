"""Every example document, damaged: it is refused with the place, the word and a way out, or it is taken as it stands.

Nothing is ever widened in silence: a damaged text that lets more through than the original is a change that `diff`
names; a damaged field name, kind or mode is never overlooked. `SECTOOL_POLICY_CASES` makes the run longer.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sectool.errors import DocumentError
from sectool.events import Action
from sectool.policy import DocumentSet, Engine, diff, parse, parse_flow, parse_sentence
from sectool.policy.conflicts import find_conflicts
from tests.sectool.policy.worlds import LONG

NOW = 1_780_000_000_000_000
ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
EXAMPLES = [
    *re.findall(r"^```yaml\n(.*?)^```$", (DOCS / "policy.md").read_text(encoding="utf-8"), re.M | re.S),
    *(file.read_text(encoding="utf-8") for file in sorted((ROOT / "labs" / "policies").glob("*.yaml"))),
]
assert len(EXAMPLES) >= 8
SENTENCES = [
    line
    for block in re.findall(
        r"^```rule\n(.*?)^```$", (DOCS / "policy.md").read_text(encoding="utf-8"), re.M | re.S
    )
    for line in block.splitlines()
]
FLOWS = (
    "app=web -> app=db tcp/5432",
    "app=web,env=dev -> app=db,env=prod tcp/5432",
    "app=web -> app=db tcp/22",
    "ip:198.51.100.7 -> app=web tcp/443",
    "ip:10.0.0.7 -> app=web tcp/443",
    "app=batch -> app=db tcp/5432",
    "vuln=critical,vuln-age=30d -> app=x tcp/443",
    "app=web -> fqdn:api.stripe.com tcp/443",
)
PIECES = st.one_of(
    st.sampled_from(
        (
            "any",
            "!",
            "*",
            "=",
            ",",
            "-",
            ":",
            "#",
            "'",
            '"',
            "\n",
            "  ",
            "---\n",
            "mode: off\n",
            "tcp",
            "0",
            "allow ",
        )
    ),
    st.text(max_size=2),
)


@st.composite
def damaged(draw: st.DrawFn, texts: list[str]) -> tuple[str, str]:
    """A text and the same with one to three places damaged."""
    original = text = draw(st.sampled_from(texts))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        match draw(st.integers(0, 4)):
            case 0:
                text = text[:at] + draw(PIECES) + text[at:]
            case 1:
                text = text[:at] + text[at + draw(st.integers(1, 8)) :]
            case 2:
                text = text[:at] + draw(PIECES) + text[at + draw(st.integers(1, 4)) :]
            case 3:
                text = text[:at] + text[at : at + 2].swapcase() + text[at + 2 :]
            case _:
                lines = text.splitlines(keepends=True)
                line = draw(st.integers(0, len(lines) - 1)) if lines else 0
                lines[line : line + 1] = draw(st.sampled_from(([], lines[line : line + 1] * 2)))
                text = "".join(lines)
    return original, text


def well_told(error: DocumentError) -> None:
    """Place, word and hint."""
    assert re.fullmatch(r"[^\n]+:[1-9][0-9]*:[1-9][0-9]*", error.where), error.where
    assert error.message.startswith(error.where)
    assert error.hint, error.message
    assert "Traceback" not in error.message
    shown, _, caret = error.excerpt.partition("\n")
    if shown:
        assert caret.strip() == "^"
        assert len(caret) <= len(shown) + 1


def verdicts(documents: DocumentSet) -> list[bool]:
    engine = Engine(documents)
    return [engine.decide(parse_flow(flow).request(), NOW).action is not Action.DENY for flow in FLOWS]


@given(damaged(EXAMPLES))
@settings(max_examples=LONG or 60, deadline=None)
def test_damaged_documents(texts: tuple[str, str]) -> None:
    original, text = texts
    try:
        after = parse(text, "example.yaml")
    except DocumentError as error:
        well_told(error)
        return
    before = parse(original, "example.yaml")
    wider = [new and not old for old, new in zip(verdicts(before), verdicts(after), strict=True)]
    named = [line for change in diff(before, after) for line in change.lines()]
    if any(wider):
        assert named
    if not named:
        assert before.hash == after.hash
    find_conflicts(Engine(after), NOW)


@given(damaged(SENTENCES))
@example(("", "allow a to call b on icmp/3/999"))
@example(("", "allow a=1 to call a=2 until 9999-12-31T23:59:59-23:59"))
@settings(max_examples=LONG or 60, deadline=None)
def test_damaged_sentences(texts: tuple[str, str]) -> None:
    try:
        found = parse_sentence(texts[1])
    except DocumentError as error:
        well_told(error)
        return
    assert str(parse_sentence(str(found))) == str(found)


def edits(word: str) -> set[str]:
    """The word with one letter gone, doubled, swapped with the next, or in the other case."""
    out = set()
    for i in range(len(word)):
        out |= {
            word[:i] + word[i + 1 :],
            word[:i] + word[i] * 2 + word[i + 1 :],
            word[:i] + word[i].swapcase() + word[i + 1 :],
        }
        if i + 1 < len(word):
            out.add(word[:i] + word[i + 1] + word[i] + word[i + 2 :])
    return out - {word, ""}


WHOLE = """kind: Guardrail
name: box
owner: security
mode: stage
description: x
rules: [deny env=dev to call env=prod]
"""


@pytest.mark.parametrize(
    "word", ["kind", "name", "owner", "mode", "description", "rules", "Guardrail", "stage", "deny", "call"]
)
def test_a_misspelt_word_is_never_overlooked(word: str) -> None:
    assert WHOLE.count(word) == 1
    for wrong in sorted(edits(word)):
        with pytest.raises(DocumentError) as caught:
            parse(WHOLE.replace(word, wrong), "box.yaml")
        well_told(caught.value)
