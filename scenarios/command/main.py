"""The command line: `fedtap run NAME --knob value`, `fedtap attack LEAKS --attack NAME`, `fedtap list`."""

from __future__ import annotations

import fedtap.scenarios.command.interrupt  # noqa: F401  before the rest, which takes seconds

# isort: split
import contextlib
import errno
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, TextIO

import torch
import typer
from flwr.app import UserConfig
from rich.console import Console
from rich.table import Table

from fedtap.attackers import ATTACKS, models_named, parse, suited
from fedtap.clients.app import client_app
from fedtap.clients.cost import overhead
from fedtap.scenarios.command.options import knobs_of, pairs
from fedtap.scenarios.command.plan import catalogue, models_of, plan, plan_of, question, sorted_out
from fedtap.scenarios.gradients.game import Game, check
from fedtap.scenarios.gradients.game_report import play_games
from fedtap.scenarios.gradients.image import with_trained
from fedtap.simulator.attack import Attack
from fedtap.simulator.data.images import DATASETS
from fedtap.simulator.defences.notation import WORDS, usage
from fedtap.simulator.errors import FedtapError, Stopped, short, unknown
from fedtap.simulator.federation.settings import Scenario
from fedtap.simulator.leaks import KINDS, Leak, load, told
from fedtap.simulator.models.attention import architecture
from fedtap.simulator.models.registry import MODELS, allow
from fedtap.simulator.report import defences, images
from fedtap.simulator.report.columns import table
from fedtap.simulator.report.folder import place
from fedtap.simulator.report.page import failures
from fedtap.simulator.run import (
    ATTACK,
    attack_saved,
    columns_of_found,
    described_attack,
    described_run,
    device_named,
    run,
)
from fedtap.simulator.study import Study, run_studies
from fedtap.simulator.wire.grid import LocalGrid

cli = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(emoji=False)  # mine:cat is a model, and no cat

DataRoot = Annotated[Path, typer.Option(envvar="FEDTAP_DATA_ROOT", help="Folder that holds the data sets.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; cuda if there is one, unless said.")]
Out = Annotated[
    Path | None, typer.Option(help="Folder for what the run leaves; runs/NAME, or the next free runs/NAME-2, -3, ….")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a run with other settings in that folder.")]
COMMANDS = ("run", "attack", "list")
SAYS = "This option and those below say what the client did, in place of the leak's JSON."
EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}


@cli.callback(invoke_without_command=True)
def version_option(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """What federated learning leaks: fedtap run SCENARIO --knob value, fedtap attack LEAK, fedtap list."""
    if version:
        console.print(metadata.version("fedtap"), highlight=False)
        raise typer.Exit


@cli.command("run", context_settings=EXTRA, add_help_option=False)
def run_command(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A scenario: see `fedtap list`.")] = "",
    out: Out = None,
    data_root: DataRoot = Path("data"),
    device: Device = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is in the folder.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Play a scenario in this process. `fedtap run NAME --help` shows its knobs; values joined by commas are swept."""
    if name in ("", "--help", "-h"):
        console.print(context.get_help())
        console.print(f"Scenarios: {', '.join(sorted(catalogue()))}")
        return
    if name.startswith("-"):
        raise FedtapError(f"The scenario comes before its knobs, and {name} is one: fedtap run NAME {name} VALUE.")
    if {"--help", "-h"} & set(context.args):
        _explain(name)
        return
    knobs = pairs(context.args)
    parts, studies = sorted_out(plan(name, knobs))
    config: UserConfig = {**knobs, "scenario": name, "data-root": str(data_root)}
    games = tuple(part for part in parts if isinstance(part, Game))
    alone = not studies and len(games) == len(parts)
    if resume and (studies or alone):
        raise FedtapError(f"{name} keeps nothing to go on with: leave out --resume.")
    used = torch.device("cpu") if alone else device_named(device)
    about = described_run(studies or parts, used)
    where = place(about, out, Path("runs") / name, resume=resume, overwrite=overwrite)
    if studies:
        _studies(studies, where, config, used, data_root, overwrite)
        return
    if alone:
        _games(games, where, overwrite)
        return
    _find_own_code(*models_of(parts))
    logging.getLogger("flwr").setLevel(logging.ERROR)  # Flower tells of each round; the rows say what matters of it

    def grid(part: Scenario) -> LocalGrid:
        return LocalGrid(client_app(plan_of), (part.clients or part.victims) + 1, config)

    console.print(question(name).splitlines()[0], highlight=False)
    for line in _overrides(parts):
        console.print(f"  {line}", highlight=False, markup=False)
    with _stoppable(where, resumable=True):
        rows = run(
            parts,
            grid,
            where,
            device=used,
            data_root=data_root,
            resume=resume,
            overwrite=overwrite,
            overhead=overhead,
        )
    _say(rows, where)
    check([row for row in rows if "canaries" in row])
    _all_failed(rows)


@cli.command("attack")
def attack_command(
    leaks: Annotated[Path, typer.Argument(help="A saved leak (.safetensors and .json), or a folder of them.")],
    attack: Annotated[
        str, typer.Option(help="NAME[,NAME…], with settings if need be; the leak's own unless said.")
    ] = "",
    trained_attack: Annotated[
        str, typer.Option(help="PATH of a trained attack's .safetensors, as a run leaves it.")
    ] = "",
    model: Annotated[str, typer.Option(help="The leak's architecture, where it is a module:function of yours.")] = "",
    out: Out = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the starting points.")] = 0,
    device: Device = "",
    overwrite: Overwrite = False,
    batch: Annotated[int | None, typer.Option(help=f"Images in a client's local step. {SAYS}")] = None,
    local_steps: Annotated[int | None, typer.Option(help="Local steps, each on the same batch.")] = None,
    low: Annotated[str, typer.Option(help="What the model is fed for a pixel of 0: a number, or R,G,B.")] = "",
    high: Annotated[str, typer.Option(help="What the model is fed for a pixel of 1: a number, or R,G,B.")] = "",
    loss: Annotated[str | None, typer.Option(help="cross_entropy, bce (with logits) or mse (on one-hot).")] = None,
    reduction: Annotated[str | None, typer.Option(help="Of the loss over the batch: mean or sum.")] = None,
    optimiser: Annotated[str | None, typer.Option(help="sgd or adam; of adam one step, which leaves signs.")] = None,
    momentum: Annotated[float | None, typer.Option(help="The optimiser's, from 0 and below 1.")] = None,
    nesterov: Annotated[bool | None, typer.Option(help="Whether that momentum is Nesterov's.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="The optimiser's, times the weights.")] = None,
    batchnorm: Annotated[str | None, typer.Option(help="train (the batch's statistics) or eval (running).")] = None,
) -> None:
    """Attack a saved leak, of fedtap's own or captured elsewhere. There is no truth here, so there are no scores."""
    said = {
        "batch": batch,
        "local_steps": local_steps,
        "low": numbers("low", low),
        "high": numbers("high", high),
        "loss": loss,
    }
    said |= {"reduction": reduction, "optimiser": optimiser, "momentum": momentum, "nesterov": nesterov}
    said |= {"weight_decay": weight_decay, "batchnorm": batchnorm}
    named = parse(with_trained(attack, trained_attack)) if attack or trained_attack else ()
    _find_own_code(model, *(name for attack in named for name in models_named(attack)))
    known = {name: value for name, value in said.items() if value is not None}
    found = {path.name: _read(path, model, known) for path in _leaks_in(leaks)}

    def attacks_on(leak: Leak) -> tuple[Attack, ...]:
        return named or parse(suited(leak))

    used = device_named(device)
    about = described_attack(found, attacks_on, used, seed)
    where = place(about, out, Path("runs") / ATTACK, overwrite=overwrite)
    with _stoppable(where):
        rows = attack_saved(found, attacks_on, where, device=used, seed=seed, overwrite=overwrite)
    console.print(table(rows, columns_of_found(rows), failures(rows)))
    _files("Page", where)
    _all_failed(rows)


def _leaks_in(path: Path) -> list[Path]:
    """The leak of this path, or those of this folder."""
    if not path.is_dir():
        return [path]
    if found := sorted(path.glob("*.safetensors")):
        return found
    raise FedtapError(f"{path} holds no leaks: name a .safetensors file, or a folder with some, as a run's leaks/ is.")


def _read(path: Path, model: str, known: Mapping[str, Any]) -> Leak | FedtapError:
    """The leak, with what is known of its protocol; or why it is none."""
    try:
        return told(load(path, architecture, model or None), **known)
    except FedtapError as error:
        return error


def _all_failed(rows: Sequence[Mapping[str, Any]]) -> None:
    """Exit with 1 where each attack failed on each victim: nothing was measured."""
    if rows and all(row.get("error") for row in rows):
        raise typer.Exit(1)


@cli.command("list")
def list_command() -> None:
    """Scenarios with their questions, attacks with their papers, defences, datasets, models."""
    _catalogue("scenario", {name: question(name).splitlines()[0] for name in sorted(catalogue())})
    _catalogue("attack", {name: _about(attack) for name, attack in sorted(ATTACKS.items())})
    _catalogue("defence", {usage(name): f"{kind.about} [dim]({kind.hook})[/dim]" for name, kind in WORDS.items()})
    _catalogue("dataset", dict(DATASETS) | {"FOLDER, FILE.zip": "your own images", "FILE.npz": "your own arrays"})
    _catalogue("model", {name: (made.__doc__ or "").splitlines()[0] for name, made in MODELS.items()})


def main() -> None:
    """Run the command line; a FedtapError is one sentence on standard error and exit code 2."""
    words = sys.argv[1:]
    warnings.showwarning = _warn
    _usable_streams()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # on small nets' tensors a second thread costs many times what it brings
    try:
        _check_here()
        if words and words[0] in catalogue():
            words = ["run", *words]
        elif words and words[0] not in COMMANDS and not words[0].startswith("-"):
            raise unknown("command or scenario", words[0], (*COMMANDS, *catalogue()))
        cli(words, prog_name="fedtap")
    except FedtapError as error:
        _complain(short(error, LONGEST))
        raise SystemExit(error.code) from None
    except (KeyboardInterrupt, SystemExit) as end:  # typer makes the one into the other
        stopped = isinstance(end, KeyboardInterrupt) or end.code == Stopped.code
        if not stopped:
            raise
        _complain("stopped before anything was done.")
        raise SystemExit(Stopped.code) from None
    except OSError as error:
        if error.errno not in MACHINES:
            raise
        what = short(error.filename) if error.filename else "what it says"
        _complain(f"{what} could not be read or written ({error.strerror}): see to that, and run again.")
        _discard(sys.stdout)
        raise SystemExit(2) from None


LONGEST = 290
"""Characters of a sentence on standard error."""

MACHINES = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE)
"""Errors that tell of the machine and not of a mistake in fedtap."""


def _complain(sentence: str) -> None:
    with contextlib.suppress(OSError):  # there may be nowhere left to say it
        Console(stderr=True).print(f"fedtap: {sentence}", markup=False, emoji=False, highlight=False, soft_wrap=True)


def _usable_streams() -> None:
    """Standard output and error that take any letter, and no file of ours in the place of one that is closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # σ in an ASCII locale


def _check_here() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:
        raise FedtapError(
            "The current folder has been removed, so nothing can be found from it: cd to another."
        ) from None


def _discard(stream: TextIO | None) -> None:
    """Throw away what is still to be printed, which Python would try again as it ends."""
    with contextlib.suppress(OSError, AttributeError):  # it is closed, or none of the system's
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[union-attr]


@contextlib.contextmanager
def _stoppable(where: Path, resumable: bool = False) -> Iterator[None]:
    """Ctrl-C ends what is in here in a sentence."""
    try:
        yield
    except KeyboardInterrupt:
        if not where.exists():
            raise Stopped("stopped before anything was finished.") from None
        again = "the same command with --resume goes on" if resumable else "the same command begins anew"
        raise Stopped(f"stopped: what was finished is in {short(where)}, and {again}.") from None


def _warn(message: Warning | str, category: type[Warning], *_where: Any, **_named: Any) -> None:
    """A sentence of ours as it is; of the libraries', only what is not about their own future."""
    if issubclass(category, UserWarning):
        _complain(str(message))


def _games(games: tuple[Game, ...], where: Path, overwrite: bool) -> None:
    """Play games; a success above its bound ends in an error, once everything is written."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    console.print(question(games[0].name).splitlines()[0], highlight=False)
    with _stoppable(where):
        rows = play_games(games, where, overwrite)
    _say(rows, where)
    check(rows)


def _studies(
    studies: tuple[Study, ...], where: Path, config: UserConfig, device: torch.device, data_root: Path, overwrite: bool
) -> None:
    """Play studies, each over a grid of its own."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    console.print(question(studies[0].name).splitlines()[0], highlight=False)

    def grid(part: Study) -> LocalGrid:
        return LocalGrid(client_app(plan_of), part.clients, config)

    with _stoppable(where):
        rows = run_studies(studies, grid, where, device=device, data_root=data_root, overwrite=overwrite)
    console.print(table(rows, studies[0].columns))
    _files("Page", where)


def numbers(name: str, text: str) -> float | tuple[float, ...] | None:
    """A number, or several with commas between; None of an empty text.

    Raises:
        FedtapError: it is neither.
    """
    try:
        values = tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise FedtapError(
            f"--{name} {short(text)} is neither a number nor one a channel: give it as -1 or as -2.1,-2,-1.8."
        ) from None
    return values[0] if len(values) == 1 else values or None


def _find_own_code(*models: str) -> None:
    """Allow a module:function of the command line, and let it lie in the current folder."""
    if own := [model for model in models if ":" in model]:
        allow(own)
        sys.path.insert(0, str(Path.cwd()))


def _explain(name: str) -> None:
    if name not in catalogue():
        raise unknown("scenario", name, catalogue())
    console.print(question(name), highlight=False)
    table = Table("knob", "default", "meaning", title=f"fedtap run {name}", title_justify="left")
    for knob, (kind, about, default) in knobs_of(catalogue()[name]).items():
        words = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        table.add_row(
            f"--{knob.replace('_', '-')} {kind.__name__.upper()}", words or "(as the scenario says)", about.help
        )
    console.print(table)
    console.print("Also --out DIR, --data-root DIR, --device D, --resume, --overwrite.")


def _overrides(parts: tuple[Scenario, ...]) -> list[str]:
    """Each part's attacks, with the settings that are not their defaults."""
    lines = []
    for part in (part for part in parts if part.attacks):
        told = dict(part.swept) | ({"others": part.others} if part.others != "honest" else {})
        at = ", ".join(f"{knob} {value}" for knob, value in told.items())
        named = ", ".join(attack.written() for attack in part.attacks)
        lines.append(f"{part.victims} victims, {part.model}{f', {at}' if at else ''}: {named}")
    return list(dict.fromkeys(lines))  # of a defence's strengths one line


def _catalogue(kind: str, entries: dict[str, str]) -> None:
    table = Table(kind, "", show_header=True, box=None, pad_edge=False)
    for name, text in entries.items():
        table.add_row(f"[bold]{name}[/bold]", text)
    console.print(table, "")


def _about(attack: type[Attack]) -> str:
    text = (sys.modules[attack.__module__].__doc__ or "").strip()
    kinds = ", ".join(kind for kind, leak in KINDS.items() if leak in attack.leaks)
    return f"{' '.join(text.partition('Departs')[0].split())} [dim]({kinds})[/dim]"


def _say(rows: list[dict[str, object]], out: Path) -> None:
    attacked, shown = ([row for row in rows if names & row.keys()] for names in ({"attack"}, {"attack", "games"}))
    console.print(table(shown, images.columns(shown), images.notes(attacked)))
    if compared := defences.table(rows):
        console.print(compared)
    for sentence in (*failures(attacked), *images.alarms(attacked)):
        console.print(f"⚠ {sentence}", highlight=False, markup=False, emoji=False)
    for sentence in images.answers(attacked):
        console.print(sentence, highlight=False, markup=False, emoji=False)
    _files("Page", out)


def _files(what: str, out: Path) -> None:
    said = f"{what}: {out / 'report.html'}   figures: {out / 'rows.jsonl'}"
    console.print(said, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
