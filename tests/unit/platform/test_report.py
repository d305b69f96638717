"""The HTML report of a synthetic comparison: what it says, what it leaves out, and that it stands alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from fedgraft.errors import FedgraftError
from fedgraft.platform import results
from fedgraft.platform.report import style, write_report

CLIENTS, EXPERTS, LAYERS, ROUNDS = 8, 64, list(range(16)), 4
NAMES = [
    "<script>alert(1)</script>",
    "a & b",
    "$x$ _y",
    "_hidden",
    "\u6cd5\u5f8b",
    "five",
    "six",
    "a name that is very long indeed",
]
FINAL = {"base": 2.5, "FLEx graft": 1.5, "local only": 1.504, "FedAvg <b>LoRA</b>": 1.8, "FLAME": 1.9, "PFedMoE": 1.7}


def lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(folder: Path, label: str, seed: int = 0, **more: object) -> Path:
    """A run whose NLL falls in equal steps from 2.5 to ``FINAL``, with +-0.02 that alternates over clients for one label."""
    folder.mkdir(parents=True)
    rounds = 0 if label == "base" else ROUNDS
    rng = np.random.default_rng(seed)
    info = {"run_id": "r", "label": label, "method": label, "seed": seed, "status": "finished", "rounds": rounds}
    info |= {"num_clients": CLIENTS, "client_names": NAMES, "learning_rate": 1e-3, "seconds": 100.0, "has_private": True}
    info |= {"model": {"family": "olmoe", "layers": LAYERS, "num_experts": EXPERTS, "top_k": 8, "num_parameters": 2e7}}
    info |= {"versions": {"torch": "2.13.0"}, "frozen_hash_start": "aa", "frozen_hash_end": "aa", "started_at": "now"}
    (folder / "run.json").write_text(json.dumps(info | more), encoding="utf-8")
    (folder / "config.yaml").write_text("method: <i>graft</i>\n", encoding="utf-8")
    evaluations, metrics, ledger, diagnostics = [], [], [], []
    for idx in range(rounds + 1):
        view = "personal" if idx else "global"
        level = 2.5 + (FINAL[label] - 2.5) * idx / max(rounds, 1)
        for client in range(CLIENTS):
            value = level + (0.02 * (-1) ** client if label == "local only" and idx else 0.0)
            row = {"round": idx, "view": view, "client_id": client, "split": "test", "weight": 100.0}
            evaluations.append(row | {"task": "client", "metric": "nll", "total": 100 * value})
            evaluations.append(row | {"task": "client", "metric": "routing_entropy", "total": 200.0 - idx})
            evaluations.append(row | {"task": "retention", "metric": "nll", "total": 230.0 + idx * (label != "base")})
            evaluations.append(row | {"task": "choice", "metric": "choice_accuracy", "total": 26.0})
            if idx:
                ledger += [
                    {"round": idx, "client_id": client, "direction": way, "group": "shared", "bytes": 2**20, "is_retry": False}
                    for way in ("up", "down")
                    if label != "local only"
                ]
        if idx:
            tokens = rng.integers(0, 1000, (len(LAYERS), EXPERTS)).tolist()
            metrics.append({"round": idx, "train_loss": level, "cohort": list(range(CLIENTS)), "expert_tokens": tokens})
    if label == "FLEx graft":
        for client in range(CLIENTS):
            choice = {"layers": LAYERS, "experts": [[7]] * 16, "loss": [[0.5]] * 16, "zero_loss": [2.0] * 16}
            gate = {"mean_open_own": [0.5] * 16, "mean_open_retention": [0.1] * 16}
            diagnostics.append({"round": 1, "client_id": client, "kind": "graft_choice", "values": choice})
            diagnostics.append({"round": 4, "client_id": client, "kind": "graft_gate", "values": gate})
    for name, rows in (("evaluations", evaluations), ("metrics", metrics), ("ledger", ledger), ("diagnostics", diagnostics)):
        lines(folder / f"{name}.jsonl", rows)
    counts = [{"client_id": idx, "name": name, "train": {"law": idx}, "test": {"law": 1}} for idx, name in enumerate(NAMES)]
    (folder / "partition.json").write_text(json.dumps({"labels": ["law", "<u>"], "clients": counts}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> results.ComparisonResult:
    folder = tmp_path_factory.mktemp("comparison")
    runs = {label: [f"run{place}"] for place, label in enumerate(FINAL)}
    for place, label in enumerate(FINAL):
        failure = {"client_id": 1, "round_idx": 2, "stage": "train", "error": "out of memory <script>"}
        make_run(folder / f"run{place}", label, failures=[failure] if label == "FLAME" else [])
    search = {"rates": [1e-4, 1e-3], "validation_nll": [2.0, 1.9], "chosen": 1e-3, "is_edge": True, "rounds": 2}
    data = {"labels": list(FINAL), "base": "base", "runs": runs, "rate_search": {"FLAME": search}, "seeds": [0]}
    (folder / "comparison.json").write_text(json.dumps(data), encoding="utf-8")
    return results.read_comparison(folder)


@pytest.fixture(scope="module")
def page(comparison: results.ComparisonResult, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_report(comparison, tmp_path_factory.mktemp("report") / "new" / "report.html")
    return path.read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Collects tags, ids, headings and the cells marked as won."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.headings: list[str] = []
        self.won: list[str] = []
        self._into: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag == "h2":
            self._into = self.headings
        if tag == "td" and "win" in (dict(attrs).get("class") or "").split():
            self._into = self.won

    def handle_data(self, data: str) -> None:
        if self._into is not None and data.strip():
            self._into.append(data.strip())
            self._into = None


def test_the_file_stands_alone_and_is_small(page: str) -> None:
    outline = Outline(page)
    assert not {"link", "img", "iframe", "object"} & set(outline.tags)
    links = [value for name, value in outline.attributes if name in ("href", "src", "xlink:href") and value]
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert set(re.findall(r"https?://[^\"\s]+", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in page
    assert len(page.encode()) < 1_500_000


def test_what_comes_from_files_is_escaped(page: str) -> None:
    outline = Outline(page)
    assert outline.tags["script"] == 1
    assert not {"b", "u"} & set(outline.tags)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "method: &lt;i&gt;graft&lt;/i&gt;" in page
    assert "$x$ _y" in page
    assert "\u6cd5\u5f8b" in page


def test_figures_are_named_well_formed_and_have_ids_of_their_own(page: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) >= 10
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.get("role") == "img"
        assert len(root.get("aria-label") or "") > 10
        targets = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", drawing))
        assert targets <= set(re.findall(r' id="([^"]+)"', drawing))
    ids = Outline(page).ids
    assert len(ids) == len(set(ids))
    # Colours are the page's variables: a stand-in left over would show as almost black in both schemes.
    assert not re.search(r"#0[12]0[23][0-9a-f]{2}\b", page)
    assert set(re.findall(r"var\((--[a-z0-9]+)\)", page)) <= set(re.findall(r"(--[a-z0-9-]+):", page))


def test_the_words_state_best_tie_losses_and_seeds(page: str) -> None:
    # 1.504 +- 0.02 alternating: standard error 0.0214 / sqrt(8) = 0.0076, difference 0.004. The others are constant.
    assert "Lowest NLL on clients&#39; own text: FLEx graft, 1.500 (mean over 8 clients)." in page
    assert "Not told apart from it (within two standard errors): local only (by 0.004 \u00b1 0.008)." in page
    assert "Worse: PFedMoE (by 0.200" in page
    assert "keeps most, 2.340, 0.040 above the untouched model" in page
    assert "One seed: no spread over seeds" in page
    assert "Choice accuracy tells nothing here" in page


def test_the_best_of_each_column_is_marked(page: str) -> None:
    won = Outline(page).won
    # Base: spread over clients (0 for all but one), retention. FLEx: own NLL, worst client, spread. Choice is silent.
    assert won[:5] == ["0.000", "2.300", "1.500", "1.500", "0.000"]
    assert "0.260" not in won


def test_warnings_failures_and_checks_are_shown(page: str) -> None:
    assert "FLAME: the chosen rate 0.001 is at the edge of its grid" in page
    assert "out of memory &lt;script&gt;" in page
    assert "Rounds in which a client gave no update" in page
    assert "the same hash before and after training in all 6 runs" in page


@pytest.mark.slow
def test_the_same_data_give_the_same_bytes(comparison: results.ComparisonResult, page: str, tmp_path: Path) -> None:
    assert write_report(comparison, tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_sections_without_data_are_left_out(comparison: results.ComparisonResult, page: str, tmp_path: Path) -> None:
    everything = Outline(page).headings
    assert everything == [
        "Summary", "Learning curves", "Clients", "Personalisation and retention", "Cost", "Learning rates", "Grafts",
        "Use of experts", "Who has which data", "Failures", "Checks and versions", "Configuration",
    ]  # fmt: skip
    base = write_report(comparison.runs["base"][0], tmp_path / "base.html").read_text(encoding="utf-8")
    assert Outline(base).headings == [
        "Summary", "Clients", "Cost", "Who has which data", "Checks and versions", "Configuration",
    ]  # fmt: skip


@pytest.mark.slow
def test_grafts_that_are_no_experts_copy_show_their_gates_only(tmp_path: Path) -> None:
    pages = {}
    for name in ("copy", "other"):
        folder = make_run(tmp_path / name, "FLEx graft")
        rows = [json.loads(line) for line in (folder / "diagnostics.jsonl").read_text().splitlines()]
        for row in rows:
            if row["kind"] == "graft_choice" and name == "other":
                del row["values"]["experts"]
            elif row["kind"] == "graft_choice":  # no graft in the first layer
                row["values"]["experts"] = [[], *row["values"]["experts"][1:]]
        lines(folder / "diagnostics.jsonl", rows)
        pages[name] = write_report(results.read_run(folder), tmp_path / f"{name}.html").read_text(encoding="utf-8")
    assert all("Mean opening of the graft gate" in page for page in pages.values())
    assert [caption in pages[name] for name in pages for caption in ("Expert grafted by", "loss of the grafted expert")] == [
        True, True, False, False,
    ]  # fmt: skip


@pytest.mark.slow
def test_a_single_run_is_told_against_its_start(comparison: results.ComparisonResult, tmp_path: Path) -> None:
    page = write_report(comparison.runs["FLEx graft"][0], tmp_path / "one.html").read_text(encoding="utf-8")
    assert "<h1>FLEx graft on olmoe</h1>" in page
    assert "That is 1.000 lower than before training (2.500)." in page
    assert "before training" in page
    assert "Worse:" not in page


def test_a_changed_frozen_hash_and_a_stopped_run_are_warned_of(tmp_path: Path) -> None:
    run = results.read_run(make_run(tmp_path / "run", "FLAME", frozen_hash_end="bb", status="stopped"))
    page = write_report(run, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Frozen parameters changed: FLAME, seed 0." in page
    assert "FLAME, seed 0: stopped, not finished." in page
    assert "the same hash" not in page


def test_a_run_that_failed_at_once_still_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"run_id": "x", "label": "graft", "status": "failed", "rounds": 9}))
    page = write_report(results.read_run(tmp_path), tmp_path / "report.html").read_text(encoding="utf-8")
    assert "no evaluation on clients&#39; own text" in page
    assert "failed, not finished" in page


@pytest.mark.slow
def test_several_seeds_show_their_spread(tmp_path: Path) -> None:
    runs = {"FLAME": ("a", "b"), "PFedMoE": ("c", "d")}
    for label, folders in runs.items():
        for seed, folder in enumerate(folders):
            make_run(tmp_path / folder, label, seed)
    data = {"labels": list(runs), "base": None, "runs": runs, "seeds": [0, 1]}
    (tmp_path / "comparison.json").write_text(json.dumps(data), encoding="utf-8")
    page = write_report(results.read_comparison(tmp_path), tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&plusmn; 0.000" in page
    assert "One seed" not in page
    assert "Bands: one standard deviation over seeds." in page


def test_a_place_that_cannot_be_written_is_a_clear_error(comparison: results.ComparisonResult, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FedgraftError, match="writing the report"):
        write_report(comparison.runs["base"][0], tmp_path / "file" / "report.html")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1010 * 1024, "1010 KiB"), (3 * 2**40, "3 TiB")]
)
def test_bytes_are_written_with_a_unit(count: int, text: str) -> None:
    assert style.readable_bytes(count) == text


@pytest.mark.slow
def test_pyplot_is_not_imported() -> None:
    code = "import sys, fedgraft.platform.report; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
