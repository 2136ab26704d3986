"""The command line: `fedtap run NAME --option value`, `fedtap attack LEAKS --attack NAME`, `fedtap audit APP`, `fedtap
audit-dp TARGET`, `fedtap tune NAME --try FIELD=VALUES`, `fedtap list`, `fedtap pretrain diffusion`, `fedtap course`,
`fedtap grade UNIT ANSWERS`; and of runs that are done `fedtap show RUN`, `open RUN`, `compare RUN RUN` and `index DIR`.

Nothing here imports torch before a run begins, so that help and lists are there at once.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.table import Table

from fedtap.scenarios import SCENARIOS
from fedtap.scenarios.audit.command import audit_command
from fedtap.scenarios.audit_dp.command import audit_dp_command
from fedtap.scenarios.command.bench import bench_cli
from fedtap.scenarios.command.catalogue import LISTS, first_paragraph, in_full, listed
from fedtap.scenarios.command.help import FOLDED, ScreenCommand, explain, with_arguments_told
from fedtap.scenarios.command.options import pairs
from fedtap.scenarios.command.plan import code_in, models_of, plan
from fedtap.scenarios.command.results import results_cli
from fedtap.scenarios.command.runs import COMMANDS_ON_RUNS, answer, files
from fedtap.scenarios.course.command import course_cli, grade_command
from fedtap.simulator.errors import FedtapError, Stopped, short, unknown
from fedtap.simulator.scenario import Scenario

if TYPE_CHECKING:
    from flwr.app import UserConfig
    from flwr.serverapp import Grid

    from fedtap.simulator.attack import Attack
    from fedtap.simulator.leaks import Leak
    from fedtap.simulator.saved_leak import SavedLeaks

cli = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},  # of its commands too
)
console = Console(emoji=False)  # mine:cat is a model, and no cat

DataRoot = Annotated[Path, typer.Option(envvar="FEDTAP_DATA_ROOT", help="Folder that holds the data sets.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; cuda if there is one, unless said.")]
Out = Annotated[
    Path | None, typer.Option(help="Folder for what the run leaves; runs/NAME, or the next free runs/NAME-2, -3, ….")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a run with other settings in that folder.")]
COMMANDS = (
    *("run", "attack", "audit", "audit-dp", "tune", "pretrain", "list", "course", "grade", "bench", "results"),
    *dict(COMMANDS_ON_RUNS),
)
OfCheckpoints = partial(typer.Option, rich_help_panel="of checkpoints")
OfTraining = partial(typer.Option, rich_help_panel=FOLDED)
EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}


@cli.callback(invoke_without_command=True)
def version_option(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """What federated learning leaks. `fedtap COMMAND --help` says more of a command."""
    if version:
        console.print(metadata.version("fedtap"), highlight=False)
        raise typer.Exit


def _scenarios(incomplete: str) -> list[tuple[str, str]]:
    """Names for the shell to complete."""
    return [(name, first_paragraph(SCENARIOS.about(name))) for name in SCENARIOS if name.startswith(incomplete)]


@cli.command("run", context_settings=EXTRA, add_help_option=False)
def run_command(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A scenario: see `fedtap list`.", autocompletion=_scenarios)] = "",
    out: Out = None,
    data_root: DataRoot = Path("data"),
    device: Device = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is in the folder.")] = False,
    overwrite: Overwrite = False,
    film: Annotated[bool, typer.Option("--film", help="Film iterative attacks: films/*.gif, and on the page.")] = False,
    parallel: Annotated[int, typer.Option(min=1, help="Processes among which the values of a sweep are dealt.")] = 1,
) -> None:
    """Play a scenario in this process. `fedtap run NAME --help` shows its options.

    Values joined by commas are swept."""
    if name in ("", "--help", "-h"):
        console.print(context.get_help())
        console.print(f"Scenarios: {', '.join(SCENARIOS)}")
        return
    if name.startswith("-"):
        raise FedtapError(f"The scenario comes before its options, and {name} is one: fedtap run NAME {name} VALUE.")
    if {"--help", "-h", "--help-all"} & set(context.args):
        _own_code(name)
        explain(name, whole="--help-all" in context.args)
        return
    _played(name, context.args, out, data_root, device, resume, overwrite, parallel, film)


@cli.command("tune", context_settings=EXTRA)
def tune_command(
    context: typer.Context,
    attack: Annotated[str, typer.Argument(help="The attack to tune, with settings that are not tried if need be.")],
    tries: Annotated[
        list[str] | None,
        typer.Option("--try", help="FIELD=VALUE,VALUE…: values of one of its fields. Again for another field."),
    ] = None,
    out: Out = None,
    data_root: DataRoot = Path("data"),
    device: Device = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is in the folder.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Try every combination of values of an attack's fields on public images alone.

    What victims stand for here are public images that were held out. All other options are those of `fedtap run tuning
    --help`."""
    from fedtap.scenarios.command.grid import attack_grid

    if attack.startswith("-"):
        raise FedtapError(f"The attack comes before the options, and {attack} is one: fedtap tune NAME {attack} VALUE.")
    if "attack" in pairs(context.args):
        raise FedtapError("The attack to tune is named first, so --attack would be another: leave it out.")
    from fedtap.attackers import code_named

    _own_code(*(name for text in (attack, *(tries or ())) for name in code_named(text)))
    attacks = ",".join(attack_grid(attack, tries or ()))
    _played("tuning", [*context.args, "--attack", attacks], out, data_root, device, resume, overwrite)


def _played(
    name: str,
    words: list[str],
    out: Path | None,
    data_root: Path,
    device: str,
    resume: bool,
    overwrite: bool,
    processes: int = 1,
    film: bool = False,
) -> None:
    """Play a scenario with these options in this process, and say what came of it."""
    settings = _planned(name, words)
    from fedtap.simulator.report.folder import place
    from fedtap.simulator.run import described_run, device_named, run

    used = device_named(device)
    about = described_run(settings, used)
    where = place(about, out, Path("runs") / settings[0].plain_name, resume=resume, overwrite=overwrite)
    console.print(settings[0].question.splitlines()[0], highlight=False)
    for line in _overview(settings):
        console.print(f"  {line}", highlight=False, markup=False)
    with _stoppable(where, resumable=True):
        if processes > 1 and len(settings) > 1 and not resume:
            from fedtap.scenarios.command.parallel import play_apart
            from fedtap.simulator.report.folder import Folder

            for setting in settings:
                setting.check(settings)
            Folder(where, about, overwrite=overwrite)  # what it held before is gone
            play_apart(name, words, len(settings), processes, where, data_root, device, film)
            resume = True
        grid = _grids(name, words, data_root)
        rows = run(
            settings,
            grid,
            where,
            device=used,
            data_root=data_root,
            resume=resume,
            overwrite=overwrite,
            film=film,
        )
    _say(rows, settings)
    files(console, "Page", where)
    for setting in settings:
        setting.verdict(rows)
    _all_failed(rows)


def play_some(
    name: str, words: list[str], numbers: Collection[int], out: Path, data_root: Path, device: str, film: bool
) -> None:
    """Play the settings of these numbers alone, into a folder of their own.

    Raises:
        FedtapError: as `run`.
    """
    settings = _planned(name, words)
    from fedtap.simulator.run import device_named, run

    run(
        settings,
        _grids(name, words, data_root),
        out,
        device=device_named(device),
        data_root=data_root,
        only=numbers,
        film=film,
    )


def _planned(name: str, words: list[str]) -> tuple[Scenario, ...]:
    """The settings that these options ask for, after all that has to be done before they are played."""
    options = pairs(words)
    _own_code(*code_in(name, shlex.join(words)))
    settings = plan(name, options)
    _prepared()
    _own_code(*models_of(settings))
    return settings


def _grids(name: str, words: list[str], data_root: Path) -> Callable[[Scenario], Grid]:
    """For each setting a federation in this process."""
    from fedtap.clients.app import client_app
    from fedtap.scenarios.command.plan import plan_of
    from fedtap.simulator.wire.grid import LocalGrid

    config: UserConfig = {"scenario": name, "options": shlex.join(words), "data-root": str(data_root)}
    return lambda setting: LocalGrid(client_app(plan_of), setting.nodes, config)


@cli.command("attack", cls=ScreenCommand)
def attack_command(
    leaks: Annotated[Path, typer.Argument(help="A saved leak (.safetensors and .json), or a folder of them.")],
    attack: Annotated[
        str, typer.Option(help="NAME[,NAME…], with settings if need be; the leak's own unless said.")
    ] = "",
    trained_attack: Annotated[
        str, typer.Option(help="PATH of a trained attack's .safetensors, as a run leaves it.")
    ] = "",
    model: Annotated[str, typer.Option(help="The leak's architecture, where it is a module:function of yours.")] = "",
    client: Annotated[
        list[int] | None, typer.Option(help="A client to attack; all unless said. Again for more.")
    ] = None,
    rnd: Annotated[
        list[int] | None, typer.Option("--round", help="Rounds to attack; all unless said. Again for more.")
    ] = None,
    out: Out = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the starting points.")] = 0,
    device: Device = "",
    overwrite: Overwrite = False,
    base: Annotated[
        str, OfCheckpoints(help="The model that it was tuned from; a checkpoint is a folder with a model or a LoRA.")
    ] = "",
    tokens: Annotated[int, OfCheckpoints(min=4, help="Tokens to which documents are cut.")] = 32,
    private: Annotated[int, OfCheckpoints(min=1, help="Of a diffusion model's: images that it was tuned on.")] = 4,
    prompt: Annotated[
        str, OfCheckpoints(help="Of a diffusion model's: their caption, as far as it is known; * is an unknown word.")
    ] = "",
    batch: Annotated[int | None, OfTraining(help="Images in a client's local step.")] = None,
    local_steps: Annotated[int | None, OfTraining(help="Local steps, each on the same batch.")] = None,
    low: Annotated[str, OfTraining(help="What the model is fed for a pixel of 0: a number, or R,G,B.")] = "",
    high: Annotated[str, OfTraining(help="What the model is fed for a pixel of 1: a number, or R,G,B.")] = "",
    loss: Annotated[str | None, OfTraining(help="cross_entropy, bce (with logits) or mse (on one-hot).")] = None,
    reduction: Annotated[str | None, OfTraining(help="Of the loss over the batch: mean or sum.")] = None,
    optimiser: Annotated[str | None, OfTraining(help="sgd or adam; of adam one step, which leaves signs.")] = None,
    momentum: Annotated[float | None, OfTraining(help="The optimiser's, from 0 and below 1.")] = None,
    nesterov: Annotated[bool | None, OfTraining(help="Whether that momentum is Nesterov's.")] = None,
    weight_decay: Annotated[float | None, OfTraining(help="The optimiser's, times the weights.")] = None,
    batchnorm: Annotated[str | None, OfTraining(help="train (the batch's statistics) or eval (running).")] = None,
    step_batch: Annotated[
        int | None, OfTraining(min=0, help="Examples in each local step, which take the batch's in turn; 0: all.")
    ] = None,
) -> None:
    """Attack a saved leak, of fedtap's own or captured elsewhere. There is no truth here, so there are no scores.
    What is said of the client's training holds in place of the leak's JSON."""
    said = {
        "batch": batch,
        "local_steps": local_steps,
        "low": numbers("low", low),
        "high": numbers("high", high),
        "loss": loss,
    }
    said |= {"reduction": reduction, "optimiser": optimiser, "momentum": momentum, "nesterov": nesterov}
    said |= {"weight_decay": weight_decay, "batchnorm": batchnorm, "step_batch": step_batch}
    from fedtap.attackers import code_named, loaded, models_named, parse, suited

    _own_code(*code_named(attack))
    _prepared()
    from fedtap.scenarios.attack_options import with_trained
    from fedtap.simulator.report.columns import table
    from fedtap.simulator.report.folder import place
    from fedtap.simulator.report.page import failures
    from fedtap.simulator.run import device_named
    from fedtap.simulator.saved_leak import ATTACK, attack_saved, columns_of_found, described_attack, told_of_found

    named = parse(with_trained(attack, trained_attack)) if attack or trained_attack else ()
    _own_code(model, *(name for attack in named for name in models_named(attack)))
    loaded()  # so that the kinds of leak are known that installed packages add
    known = {name: value for name, value in said.items() if value is not None}
    tuned = {"base": base, "tokens": tokens, "private": private, "prompt": prompt}
    found = _saved(_leaks_in(leaks), lambda path: _read(path, model, known, tuned), client or [], rnd or [])

    def attacks_on(leak: Leak) -> tuple[Attack, ...]:
        return named or parse(suited(leak))

    used = device_named(device)
    about = described_attack(found, attacks_on, used, seed)
    where = place(about, out, Path("runs") / ATTACK, overwrite=overwrite)
    with _stoppable(where):
        rows = attack_saved(found, attacks_on, where, device=used, seed=seed, overwrite=overwrite)
    console.print(table(rows, columns_of_found(rows), failures(rows)))
    for sentence in told_of_found(rows, where):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    files(console, "Page", where)
    _all_failed(rows)


def _leaks_in(path: Path) -> list[Path]:
    """The leak of this path, or those of this folder."""
    from fedtap.simulator.wire.checkpoints import is_checkpoint

    if not path.is_dir() or is_checkpoint(path):
        return [path]
    if found := sorted(path.glob("*.safetensors")):
        return found
    raise FedtapError(f"{path} holds no leaks: name a .safetensors file, or a folder with some, as a run's leaks/ is.")


def _saved(
    paths: list[Path], read: Callable[[Path], Leak | FedtapError], clients: list[int], rounds: list[int]
) -> SavedLeaks:
    """The leaks of these files, or what they hold of these clients and rounds."""
    from fedtap.simulator.saved_leak import SavedLeaks

    if not clients and not rounds:
        return SavedLeaks(paths, read)

    def chosen(path: Path) -> Leak | FedtapError:
        leak = read(path)
        if isinstance(leak, FedtapError):
            return leak
        these = [
            (not clients or client in clients) and (not rounds or rnd in rounds)
            for client, rnd in zip(leak.clients.tolist(), leak.rounds.tolist(), strict=True)
        ]
        return leak[leak.clients.new_tensor(these).bool()]

    def holds(path: Path) -> bool:
        leak = chosen(path)
        return isinstance(leak, FedtapError) or len(leak) > 0

    if found := [path for path in paths if holds(path)]:
        return SavedLeaks(found, chosen)
    raise FedtapError(
        f"No leak there is of client {short(clients or 'any')} in round {short(rounds or 'any')}: attack them all, and "
        "the page names each leak's client and round."
    )


def _read(path: Path, model: str, known: Mapping[str, Any], tuned: Mapping[str, Any]) -> Leak | FedtapError:
    """The leak, with what is known of its protocol, or of a checkpoint; or why it is none."""
    from fedtap.simulator.leaks import load, with_terms
    from fedtap.simulator.models.attention import architecture
    from fedtap.simulator.wire.checkpoints import checkpoint_leak, is_checkpoint

    try:
        if is_checkpoint(path):
            return checkpoint_leak(tuned=path, **tuned)
        return with_terms(load(path, architecture, model or None), **known)
    except FedtapError as error:
        return error


def _all_failed(rows: Sequence[Mapping[str, Any]]) -> None:
    """Exit with 1 where each attack failed on each victim: nothing was measured."""
    if rows and all(isinstance(row.get("error"), str) for row in rows):  # in some rows it is a number
        raise typer.Exit(1)


cli.command("audit")(audit_command)
cli.command("audit-dp")(audit_dp_command)
cli.command("grade")(grade_command)
cli.add_typer(course_cli, name="course")
cli.add_typer(bench_cli, name="bench")
cli.add_typer(results_cli, name="results")
for _name, _command in COMMANDS_ON_RUNS:
    cli.command(_name)(_command)


@cli.command("pretrain")
def pretrain_command(
    what: Annotated[str, typer.Argument(help="What is pretrained: diffusion.")],
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="NAME or path; several with commas between, or given again. photos unless said."),
    ] = None,
    size: Annotated[int, typer.Option(help="Pixels a side, 16 to 128, which 4 divides.")] = 32,
    width: Annotated[int, typer.Option(help="Base channels of the U-Net, which 16 divides.")] = 48,
    steps: Annotated[int, typer.Option(help="Steps of AdamW.")] = 1500,
    batch: Annotated[int, typer.Option(help="Images in a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, after 100 steps in which it rises.")] = 5e-4,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the model; fedtap/diffusion-SIZE in XDG_CACHE_HOME or ~/.cache.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Device = "",
    data_root: DataRoot = Path("data"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove what a pretraining left in that folder, and begin anew.")
    ] = False,
) -> None:
    """Train a small diffusion model from nothing on public images, once, for scenarios that are given no --weights.

    Stopped or killed, the same command goes on. On a core of an AMD EPYC that other work shared, a step of 16 images of
    32 pixels took 1.6 to 2.2 s of processor time, and one of 32 took 3.5 to 4.5 s: the default takes 40 to 55 minutes
    of one core. It has not been timed on a GPU."""
    if what != "diffusion":
        raise unknown("model to pretrain", what, ("diffusion",))
    from fedtap.simulator.models.diffusion_pretraining import EVERY, Pretraining, cache_folder, pretrain
    from fedtap.simulator.run import device_named

    names = tuple(name for given in dataset or ["photos"] for name in _names(given))
    setting = Pretraining(names, size, width, steps, batch, learning_rate, seed)
    where = out or cache_folder(size)
    try:
        pretrain(where, setting, data_root, device=device_named(device), overwrite=overwrite)
    except KeyboardInterrupt:
        again = "the same command without --overwrite" if overwrite else "the same command"
        raise Stopped(
            f"stopped: {again} goes on from the last checkpoint, of which there is one every {EVERY} steps."
        ) from None
    console.print(f"Model: {where}", markup=False, highlight=False, soft_wrap=True)


def _names(given: str) -> list[str]:
    """The names between the commas; a comma in the name of a file that is there is part of it."""
    from fedtap.simulator.files import exists

    return [given] if exists(Path(given)) else [name.strip() for name in given.split(",") if name.strip()]


@cli.command("list")
def list_command(
    what: Annotated[
        str, typer.Argument(help=f"{', '.join(LISTS)}; or one name, to be told in full. All lists unless said.")
    ] = "",
) -> None:
    """Scenarios with their questions, attacks with their papers, defences, datasets, models; or one of them in full."""
    if what and what not in LISTS:
        in_full(console, what, explain)
        return
    for heading, entries in listed(what).items():
        _catalogue(heading, entries)
    if what in SCENARIOS:
        console.print(f"{what} is a scenario too: fedtap run {what} --help", highlight=False)


_MISUSE: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""ClickException, wherever this version of typer has it."""


def _called(words: list[str]) -> int:
    """Run the command that the words name; its exit code.

    Raises:
        FedtapError: the words are no command with its options, in one sentence in the place of typer's frame.
    """
    try:
        code = with_arguments_told(typer.main.get_command(cli))(words, prog_name="fedtap", standalone_mode=False)
    except _MISUSE as error:
        said = error.format_message()  # type: ignore[attr-defined]
        context = getattr(error, "ctx", None)
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            return 2
        command = context.command_path if context is not None else "fedtap"
        fault, _, near = said.partition(" Did you mean ")
        hint = f"did you mean {near.partition('?')[0]}? See" if near else "see"
        raise FedtapError(f"{fault.rstrip('.')}: {hint} {command} --help.") from None
    if code == Stopped.code:
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def main() -> None:
    """Run the command line; a FedtapError is one sentence on standard error and exit code 2."""
    words = sys.argv[1:]
    warnings.showwarning = _warn
    _usable_streams()
    try:
        _check_here()
        if words and words[0] in SCENARIOS:
            words = ["run", *words]
        elif words and words[0] not in COMMANDS and not words[0].startswith("-"):
            raise unknown("command or scenario", words[0], (*COMMANDS, *SCENARIOS))
        raise SystemExit(_called(words))
    except FedtapError as error:
        _complain(short(error, _LONGEST))
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


_LONGEST = 290
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


def _own_code(*names: str) -> None:
    """Allow code that the command line names, `module:name`, and let it lie in the current folder."""
    if own := [name for name in names if ":" in name]:
        from fedtap.simulator.models.registry import allow

        allow(own)
        sys.path.insert(0, str(Path.cwd()))


def _prepared() -> None:
    """One thread, unless the environment says otherwise, and Flower's log without a line for each round."""
    import logging

    import flwr.app  # noqa: F401  (it sets its log's level as it is imported)
    import torch

    from fedtap.simulator.progress import in_lines

    in_lines()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # on small nets' tensors a second thread costs many times what it brings
    logging.getLogger("flwr").setLevel(logging.ERROR)  # the rows say what matters of a round


def _overview(settings: Sequence[Scenario]) -> list[str]:
    """Each setting's attacks, with the settings that are not their defaults."""
    lines = []
    for setting in settings:
        at = ", ".join(f"{name} {value}" for name, value in setting.swept)
        named = ", ".join(attack.written() for attack in setting.attacks)
        lines.append(f"{setting.plain_name}{f', {at}' if at else ''}: {named}")
    return list(dict.fromkeys(lines))


def _catalogue(kind: str, entries: dict[str, str]) -> None:
    table = Table(kind, "", show_header=True, box=None, pad_edge=False)
    for name, text in entries.items():
        table.add_row(f"[bold]{name}[/bold]", text)
    console.print(table, "")


def _say(rows: Sequence[dict[str, Any]], settings: Sequence[Scenario]) -> None:
    """The rows' tables, what has to be known first, and the answers in sentences."""
    from fedtap.simulator.report.page import Page

    first = settings[0]
    page, shown = first.shown_on(Page(first.name, first.question, "", {}, {}), rows)
    answer(console, page, shown)
