"""The one shape of a result: a row per case and metric, its rounds, their median, and a ratio to another case."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from sectool.errors import SectoolError

Row = dict[str, Any]
FIELDS = ("bench", "case", "metric", "unit", "rounds", "median", "ratio_to", "ratio")


class PartialError(SectoolError):
    """Part of a bench failed; `rows` is what the rest gave."""

    def __init__(self, message: str, rows: list[Row]) -> None:
        super().__init__(message)
        self.rows = rows


def row(bench: str, case: str, metric: str, unit: str, rounds: Sequence[float]) -> Row:
    """A row without a comparison. At least one round."""
    return {
        "bench": bench,
        "case": case,
        "metric": metric,
        "unit": unit,
        "rounds": list(rounds),
        "median": median(rounds),
        "ratio_to": None,
        "ratio": None,
    }


def compare(one: Row, base: Row) -> Row:
    """`one`, with the median of its rounds divided each by the same round of `base`: drift cancels out."""
    ratios = [a / b for a, b in zip(one["rounds"], base["rounds"], strict=True) if b]
    return {**one, "ratio_to": base["case"], "ratio": median(ratios) if ratios else None}


def check(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows of any bench, verified to have exactly the agreed fields. ValueError names the first that has not."""
    checked = []
    for one in rows:
        if set(one) != set(FIELDS):
            raise ValueError(f"a row has the fields {sorted(one)}; expected {sorted(FIELDS)}")
        if not one["rounds"]:
            raise ValueError(f"row {one['bench']}/{one['case']}/{one['metric']} has no rounds")
        checked.append({field: one[field] for field in FIELDS})
    return checked
