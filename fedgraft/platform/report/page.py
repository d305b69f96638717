"""Puts a run's or a comparison's report together: sections of words, tables and figures, written as one HTML file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import jinja2
import pandas as pd
from markupsafe import Markup

from fedgraft.errors import FedgraftError
from fedgraft.platform.budgets import distribution_text
from fedgraft.platform.report.inside import INSIDE_SECTIONS
from fedgraft.platform.report.outcome import OUTCOME_SECTIONS
from fedgraft.platform.report.parts import Section, Subject, count_text
from fedgraft.platform.report.style import colour_of
from fedgraft.platform.results import (
    ComparisonResult,
    RunResult,
    best_round,
    last_round,
    rank,
    round_values,
    summary,
)

__all__ = ["Page", "write_file", "write_report"]


def write_report(result: RunResult | ComparisonResult, path: Path | str) -> Path:
    """Write the report as one HTML file that loads nothing from anywhere.

    Args:
        result: A run, or several methods on the same clients. Sections without data are left out.
        path: The file; its folder is made where missing, and the file is replaced.

    Returns:
        The path.

    Raises:
        FedgraftError: The file cannot be written.
    """
    path = Path(path)
    subject = _subject(result)
    built = [build(subject) for build in (*OUTCOME_SECTIONS, *INSIDE_SECTIONS)]
    page = Page(
        title=_title(subject),
        facts=_facts(subject),
        verdict=_verdict(subject),
        sections=[section for section in built if section is not None],
        config=subject.first.config,
    )
    return write_file(page, path)


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """What stands on a report's page: title, facts as name and value, the outcome in sentences, sections, a configuration."""

    title: str
    facts: Sequence[tuple[str, str]]
    verdict: Sequence[str]
    sections: Sequence[Section]
    config: str = ""


def write_file(page: Page, path: Path) -> Path:
    """Write a page as one HTML file that loads nothing from anywhere.

    Raises:
        FedgraftError: The file cannot be written.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    package = resources.files("fedgraft.platform.report")
    text = environment.from_string((package / "report.html.j2").read_text(encoding="utf-8")).render(
        title=page.title,
        facts=page.facts,
        verdict=page.verdict,
        sections=page.sections,
        style=Markup((package / "report.css").read_text(encoding="utf-8")),
        config=page.config,
    )
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise FedgraftError(f"writing the report {path}: {error}", "give a path that can be written") from error
    return path


def _subject(result: RunResult | ComparisonResult) -> Subject:
    if isinstance(result, RunResult):
        is_base = int(result.info.get("rounds") or 0) == 0
        runs: dict[str, tuple[RunResult, ...]] = {result.label: (result,)}
        base = result.label if is_base else None
    else:
        runs = {label: result.runs[label] for label in result.labels}
        base = result.base
    others = [label for label in runs if label != base]
    colours = {label: colour_of(others.index(label) if label != base else 0, is_base=label == base) for label in runs}
    trained = {label: runs[label] for label in others}
    return Subject(result=result, runs=runs, colours=colours, base=base, table=summary(result), trained=trained)


def _title(subject: Subject) -> str:
    methods = list(subject.trained) or list(subject.runs)
    model = _model_name(subject.first)
    if len(methods) == 1:
        return f"{methods[0]} on {model}"
    return f"{len(methods)} methods on {model}"


def _facts(subject: Subject) -> list[tuple[str, str]]:
    run = subject.first
    info, model = run.info, run.info.get("model") or {}
    parts = []
    if model.get("num_experts"):
        parts.append(f"{len(model.get('layers') or ())} MoE layers with {model['num_experts']} experts, top {model.get('top_k')}")
    if model.get("num_parameters"):
        parts.append(count_text(float(model["num_parameters"])) + " parameters")
    seeds = sorted({int(each.info.get("seed") or 0) for runs in subject.runs.values() for each in runs})
    statuses = sorted({each.status for runs in subject.runs.values() for each in runs})
    return [
        ("Methods", ", ".join(subject.runs)),
        ("Model", "; ".join([_model_name(run), *parts])),
        ("Clients", str(info.get("num_clients", len(subject.names)))),
        ("Rounds", str(info.get("rounds", "-"))),
        ("Seeds" if len(seeds) > 1 else "Seed", ", ".join(map(str, seeds))),
        *_budgets(subject),
        ("Started", str(info.get("started_at", "-"))),
        ("Status", ", ".join(statuses)),
    ]


def _budgets(subject: Subject) -> list[tuple[str, str]]:
    """What clients may hold or train in each method's first run; nothing where no run has budgets."""
    texts = []
    for label, runs in subject.runs.items():
        info = runs[0].info if runs else {}
        if not info.get("budgets"):
            continue
        use = info.get("budget_use")
        counts = distribution_text(each.get("experts_per_layer") for each in info["budgets"])
        texts.append(f"{label}: not used, every client holds everything" if use == "none" else f"{label} ({use}): {counts}")
    return [("Budgets", "; ".join(texts))] if texts else []


def _model_name(run: RunResult) -> str:
    model = run.info.get("model") or {}
    return str(model.get("name") or model.get("family") or "an unnamed model")


def _verdict(subject: Subject) -> list[str]:
    """State the outcome in words, as it is: best, ties, losses, and against the untouched model."""
    lines = []
    ranks = rank(subject.result)
    num_clients = len(subject.names)
    if len(ranks) > 1:
        best = str(ranks.index[0])
        lines.append(f"Lowest NLL on clients' own text: {best}, {ranks['value'].iloc[0]:.3f} (mean over {num_clients} clients).")
        groups = {outcome: ranks[ranks["outcome"] == outcome] for outcome in ("tie", "worse", "unknown")}
        if len(groups["tie"]):
            lines.append(f"Not told apart from it (within two standard errors): {_with_differences(groups['tie'])}.")
        if len(groups["worse"]):
            lines.append(f"Worse: {_with_differences(groups['worse'])}.")
        if len(groups["unknown"]):
            lines.append(f"Worse by an amount without a known error: {_with_differences(groups['unknown'])}.")
        retention = rank(subject.result, "retention")
        if len(retention) > 1:
            lines.append(_retention_words(subject, retention))
    for label, runs in subject.trained.items():
        if len(subject.runs) == 1:
            lines += _single_words(label, runs[0])
    if int(subject.table["num_seeds"].max()) == 1:
        lines.append("One seed: no spread over seeds; standard errors are over clients.")
    else:
        lines.append("Standard errors are the larger of those over clients and over seeds.")
    return lines


def _with_differences(rows: pd.DataFrame) -> str:
    texts = []
    for label, row in rows.iterrows():
        error = "" if math.isnan(row["standard_error"]) else f" \u00b1 {row['standard_error']:.3f}"
        texts.append(f"{label} (by {row['difference']:.3f}{error})")
    return ", ".join(texts)


def _retention_words(subject: Subject, ranks: pd.DataFrame) -> str:
    base = ranks["value"].get(subject.base) if subject.base else None
    methods = ranks.drop(index=subject.base) if base is not None else ranks
    best, value = str(methods.index[0]), float(methods["value"].iloc[0])
    words = f"General text (retention NLL): of the methods, {best} keeps most, {value:.3f}"
    if base is None:
        return f"{words}."
    change = value - float(base)
    direction = "above" if change >= 0 else "below"
    return (
        f"{words}, {abs(change):.3f} {direction} the untouched model; {methods.index[-1]} least, {methods['value'].iloc[-1]:.3f}."
    )


def _single_words(label: str, run: RunResult) -> list[str]:
    values = round_values(run)["personal_nll"].dropna()
    if not len(values):
        return [f"{label}: no evaluation on clients' own text."]
    last, best = last_round(run), best_round(run)
    words = [f"NLL on clients' own text is {values[last]:.3f} at the last evaluated round ({last})."]
    if 0 in values.index and last != 0:
        change = values[last] - values[0]
        word = "lower" if change < 0 else "higher"
        words.append(f"That is {abs(change):.3f} {word} than before training ({values[0]:.3f}).")
    if best != last:
        words.append(f"It was lowest at round {best}: {values[best]:.3f}.")
    return words
