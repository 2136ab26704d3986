"""What federated learning leaks: from a gradient that a client sent back to the data that it kept.

A client has one private image and sends the gradient of its loss, as federated learning asks. That shows the image:

>>> import torch, fedtap
>>> from torch import nn
>>> _ = torch.manual_seed(0)
>>> image, label = torch.rand(1, 1, 8, 8), torch.tensor([3])  # what the client keeps to itself: pixels in [0, 1]
>>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, 10))
>>> loss = nn.functional.cross_entropy(model(image), label)
>>> gradient = torch.autograd.grad(loss, list(model.parameters()))  # what it sends
>>> leak = fedtap.leak(model, gradient, shape=(1, 8, 8))  # what the server can see, and nothing else
>>> found = fedtap.attack(leak, "idlg(steps=300)")  # found.images has an axis of victims before that of the batch
>>> found.labels.tolist(), bool((found.images[0] - image).abs().max() < 0.01)
([[3]], True)

`fedtap.tap` records such leaks in a Flower app, `fedtap.load` reads them again, and `fedtap.run` plays one of fedtap's
own scenarios. Importing fedtap imports no torch; its functions do.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Sequence

    from flwr.app import UserConfig
    from flwr.serverapp import Grid
    from torch import nn

    from fedtap.simulator.attack import Attack, Reconstructed
    from fedtap.simulator.leaks import GradientLeak, Leak
    from fedtap.simulator.scenario import Row
    from fedtap.simulator.wire.canary_clients import CanaryTap
    from fedtap.simulator.wire.captured import Captured
    from fedtap.simulator.wire.wiretap import Wiretap

Made = TypeVar("Made", bound="Reconstructed")

__all__ = ["__version__", "attack", "leak", "load", "run", "tap"]

__version__ = version("fedtap")

# In the repository's own folder, `import fedtap` finds fedtap/ there, and its subpackages where they are installed.
__path__ = extend_path(__path__, __name__)


def leak(
    model: nn.Module, gradients: Captured | Sequence[Captured], *, shape: tuple[int, ...], batch: int = 1, **known: Any
) -> GradientLeak:
    """The leak of a gradient that you captured yourself, or of several at the same weights.

    Args:
        model: at the weights at which the gradients were taken.
        gradients: as `torch.autograd.grad` returns them, or by the parameters' names; of several victims, a list.
        shape: of one input, without the batch: channels, height, width of an image.
        batch: examples behind each gradient.
        known: `name`, `classes`, `weights`, and what else the attacker knows (`fedtap.simulator.leaks.Protocol`).

    Raises:
        FedtapError: the model does not take such an input, or the gradients are not those of its parameters.
    """
    from fedtap.simulator.wire import captured

    return captured.leak(model, gradients, shape=shape, batch=batch, **known)


@overload
def attack(leak: Leak, attack: Attack[Made], *, seed: int = 0) -> Made: ...
@overload
def attack(leak: Leak, attack: str, *, seed: int = 0) -> Any: ...
def attack(leak: Leak, attack: str | Attack[Any], *, seed: int = 0) -> Any:
    """What an attack reconstructs from a leak, on the device that the leak is on.

    Args:
        attack: as on the command line, `"idlg(steps=300)"`, or an `Attack`.
        seed: of the starting points, a whole number from 0.

    Raises:
        FedtapError: there is no such attack, several are named, it cannot use this leak, or the seed is no whole number
            from 0.
    """
    from fedtap.attackers import parse
    from fedtap.simulator.attack import Attack
    from fedtap.simulator.errors import FedtapError, short

    if isinstance(attack, str):
        named = parse(attack)
        if len(named) != 1:
            raise FedtapError(f"{short(attack)!r} names {len(named)} attacks, and one is run at a time: name one.")
        (attack,) = named
    if not isinstance(attack, Attack):
        raise FedtapError(
            f"{short(attack)} is no attack: give its name, 'idlg(steps=300)', or a value of its class, IDLG(steps=300)."
        )
    start = seed.__index__() if hasattr(seed, "__index__") else -1
    if start < 0:
        raise FedtapError(f"The seed is {short(repr(seed))}, and it is a whole number from 0: give one, seed=0.")
    return attack(leak, seed=start)


@overload
def tap(
    grid: Grid,
    folder: str | Path,
    model: nn.Module,
    *,
    name: str,
    shape: tuple[int, ...],
    classes: int,
    canaries: int,
    **others: Any,
) -> CanaryTap: ...
@overload
def tap(
    grid: Grid, folder: str | Path, model: nn.Module, *, name: str, shape: tuple[int, ...], classes: int, **others: Any
) -> Wiretap: ...
def tap(
    grid: Grid,
    folder: str | Path,
    model: nn.Module,
    *,
    name: str,
    shape: tuple[int, ...],
    classes: int,
    rounds: Container[int] | None = None,
    clients: Iterable[int] | None = None,
    canaries: int = 0,
    clip: float | None = None,
    **known: Any,
) -> Wiretap | CanaryTap:
    """`grid`, with what each client leaks saved under `folder`: give it to your strategy in the place of `grid`.

    Args:
        model: the network that the app trains.
        name: `module:function` of a function of (shape, classes) that returns the model, for `fedtap attack --model`.
        shape: of one input, without the batch: channels, height, width of an image.
        classes: that the model tells apart.
        rounds: those to record, `range(1, 4)`; all unless said.
        clients: those to record, `list(grid.get_node_ids())[:10]`; all unless said.
        canaries: clients to add whose updates are known, each with probability 1/2; `bound(arrays)` of what is returned
            gives a lower bound on ε when the strategy has ended.
        clip: the L2 norm that updates are clipped to, and so that of a canary's; the others' median unless said.
        known: `batch`, `local_steps`, `learning_rate` and what else the app prescribes
            (`fedtap.simulator.leaks.Protocol`).

    Raises:
        FedtapError: no client could train like that, rounds or clients name none, or so few canaries show nothing.
    """
    from fedtap.simulator.leaks import Protocol
    from fedtap.simulator.wire.canary_clients import CanaryTap
    from fedtap.simulator.wire.recorder import recorder
    from fedtap.simulator.wire.wiretap import Wiretap

    protocol = Protocol(name, tuple(shape), classes, **{"batch": 1, **known})
    recording = Wiretap(grid, recorder(Path(folder), protocol, model, rounds=rounds, clients=clients))
    return CanaryTap(recording, canaries, clip) if canaries else recording


def load(path: str | Path, model: str | None = None) -> Leak:
    """A leak that was saved, by `fedtap.tap`, a run, or its own `save`.

    Args:
        path: of the .safetensors file; its .json lies beside it.
        model: `module:function` of your own model, since no file may name code to import.

    Raises:
        FedtapError: a file is missing or damaged, or is a leak of another model.
    """
    from fedtap.simulator.leaks import load
    from fedtap.simulator.models.attention import architecture

    return load(Path(path), architecture, model)


@overload
def run(scenario: str, *, as_frame: Literal[False], **others: Any) -> list[Row]: ...
@overload
def run(scenario: str, *, as_frame: bool | None = None, **others: Any) -> Any: ...
def run(
    scenario: str,
    *,
    out: str | Path | None = None,
    data_root: str | Path = "data",
    device: str = "",
    overwrite: bool = False,
    as_frame: bool | None = None,
    **options: Any,
) -> Any:
    """Play a scenario in this process, as `fedtap run` does, and return its rows: a pandas DataFrame if pandas is
    installed (extra `pandas`), else a list of dictionaries.

    Args:
        scenario: its name, as `fedtap list` shows it.
        out: folder for what the run leaves; `runs/NAME`, or the next free `runs/NAME-2`, unless said.
        data_root: folder that holds the data sets.
        device: cpu, cuda or cuda:N; cuda if there is one, unless said.
        overwrite: replace a run with other settings that `out` holds.
        as_frame: True: a DataFrame; False: a list, whatever is installed. A column that a row lacks is NaN in a frame.
        options: the scenario's own, `victims=3, attack="idlg(steps=20)"`; a list of values is swept.

    Raises:
        FedtapError: there is no such scenario or option, it cannot be played, or a frame is asked for without pandas.
    """
    from importlib.util import find_spec

    from fedtap.scenarios.app import in_process
    from fedtap.simulator.errors import FedtapError

    if as_frame and not find_spec("pandas"):
        raise FedtapError(
            "pandas is not installed, which makes a DataFrame: pip install 'fedtap[pandas]', or leave as_frame out."
        )

    run_config: UserConfig = {
        "out": str(out or ""),
        "data-root": str(data_root),
        "device": device,
        "overwrite": overwrite,
    }
    rows = in_process(scenario, options, run_config)
    if as_frame is False or not find_spec("pandas"):
        return rows
    import pandas

    return pandas.DataFrame(rows)
