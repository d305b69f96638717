"""The command ``fedgraft``. It only calls what ``import fedgraft`` offers; a command imports what it needs when it is run."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.metadata
import json
import re
import signal
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

import fedgraft
from fedgraft.errors import FedgraftError, RunInterrupted

__all__ = ["app", "main"]

app = typer.Typer(
    name="fedgraft",
    help="Personalised federated fine-tuning of Mixture-of-Experts language models, simulated on Ray.",
    epilog="Exit codes: 0 done, 1 other errors, 2 wrong configuration or input, 3 Ray, 4 a broken promise of a method, "
    "5 too few clients answered, 6 checkpoint, 7 verify found a difference, 8 disk, 130 interrupted (Ctrl-C or SIGTERM).",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


_Address = Annotated[
    str | None,
    typer.Option("--address", metavar="HOST:PORT", help="Ray cluster to join; else executor.address, else RAY_ADDRESS."),
]
_RunId = Annotated[str, typer.Argument(metavar="ID", help="As fedgraft run --detach gave it; fedgraft status lists them.")]


def main() -> None:
    """Run the command line; the entry point of the command ``fedgraft``."""
    app()


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"fedgraft {importlib.metadata.version('fedgraft')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and end.")
    ] = False,
) -> None:
    pass  # the option's own callback does it


@app.command()
def run(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY=VALUE]...",
            help="A YAML file (without one: the packaged quickstart), then options of it to replace, such as "
            "federation.rounds=3 or method.name=flex. A first argument with '=' in it is no file. Relative paths, those in "
            "the file too, are relative to the current directory.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show the resolved configuration and the memory, bytes and time it needs; run nothing."),
    ] = False,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume", metavar="RUN_FOLDER", help="Go on with a run that was stopped, in its folder; a URI is fetched into runs."
        ),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Leave the run to a running cluster and give its id; see attach, stop and status.")
    ] = False,
    address: _Address = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show failures, notes and the result only.")] = False,
) -> None:
    """Run a configuration: one method, or several side by side."""
    source, overrides = _split(arguments or [])
    if detach and dry_run:
        raise typer.BadParameter("a dry run begins nothing that could be detached", param_hint="--detach")
    if resume is not None and (arguments or dry_run):
        raise typer.BadParameter("a resumed run keeps its configuration: give --resume RUN_FOLDER alone", param_hint="--resume")
    output = Console()
    with _errors():
        from fedgraft.platform.progress import make_display
        from fedgraft.tuning.experiment import with_address

        if resume is None:
            config = fedgraft.load_config(source, overrides)
            if dry_run:
                if address is not None:
                    config = with_address(config, address)
                plan = fedgraft.make_plan(config)
                _show(plan, output)
                plan.require_fit()
                return
        else:
            config = None
        if detach:
            # The id alone goes to stdout, for scripts.
            with make_display(Console(stderr=True), quiet=True) as display:
                run_id = fedgraft.detach(config, resume=resume, address=address, on_event=display)
            output.print(Text(run_id), soft_wrap=True)
            if not quiet:
                typer.echo(f"it goes on by itself: fedgraft attach {run_id}, fedgraft stop {run_id}, fedgraft status", err=True)
            return
        with make_display(output, quiet) as display:
            result = fedgraft.run(config, resume=resume, address=address, on_event=display)
        _show_result(result, output)


@app.command()
def attach(
    run_id: _RunId,
    address: _Address = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show failures, notes and the result only.")] = False,
) -> None:
    """Follow a run that was left to a cluster, from its beginning to its end; Ctrl-C leaves it, and it goes on."""
    with _errors():
        from fedgraft.platform.progress import make_display

        output = Console()
        with make_display(output, quiet) as display:
            result = fedgraft.attach(run_id, address=address, on_event=display)
        if result is not None:
            _show_result(result, output)


@app.command()
def stop(
    run_id: _RunId,
    address: _Address = None,
    now: Annotated[
        bool, typer.Option("--now", help="At once, not after the round that it is in; the round is run again.")
    ] = False,
) -> None:
    """End a run that was left to a cluster; it can be resumed."""
    with _errors():
        folder = fedgraft.stop(run_id, address=address, is_at_once=now)
        where = "its folder" if folder is None else str(folder)
        Console().print(Text(f"stopped {run_id}; go on with: fedgraft run --resume {where}"), soft_wrap=True)


@app.command()
def status(
    address: _Address = None,
    runs: Annotated[Path, typer.Option("--runs", help="Folder of runs to list, too.")] = Path("runs"),
) -> None:
    """List the runs that were left to a cluster, and those in a folder of runs."""
    with _errors():
        found = fedgraft.status(address=address, runs=runs)
    if not found:
        typer.echo("no runs")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("run", "status", "progress", "begun", "folder"):
        table.add_column(title, overflow="fold")
    for each in found:
        table.add_row(*(Text(text) for text in (each.run_id, each.status, each.progress, each.begun, each.folder)))
    _show(table, Console())


@app.command()
def sweep(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SWEEP] [KEY=VALUE]...",
            help="A YAML file with a base and a space, then options of it to replace, such as base.federation.rounds=3 or "
            "search.num_points=4. Relative paths, those in the file too, are relative to the current directory.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show points, trials, rounds, resources and the time they need; run nothing.")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="SWEEP_FOLDER", help="Go on with a sweep that was stopped or killed, in its folder."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show failures, notes and the result only.")] = False,
) -> None:
    """Run a configuration at many points of a space, with Ray Tune."""
    source, overrides = _split(arguments or [])
    if resume is not None and (arguments or dry_run):
        raise typer.BadParameter("a resumed sweep keeps its configuration: give --resume FOLDER alone", param_hint="--resume")
    if resume is None and source is None:
        raise typer.BadParameter(
            "name the file of a sweep, such as examples/sweep_small.yaml, or --resume FOLDER", param_hint="SWEEP"
        )
    output = Console()
    with _errors():
        from fedgraft.platform.progress import make_display
        from fedgraft.tuning.sweep_view import sweep_tables

        config = None
        if source is not None:
            config = fedgraft.load_sweep(source, overrides)
            if dry_run:
                plan = fedgraft.plan_sweep(config)
                _show(plan, output)
                plan.require_fit()
                return
        with make_display(output, quiet) as display:
            result = fedgraft.sweep(config, resume=resume, on_event=display)
        for table in sweep_tables(result):
            _show(table, output)


@app.command()
def pretrain(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY=VALUE]...",
            help="A YAML file (without one: a packaged small example), then options of it to replace, such as training.steps=50.",
        ),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="FOLDER", help="Go on with one that was stopped, in its output folder.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show notes and the result only.")] = False,
) -> None:
    """Make a base model from text, with Ray Train and DeepSpeed."""
    source, overrides = _split(arguments or [])
    if resume is not None and arguments:
        raise typer.BadParameter("what is resumed keeps its configuration: give --resume FOLDER alone", param_hint="--resume")
    with _errors():
        from fedgraft.platform.pretraining.command import pretrain_table
        from fedgraft.platform.progress import make_display

        config = fedgraft.load_pretrain_config(source, overrides) if resume is None else None
        output = Console()
        with make_display(output, quiet) as display:
            outcome = fedgraft.pretrain_model(config, resume=resume, on_event=display)
        output.print(pretrain_table(outcome))


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One method: how it works, and all its options.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, options with their descriptions too, as JSON.")] = False,
) -> None:
    """List the methods: paper, what each does, and what in it is reconstructed; or tell all about one."""
    with _errors():
        found = fedgraft.methods()
        if name is not None:
            from fedgraft.platform.catalogue import find_method, method_page

            found = [find_method(found, name)]
    if name is not None and not as_json:
        Console().print(Markdown(method_page(found[0])))
        return
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(info) for info in found], indent=1))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0))
    for title in ("name", "method and paper", "what it does"):
        table.add_column(title, overflow="fold")
    for info in found:
        what = Text(info.summary)
        if info.reconstructed:
            what.append(f"\nreconstructed here: {info.reconstructed}", style="dim")
        table.add_row(Text(info.name, style="bold"), Text(f"{info.title}\n{info.paper}"), what)
    console = Console()
    console.print(table)
    console.print(
        "Options and details of one: fedgraft methods NAME. Use it with: fedgraft run method.name=NAME", highlight=False
    )


@app.command()
def doctor(
    full: Annotated[bool, typer.Option("--full", help="Also start and stop a local Ray.")] = False,
    runs: Annotated[Path, typer.Option("--runs", help="Folder that runs will lie in.")] = Path("runs"),
) -> None:
    """Check packages, cores, memory, GPUs, Ray, MLflow and write access, and say what to do."""
    with _errors():
        from fedgraft.platform.doctor import check_table, has_failed

        checks = fedgraft.examine(full=full, runs=runs)
        Console().print(check_table(checks))
        if has_failed(checks):
            raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a run, an experiment or a sweep.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The file; else report.html in the folder.")] = None,
) -> None:
    """Write the report of a run, an experiment or a sweep again; `compare` puts several side by side."""
    with _errors():
        from fedgraft.platform.reporting import rewrite_report

        Console().print(Text(str(rewrite_report(folder, output))), soft_wrap=True)


@app.command()
def compare(
    targets: Annotated[
        list[Path] | None, typer.Argument(metavar="[TARGET]...", help="Folders of runs, experiments and sweeps.")
    ] = None,
    mlflow: Annotated[
        str | None,
        typer.Option("--mlflow", metavar="QUERY", help="Instead: runs that MLflow finds, e.g. tags.\"fedgraft.method\" = 'flex'"),
    ] = None,
    uri: Annotated[
        str | None,
        typer.Option("--uri", help="Store of --mlflow; else MLFLOW_TRACKING_URI, else runs/mlflow.db."),
    ] = None,
    metric: Annotated[
        str, typer.Option("--metric", help="What to judge by: personal_nll, token_accuracy or rouge_l.")
    ] = "personal_nll",
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", help="Method or setting to test the others against; else fedavg, else the first method."),
    ] = None,
    keys: Annotated[
        str | None, typer.Option("--keys", metavar="KEY,KEY", help="The heatmap's two keys; else the first two that vary.")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write a row a point, method, seed and client.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write one self-contained report.")] = None,
    figures: Annotated[
        Path | None, typer.Option("--figures", metavar="FOLDER", help="Write the report's figures as PNG and SVG for a paper.")
    ] = None,
) -> None:
    """Compare runs, experiments and sweeps: last scores, paired tests against a baseline, a report, figures."""
    if keys is not None and html is None and figures is None:
        raise typer.BadParameter("has an effect on --html and --figures only", param_hint="--keys")
    with _errors():
        found = fedgraft.compare(
            targets or (),
            mlflow=mlflow,
            uri=uri,
            metric=metric,
            baseline=baseline,
            keys=tuple(key.strip() for key in keys.split(",")) if keys is not None else (),
        )
        output = Console()
        _show(found.table(), output)
        written = [found.to_csv(csv)] if csv is not None else []
        written += [found.write_html(html)] if html is not None else []
        written += found.write_figures(figures) if figures is not None else ()
        for path in written:
            output.print(Text(str(path)), soft_wrap=True)


@app.command()
def ui(
    target: Annotated[
        Path | None,
        typer.Argument(
            metavar="[TARGET]",
            help="The runs folder, a folder in it, or a configuration; without it MLFLOW_TRACKING_URI, else the folder runs.",
        ),
    ] = None,
    port: Annotated[int, typer.Option("--port", "-p", min=1, max=65535, help="On this machine only (127.0.0.1).")] = 5000,
) -> None:
    """Show the runs in MLflow's user interface, until Ctrl-C."""
    with _errors():
        from fedgraft.platform.mlflow_ui import find_store, serve

        store, output = find_store(target), Console(highlight=False)
        if store.is_server:
            output.print(Text(f"{store.shown} is a tracking server with an interface of its own: open it in a browser"))
            return
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # whatever ends this command ends the server
            signal.signal(signum, _interrupt)
        try:
            output.print(Text(f"starting MLflow on {store.shown}"), soft_wrap=True)
            with serve(store, port) as server:
                output.print(Text(f"open {server.address} in a browser; Ctrl-C ends it"), soft_wrap=True)
                server.wait()
        except KeyboardInterrupt:
            output.print("ended")


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


@app.command()
def verify(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="Folder of a run, an experiment or a sweep.")],
    second: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN_B]", help="Another one to compare it with; alone, RUN_A is held to its own hashes."),
    ] = None,
) -> None:
    """Hash a run's tensors again, compare them and all records with another run's, and name the first difference."""
    with _errors():
        from fedgraft.platform.verify import verification_table

        found = fedgraft.verify(first, second)
        console = Console()
        _show(verification_table(found), console)
        for note in found.notes:
            console.print(Text(f"note: {note}", style="dim"), soft_wrap=True)
        if not found.is_same:
            _complain("\n".join(f"differs: {difference}" for difference in found.differences[:10]), "red")
            raise typer.Exit(7)
        whose = "every tensor has the hash that the run wrote down" if second is None else "same bits"
        console.print(Text(whose, style="green"))


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or an experiment's with one run.")],
    client: Annotated[
        int | None, typer.Option("--client", "-c", min=0, help="Whose personal model; without it the global model.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write, new or empty; else one under RUN/exports.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write whole weights with LoRA merged in, not adapters.")] = False,
    base: Annotated[
        str | None, typer.Option("--base", help="Where the base model is now, if no longer where the run found it.")
    ] = None,
) -> None:
    """Write a model of a run's last checkpoint as a folder for PEFT, transformers or fedgraft.load_export."""
    with _errors():
        made = fedgraft.export(run_folder, client=client, output=output, merge=merge, base=base)
        console = Console()
        console.print(Text(str(made.folder)), soft_wrap=True)
        what = (
            f"form: {made.form}; round {made.round_idx}; logits differ by at most {made.difference:.2g} from the run's own model"
        )
        console.print(Text(f"{what}; README.md says how to load it"), soft_wrap=True)


def _split(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Tell the file from the overrides: the first argument is a file unless it has a ``=``."""
    if arguments and "=" not in arguments[0]:
        return arguments[0], arguments[1:]
    return None, arguments


def _show_result(result: Any, output: Console) -> None:
    """The tables of the last and of the best rounds."""
    from fedgraft.platform.results import summary_table

    for at in ("last", "best"):
        _show(summary_table(result, at), output)


def _show(table: Any, output: Console) -> None:
    """Print what needs 100 characters a line; a narrower terminal wraps the lines."""
    Console(width=max(output.width, 100)).print(table)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Turn errors into one message on stderr and an exit code; nobody who uses the command sees a traceback."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except RunInterrupted as error:
        _complain(f"{error.message}; {error.hint}" if error.hint else error.message, "yellow")
        raise typer.Exit(error.exit_code) from None
    except FedgraftError as error:
        _complain(str(error), "red")
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        _complain("interrupted before the run began; start it again with the same command", "yellow")
        raise typer.Exit(RunInterrupted.exit_code) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            raise  # whoever read our output has gone; typer ends quietly
        with tempfile.NamedTemporaryFile("w", prefix="fedgraft-bug-", suffix=".txt", delete=False) as file:
            traceback.print_exc(file=file)
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        _complain(f"this is a bug in fedgraft: {what}\n  what to do: report it with the file {file.name}", "red")
        raise typer.Exit(1) from None


def _complain(text: str, style: str) -> None:
    text = re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", lambda found: ascii(found.group())[1:-1], text)  # names in a user's files
    Console(stderr=True, highlight=False).print(Text(text, style=style), soft_wrap=True)
