"""What the terminal and the page both say of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from fedgraft.platform.comparison.paired import ALPHA
from fedgraft.platform.report.parts import fixed
from fedgraft.platform.results import Quantity

if TYPE_CHECKING:
    from fedgraft.platform.comparison.comparison import Comparison

__all__ = ["baseline_words", "p_text", "pair_words", "status_words", "with_spread"]


def p_text(value: float) -> str:
    """Write a p value: ``0.031``, ``<0.001``, ``-`` where there is none."""
    if pd.isna(value):
        return "-"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def status_words(status: str) -> str:
    """Write a status for people: ``stopped early``."""
    return status.replace("_", " ")


def with_spread(row: Mapping[str, Any] | pd.Series[Any], quantity: Quantity) -> str:
    """Write a mean with the deviation over seeds where there is one: ``1.504 +- 0.021``."""
    spread = row[f"{quantity.name}_std"]
    text = fixed(row[quantity.name], quantity.digits)
    return text if pd.isna(spread) else f"{text} \u00b1{spread:.{quantity.digits}f}"


def baseline_words(comparison: Comparison) -> str:
    """Say what the tests are against, and who chose it."""
    if comparison.baseline is None:
        return "paired tests against the first setting on the same clients"
    how = "" if comparison.is_baseline_named else " (choose another with --baseline)"
    return f"paired tests against {comparison.baseline}{how}"


def pair_words(tests: pd.DataFrame) -> list[str]:
    """Say what a pair is, how many there are, and what the p values do not know."""
    tested = tests[tests["outcome"] != "refused"]
    if not len(tested):
        return ["no test was possible; the means above stand"]
    pairs = _range(tested["num_pairs"])
    clients, seeds = _range(tested["num_clients"]), _range(tested["num_seeds"])
    one = seeds == "1"
    family = f"{len(tested)} comparison{'s' if len(tested) != 1 else ''}"
    lines = [
        f"{pairs} pairs a test: a pair is a client ({clients}) with a seed ({seeds}); p values by Holm over {family}; "
        f"below {ALPHA:g} by Wilcoxon: better or worse",
        "clients of a seed share what the server learned, so pairs are not independent: "
        + ("with one seed the p values say nothing of other seeds" if one else "see in how many seeds a setting is better, too"),
    ]
    fewest = int(tested["num_pairs"].min())
    if len(tested) * 2 / 2**fewest >= ALPHA:
        lines.append(f"with {fewest} pairs and {family} Wilcoxon's p cannot fall below {ALPHA:g}")
    return lines


def _range(column: pd.Series[Any]) -> str:
    low, high = int(column.min()), int(column.max())
    return str(low) if low == high else f"{low}-{high}"
