"""Wrong configurations, many of them: each must be taken as valid, or be refused by one message with exit code 2.

    python benchmarks/config_fuzz.py                 2000 mutations of every example and packaged file, seed 0
    python benchmarks/config_fuzz.py --count 500 --seed 7 --show 20

A mutation starts from one of the files ``fedgraft run`` and ``fedgraft pretrain`` are shown with, and spoils it in one of four
ways: its tree (keys dropped, misspelt, moved, values of wrong types, ranges and units), its text (torn, tabs, bytes that are no
UTF-8, keys twice, aliases), an override on the command line, or a path. Then the command runs in this process up to the point
where it would begin to train; what a valid one would run with is written as YAML and read again. Of every mutation is checked

    the exit code is 0 or 2;    no traceback, and no talk of a bug in fedgraft;
    each problem has a key path, the value and what was expected;    it took no longer than ``LIMIT_S``.

One JSON line with the counts on stdout; what broke a rule is shown on stderr, and the exit code is 1. ``--plan`` also makes
the plan of every valid configuration of a run whose model is no name of the hub, as ``--dry-run`` does.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

import fedgraft
from fedgraft.cli import app
from fedgraft.errors import FedgraftError
from fedgraft.platform.config import RunConfig
from fedgraft.platform.loading import dump_config, load_config
from fedgraft.platform.plan import MachineFacts, make_plan
from fedgraft.platform.pretraining.config import PretrainConfig
from fedgraft.platform.pretraining.loading import dump_pretrain_config, load_pretrain_config
from fedgraft.platform.validation import key_places
from fedgraft.registry import METHODS

ROOT = Path(__file__).parents[1]
LIMIT_S = 20.0
"""Longest that one mutation may take; a hundred times what it takes on an idle machine."""

COMMANDS = {"pretrain.yaml": "pretrain"}
MACHINE = MachineFacts(cores=2, memory_bytes=8 * 2**30, gpus=0, gpu_bytes=None, speed=1e10)

WRONG: tuple[Any, ...] = (
    None, True, False, 0, -1, -0.0, 1, 2, 3, 7, 10**6, 10**9, 10**18, 10**40, -(10**12), 0.5, 1.5, -2.5, 1e-300, 1e300,
    float("nan"), float("inf"), float("-inf"), "", " ", "x", "none", "None", "~", "yes", "1", "-1", "1e-3", "1e400", "nan", "inf",
    "10 s", "1GiB", "50%", "0x10", "1_000", "\x00", "\u00e9\u4e2d", "\U0001f600", "a" * 5000, "../..", "/", "/dev/null",
    "~nobody-here/x",
    "a\nb", "${HOME}",
    "!!python/none", [], [[]], [1], [None], ["x"] * 3, [1, "a", None], list(range(300)), {},
    {"name": 3}, {"a": {}},
    {"": 1}, {"a": [{"b": [{}]}]},
)  # fmt: skip
DEEP: Any = None
for _ in range(30):
    DEEP = {"a": [DEEP]}
BOMB = "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9))
"""Each key holds nine of the one before: 9 lines of text, 4e8 values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mutation:
    """What the command gets: a file's bytes (``None``: the path alone), its path, overrides; ``how`` says what was done."""

    how: str
    base: str
    command: str
    content: bytes | None
    name: str = "config.yaml"
    overrides: tuple[str, ...] = ()


@dataclass(slots=True)
class Outcome:
    """How the command ended; ``wrong`` lists the rules that were broken."""

    is_valid: bool
    problems: int
    text: str
    seconds: float
    wrong: list[str] = field(default_factory=list)


def bases() -> dict[str, tuple[str, str]]:
    """Every shown configuration by name: the command that takes it, and its text."""
    packaged = ROOT / "fedgraft" / "platform"
    paths = [*sorted((ROOT / "examples").glob("*.yaml")), packaged / "quickstart.yaml", packaged / "pretrain.yaml"]
    found = {}
    for path in paths:
        found[str(path.relative_to(ROOT))] = (COMMANDS.get(path.name, "run"), path.read_text("utf-8"))
    return found


# What is spoilt.


def mutations(seed: int) -> Iterator[Mutation]:
    """Give mutations for ever, the same ones for the same seed; the files take turns."""
    rng = random.Random(seed)
    found = bases()
    ways: list[Callable[[random.Random, str, str, str], Mutation]] = [
        _of_tree,
        _of_tree,
        _of_tree,
        _of_text,
        _of_overrides,
        _of_path,
    ]
    while True:
        for name, (command, text) in found.items():
            yield rng.choice(ways)(rng, name, command, text)


def _of_tree(rng: random.Random, base: str, command: str, text: str) -> Mutation:
    tree = yaml.safe_load(text)
    how = [_spoil(rng, tree, command) for _ in range(rng.choice((1, 1, 1, 2, 4)))]
    dumped = yaml.dump(tree, Dumper=yaml.SafeDumper, allow_unicode=rng.random() < 0.5, sort_keys=False)
    return Mutation(how="; ".join(how), base=base, command=command, content=dumped.encode("utf-8", "surrogatepass"))


def _spoil(rng: random.Random, tree: dict[str, Any], command: str) -> str:
    """Change one place of a tree."""
    places = list(_places(tree))
    holder, key = rng.choice(places) if places else (tree, "name")
    kind = rng.choice(
        ("drop", "drop", "misspell", "move", "set", "set", "known", "known", "wrap", "deep", "negate", "scale", "scale")
    )
    if kind == "drop" and key in (holder if isinstance(holder, dict) else range(len(holder))):
        del holder[key]
    elif kind == "misspell" and isinstance(holder, dict):
        new = _misspell(rng, str(key))
        holder[new] = holder.pop(key, None)
        return f"{key} misspelt {new!r}"
    elif kind == "move" and isinstance(holder, dict):
        other, _ = rng.choice(places)
        if isinstance(other, dict):
            other[key] = copy.deepcopy(holder.get(key))
    elif kind == "known":
        path = rng.choice(_known_paths(command))
        value = copy.deepcopy(rng.choice(WRONG))
        _put(tree, path, value)
        return f"{'.'.join(path)} set to {value!r}"[:200]
    elif kind == "wrap":
        holder[key] = rng.choice(([holder[key]], {str(key): holder[key]}, str(holder[key]))) if _holds(holder, key) else [None]
    elif kind == "deep":
        holder[key] = copy.deepcopy(DEEP)
    elif kind in ("negate", "scale") and _holds(holder, key) and isinstance(holder[key], int | float):
        holder[key] = -holder[key] if kind == "negate" else holder[key] * rng.choice((2, 3, 10**6, 10**12, 1e-9, 1.5))
    else:
        holder[key] = copy.deepcopy(rng.choice(WRONG))
    return f"{kind} {key}"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def _holds(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else isinstance(key, int) and 0 <= key < len(holder)


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    at = tree
    for part in path[:-1]:
        if not isinstance(at.get(part), dict):
            at[part] = {}
        at = at[part]
    at[path[-1]] = value


def _misspell(rng: random.Random, key: str) -> Any:
    at = rng.randrange(len(key) + 1)
    return rng.choice((key[:at] + key[at + 1 :], key[:at] + "x" + key[at:], key.upper(), f"{key} ", f".{key}", 7, "", None, True))


def _known_paths(command: str) -> list[tuple[str, ...]]:
    """Every key path of the command's configuration, with the options of every method."""
    kind: type[BaseModel] = RunConfig if command == "run" else PretrainConfig
    paths = [tuple(path.split(".")) for each in key_places(kind).values() for path in each]
    if command == "run":
        for name in METHODS.names():
            options = key_places(METHODS.get(name).config_class)
            paths += [("method", *path.split(".")) for each in options.values() for path in each]
    return sorted(set(paths))


def _of_text(rng: random.Random, base: str, command: str, text: str) -> Mutation:
    lines = text.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    place = rng.randrange(len(text))
    sign = rng.choice(":[]{},&*!|>'\"%@`#-?\t\x00\x0b\x85\u2028\ufeff")
    ways: dict[str, Callable[[], str | bytes]] = {
        "torn": lambda: text[:place],
        "a sign more": lambda: text[:place] + sign + text[place:],
        "a sign less": lambda: text[:place] + text[place + 1 :],
        "a line twice": lambda: "".join([*lines[: at + 1], lines[at], *lines[at + 1 :]]),
        "the text twice": lambda: text + "\n" + text,
        "two documents": lambda: text + "\n---\n" + text,
        "tabs": lambda: text.replace("  ", "\t"),
        "an indent less": lambda: text.replace("\n  ", "\n", 1),
        "bytes": lambda: text[:place].encode() + bytes(rng.randrange(256) for _ in range(8)) + text[place:].encode(),
        "latin": lambda: f"name: caf\u00e9\n{text}".encode("latin-1"),
        "utf-16": lambda: text.encode("utf-16"),
        "binary": lambda: rng.randbytes(400),
        "empty": lambda: rng.choice(("", "\n\n", "# nothing\n", "---\n", "null\n", "...")),
        "a list": lambda: f"- {text.replace(chr(10), chr(10) + '  ')}",
        "a scalar": lambda: rng.choice(("3", "text", "2020-01-01", "2020-13-45", "!!binary x", "!!set {a}", "!!timestamp 1")),
        "a tag": lambda: text + rng.choice(("x: !!python/object/apply:os.getpid []\n", "x: !own {}\n", "seeds: !!omap [a: 1]\n")),
        "an alias bomb": lambda: "a: &a [x]\n" + BOMB + text,
        "an alias of itself": lambda: f"zz: &z [*z]\n{text}",
        "a merge of nothing": lambda: f"zz: {{<<: {rng.choice(('3', '[1]', 'null', '*no'))}}}\n{text}",
        "a long number": lambda: f"seeds: [{'9' * 6000}]\n{text}",
        "a long key": lambda: f"{'k' * 2000}: 1\n{text}",
        "many keys": lambda: text + "".join(f"k{i}: {i}\n" for i in range(400)),
        "nested": lambda: text + "zz: " + "[" * 400,
        "odd keys": lambda: (
            text + rng.choice(("1: 2\n", "null: 1\n", "? [a, b]\n: 1\n", "true: x\n", "1.5: x\n", "2020-01-01: x\n"))
        ),
    }
    how = rng.choice(list(ways))
    made = ways[how]()
    return Mutation(how=how, base=base, command=command, content=made if isinstance(made, bytes) else made.encode("utf-8"))


def _of_overrides(rng: random.Random, base: str, command: str, text: str) -> Mutation:
    paths = _known_paths(command)

    def ugly() -> str:
        key = ".".join(rng.choice(paths))
        value = rng.choice(WRONG)
        shown = value if isinstance(value, str) and len(value) < 100 else json.dumps(value, default=str)
        return rng.choice(
            (
                f"{key}={shown}", f"{key}={shown}", f"{key}={shown}", f"{key}={shown}", f"{key}", f"={shown}", f"{key}.={shown}",
                f".{key}={shown}", f"{key}.x.y={shown}", f"{key}=", f"{key}==", f" {key} = {shown}", f"{key}=[",
                f"{key}={{a: 1, a: 2}}",
                f"{key}=*a", f"{key}=!!python/name:os.system", f"{key}=\udcff", f"{key}\u00e9={shown}", f"{key.upper()}={shown}",
                f"{key.replace('.', '..')}={shown}", f"{key}=a: b: c", f"{key}='", f"{key}=" + "[" * 400, f"{key}=- 1\n- 2",
                "=", ".=.",
            )
        )  # fmt: skip

    given = tuple(ugly() for _ in range(rng.choice((1, 1, 2, 5))))
    return Mutation(how="overrides", base=base, command=command, content=text.encode(), overrides=given)


def _of_path(rng: random.Random, base: str, command: str, text: str) -> Mutation:
    name = rng.choice(
        (
            ".",
            "..",
            "/",
            "no.yaml",
            "no/such/folder.yaml",
            "config.yaml/below",
            "",
            " ",
            "a" * 300,
            "a\x00b",
            "~nobody-here/x.yaml",
            "\udcff",
        )
    )
    if rng.random() < 0.4 and command == "run":
        keys = ("data.path", "data.retention.path", "data.questions.path", "model.path", "output.folder", "output.cache")
        given = (f"{rng.choice((*keys, 'federation.budgets.profile'))}={json.dumps(name)}", f"method_files=[{json.dumps(name)}]")
        return Mutation(
            how=f"path {name!r}", base=base, command=command, content=text.encode(), overrides=given[: rng.choice((1, 2))]
        )
    return Mutation(how=f"file {name!r}", base=base, command=command, content=None, name=name)


# What comes of it.


class Bench:
    """Runs mutations through the command, in a folder of its own, up to where it would begin to work."""

    def __init__(self, folder: Path, *, plans: bool = False) -> None:
        self._folder = folder
        self._plans = plans
        self._taken: list[Any] = []
        (folder / "examples").mkdir(exist_ok=True)
        for path in (ROOT / "examples").glob("*.py"):
            (folder / "examples" / path.name).write_text(path.read_text())

    def try_one(self, mutation: Mutation) -> Outcome:
        """Run one mutation and judge it."""
        given = mutation.name
        if mutation.content is not None:
            (self._folder / mutation.name).write_bytes(mutation.content)
        arguments = [mutation.command, given, *mutation.overrides]
        if "=" in given or given.startswith("-"):
            arguments[1] = f"./{given}"
        self._taken.clear()
        known = dict(METHODS._classes)
        started = time.perf_counter()
        with contextlib.chdir(self._folder), mock.patch.dict(vars(fedgraft), run=self._take, pretrain_model=self._take):
            done = CliRunner().invoke(app, arguments)
            seconds = time.perf_counter() - started
            outcome = Outcome(is_valid=bool(self._taken), problems=0, text=done.output, seconds=seconds)
            self._judge(outcome, done)
            if self._taken and not outcome.wrong:
                self._read_again(mutation, outcome)
        METHODS._classes = known  # without what the example's method files added
        return outcome

    def _take(self, config: Any, **options: Any) -> Any:
        self._taken.append(config)
        raise _Taken

    def _judge(self, outcome: Outcome, done: Any) -> None:
        if outcome.is_valid:
            if not isinstance(done.exception, SystemExit) or "_Taken" not in done.stderr:
                outcome.wrong.append(f"a valid one ended with {done.exception!r}")
        else:
            if done.exit_code != 2:
                outcome.wrong.append(f"exit code {done.exit_code}")
            if "bug in fedgraft" in done.output or "Traceback" in done.output:
                outcome.wrong.append("called a bug")
            if done.exception is not None and not isinstance(done.exception, SystemExit):
                outcome.wrong.append(f"raised {done.exception!r}"[:300])
            outcome.problems = self._count(outcome, done.stderr)
        if outcome.seconds > LIMIT_S:
            outcome.wrong.append(f"took {outcome.seconds:.1f} s")

    @staticmethod
    def _count(outcome: Outcome, text: str) -> int:
        """Check the form of a message; gives how many problems it tells."""
        head, _, rest = text.partition("\n")
        found = re.search(r": (\d+) problems?$", head)
        lines = [line for line in rest.splitlines() if line.strip()]
        if found is None or int(found.group(1)) != len(lines):
            outcome.wrong.append("not one line a problem under a headline with their number")
            return 0
        outcome.wrong += [f"no place, value and expectation in {line!r}" for line in lines if not _is_problem(line)][:3]
        return len(lines)

    def _read_again(self, mutation: Mutation, outcome: Outcome) -> None:
        """A valid configuration is written and read as the same one; its plan, if asked for, is made or refused in our words."""
        (config,) = self._taken
        dump, load = (dump_config, load_config) if mutation.command == "run" else (dump_pretrain_config, load_pretrain_config)
        try:
            again = load(yaml.safe_load(dump(config)))
            if again.model_dump() != config.model_dump():
                outcome.wrong.append("what was written is read as another configuration")
            if self._plans and mutation.command == "run" and config.model.name is None:  # the hub is not asked here
                with contextlib.suppress(FedgraftError):
                    make_plan(config, MACHINE)
        except Exception as error:
            outcome.wrong.append(f"after it was taken: {type(error).__name__}: {error}"[:600])


class _Taken(Exception):
    """Raised where the command would begin to work."""


def _is_problem(line: str) -> bool:
    return re.fullmatch(r"  \S.*: got .+; expected .+", line) is not None and line.isascii()


def run(count: int, seed: int, *, plans: bool = False) -> tuple[dict[str, Any], list[tuple[Mutation, Outcome]]]:
    """Try mutations; gives the counts, and those that broke a rule."""
    counts: Counter[str] = Counter()
    bad = []
    longest = 0.0
    with tempfile.TemporaryDirectory(prefix="fedgraft-fuzz-") as name, mock.patch.dict(os.environ, {"TMPDIR": name}):
        tempfile.tempdir = None
        bench = Bench(Path(name), plans=plans)
        for _, mutation in zip(range(count), mutations(seed), strict=False):
            outcome = bench.try_one(mutation)
            counts["valid" if outcome.is_valid else "refused"] += 1
            counts["problems"] += outcome.problems
            longest = max(longest, outcome.seconds)
            if outcome.wrong:
                bad.append((mutation, outcome))
    tempfile.tempdir = None
    return {**counts, "broken": len(bad), "slowest_s": round(longest, 2)}, bad


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="mutations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=10, help="how many broken ones to show on stderr")
    parser.add_argument("--plan", action="store_true", help="also make the plan of every valid configuration of a run")
    given = parser.parse_args(arguments)
    if given.count < 1:
        parser.error(f"--count {given.count}: expected at least 1")
    counts, bad = run(given.count, given.seed, plans=given.plan)
    print(json.dumps({"benchmark": "config_fuzz", "count": given.count, "seed": given.seed, **counts}))
    for mutation, outcome in bad[: given.show]:
        shown = dataclasses.replace(mutation, content=None)
        print(f"\n{shown}\n  {outcome.wrong}\n{outcome.text[:1500]}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
