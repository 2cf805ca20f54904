"""The shape of results, and the runner's command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.__main__ import ALL, arguments
from tests.bench.matrix import markdown, number
from tests.bench.rows import check, compare, row


def test_a_ratio_is_the_median_of_each_round_s_own_ratio() -> None:
    base = row("b", "bare", "rate", "1/s", [100, 200, 400])
    ours = compare(row("b", "enforced", "rate", "1/s", [50, 180, 400]), base)
    assert base["median"] == 200
    assert ours["ratio_to"] == "bare"
    assert ours["ratio"] == pytest.approx(0.9)


def test_rounds_that_do_not_pair_up_are_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        compare(row("b", "x", "m", "u", [1]), row("b", "y", "m", "u", [1, 2]))


def test_a_row_with_other_fields_is_refused() -> None:
    good = row("b", "c", "m", "u", [1.0])
    assert check([good]) == [good]
    with pytest.raises(ValueError, match="fields"):
        check([{**good, "extra": 1}])
    with pytest.raises(ValueError, match="no rounds"):
        check([{**good, "rounds": []}])


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (27400.4, "27,400"), (49.123, "49.1"), (0.98765, "0.988"), (-12.3, "-12.3")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_a_matrix_has_a_line_per_case_and_a_dash_where_nothing_was_measured() -> None:
    rate = row("b", "bare", "rate", "1/s", [1200])
    ours = compare(row("b", "ours", "rate", "1/s", [600]), rate)
    others = [{**ours, "metric": "rate beside ours"}, {**rate, "bench": "other"}]
    lines = markdown([rate, row("b", "bare", "cpu", "µs", [3.14159]), ours, *others], "b").splitlines()
    assert lines == [
        "| case | rate (1/s) | cpu (µs) |",
        "| --- | ---: | ---: |",
        "| bare | 1,200 | 3.14 |",
        "| ours | 600 | – |",
    ]


@pytest.mark.parametrize(
    "argv",
    [["--case", "bare"], ["store", "--case", "bare"], ["nothing"], ["--rounds", "0"], ["--rounds", "many"]],
)
def test_a_bad_command_line_exits_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        arguments(argv)
    assert stopped.value.code == 2


def test_every_bench_of_the_folder_is_known_to_the_runner() -> None:
    own = {
        "__main__",
        "history",
        "matrix",
        "meters",
        "pair",
        "rows",
        "starting",
        "store_history",
        "store_questions",
        "wire",
    }
    modules = {file.stem for file in Path(__file__).parent.glob("*.py") if not file.stem.startswith("test_")}
    assert modules - own == set(ALL)


def test_names_and_options_may_be_mixed() -> None:
    parsed = arguments(["store", "--rounds", "2", "--json", "x.json"])
    assert (parsed.names, parsed.rounds, str(parsed.json)) == (["store"], 2, "x.json")
