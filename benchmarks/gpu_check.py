"""One client's step of FLEx beside the same step in plain Hugging Face and PEFT: tokens/s, MFU, peak memory, as one JSON line.

    python benchmarks/gpu_check.py                          a model of 0.2 M parameters, on a CPU in seconds
    python benchmarks/gpu_check.py --size full --device cuda --dtype bfloat16 --out benchmarks/results/gpu.json

No Ray: only torch, transformers, peft and fedgraft's compute parts. Weights are random and made on the device; nothing is
downloaded or written but ``--out``. Four variants take the same batches from the same start: fedgraft's engine with the slots of
FLEx and of FedAvg (attention LoRA without a graft), and a plain AdamW loop over ``get_peft_model`` with and without a graft
written anew as a plain module. Each pair must agree on the first loss and on what it trained, and hosting client A, B, A must
give A's loss again, bit for bit where the device repeats itself at all; else the exit code is 1, after the figures are printed.

FLOPs of a step: T tokens at 4 a frozen weight and 6 more a trained value that a token passes through (fedgraft's own plan), the
output layer only on label tokens, and 6 S A a token and layer for causal attention (S length, A width of all heads): half of
S keys, two products, forward once and backward twice. The same count divides all variants, so work that one does beyond it
(plain HF applies the output layer to every token) lowers its MFU. Norms, softmax, routing and the optimiser are not counted; the
first layer's projections are counted with a gradient for their input, which needs none.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from client_step import Setting, Size, choose_kernel, count_flops, difference, measure_engine, measure_plain
from measuring import free, measure_matmul, peak_of

import fedgraft.aggregation  # noqa: F401  (registers the methods)
from fedgraft.protocols import TrainSpec
from fedgraft.registry import METHODS

# How far fedgraft and the plain loop may be apart: their first loss over the loss, and what they trained over its change. Both
# compute the same from differently grouped sums; AdamW turns small differences of small gradients into large ones.
FIRST_LOSS = {"float32": 1e-5, "bfloat16": 2e-3}
TRAINED = {"float32": 0.01, "bfloat16": 0.5}
KERNELS = ("auto", "grouped_mm", "eager", "batched_mm")
SIZES = {
    "small": Size(
        hidden=64,
        layers=2,
        experts=8,
        top_k=2,
        expert_hidden=32,
        shared_hidden=64,
        heads=4,
        vocabulary=512,
        batch=2,
        length=32,
        steps=3,
    ),
    "full": Size(  # Qwen1.5-MoE-A2.7B with 4 of its 24 layers
        hidden=2048,
        layers=4,
        experts=60,
        top_k=4,
        expert_hidden=1408,
        shared_hidden=5632,
        heads=16,
        vocabulary=151_936,
        batch=8,
        length=1024,
        steps=10,
    ),
}


def run(setting: Setting, kernel: str) -> tuple[dict[str, Any], list[str]]:
    """Measure everything; gives the record, and the checks that failed."""
    chosen = kernel
    kernels_ms: dict[str, float] = {}
    if kernel == "auto":
        chosen, kernels_ms = choose_kernel(setting)
        free(setting.device)
    setting = replace(setting, kernel=chosen)
    dtype = str(setting.dtype).removeprefix("torch.")
    device_name = torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else f"CPU ({platform.machine()})"
    matmul = measure_matmul(setting.device, setting.dtype)
    listed = peak_of(device_name, setting.dtype)
    peak = listed[1] if listed else matmul
    adapter = {"rank": setting.size.rank}
    variants: dict[str, dict[str, Any]] = {}
    counts: dict[str, dict[str, int]] = {}
    failed: list[str] = []
    agreement = {}
    for kind, name, label in (("lora", "fedavg", "fedgraft_lora"), ("graft", "flex", "fedgraft_flex")):
        method = METHODS.parse({"name": name, "adapter": adapter})
        variants[label], start, end = measure_engine(setting, method)
        free(setting.device)
        variants[f"peft_{kind}"], plain_end = measure_plain(setting, start, has_graft=kind == "graft")
        free(setting.device)
        counts[kind] = count_flops(setting, start)
        ours, theirs = variants[label], variants[f"peft_{kind}"]
        for figures in (ours, theirs):
            figures["mfu"] = round(1e3 * counts[kind]["flops_per_step"] / figures["step_ms"] / peak, 4)
        relative = [abs(a - b) / abs(b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
        apart = difference(start, end, plain_end)
        agreement[kind] = {"first_loss": relative[0], "worst_loss": max(relative), "trained_values": apart}
        if not relative[0] <= FIRST_LOSS[dtype]:
            failed.append(f"{kind}: first losses differ by {relative[0]:.2e}, more than {FIRST_LOSS[dtype]:.0e} of the loss")
        for part, share in apart.items():
            if not share <= TRAINED[dtype]:
                failed.append(f"{kind}: the trained {part} differ by {share:.2e} of their change, more than {TRAINED[dtype]:g}")
        aba = ours["aba"]
        if not aba["same_slots"] or (aba["device_repeats_itself"] and not aba["same_loss"]):
            failed.append(f"{label}: hosting A, B, A does not give A again: {aba}")
    record = {
        "benchmark": "gpu_check",
        "device": device_name,
        "dtype": dtype,
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda}
        | {name: metadata.version(name) for name in ("torch", "transformers", "peft")},
        "threads": torch.get_num_threads(),
        "float32_precision": torch.get_float32_matmul_precision(),
        "size": asdict(setting.size),
        "repeats": setting.repeats,
        "experts_implementation": chosen,
        "experts_ms": kernels_ms,
        "peak_flops": peak,
        "peak_source": f"table: {listed[0]}" if listed else "measured: large matmul",
        "matmul_flops": matmul,
        "counts": counts,
        "variants": variants,
        "agreement": agreement,
        "tolerance": {"first_loss": FIRST_LOSS[dtype], "trained_values": TRAINED[dtype]},
        "failed": failed,
    }
    return record, failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    for item in fields(Size):
        parser.add_argument(f"--{item.name.replace('_', '-')}", type=_positive, help="replaces this number of --size")
    parser.add_argument("--repeats", type=_positive, default=3, help="measured clients, after one that warms up")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=sorted(FIRST_LOSS), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument(
        "--experts-implementation", choices=KERNELS, default="auto", help="auto: grouped_mm or eager, whichever is faster here"
    )
    parser.add_argument("--float32-precision", choices=("highest", "high"), default="highest", help="high: TF32 for float32")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, help="also write the record to this file")
    given = parser.parse_args(arguments)
    try:
        device = torch.device(given.device)
    except RuntimeError:
        parser.error(f"--device {given.device}: expected cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {given.device}: torch sees no GPU; use --device cpu")
    if given.out is not None and not given.out.parent.is_dir():
        parser.error(f"--out {given.out}: the folder {given.out.parent} does not exist; make it first")
    replaced = {item.name: value for item in fields(Size) if (value := getattr(given, item.name)) is not None}
    size = replace(SIZES[given.size], **replaced)
    if size.hidden % (2 * size.heads):
        parser.error(f"--hidden {size.hidden}: expected a multiple of 2 * heads = {2 * size.heads}; change --hidden or --heads")
    if size.top_k > size.experts or size.length < 4:
        parser.error(f"--top-k {size.top_k} of --experts {size.experts}, --length {size.length}: top-k <= experts, length >= 4")
    torch.set_float32_matmul_precision(given.float32_precision)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events are recorded on the current device
    dtype = given.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    setting = Setting(
        size=size,
        device=device,
        dtype=getattr(torch, dtype),
        repeats=given.repeats,
        train=TrainSpec(learning_rate=given.learning_rate),
    )
    record, failed = run(setting, given.experts_implementation)
    print(json.dumps(record))
    if given.out is not None:
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    for problem in failed:
        print(problem, file=sys.stderr)
    return 1 if failed else 0


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
