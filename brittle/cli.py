"""The command line: commands that call the library. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from brittle._version import __version__
from brittle.blame import described
from brittle.errors import SubjectError, UsageError
from brittle.exits import terminable, verdict

if TYPE_CHECKING:
    from brittle.subject import Subject

PRESETS = ("quick", "standard", "thorough")
"""Those of `brittle.pipeline`, which is too heavy to ask for `--help`."""

NORMS = ("l0", "l1", "l2", "linf")
"""Those of `brittle.records`."""

PRECISIONS = ("float32", "tf32", "bfloat16")
"""Those of `brittle.kernel.precision`."""

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
        click.option(
            "--memory-budget",
            callback=_bytes,
            metavar="SIZE",
            help="For the queries that are accounted for at once, such as 500M or 4G.  [default: 2G]",
        ),
        click.option(
            "--tolerance",
            type=click.FloatRange(0, 1, min_open=True, max_open=True),
            help="Relative error of a shift that the map may have.  [default: the preset's]",
        ),
        click.option(
            "--precision",
            type=click.Choice(PRECISIONS),
            default=PRECISIONS[0],
            show_default=True,
            help="Of the ledger's products; sums are float32.",
        ),
        click.option("--deterministic", is_flag=True, help="The same bits every time; one thread a process."),
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


def _bytes(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """A number of bytes with an optional K, M or G."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)(?:i?B)?", value or "0", re.IGNORECASE)
    if found is None or (value is not None and float(found[1]) == 0):
        raise click.BadParameter(f"must be a size, found {value!r}; write 500M or 4G", context, parameter)
    return None if value is None else int(float(found[1]) * 1024 ** " KMG".index(found[2].upper() or " "))


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.pass_context
def commands(context: click.Context) -> None:
    """Audit a trained classifier: where it fails, why there, whether that is true, and which data is missing."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@commands.command()
@audits
def audit(out: Path, **asked: Any) -> None:
    """Map, attack, compare, suggest and report on the subject that SPEC makes.

    SPEC is file.py:make or package.module:make. The same command on the same folder resumes.
    """
    from brittle import pipeline
    from brittle.terminal import headline

    with _asked(out, **asked) as (subject, settings):
        findings = pipeline.audit(subject, out, **settings)
    click.echo(headline(findings, out / "report.html"))


@commands.command("map")
@audits
@click.option("--shard", metavar="I/N", help="This job's share of the units of work, 0/N to N-1/N in an array of jobs.")
def make_map(out: Path, shard: str | None, **asked: Any) -> None:
    """Make the map of an audit alone: memory, shift, holes, and the ledger of the queries.

    SPEC is file.py:make or package.module:make. The same command resumes, and `brittle audit` goes on from it. Under
    torchrun its processes share the work. In an array of jobs each does its share; the same command without --shard,
    or the job that comes last, adds up.
    """
    from brittle import pipeline
    from brittle.shares import share_of
    from brittle.terminal import charted

    share = share_of(shard)
    with _asked(out, **asked) as (subject, settings):
        found = pipeline.make_map(subject, out, share=share, **settings)
    if share.leads or share.lone:
        click.echo(charted(found, out))


@commands.command()
@audits
@click.option(
    "--norm", "norms", multiple=True, type=click.Choice(NORMS), help="Again for several.  [default: l2, linf]"
)
@click.option("--eps", "epsilon", type=click.FloatRange(min=0, min_open=True), help="Of attacks within a distance.")
@click.option("--attack", "attacks", multiple=True, metavar="NAME", help="Again for several.  [default: the preset's]")
@click.option("--cap", type=click.IntRange(min=1), help="Evaluations that one attack may spend on an input.")
def attack(out: Path, norms: tuple[str, ...], attacks: tuple[str, ...], **asked: Any) -> None:
    """Attack the queries of an audit alone, and check whether the attacks can be believed.

    SPEC is file.py:make or package.module:make. Without --norm, --eps, --attack and --cap it is the audit's own stage,
    and `brittle audit` goes on from it.
    """
    from brittle import pipeline
    from brittle.terminal import attacked

    with _asked(out, norms=norms or None, attacks=attacks or None, **asked) as (subject, settings):
        click.echo(attacked(pipeline.attack(subject, out, **settings), out))


@contextmanager
def _asked(
    out: Path, spec: str, options: dict[str, str], no_progress: bool, **settings: Any
) -> Iterator[tuple[Subject, dict[str, Any]]]:
    """The subject, and what is asked of it by keyword; what was not given is left to the pipeline."""
    from brittle.loading import load_subject
    from brittle.runs import begun

    _take_device(settings["device"])
    begun(out)  # a folder of something else is refused before the subject trains
    given = {key: value for key, value in settings.items() if value is not None}
    with _progress(not no_progress):
        yield load_subject(spec, options), {"spec": spec, "options": options, "progress": not no_progress, **given}


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


def _take_device(name: str) -> None:
    """Check that the device is there; under torchrun each process of a machine takes a GPU of its own for `cuda`."""
    import torch

    try:
        if name == "cuda" and "LOCAL_RANK" in os.environ:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
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
