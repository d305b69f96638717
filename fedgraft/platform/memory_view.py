"""The memory part of a plan, drawn: one row a method and place, the node's sum, and what each word means."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group as RenderGroup
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fedgraft.platform.fitting import Need
from fedgraft.platform.memory import RankMemory
from fedgraft.platform.progress import bytes_text

__all__ = ["memory_view"]

_WIDEST = 12  # of a label, so that the table stays below 100 columns
_TITLES = {
    "weights": "weights",
    "graft": "graft",
    "gradients": "gradi-\nents",
    "optimizer": "opti-\nmiser",
    "activations": "activa-\ntions",
    "heap": "heap",
    "buffers": "buffers",
    "copies": "copies",
    "process": "process",
}
_WORDS = {
    "weights": "LoRA, parts trained in full, and the base where no other process shares it",
    "gradients": "of what trains",
    "optimiser": "moments; with ZeRO float32 masters and the step's gradients, divided by the ranks",
    "activations": "rows of a part x max_length x what layers keep; or an evaluation batch's",
    "heap": "freed pieces that a CPU process's allocator keeps, measured as about as much again",
    "buffers": "DeepSpeed's bucket of gradients, averaging, and weights that ZeRO 3 brings together",
    "copies": "start values, what the server sent, the client's own state, in float32",
    "process": "Python, PyTorch, Ray, DeepSpeed; on a GPU CUDA's own",
}


def memory_view(rows: Sequence[tuple[str, Need, int]], *, is_cluster: bool) -> RenderableType:
    """Draw what each rank and the node need.

    Args:
        rows: Label, need and number of replicas of each method.
        is_cluster: Whether replicas may be on nodes that are not known here.
    """
    if not rows:
        return Text()
    has_gpu = any(need.rank.device for _, need, _ in rows)
    shown = [name for name in _TITLES if name == "weights" or any(getattr(need.rank, name) for _, need, _ in rows)]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("a rank of", no_wrap=True)
    for name in shown:
        table.add_column(_TITLES[name], justify="right", no_wrap=True)
    table.add_column("private\ntotal", justify="right", no_wrap=True)
    for label, need, _ in rows:
        for title, on_host in (
            ((f"{_short(label)}, GPU", False), (f"{_short(label)}, host", True)) if need.rank.device else ((_short(label), True),)
        ):
            sizes = [need.rank.part(name, on_host=on_host) for name in shown]
            sizes[-1] += need.rank.part("context", on_host=on_host)  # the last one is the process
            total = need.rank.host if on_host else need.rank.device
            table.add_row(Text(title), *(bytes_text(size) if size else "-" for size in sizes), bytes_text(total))
    words = dict(_WORDS)
    words = {word: meaning for word, meaning in words.items() if word not in ("buffers", "heap") or word in shown}
    lines = [f"{word}: {meaning}." for word, meaning in words.items()]
    if has_gpu:
        lines.append("GPU, total: the base is read whole before ZeRO 3 shards it, so never less than all of it.")
    return RenderGroup(table, Text(), _nodes(rows), Text(), _doubts(rows, is_cluster), Text("\n".join(lines), style="dim"))


def _short(label: str) -> str:
    return label if len(label) <= _WIDEST else f"{label[: _WIDEST - 3]}..."


def _nodes(rows: Sequence[tuple[str, Need, int]]) -> Text:
    """One line a method: shared + replicas x ranks x private, against what the machine has."""
    lines = []
    width = max(len(label) for label, _, _ in rows)
    for label, need, replicas in rows:
        ranks = f" x {need.ranks} ranks" if need.ranks > 1 else ""
        count = f"{replicas} replica{'s' if replicas != 1 else ''}{ranks} x {bytes_text(need.rank.host)}"
        sums = f"{bytes_text(need.rank.shared)} shared + {count} = {bytes_text(need.host(replicas))}"
        lines.append(f"{label:<{width}}  {sums} of {bytes_text(need.host_limit)} free{_gpu(need)}")
    return Text("\n".join(lines))


def _gpu(need: Need) -> str:
    rank: RankMemory = need.rank
    if not rank.device:
        return ""
    limit = "a size not known here" if need.gpu_limit is None else bytes_text(need.gpu_limit)
    return f"\n  and {bytes_text(rank.device)} a rank of its GPU's {limit}"


def _doubts(rows: Sequence[tuple[str, Need, int]], is_cluster: bool) -> Text:
    """What the comparison leaves open; nothing where it leaves nothing open."""
    lines = []
    if is_cluster:
        lines.append("A cluster is joined: the free memory is that of this machine, other nodes are not known here.")
    if any(need.rank.device and need.gpu_limit is None for _, need, _ in rows):
        lines.append("No GPU is seen from here, so whether a rank fits one is not known.")
    return Text("".join(f"{line}\n" for line in lines), end="")
