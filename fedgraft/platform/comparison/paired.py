"""Paired tests of settings against a baseline: the same clients, with the same seed, under both.

A pair is a client with a seed. Two tests are made of the differences: Wilcoxon's signed-rank test (Wilcoxon, 1945) and the
paired t-test; each one's p values are corrected over all comparisons by Holm's method (Holm, 1979). Clients of a seed
share what the server learned, so pairs of a seed are not independent and both p values are too small where runs differ a
lot from seed to seed. What does not lean on that is told beside them: the t-test over seeds' means (``seed_p``, from two
seeds), and in how many seeds the setting was better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from fedgraft.errors import ResultsError

__all__ = ["ALPHA", "COLUMNS", "choose_baseline", "holm", "paired_tests"]

ALPHA = 0.05
"""A corrected p value below this is called a difference."""

COLUMNS = (
    "setting", "baseline", "num_pairs", "num_clients", "num_seeds", "difference", "low", "high", "seeds_better",
    "wilcoxon_p", "wilcoxon_holm", "t_p", "t_holm", "seed_p", "outcome", "reason",
)  # fmt: skip
"""Columns of the tests: ``difference`` is setting minus baseline, ``low`` and ``high`` its 95 % interval by the t-test."""


def choose_baseline(settings: pd.DataFrame, named: str | None) -> str | None:
    """Give the label or setting that the others are tested against.

    Without a name: the label whose method is ``fedavg``; else the first label that is not the untouched base model; where
    there is one label only, ``None``: the first setting on each data.

    Raises:
        ResultsError: Nothing is called ``named``; what there is is listed.
    """
    labels = list(dict.fromkeys(settings["label"]))
    if named is not None:
        if named in labels or named in settings.index:
            return named
        known = [*labels, *(str(name) for name in settings.index if name not in labels)]
        raise ResultsError(
            f"--baseline: got {named!r}; expected one of: {', '.join(known)}", "name a method or a setting of the table"
        )
    if len(labels) == 1:
        return None
    trained = settings[settings["method"] != "base"]
    averaged = trained[trained["method"] == "fedavg"]
    found = averaged if len(averaged) else trained if len(trained) else settings
    return str(found["label"].iloc[0])


def paired_tests(
    settings: pd.DataFrame,
    runs: pd.DataFrame,
    clients: pd.DataFrame,
    *,
    keys: Sequence[str],
    metric: str,
    is_lower_better: bool,
    baseline: str | None,
) -> pd.DataFrame:
    """Test every setting against its baseline.

    Args:
        settings: As in ``Comparison``, and so ``runs`` and ``clients``.
        runs: Say which data a seed had.
        clients: The values.
        keys: Key paths by which settings differ.
        metric: A column of ``clients``.
        is_lower_better: Of the metric.
        baseline: From ``choose_baseline``.

    Returns:
        A row a setting with ``COLUMNS``. Where no test was possible ``outcome`` is ``refused`` and ``reason`` says why.
    """
    rows = []
    averaged = runs[runs["is_averaged"]]
    for name in settings.index:
        found, reason = _baseline_of(settings, str(name), baseline, keys)
        if found == name or (found is None and not reason):
            continue
        row: dict[str, Any] = {"setting": name, "baseline": found or baseline or "", "outcome": "refused", "reason": reason}
        if found is not None:
            row |= _test(averaged, clients, str(name), found, metric, is_lower_better)
        rows.append(row)
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    tested = table["outcome"] != "refused"
    for kind in ("wilcoxon", "t"):
        table.loc[tested, f"{kind}_holm"] = holm(table.loc[tested, f"{kind}_p"].to_numpy(float))
    is_found = tested & (table["wilcoxon_holm"].astype(float) < ALPHA)
    is_better = (table["difference"].astype(float) < 0) == is_lower_better
    table.loc[tested, "outcome"] = "not told apart"
    table.loc[is_found, "outcome"] = np.where(is_better[is_found], "better", "worse")
    return table


def holm(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Correct p values for the number of them, step down; NaN stays NaN and counts for nothing.

    Holm (1979), A simple sequentially rejective multiple test procedure: the k-th smallest of m is multiplied by
    m - k + 1, and none may be smaller than those before it, or larger than 1.
    """
    corrected = np.full(len(p_values), math.nan)
    order = [index for index in np.argsort(p_values) if not math.isnan(p_values[index])]
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, p_values[index] * (len(order) - place)))
        corrected[index] = largest
    return corrected


def _baseline_of(settings: pd.DataFrame, name: str, baseline: str | None, keys: Sequence[str]) -> tuple[str | None, str]:
    """Find a setting's own baseline: on the same data, and alike in every key that both have."""
    mine = settings.loc[name]
    on_same_data = settings[settings["data"] == mine["data"]]
    if baseline is None:
        return str(on_same_data.index[0]), ""
    if baseline in settings.index and not (settings["label"] == baseline).sum() > 1:
        return baseline, ""
    if mine["label"] == baseline:
        return None, ""
    found = on_same_data[on_same_data["label"] == baseline]
    if len(found) > 1:
        alike = [
            all(row[key] == mine[key] for key in keys if not (_is_none(row[key]) or _is_none(mine[key])))
            for _, row in found.iterrows()
        ]
        found = found[alike]
    if len(found) == 1:
        return str(found.index[0]), ""
    if len(found) == 0:
        return None, f"no finished run of {baseline} has the same clients' data"
    return None, f"{len(found)} settings of {baseline} fit ({', '.join(map(str, found.index))}): name one with --baseline"


def _test(
    runs: pd.DataFrame, clients: pd.DataFrame, name: str, baseline: str, metric: str, is_lower_better: bool
) -> dict[str, Any]:
    mine, other = runs[runs["setting"] == name], runs[runs["setting"] == baseline]
    reason = _clients_differ(mine, other, clients, name, baseline)
    if reason:
        return {"outcome": "refused", "reason": reason}
    values = [clients[clients["setting"] == each].set_index(["seed", "client_id"])[metric].dropna() for each in (name, baseline)]
    differences = (values[0] - values[1]).dropna()
    if len(differences) < 2:
        what = "no client has" if not len(differences) else "one client alone has"
        return {"outcome": "refused", "reason": f"{what} {metric} with {name} and with {baseline}"}
    numbers = differences.to_numpy(float)
    by_seed = differences.groupby("seed").mean().to_numpy(float)
    better = int(((by_seed < 0) if is_lower_better else (by_seed > 0)).sum())
    mean, error = float(numbers.mean()), float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    half = float(stats.t.ppf(0.975, len(numbers) - 1)) * error
    return {
        "num_pairs": len(numbers),
        "num_clients": differences.index.get_level_values("client_id").nunique(),
        "num_seeds": len(by_seed),
        "difference": mean,
        "low": mean - half,
        "high": mean + half,
        "seeds_better": better,
        "wilcoxon_p": _wilcoxon(numbers),
        "t_p": _t(numbers),
        "seed_p": _t(by_seed),
        "outcome": "tested",
        "reason": "",
    }


def _clients_differ(mine: pd.DataFrame, other: pd.DataFrame, clients: pd.DataFrame, name: str, baseline: str) -> str:
    """Say how the clients of two settings differ in the seeds that both have; empty where they do not."""
    seeds = sorted(set(mine["seed"]) & set(other["seed"]))
    if not seeds:
        return f"{name} and {baseline} have no seed in common"
    for seed in seeds:
        sets = [
            clients[(clients["setting"] == each) & (clients["seed"] == seed)].set_index("client_id")["client"].to_dict()
            for each in (name, baseline)
        ]
        if sets[0] != sets[1]:
            counts = f"{len(sets[0])} and {len(sets[1])}" if len(sets[0]) != len(sets[1]) else "others of the same number"
            return f"{name} and {baseline} were judged on different clients (seed {seed}: {counts})"
        prints = [frame.loc[frame["seed"] == seed, "data_fingerprint"].iloc[0] for frame in (mine, other)]
        if prints[0] != prints[1]:
            shown = [each[:8] or "unknown" for each in prints]
            return f"{name} and {baseline} had different data (seed {seed}: fingerprints {shown[0]} and {shown[1]})"
    return ""


def _wilcoxon(differences: NDArray[np.float64]) -> float:
    """Two-sided; differences of nothing are left out (Wilcoxon's own way), and nothing but such is no evidence."""
    changed = differences[differences != 0]
    return float(stats.wilcoxon(changed).pvalue) if len(changed) else 1.0


def _t(differences: NDArray[np.float64]) -> float:
    """Two-sided one-sample t-test; NaN with fewer than two values, or where they are all alike and not zero."""
    if len(differences) < 2:
        return math.nan
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    if error == 0:
        return 1.0 if not differences.any() else math.nan
    return float(2 * stats.t.sf(abs(differences.mean()) / error, len(differences) - 1))


def _is_none(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
