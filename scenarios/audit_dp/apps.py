"""The mechanism in a Flower app: it is played for a round, and what adds noise on the way is caught and audited alone.

Found are the client's mods, a strategy that clips and adds noise around another, and Opacus. No file of the app is
changed. What its own training code adds by hand is not found: name that function as module:function.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedtap.scenarios.audit.app import flower_app, mods_of
from fedtap.scenarios.audit.play import play_app
from fedtap.scenarios.audit_dp.promise import promised_by_multiplier
from fedtap.scenarios.audit_dp.target import AuditedUpdate, Mechanism, as_mechanism
from fedtap.simulator.errors import FedtapError, short

_INPUTS = 256
"""AuditInputs of the linear model on which Opacus is audited, each an entry of its gradient."""


def mechanism_in_app(path: Path, said: Mapping[str, Any]) -> Mechanism:
    """The first mechanism that is found in the app in this folder.

    Raises:
        FedtapError: it is no app, cannot be played, or has no mechanism that is found.
    """
    app = flower_app(path)
    mods = [mod for mod in mods_of(app.client) if _adds_noise(mod)]
    if mods:
        mechanism = as_mechanism(mods[-1], said, f"the mod of {short(app.name)}")
        mechanism.notes.append(f"the client mod {type(mods[-1]).__name__} of {app.name} was audited")
        return mechanism
    found: list[Any] = []
    with _caught(found):
        try:
            play_app(app, 2, 1, time.monotonic() + 30, lambda *_: None)
        except FedtapError:
            if not found:
                raise
    for one in found:
        mechanism = of_opacus(one, said) if isinstance(one, dict) else as_mechanism(one, said, type(one).__name__)
        mechanism.notes.append(f"{'Opacus' if isinstance(one, dict) else type(one).__name__} of {app.name} was audited")
        return mechanism
    raise FedtapError(
        f"No mechanism was found in {short(app.name)}: no client mod with a promise, no strategy that adds noise, and "
        "no Opacus; name the function that adds the noise as module:function."
    )


def _adds_noise(mod: Any) -> bool:
    return all(hasattr(mod, name) for name in ("epsilon", "delta")) and callable(mod)


@contextmanager
def _caught(found: list[Any]) -> Iterator[None]:
    """Inside, strategies with noise and what Opacus is told are noted as they are made."""
    from flwr.serverapp.strategy import dp_adaptive_clipping, dp_fixed_clipping
    from opacus import PrivacyEngine

    with ExitStack() as stack:
        for kind in (
            dp_fixed_clipping.DifferentialPrivacyFixedClippingBase,
            dp_adaptive_clipping.DifferentialPrivacyAdaptiveBase,
        ):
            stack.enter_context(_wrapped(kind, "__init__", lambda made, _given, _out: found.append(made)))
        stack.enter_context(
            _wrapped(PrivacyEngine, "make_private", lambda _made, given, out: found.append(_told(given, out)))
        )
        yield


@contextmanager
def _wrapped(kind: Any, name: str, note: Callable[[Any, dict[str, Any], Any], None]) -> Iterator[None]:
    """Inside, `note` is told of each call of a method: the object, named arguments, what it returned."""
    plain = getattr(kind, name)

    def noting(self: Any, *given: Any, **named: Any) -> Any:
        out = plain(self, *given, **named)
        note(self, named, out)
        return out

    setattr(kind, name, noting)
    try:
        yield
    finally:
        setattr(kind, name, plain)


def _told(given: Mapping[str, Any], out: Any) -> dict[str, Any]:
    """What Opacus was told, and the sizes of its data."""
    loader = given["data_loader"]
    return {
        "noise_multiplier": float(given["noise_multiplier"]),
        "max_grad_norm": float(given["max_grad_norm"]),
        "loss_reduction": given.get("loss_reduction", "mean"),
        "examples": len(loader.dataset),
        "batch": int(loader.batch_size or 1),
    }


def of_opacus(told: Mapping[str, Any], said: Mapping[str, Any]) -> Mechanism:
    """Opacus as the app uses it, on a linear model whose gradient of an example is the example.

    One release is the noisy gradient of one batch. Batches are not sampled, so that the promise is that of a Gaussian
    release without amplification.

    Args:
        told: noise multiplier, clip, reduction, examples and batch size.
    """

    def call(stack: AuditedUpdate) -> AuditedUpdate:
        return opacus_release(
            stack, told["batch"], told["noise_multiplier"], told["max_grad_norm"], told["loss_reduction"]
        )

    examples, clip = int(told["examples"]), float(told["max_grad_norm"])
    mechanism = Mechanism(call, {"gradient": torch.zeros(examples, _INPUTS)}, examples, kind="Opacus")
    if not said.get("rate"):
        mechanism.notes.append(
            f"Opacus draws batches by Poisson sampling unless told otherwise: --rate {told['batch'] / examples:.4g}, "
            "and --rounds with the number of steps, say what the steps add up to"
        )
    mechanism.attributes = promised_by_multiplier(told["noise_multiplier"], clip, "example", said)
    return mechanism


def opacus_release(
    stack: AuditedUpdate, batch: int, noise_multiplier: float, clip: float, reduction: str
) -> AuditedUpdate:
    """The noisy gradient that Opacus makes of the batch that the last example is in; batches are in order.

    Args:
        stack: under `gradient`, the gradient of each example: `examples entries`.
        reduction: `mean` or `sum`, as `PrivacyEngine.make_private` takes it.
    """
    import warnings

    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    rows = stack["gradient"]
    model = nn.Linear(rows.shape[1], 1, bias=False)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine: Any = PrivacyEngine()
        network, step, loader = engine.make_private(
            module=model, optimizer=optimiser, data_loader=DataLoader(TensorDataset(rows.flip(0)), batch_size=batch),
            noise_multiplier=noise_multiplier, max_grad_norm=clip, loss_reduction=reduction, poisson_sampling=False,
        )  # fmt: skip
        (some,) = next(iter(loader))
        scores = network(some)
        (scores.mean() if reduction == "mean" else scores.sum()).backward()
        step.step()
    assert model.weight.grad is not None
    return {"gradient": model.weight.grad[0]}
