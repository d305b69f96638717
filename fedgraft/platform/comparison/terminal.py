"""A comparison's tables for a terminal of 100 characters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fedgraft.platform.comparison.keys import label_of, short_keys, value_text
from fedgraft.platform.comparison.words import baseline_words, p_text, pair_words, status_words, with_spread
from fedgraft.platform.report.parts import fixed
from fedgraft.platform.report.style import readable_bytes
from fedgraft.platform.results import QUANTITIES, Quantity

if TYPE_CHECKING:
    from fedgraft.platform.comparison.comparison import Comparison

__all__ = ["tables"]

_SHORT = {
    "personal_nll": "own NLL",
    "worst_client_nll": "worst\nclient",
    "token_accuracy": "token\nacc.",
    "rouge_l": "ROUGE-L",
    "retention_nll": "general\nNLL",
    "choice_accuracy": "choice",
}


def tables(comparison: Comparison) -> Group:
    """Give the settings, the tests where there are any, and what was left out."""
    parts = [_settings(comparison)]
    if len(comparison.tests):
        parts.append(_tests(comparison))
    if len(comparison.left_out):
        parts.append(_left_out(comparison))
    return Group(*parts)


def _settings(comparison: Comparison) -> Table:
    frame = comparison.settings
    table = _table("last score of each setting, means over seeds", "\n".join([_MARKS, *comparison.notes]))
    table.add_column("method", overflow="fold", min_width=8)
    keys = [key for key in comparison.keys if frame[key].map(value_text).nunique() > 1]
    short = short_keys(keys)
    for key in keys:
        table.add_column(short[key], overflow="fold")
    table.add_column("seeds", justify="right")
    shown = [quantity for quantity in QUANTITIES if quantity.name in _SHORT and frame[quantity.name].notna().any()]
    for quantity in shown:
        table.add_column(f"{_SHORT[quantity.name]}\n{'lower' if quantity.is_lower_better else 'higher'}", justify="right")
    table.add_column("bytes\nlower", justify="right")
    blocks = list(frame.groupby("data", sort=False))
    for place, (_, block) in enumerate(blocks):
        best = {quantity.name: _best(block, quantity) for quantity in shown}
        names = list(block.index)
        for name, row in block.iterrows():
            cells = [
                Text(label_of(str(name), row["label"])),
                *(Text(value_text(row[key])) for key in keys),
                Text(str(row["num_seeds"])),
            ]
            for quantity in shown:
                is_best = len(block) > 1 and fixed(row[quantity.name], quantity.digits) == best[quantity.name]
                text = with_spread(row, quantity) if quantity is comparison.metric else fixed(row[quantity.name], quantity.digits)
                cells.append(Text(text, style="bold" if is_best else ""))
            cells.append(Text(readable_bytes(row["bytes_up"] + row["bytes_down"])))
            table.add_row(*cells, end_section=name == names[-1] and place < len(blocks) - 1)
    return table


_MARKS = "bold: best of a column on the same clients; 'lower' and 'higher': which is better"


def _tests(comparison: Comparison) -> Table:
    table = _table(f"{comparison.metric.title}: {baseline_words(comparison)}", "\n".join(pair_words(comparison.tests)))
    for column, justify in (
        ("setting", "left"), ("difference", "right"), ("95 % interval", "right"), ("pairs", "right"),
        ("seeds\nbetter", "right"), ("p\nWilcoxon", "right"), ("p\nt-test", "right"), ("", "left"),
    ):  # fmt: skip
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for _, row in comparison.tests.iterrows():
        name = Text(str(row["setting"]))
        if row["outcome"] == "refused":
            table.add_row(name, "-", "-", "-", "-", "-", "-", Text(f"no test: {row['reason']}"))
            continue
        table.add_row(name, *_numbers(row, comparison.metric), Text(str(row["outcome"]), style=_STYLES[row["outcome"]]))
    return table


_STYLES = {"better": "green", "worse": "red", "not told apart": ""}


def _numbers(row: Mapping[str, Any] | pd.Series[Any], quantity: Quantity) -> list[str]:
    digits = quantity.digits
    return [
        f"{row['difference']:+.{digits}f}",
        f"{row['low']:+.{digits}f} {row['high']:+.{digits}f}",
        str(row["num_pairs"]),
        f"{row['seeds_better']}/{row['num_seeds']}",
        p_text(row["wilcoxon_holm"]),
        p_text(row["t_holm"]),
    ]


def _left_out(comparison: Comparison) -> Table:
    table = _table("in no average", "")
    for column in ("setting", "seed", "status", "rounds", f"last {comparison.metric.title}", "why"):
        table.add_column(column, overflow="fold")
    for _, row in comparison.left_out.iterrows():
        rounds = f"{row['rounds_done']} of {row['rounds']}" if row["rounds"] else "-"
        score = fixed(row[comparison.metric.name], comparison.metric.digits)
        texts = [row["setting"], value_text(None if pd.isna(row["seed"]) else row["seed"]), status_words(row["status"]), rounds]
        table.add_row(*(Text(str(text)) for text in (*texts, score, row["error"].splitlines()[0] if row["error"] else "")))
    return table


def _best(block: pd.DataFrame, quantity: Quantity) -> str:
    column = block[quantity.name]
    return fixed(column.min() if quantity.is_lower_better else column.max(), quantity.digits)


def _table(title: str, caption: str) -> Table:
    return Table(
        title=Text(title, style="italic"),
        caption=Text(caption, style="dim italic") if caption else None,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
