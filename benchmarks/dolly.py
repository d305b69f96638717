"""Six methods on Dolly, three seeds: personal NLL, ROUGE-L, worst client, retention and bytes, as a table and one JSON line.

    python benchmarks/dolly.py --model FOLDER --data dolly15k.jsonl.gz --retention TEXT --questions mmlu.jsonl.gz

The configuration is examples/dolly_compare.yaml with the sizes below, which suit a model of about 12 M parameters on two cores
(about 40 minutes). Learning rates are chosen on each seed's validation split. The table is written to
benchmarks/results/dolly-table.md (dolly.md has it with a reading in words), the numbers to dolly.json beside it.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import pandas as pd
import psutil

import fedgraft
from fedgraft.platform.results import rank, summary

RESULTS = Path(__file__).parent / "results"
COLUMNS = {
    "last_personal_nll": "own NLL",
    "last_personal_nll_std": "std over seeds",
    "last_worst_client_nll": "worst client NLL",
    "last_rouge_l": "ROUGE-L",
    "last_rouge_l_std": "std over seeds ",
    "last_retention_nll": "retention NLL",
    "last_choice_accuracy": "MMLU",
    "bytes_up": "MB up",
    "bytes_down": "MB down",
    "seconds": "s a run",
    "learning_rate": "rate",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--retention", required=True)
    parser.add_argument("--questions", required=True)
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--resume")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    overrides = [
        "name=dolly-benchmark",
        f"model.path={arguments.model}",
        "model.dtype=float32",
        f"data.path={arguments.data}",
        f"data.retention={{path: {arguments.retention}, max_examples: 48}}",
        f"data.questions={{path: {arguments.questions}, max_questions: 48}}",
        "data.max_length=128",
        "data.max_train_examples=320",
        "data.max_validation_examples=32",
        "data.max_test_examples=64",
        "federation.rounds=6",
        "evaluation.every=3",
        "evaluation.max_generate=24",
        "evaluation.max_new_tokens=32",
        "rate_search={rates: [0.001, 0.003, 0.01], rounds: 2}",
        f"output.folder={arguments.runs}",
        "tracking.enabled=false",
        *arguments.overrides,
    ]
    config = fedgraft.load_config(Path(__file__).parents[1] / "examples" / "dolly_compare.yaml", overrides)
    result = fedgraft.run(resume=arguments.resume) if arguments.resume else fedgraft.run(config)
    assert isinstance(result, fedgraft.ComparisonResult)
    frame = summary(result)
    table = frame[[name for name in COLUMNS if name in frame]].copy()
    table["bytes_up"] = table["bytes_up"] / 1e6
    table["bytes_down"] = table["bytes_down"] / 1e6
    table = table.rename(columns=COLUMNS)
    order = rank(result)
    record = {
        "benchmark": "dolly",
        "machine": f"{psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, {platform.machine()}",
        "versions": next(iter(result.runs.values()))[0].info["versions"],
        "seeds": list(result.seeds),
        "rate_search": dict(result.rate_search),
        "methods": json.loads(frame.to_json(orient="index", double_precision=6)),
        "rank": json.loads(order.to_json(orient="index", double_precision=6)),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "dolly.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "dolly-table.md").write_text(_markdown(table) + "\n")
    print(
        json.dumps({"benchmark": "dolly", "own_nll": frame["last_personal_nll"].round(4).to_dict(), "folder": str(result.folder)})
    )


def _markdown(table: pd.DataFrame) -> str:
    rows = [["method", *table.columns]]
    for label, row in table.iterrows():
        rows.append([str(label), *("-" if pd.isna(value) else f"{value:.4g}" for value in row)])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


if __name__ == "__main__":
    main()
