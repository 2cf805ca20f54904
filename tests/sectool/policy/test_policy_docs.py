"""docs/policy.md says what is so: its examples parse, its limits and word lists are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sectool.policy import (
    condition,
    documents,
    parse,
    parse_flow,
    parse_sentence,
    run_tests,
    selector,
    sentence,
    service,
    tokens,
    yamlpos,
)
from sectool.policy.fields import MATCH_KEYS
from sectool.policy.model import DocumentKind, Mode

TEXT = (Path(__file__).parents[3] / "docs" / "policy.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    assert found
    return [str(block) for block in found]


@pytest.mark.parametrize("text", blocks("yaml"))
def test_documents(text: str) -> None:
    found = parse(text)
    assert len(found) >= 1
    assert all(result.passed for result in run_tests(found))


@pytest.mark.parametrize("line", [line for block in blocks("rule") for line in block.splitlines()])
def test_rules_are_canonical(line: str) -> None:
    assert str(parse_sentence(line)) == line


@pytest.mark.parametrize("line", [line for block in blocks("flow") for line in block.splitlines()])
def test_flows(line: str) -> None:
    assert str(parse_flow(line)) == line


def test_all_examples_in_yaml_form_one_set_but_for_names() -> None:
    kinds = {d.kind for text in blocks("yaml") for d in parse(text).documents()}
    assert kinds == set(DocumentKind)


@pytest.mark.parametrize(
    "word", [*MATCH_KEYS, *DocumentKind, *Mode, *condition.OPERATORS, *service.PROTOCOLS]
)
def test_every_word_is_documented(word: str) -> None:
    assert f"`{word}`" in TEXT


def test_limits() -> None:
    mi = 1024 * 1024
    for row in (
        f"| characters of a file, of a set | {yamlpos.MAX_TEXT // mi} Mi, {documents.MAX_TOTAL // mi} Mi |",
        f"| characters of a sentence, of a reason | {tokens.MAX_SENTENCE}, {sentence.MAX_REASON} |",
        f"| clauses in a selector, values in a list | {selector.MAX_CLAUSES}, {selector.MAX_VALUES} |",
        f"| services, conditions in a rule | {service.MAX_SERVICES}, {condition.MAX_CONDITIONS} |",
    ):
        assert row in TEXT


def test_links_inside_the_page_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-")
        for h in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#(.*?)\)", TEXT)) <= headings
