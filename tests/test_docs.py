"""The documentation: every link and anchor leads somewhere, every page is in the site, every command in it exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from sectool.cli.lazy import Unloaded
from sectool.cli.main import app
from sectool.filters import FLAGS
from sectool.policy import load

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:^|[ (#])sectool (?=[a-z-])((?:[^|;&<>)#\n'\"]|'[^']*'|\"[^\"]*\")+)")
FENCE = re.compile(r"^ *(```+|~~~+)")
# The reference is made from the program; its examples are looked at by themselves.
WRITTEN = [page for page in PAGES if page.name != "reference.md"]
LEARNT = [page for page in WRITTEN if page.parent.name == "howto" or page.stem in ("README", "tutorial")]


def lines(page: Path) -> Iterator[tuple[int, str, str | None]]:
    """Number, text, and language of the code block a line is in (None: prose) of all lines of a page."""
    fence, language = "", None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if fence and line.strip() == fence:
            fence, language = "", None
        elif not fence and (found := FENCE.match(line)):
            fence, language = found[1], line.strip().lstrip("`~")
        else:
            yield number, line, language if fence else None


@cache
def anchors(page: Path) -> frozenset[str]:
    """What can follow `#` in a link to a page: its headings, as repositories and the site spell them."""
    found: dict[str, int] = {}
    for _, line, language in lines(page):
        if language is None and (heading := re.match(r"#{1,6} +(.+?) *#*$", line)):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            count = found[slug] = found.get(slug, -1) + 1
            found.setdefault(f"{slug}-{count}" if count else slug, 0)
    return frozenset(found)


def dead(page: Path) -> Iterator[str]:
    """Links of a page that lead nowhere."""
    for number, line, language in lines(page):
        if language is not None:
            continue
        for target in LINK.findall(re.sub(r"`[^`]*`", "``", line)):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            goal = (page.parent / path).resolve() if path else page
            if not goal.exists():
                yield f"{page.name}:{number}: {target}: there is no such file"
            elif anchor and anchor not in anchors(goal):
                yield f"{page.name}:{number}: {target}: {goal.name} has no such heading"
            elif page.is_relative_to(DOCS) and not goal.is_relative_to(DOCS):
                yield f"{page.name}:{number}: {target}: leads out of the site"


def test_every_link_leads_somewhere() -> None:
    assert [problem for page in PAGES for problem in dead(page)] == []


def test_a_dead_link_would_be_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One `thing`, [two](x)\n[a](#one-thing-two) [b](#three) [c](none.md)\n```\n[d](none.md)\n```\n"
    )
    assert [problem.split(": ")[1] for problem in dead(page)] == ["x", "#three", "none.md"]


def test_every_page_is_in_the_site() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    listed = set(re.findall(r": ([\w/-]+\.md)$", nav, re.M)) | set(re.findall(r"- ([\w/-]+\.md)$", nav, re.M))
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if page.parent.name != "decisions"}
    assert listed == pages, "add the page to nav in mkdocs.yml"


# Commands that take the filters of flows beside their options.
FILTERED = {f"sectool {name}" for name in ("flows", "map", "replay", "diff", "ends", "capture start")}


@cache
def _program() -> Any:
    return typer.main.get_command(app)


def _step(command: Any, path: str, word: str) -> tuple[Any, str]:
    """The command that a word leads to; the same one if the word is an argument."""
    if not hasattr(command, "list_commands") or (path == "sectool alerts" and word != "test"):
        return command, path
    child = command.get_command(typer.Context(command), word)
    if child is None:
        raise LookupError(f"{path} has no command {word}")
    return child.real() if isinstance(child, Unloaded) else child, f"{path} {word}"


def _command_problem(words: list[str]) -> str | None:
    """What is wrong with a command line behind `sectool`; None: nothing."""
    command: Any = _program()
    path, rest = "sectool", iter(words)
    for word in rest:
        if word == "--":
            return None
        name = word.partition("=")[0]
        if len(word) > 1 and word.startswith("-"):
            if path in FILTERED and (name == "--not" or name[2:] in FLAGS):
                next(rest if name != "--not" and FLAGS[name[2:]].implied is None else iter(()), None)
                continue
            options = {n: p for p in command.params for n in (*p.opts, *p.secondary_opts)}
            if name not in options and name not in ("-h", "--help"):
                return f"{path} has no {name}"
            if "=" not in word and name in options and not options[name].is_flag:
                next(rest, None)
        else:
            try:
                command, path = _step(command, path, word)
            except LookupError as problem:
                return str(problem)
    return None


def commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    """Every `sectool …` that stands in a code block without a language: what is typed, not what is printed."""
    for number, line, language in lines(page):
        if language not in ("", "sh"):
            continue
        for found in COMMAND.finditer(line):
            if re.match(r"(?:\$|#) |sudo |sectool ", line.lstrip()):
                yield number, shlex.split(found[1].removesuffix("\\"))


def test_every_command_that_is_shown_exists() -> None:
    shown = [(page, number, words) for page in WRITTEN for number, words in commands(page)]
    assert len(shown) > 150
    assert [f"{page.name}:{n}: {p}" for page, n, words in shown if (p := _command_problem(words))] == []


def test_a_command_that_does_not_exist_would_be_found() -> None:
    assert _command_problem(["policy", "aply", "x.yaml"]) == "sectool policy has no command aply"
    assert (
        _command_problem(["policy", "apply", "x.yaml", "--why", "x"]) == "sectool policy apply has no --why"
    )
    assert _command_problem(["policy", "apply", "x.yaml", "--reason", "x"]) is None


@pytest.mark.parametrize("page", LEARNT, ids=lambda page: page.stem)
def test_every_policy_that_is_shown_is_valid(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for number, block in enumerate(re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S)):
        if re.search(r"^(kind|apiVersion):", block, re.M):
            file = tmp_path / f"{number}.yaml"
            file.write_text(block)
            assert list(load([file]).documents())


def test_every_example_of_help_is_true() -> None:
    page, seen = DOCS / "reference.md", []
    for number, line, language in lines(page):
        if language == "text" and line.startswith("    ") and (found := COMMAND.search(line)):
            # What stands behind wide space is a remark.
            example = re.split(r" {3,}(?=\S)", found[1].removesuffix("\\"))[0]
            seen.append((number, shlex.split(example)))
    assert len(seen) > 150
    assert [f"{page.name}:{n}: {p}" for n, words in seen if (p := _command_problem(words))] == []


def test_every_test_that_the_threat_model_rests_on_exists() -> None:
    text = (DOCS / "threat-model.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests/[\w/]+/)?test_\w+\.py)(?:::(\w+))?`", text)
    assert len(named) > 20
    for file, function in named:
        path = ROOT / file if file.startswith("tests/") else ROOT / "tests" / "kernel" / file
        assert path.exists(), file
        assert not function or f"\ndef {function}(" in path.read_text(encoding="utf-8"), f"{file}::{function}"
