"""Write docs/methods/*.md from the code, and from what benchmarks/methods.py measured.

    python docs/write_method_pages.py

A test compares the pages with what this would write.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedgraft.platform.catalogue import MethodInfo, list_methods, method_page

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "methods"
RESULTS = ROOT / "benchmarks" / "results" / "methods.json"


def pages() -> dict[str, str]:
    """Give the text of every page by file name; methods of other packages are left out."""
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"partitions": {}}
    found = [info for info in list_methods() if info.is_builtin]
    texts = {f"{info.name}.md": method_page(info, _measured(info, results)) for info in found}
    return {"README.md": _index(found)} | texts


def _measured(info: MethodInfo, results: dict[str, Any]) -> dict[str, str]:
    rows = []
    for partition, table in results["partitions"].items():
        for label, row in table.items():
            if row["method"] != info.name:
                continue
            seeds = f"{row['num_seeds']} seed" + "s" * (row["num_seeds"] != 1)
            difference = row.get("difference_to_fedavg")
            versus = "-" if difference is None else f"{difference:+.3f} +- {row['difference_error']:.3f}"
            rows.append(f"| {partition} | {label} | {row['own_nll']:.3f} | {versus} | {row['mb_up']:.1f} | {seeds} |")
    if not rows:
        return {}
    head = "| partition | label | own NLL | minus FedAvg's | MB up | seeds |\n|---|---|---|---|---|---|"
    text = f"Last round on Dolly, as [benchmarks/results/methods.md](../../benchmarks/results/methods.md) tells.\n\n{head}\n"
    return {"What was measured": text + "\n".join(rows)}


def _index(found: list[MethodInfo]) -> str:
    rows = [f"| [{info.title}]({info.name}.md) | `{info.name}` | {info.paper} | {info.summary} |" for info in found]
    head = "| method | name | paper | what it does |\n|---|---|---|---|"
    return (
        "# Methods\n\nOne page a method, written from the code by `docs/write_method_pages.py`. "
        "All compared: [benchmarks/results/methods.md](../../benchmarks/results/methods.md). "
        "A method of your own: [own-method.md](../own-method.md).\n\n" + "\n".join([head, *rows]) + "\n"
    )


def main() -> None:
    """Write all pages; pages of methods that are gone are deleted."""
    PAGES.mkdir(exist_ok=True)
    texts = pages()
    for path in PAGES.glob("*.md"):
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        (PAGES / name).write_text(text, encoding="utf-8")
    print(f"{len(texts)} pages in {PAGES}")


if __name__ == "__main__":
    main()
