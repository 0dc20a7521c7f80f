"""The command line: commands that call the library. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from brittle._version import __version__
from brittle.blame import described
from brittle.errors import SubjectError, UsageError
from brittle.exits import terminable, verdict

PRESETS = ("quick", "standard", "thorough")
"""Those of `brittle.pipeline`, which is too heavy to ask for `--help`."""

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
"""Of the doctor's verdicts, on a terminal."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. Errors end here, in one line."""
    shared: dict[str, bool] = {"debug": False}
    try:
        with terminable():
            status = commands.main(arguments, "brittle", standalone_mode=False, obj=shared)
            return status if isinstance(status, int) else 0
    except BaseException as error:
        if shared["debug"]:
            traceback.print_exception(error)
        line, status = verdict(error)
        if line:
            click.echo(f"brittle: {line}", err=True)
        return status


Command = Callable[..., Any]
Option = Callable[[Command], Command]


def debuggable(command: Command) -> Command:
    """Add --debug."""

    def note(context: click.Context, _: click.Parameter, value: bool) -> None:
        context.ensure_object(dict)["debug"] |= value

    help = "Print a traceback where something fails."
    return click.option("--debug", is_flag=True, is_eager=True, expose_value=False, callback=note, help=help)(command)


def looks(command: Command) -> Command:
    """Add what says which subject is looked at, and how."""
    return _with(
        command,
        click.argument("spec"),
        click.option(
            "-p", "options", multiple=True, callback=_pairs, metavar="KEY=VALUE", help="Option of the factory."
        ),
        click.option("--queries", type=click.IntRange(min=1), help="Inputs whose predictions are explained."),
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, mps, ..."),
        click.option(
            "--preset", type=click.Choice(PRESETS), default=PRESETS[0], show_default=True, help="How much work."
        ),
        debuggable,
    )


def audits(command: Command) -> Command:
    """Add the options of everything that writes a run folder."""
    return _with(
        command,
        click.option("--out", required=True, type=click.Path(path_type=Path), help="The run folder."),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all randomness."),
        click.option("--no-progress", is_flag=True, help="Draw no progress bars."),
        looks,
    )


def _with(command: Command, *options: Option) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def _pairs(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    for value in values:
        if "=" not in value or value.startswith("="):
            raise click.BadParameter(f"must be KEY=VALUE, found {value!r}; write -p seed=1", context, parameter)
    return dict(value.split("=", 1) for value in values)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.pass_context
def commands(context: click.Context) -> None:
    """Audit a trained classifier: where it fails, why there, whether that is true, and which data is missing."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@commands.command()
@audits
def audit(
    spec: str, out: Path, options: dict[str, str], queries: int | None, no_progress: bool, **settings: Any
) -> None:
    """Map, attack, compare, suggest and report on the subject that SPEC makes.

    SPEC is file.py:make or package.module:make. The same command on the same folder resumes.
    """
    from brittle import pipeline
    from brittle.loading import load_subject
    from brittle.runs import begun
    from brittle.terminal import headline

    _check_device(settings["device"])
    begun(out)  # a folder of something else is refused before the subject trains
    if queries is not None:
        settings["queries"] = queries
    with _progress(not no_progress):
        subject = load_subject(spec, options)
        findings = pipeline.audit(subject, out, spec=spec, options=options, progress=not no_progress, **settings)
    click.echo(headline(findings, out / "report.html"))


@commands.command()
@looks
@click.pass_context
def doctor(context: click.Context, spec: str, options: dict[str, str], queries: int | None, **settings: Any) -> int:
    """Try one batch of everything, and say what an audit would fail on, what it will cost, and the remedy.

    SPEC is file.py:make or package.module:make. Exit status 3 where the audit would fail.
    """
    from brittle.doctor import admitted, examine, listed, summary

    subject, found = admitted(spec, options)
    if subject is not None:
        settings |= {} if queries is None else {"queries": queries}
        seen = examine(subject, **settings)
        found += seen[1:] if found else seen  # where the door refused it, the first line would say otherwise
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for check, text in zip(found, listed(found, width), strict=True):
        word = len(check.verdict)
        click.echo(click.style(text[:word], fg=COLOURS[check.verdict]) + text[word:])
        if check.error is not None and context.obj["debug"]:
            traceback.print_exception(check.error)
    click.echo(f"\n{summary(found, whole=subject is not None)}")
    return SubjectError.exit_status if any(check.verdict == "fail" for check in found) else 0


def _check_device(name: str) -> None:
    import torch

    try:
        torch.zeros(1, device=name)
    except Exception as error:
        raise UsageError(f"--device must be of this machine, found {name!r} ({described(error)}); take cpu") from error


@contextmanager
def _progress(shown: bool) -> Iterator[None]:
    """Tell subjects that train themselves whether to draw progress bars."""
    from brittle.examples.training import QUIET

    before = os.environ.get(QUIET)
    if not shown:
        os.environ[QUIET] = "1"
    try:
        yield
    finally:
        if not shown and before is None:
            del os.environ[QUIET]


@commands.command()
@click.argument("run", type=click.Path(path_type=Path))
@debuggable
def report(run: Path) -> None:
    """Write the page of a finished audit again."""
    from brittle.report import render
    from brittle.runs import read_run

    folder = read_run(run)
    click.echo(folder.save_report(render(folder.findings(), folder.load("figures"), folder.load("pictures"))))


@commands.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--query", required=True, type=click.IntRange(min=0), help="Position of the input in the test data.")
@debuggable
def explain(run: Path, query: int) -> None:
    """Say why one input flips: the training examples that leave and those that arrive."""
    from brittle.runs import read_run
    from brittle.terminal import explanation

    click.echo(explanation(read_run(run), query))


@commands.command()
@click.argument("run", type=click.Path(path_type=Path))
@debuggable
def verify(run: Path) -> None:
    """Check every file of a run against its checksum, and the findings against their schema."""
    from brittle.runs import read_run

    folder = read_run(run)
    count = folder.verify()
    finished = "the findings obey their schema" if folder.has_document("findings") else "the audit is not finished"
    click.echo(f"{run}: {count} files are whole, {finished}")


@commands.command()
@debuggable
def schema() -> None:
    """Print the JSON schema of findings.json."""
    from brittle.findings import Findings

    click.echo(json.dumps(Findings.model_json_schema(), indent=2))


@commands.command()
@debuggable
def env() -> None:
    """Print versions and devices, for a report of a bug."""
    import torch

    from brittle.settings import versions

    devices = ["cpu", *(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count()))]
    facts = versions() | {"platform": platform.platform(), "cores": str(os.cpu_count()), "devices": ", ".join(devices)}
    for name, value in facts.items():
        click.echo(f"{name:<14}{value}")


if __name__ == "__main__":
    sys.exit(main())
