"""Reads run folders and comparisons into data frames, and sums them up.

Every mean over clients is a mean of client means, so a client with many tokens counts as much as one with few. Spreads
over clients and over seeds are sample standard deviations (n - 1), NaN where there is one value only.

A method that keeps private state is judged by its personal models. One without has the same model for every client, and
its evaluations have the view ``global``; those stand in where a round has no personal ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from fedgraft.errors import FedgraftError, ResultsError
from fedgraft.training.evaluate import is_informative
from fedgraft.types import Weighted

__all__ = [
    "QUANTITIES",
    "ComparisonResult",
    "Quantity",
    "RunResult",
    "best_round",
    "client_values",
    "failure_counts",
    "is_choice_informative",
    "last_round",
    "rank",
    "read_comparison",
    "read_json",
    "read_run",
    "round_values",
    "summary",
    "summary_table",
]

_NUM_CHOICES = 4  # as in MMLU, where a run does not say

_METRICS_COLUMNS = ("round", "train_loss", "seconds", "bytes_up", "bytes_down", "cohort")
_EVALUATION_COLUMNS = ("round", "view", "task", "client_id", "split", "metric", "total", "weight")
_LEDGER_COLUMNS = ("round", "client_id", "direction", "group", "bytes", "is_retry")
_DIAGNOSTICS_COLUMNS = ("round", "client_id", "kind", "values")
_INFO_KEYS = ("run_id", "label", "status")


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantity:
    """A number of the summary: its column, how it is called in a table, and whether more or less of it is better."""

    name: str
    title: str
    is_lower_better: bool
    digits: int = 3


QUANTITIES = (
    Quantity(name="personal_nll", title="own NLL", is_lower_better=True),
    Quantity(name="worst_client_nll", title="worst client NLL", is_lower_better=True),
    Quantity(name="client_spread_nll", title="spread over clients", is_lower_better=True),
    Quantity(name="token_accuracy", title="token accuracy", is_lower_better=False),
    Quantity(name="rouge_l", title="ROUGE-L", is_lower_better=False),
    Quantity(name="worst_client_rouge_l", title="worst client ROUGE-L", is_lower_better=False),
    Quantity(name="retention_nll", title="retention NLL", is_lower_better=True),
    Quantity(name="choice_accuracy", title="choice accuracy", is_lower_better=False),
)
"""What a round of a run is judged by, in the order of the tables."""

_TOTALS = ("bytes_up", "bytes_down", "seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """One run as its folder has it.

    Attributes:
        folder: The run folder.
        label: The method's label shown to users.
        status: ``finished``, ``stopped``, ``failed`` or ``running``.
        info: All of ``run.json``.
        metrics: A row a round: ``round``, ``train_loss``, ``seconds``, ``bytes_up``, ``bytes_down``, ``cohort`` and
            what else the round noted.
        evaluations: A row a metric: ``round``, ``view``, ``task``, ``client_id`` (nullable), ``split``, ``metric``,
            ``total``, ``weight`` and ``value`` = total / weight.
        ledger: A row a transfer: ``round``, ``client_id``, ``direction``, ``group``, ``bytes``, ``is_retry``.
        diagnostics: ``round``, ``client_id`` (nullable), ``kind``, ``values`` (a mapping).
        partition: ``partition.json``; empty where the run has none.
        config: The text of ``config.yaml``; empty where the run has none.
    """

    folder: Path
    label: str
    status: str
    info: Mapping[str, Any]
    metrics: pd.DataFrame
    evaluations: pd.DataFrame
    ledger: pd.DataFrame
    diagnostics: pd.DataFrame
    partition: Mapping[str, Any]
    config: str = ""

    @property
    def client_names(self) -> dict[int, str]:
        """Names by client id: those of the run, else ``client 3``."""
        names = list(self.info.get("client_names") or [])
        count = int(self.info.get("num_clients") or len(names))
        return {idx: str(names[idx]) if idx < len(names) else f"client {idx}" for idx in range(count)}

    @property
    def report(self) -> Path | None:
        """The HTML report of this run, or of the experiment that it is part of; ``None`` where none was written."""
        found = (self.folder / "report.html", self.folder.parent.parent / "report.html")
        return next((path for path in found if path.is_file()), None)

    @property
    def has_private(self) -> bool:
        """Whether the method keeps private state on clients."""
        return bool(self.info.get("has_private"))


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonResult:
    """Several methods on the same clients.

    Attributes:
        folder: The comparison folder.
        labels: In the order of the comparison.
        base: The label of the untouched base model, if it takes part.
        runs: By label, one run a seed.
        rate_search: By label: ``rates``, ``validation_nll``, ``chosen``, ``is_edge``, ``rounds``.
        seeds: As many as each label has runs, when all are done.
        status: As in ``RunResult``.
    """

    folder: Path
    labels: tuple[str, ...]
    base: str | None
    runs: Mapping[str, tuple[RunResult, ...]]
    rate_search: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    status: str = "finished"

    @property
    def report(self) -> Path | None:
        """The HTML report of the comparison; ``None`` where none was written."""
        path = self.folder / "report.html"
        return path if path.is_file() else None


def read_run(folder: Path | str) -> RunResult:
    """Read a run folder.

    Args:
        folder: Holds ``run.json``. A finished run must have ``evaluations.jsonl``, and with rounds ``metrics.jsonl``
            and ``ledger.jsonl``, too; what else is missing is left empty.

    Raises:
        ResultsError: A file is missing, or a line is torn: file and line are named.
    """
    folder = Path(folder)
    info = read_json(folder / "run.json")
    for key in _INFO_KEYS:
        if key not in info:
            raise ResultsError(f"{folder / 'run.json'}: the key {key!r} is missing", "is this a fedgraft run folder?")
    is_done = info["status"] == "finished"
    is_trained = is_done and int(info.get("rounds") or 0) > 0
    evaluations = _read_lines(folder / "evaluations.jsonl", _EVALUATION_COLUMNS, is_needed=is_done)
    evaluations = evaluations.astype({"total": float, "weight": float, "client_id": "Int64"})
    evaluations["value"] = evaluations["total"] / evaluations["weight"].where(evaluations["weight"] != 0)
    ledger = _read_lines(folder / "ledger.jsonl", _LEDGER_COLUMNS, is_needed=is_trained)
    diagnostics = _read_lines(folder / "diagnostics.jsonl", _DIAGNOSTICS_COLUMNS, is_needed=False)
    partition = folder / "partition.json"
    config = folder / "config.yaml"
    return RunResult(
        folder=folder,
        label=str(info["label"]),
        status=str(info["status"]),
        info=info,
        metrics=_read_lines(folder / "metrics.jsonl", _METRICS_COLUMNS, is_needed=is_trained),
        evaluations=evaluations,
        ledger=ledger.astype({"bytes": float}),
        diagnostics=diagnostics.astype({"client_id": "Int64"}),
        partition=read_json(partition) if partition.exists() else {},
        config=config.read_text(encoding="utf-8") if config.exists() else "",
    )


def read_comparison(folder: Path | str) -> ComparisonResult:
    """Read a comparison folder and the runs that it names.

    Raises:
        ResultsError: A file is missing or torn, or a label has no runs listed.
    """
    folder = Path(folder)
    path = folder / "comparison.json"
    data = read_json(path)
    labels = tuple(str(label) for label in data.get("labels", ()))
    listed = data.get("runs", {})
    lacking = [label for label in labels if not listed.get(label)]
    if not labels or lacking:
        what = f"no runs listed for {', '.join(lacking)}" if lacking else "no labels"
        raise ResultsError(f"{path}: {what}", "run the comparison to its end, or resume it")
    return ComparisonResult(
        folder=folder,
        labels=labels,
        base=data.get("base"),
        runs={label: tuple(read_run(folder / part) for part in listed[label]) for label in labels},
        rate_search=data.get("rate_search") or {},
        seeds=tuple(int(seed) for seed in data.get("seeds") or ()),
        status=str(data.get("status", "finished")),
    )


def client_values(run: RunResult, task: str = "client", metric: str = "nll", split: str = "test") -> pd.DataFrame:
    """Give one metric by round and client.

    Where a round has rows of the view ``personal``, those are taken, else the ``global`` ones.

    Returns:
        Columns ``round``, ``client_id`` (-1: no client, the global model as such), ``value`` and ``weight``, sorted.
    """
    rows = run.evaluations
    wanted = (rows["task"] == task) & (rows["metric"] == metric) & ((task != "client") | (rows["split"] == split))
    rows = rows[wanted]
    personal = rows[rows["view"] == "personal"]
    rows = pd.concat([personal, rows[(rows["view"] == "global") & ~rows["round"].isin(personal["round"])]])
    rows = rows.assign(client_id=rows["client_id"].fillna(-1).astype(int), round=rows["round"].astype(int))
    rows["unknown"] = rows["total"].isna().astype(int)  # a sum leaves NaN out, and would make an NLL of 0 of it
    sums = rows.groupby(["round", "client_id"], as_index=False)[["total", "weight", "unknown"]].sum()
    sums["value"] = sums["total"] / sums["weight"].where((sums["weight"] != 0) & (sums["unknown"] == 0))
    return sums[["round", "client_id", "value", "weight"]]


def round_values(run: RunResult, split: str = "test") -> pd.DataFrame:
    """Give every quantity of ``QUANTITIES`` by evaluated round.

    Returns:
        Indexed by ``round``; NaN where a round did not measure a quantity.
    """
    nll = client_values(run, "client", "nll", split).groupby("round")["value"]
    rouge = client_values(run, "client", "rouge_l", split).groupby("round")["value"]
    table = {
        "personal_nll": nll.mean(),
        "worst_client_nll": nll.max(),
        "client_spread_nll": nll.std(),
        "token_accuracy": client_values(run, "client", "token_accuracy", split).groupby("round")["value"].mean(),
        "rouge_l": rouge.mean(),
        "worst_client_rouge_l": rouge.min(),
        "retention_nll": client_values(run, "retention", "nll").groupby("round")["value"].mean(),
        "choice_accuracy": client_values(run, "choice", "choice_accuracy").groupby("round")["value"].mean(),
    }
    frame = pd.DataFrame(table, columns=[quantity.name for quantity in QUANTITIES], dtype=float)
    frame.index.name = "round"
    return frame.sort_index()


def failure_counts(runs: Sequence[RunResult]) -> pd.DataFrame:
    """Count the rounds in which a client gave no update, over all of the runs.

    Returns:
        Columns ``client_id``, ``stage`` (at which it failed) and ``rounds``, sorted by the first two; no row where none failed.
    """
    failures = [failure for run in runs for failure in run.info.get("failures") or ()]
    rows = pd.DataFrame(failures, columns=["client_id", "stage"])
    return rows.groupby(["client_id", "stage"]).size().rename("rounds").reset_index()


def last_round(run: RunResult) -> int:
    """Give the last round whose personal NLL was measured; -1 where none was."""
    values = round_values(run)["personal_nll"].dropna()
    return int(values.index.max()) if len(values) else -1


def best_round(run: RunResult) -> int:
    """Give the round of the lowest personal NLL, round 0 included; -1 where none was measured.

    Validation examples choose it where every round judged on test examples was judged on those, too. Otherwise the test
    examples choose, and the numbers of the best round are a little too good.
    """
    test = round_values(run)["personal_nll"].dropna()
    if not len(test):
        return -1
    validation = round_values(run, "validation")["personal_nll"].reindex(test.index)
    chooser = test if validation.isna().any() else validation
    return int(chooser.index[int(chooser.to_numpy().argmin())])


def is_choice_informative(result: RunResult | ComparisonResult) -> bool | None:
    """Say whether the multiple-choice task tells anything about this model.

    It does not where the untouched base model is within two standard errors of chance, p = 1 / choices:
    |accuracy - p| <= 2 sqrt(p (1 - p) / n) for n questions. The base is the comparison's base label, else round 0
    of the first run that has it. ``None`` where the base was not asked.
    """
    runs = _runs_by_label(result)
    first = [result.base] if isinstance(result, ComparisonResult) and result.base in runs else []
    for label in [*first, *runs]:
        for run in runs[label]:
            rows = client_values(run, "choice", "choice_accuracy")
            rows = rows[(rows["round"] == 0) & rows["value"].notna()]
            if len(rows):
                num_choices = int(run.info.get("num_choices") or _NUM_CHOICES)
                accuracy, count = float(rows["value"].mean()), float(rows["weight"].max())
                return is_informative(Weighted(total=accuracy * count, weight=count), num_choices)
    return None


def summary(result: RunResult | ComparisonResult) -> pd.DataFrame:
    """Sum up each method in one row.

    Returns:
        Indexed by label, in the order of the comparison. ``method``, ``num_seeds``, ``num_clients``, ``learning_rate``,
        ``last_rounds`` and ``best_rounds`` (tuples, one a seed; see ``best_round``), ``choice_informative``,
        ``client_failures`` (rounds in which a client gave no update, over all clients and seeds); for each
        quantity q of ``QUANTITIES`` ``last_q`` and ``best_q``; ``bytes_up``, ``bytes_down``, ``seconds`` of the whole
        run.
        Over several seeds these are means, and ``<column>_std`` is the sample deviation (NaN with one seed).
    """
    informative = is_choice_informative(result)
    rows = {}
    for label, runs in _runs_by_label(result).items():
        seeds = pd.DataFrame([_seed_values(run) for run in runs])
        row: dict[str, object] = {
            "method": runs[0].info.get("method", label),
            "num_seeds": len(runs),
            "num_clients": int(runs[0].info.get("num_clients") or 0),
            "learning_rate": runs[0].info.get("learning_rate"),
            "last_rounds": tuple(last_round(run) for run in runs),
            "best_rounds": tuple(best_round(run) for run in runs),
            "choice_informative": informative,
            "client_failures": int(failure_counts(runs)["rounds"].sum()),
        }
        for column in seeds.columns:
            row[column] = seeds[column].mean()
            row[f"{column}_std"] = seeds[column].std()
        rows[label] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("label")


def rank(result: RunResult | ComparisonResult, task: str = "client", metric: str = "nll") -> pd.DataFrame:
    """Compare each method's last round with the best method's, client by client.

    The standard error of a difference is the larger of two: over clients (paired, each averaged over seeds) and, with
    several seeds, over seeds. A difference of at most two standard errors is a tie. A method with one model for all
    clients has that model's value for each of them.

    Returns:
        Indexed by label, best first: ``value``, ``difference`` (>= 0: how much worse than the best),
        ``standard_error``, ``outcome`` (``best``, ``tie``, ``worse``, or ``unknown`` where there is no standard error).
        The base is among them. Labels without the metric are left out.
    """
    sign = 1.0 if metric == "nll" else -1.0
    tables: dict[str, pd.DataFrame] = {}
    for label, runs in _runs_by_label(result).items():
        columns = []
        for run in runs:
            rows = client_values(run, task, metric)
            columns.append(rows[rows["round"] == last_round(run)].set_index("client_id")["value"])
        table = pd.concat(columns, axis=1).dropna(how="all")
        table.columns = pd.RangeIndex(len(columns))
        if len(table):
            tables[label] = table
    if not tables:
        return pd.DataFrame(columns=["value", "difference", "standard_error", "outcome"])
    means = {label: float(table.mean().mean()) for label, table in tables.items()}
    order = sorted(means, key=lambda label: sign * means[label])
    rows_out = {}
    for label in order:
        difference, error = _difference(tables[label] * sign, tables[order[0]] * sign)
        outcome = "unknown" if math.isnan(error) else "tie" if abs(difference) <= 2 * error else "worse"
        rows_out[label] = {
            "value": means[label],
            "difference": difference,
            "standard_error": error,
            "outcome": "best" if label == order[0] else outcome,
        }
    return pd.DataFrame.from_dict(rows_out, orient="index").rename_axis("label")


def summary_table(result: RunResult | ComparisonResult, at: str = "last") -> Table:
    """Draw the summary for a terminal of 100 characters.

    Args:
        result: What to sum up.
        at: ``last`` or ``best``: which round's values. The best round is that of the lowest personal NLL.
    """
    if at not in ("last", "best"):
        raise FedgraftError(f"summary table: round {at!r} is unknown; known: last, best")
    frame = summary(result)
    table = Table(
        title=f"{at} round of each method",
        caption=_caption(result, frame),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    table.add_column("method", no_wrap=True, max_width=20, overflow="ellipsis")
    table.add_column("round", justify="right")
    shown = [q for q in QUANTITIES if q.name != "worst_client_rouge_l" and frame[f"{at}_{q.name}"].notna().any()]
    short = {
        "personal_nll": "own NLL",
        "worst_client_nll": "worst\nNLL",
        "client_spread_nll": "client\nspread",
        "token_accuracy": "token\nacc.",
        "rouge_l": "ROUGE",
        "retention_nll": "general\nNLL",
        "choice_accuracy": "choice",
    }
    for quantity in shown:
        direction = "lower" if quantity.is_lower_better else "higher"
        table.add_column(f"{short[quantity.name]}\n{direction}", justify="right")
    table.add_column("MiB up\nlower", justify="right")
    table.add_column("rate", justify="right")
    has_failures = bool(frame["client_failures"].sum())
    if has_failures:
        table.add_column("no\nupdate", justify="right")
    best = {q.name: _best_text(frame[f"{at}_{q.name}"], q) for q in shown}
    for label, row in frame.iterrows():
        cells = [Text(str(label)), Text(_rounds_text(row[f"{at}_rounds"]))]
        for quantity in shown:
            text = _number(row[f"{at}_{quantity.name}"], quantity.digits)
            is_best = len(frame) > 1 and text == best[quantity.name]
            cells.append(Text(text, style="bold" if is_best else ""))
        rate = row["learning_rate"]
        cells += [
            Text(_number(row["bytes_up"] / 2**20, 1)),
            Text("-" if rate is None or pd.isna(rate) else _rate(rate)),
        ]
        if has_failures:
            cells.append(Text(str(row["client_failures"])))
        table.add_row(*cells)
    return table


def _caption(result: RunResult | ComparisonResult, frame: pd.DataFrame) -> str:
    parts = ["bold: best of a column; 'lower' and 'higher': which is better"]
    if int(frame["num_seeds"].max()) == 1:
        parts.append("one seed: no spread over seeds")
    if frame["client_failures"].sum():
        parts.append("no update: how often a client failed in a round; the report names clients, stages and errors")
    if is_choice_informative(result) is False:
        parts.append("choice accuracy tells nothing here: the base model is at chance")
    return "\n".join(parts)


def _difference(mine: pd.DataFrame, best: pd.DataFrame) -> tuple[float, float]:
    """Give mean difference and standard error of two (clients x seeds) tables on the clients of both."""
    if list(mine.index) == [-1]:
        mine = mine.reindex(best.index, method="nearest")
    if list(best.index) == [-1]:
        best = best.reindex(mine.index, method="nearest")
    both = mine.index.intersection(best.index)
    clients = mine.loc[both].mean(axis=1) - best.loc[both].mean(axis=1)
    errors = [clients.std() / math.sqrt(max(len(both), 1))]
    if mine.shape[1] == best.shape[1] and mine.shape[1] > 1:
        seeds = mine.loc[both].mean() - best.loc[both].mean()
        errors.append(seeds.std() / math.sqrt(len(seeds)))
    known = [float(error) for error in errors if not math.isnan(error)]
    return float(mine.mean().mean() - best.mean().mean()), max(known) if known else math.nan


def _seed_values(run: RunResult) -> dict[str, float]:
    table = round_values(run)
    row: dict[str, float] = {}
    for at, round_idx in (("last", last_round(run)), ("best", best_round(run))):
        for quantity in QUANTITIES:
            value = table[quantity.name].get(round_idx, math.nan)
            row[f"{at}_{quantity.name}"] = float(value)
    for direction in ("up", "down"):
        row[f"bytes_{direction}"] = float(run.ledger.loc[run.ledger["direction"] == direction, "bytes"].sum())
    row["seconds"] = float(run.info.get("seconds") or math.nan)
    return row


def _runs_by_label(result: RunResult | ComparisonResult) -> dict[str, tuple[RunResult, ...]]:
    if isinstance(result, RunResult):
        return {result.label: (result,)}
    return {label: result.runs[label] for label in result.labels}


def _rate(value: float) -> str:
    """Write 0.0002 as 2e-4."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _best_text(column: pd.Series[float], quantity: Quantity) -> str:
    return _number(column.min() if quantity.is_lower_better else column.max(), quantity.digits)


def _number(value: float, digits: int) -> str:
    return "-" if pd.isna(value) else f"{value:.{digits}f}"


def _rounds_text(rounds: Sequence[int]) -> str:
    found = sorted({round_idx for round_idx in rounds if round_idx >= 0})
    if not found:
        return "-"
    return str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        ResultsError: It is not there, torn, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultsError(f"reading results: {path} does not exist", "give the folder of a run or comparison") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultsError(f"reading results: {path} is not JSON: {error}", "the file is torn; resume the run") from error
    if not isinstance(value, dict):
        raise ResultsError(f"reading results: {path} should hold a JSON object, not {type(value).__name__}")
    return value


def _read_lines(path: Path, columns: Sequence[str], *, is_needed: bool) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    if not path.exists():
        if is_needed:
            raise ResultsError(f"reading results: {path} does not exist", "the run is not complete; resume it")
        return pd.DataFrame(columns=list(columns))
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ResultsError(
                f"reading results: {path}, line {number} is not JSON: {error}", "the line is torn; resume the run"
            ) from error
        if not isinstance(row, dict):
            raise ResultsError(f"reading results: {path}, line {number} should hold a JSON object")
        rows.append(row)
    frame = pd.DataFrame(rows)
    return frame.reindex(columns=[*columns, *(name for name in frame.columns if name not in columns)])
