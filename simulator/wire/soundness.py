"""Whether a leak is what its protocol says: doubts before an attack, and after it the share that stays unexplained.

A failed attack is not privacy, and an attack on a leak that was misread is not even a failed attack. So contradictions
to the protocol are reported before an attack is tried, and after it the share of the gradient that the reconstruction
does not cause.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from fedtap.simulator.attack import Images, Labels
from fedtap.simulator.defences.chained import sigma
from fedtap.simulator.defences.defence import EVERYTHING, Defence, Exchange, Trace
from fedtap.simulator.defences.notation import described
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import GradientLeak, Leak, UpdateLeak
from fedtap.simulator.models.registry import logits_layer
from fedtap.simulator.wire.replay import (
    client_reply,
    exchange_of,
    local_steps,
    loss_gradient,
    mean_gradient,
    summands,
    targets,
)

EXPLAINED = 2.5e-3
"""`unexplained` up to which a reconstruction counts as an explanation.

Chosen on training images, between honest leaks and misread ones (tests/misread.py). Of 128 further leaks it decides 4
wrongly, and 2 where a doubt counts too: one attack had not converged, and one image had almost no gradient.
"""

CAUSES = "not converged, or not this model, loss, range, batch or number of steps"

_ROOM = 2**24
"""Entries of the gradients that are computed at once."""


def unexplained(leak: Leak, images: Images, labels: Labels) -> Float[Tensor, "victims"] | None:
    """``|g(x) - G|^2 / |G|^2``: the share of each victim's gradient G that these images and labels do not cause.

    g is what a client of this protocol would send for them after all its steps. Weight decay does not count in the
    length of G. A clip and a pruning are done to g as well. Noise and rounding leave an error e of known ``E|e|^2``,
    which is subtracted with three of its standard deviations (down to 0), so that the truth has 0 under noise too;
    NaN where it is over half of ``|G|^2``, since then almost any images would have 0. None where the weights are not
    known, where a defence or Adam leaves nothing to compare, and of a network that torch.func cannot differentiate.
    """
    protocol, parts = leak.protocol, _parts(leak.protocol.defence)
    comparable = isinstance(leak, GradientLeak | UpdateLeak) and len(protocol.shape) == 3
    if not comparable or leak.weights is None or protocol.optimiser != "sgd" or parts is None:
        return None
    exchange = exchange_of(leak) if parts else Exchange()
    if not _replayable(parts, exchange):
        return None
    respond, leaked, plain = client_reply(leak), mean_gradient(leak), loss_gradient(leak)
    shared = 0 if leak.stacked else None
    every = vmap(respond, in_dims=(shared, shared, 0, 0))
    target = targets(labels, protocol.classes).to(images.dtype)
    at_once = max(1, _ROOM // sum(tensor[0].numel() for tensor in leaked.values()))
    values = []
    for some in torch.arange(len(leak)).split(at_once):  # type: ignore[no-untyped-call]
        model = leak[some]
        try:
            sent = every(model.weights or {}, model.buffers, images[some].nan_to_num(), target[some])
        except (RuntimeError, TypeError, ValueError):
            return None  # not a model whose gradient can be computed for several victims at once
        leaked_here = {name: tensor[some] for name, tensor in leaked.items()}
        for part in parts:
            if replay := part.replay(exchange):
                sent = replay.does(sent, leaked_here)
        apart = _squares({name: sent[name] - leaked_here[name] for name in leaked_here})
        noise = _noise(leak, leaked_here, parts)
        values.append(torch.where(noise > _squares(leaked_here) / 2, torch.nan, (apart - noise).clamp_min(0)))
    length = _squares(plain) * (summands(protocol) ** 2)
    return (torch.cat(values) / length).to(images.dtype)


def _parts(defence: str) -> tuple[Defence, ...] | None:
    """What is done to a gradient, as announced; None where that is no defence known here."""
    try:
        return tuple(part for part in described(defence) if part.hook in ("step", "update"))
    except FedtapError:
        return None


def _replayable(parts: Sequence[Defence], exchange: Exchange) -> bool:
    """Whether what these do is done to a guess's gradient as well, or is noise that nothing comes after."""
    replays = [part.replay(exchange) for part in parts]
    errors = [part.error(batch=1) is not None for part in parts]
    return all(replay is not None and replay.exact for replay in replays) and errors == sorted(errors)


def _noise(leak: Leak, leaked_here: dict[str, Tensor], parts: Sequence[Defence]) -> Float[Tensor, "victims"]:
    """``E|e|^2`` of what is random in each victim's gradient, and three standard deviations of ``|e|^2``.

    A square has the variance ``2 s^4`` under Gaussian noise of variance ``s^2``, and ``5 s^4`` under Laplace's.
    """
    first = next(iter(leaked_here.values()))
    entries = sum(tensor[0].numel() for tensor in leaked_here.values())
    total = first.new_full((len(first),), (entries + 3 * math.sqrt(5 * entries)) * entry_error(leak) ** 2)
    for error in (part.error(batch=1) for part in parts):
        if error and error.steps:
            for name, step in error.steps(leaked_here).items():
                total = total + leaked_here[name][0].numel() * step.square() / 6
    return total


def entry_error(leak: Leak) -> float:
    """Standard error of an entry of `mean_gradient`: of the wire's rounding and of the announced noise."""
    steps = local_steps(leak)
    scale = leak.protocol.learning_rate * steps if isinstance(leak, UpdateLeak) else 1.0
    return math.hypot(leak.resolution / scale, sigma(leak.protocol) / steps)


def _squares(tensors: dict[str, Tensor]) -> Float[Tensor, "victims"]:
    return torch.stack([tensor.flatten(1).square().sum(1) for tensor in tensors.values()]).sum(0)


# Before the attack.


def doubts(leak: Leak) -> list[list[str]]:
    """Of each victim, what contradicts the protocol in what it sent: sentences, none where nothing does.

    Under the mean cross-entropy the last layer's bias has the gradient ``mean(p - onehot)``: it adds up to 0, what is
    over 0 in it to 1 at most, and only a class of the batch is below 0. With one input an image, the gradient of that
    layer has the rank of the batch at most. Announced noise widens what is tolerated, and other defences end what they
    blur.
    """
    if not isinstance(leak, GradientLeak | UpdateLeak):
        return [[] for _ in range(len(leak))]
    gradient, parts = mean_gradient(leak), _parts(leak.protocol.defence)
    left = EVERYTHING.intersection(*(part.survives for part in parts or ()))
    sent = [{name: tensor[victim] for name, tensor in gradient.items()} for victim in range(len(leak))]
    found = [_empty(leak, one, left) or _of_weights(leak[victim], one) for victim, one in enumerate(sent)]
    plain = leak.protocol.optimiser == "sgd" and leak.protocol.loss == "cross_entropy"
    readable = plain and parts is not None and Trace.BIAS in left and not any(found)
    if readable and len(leak.protocol.shape) == 3:
        found = _of_last_layer(leak, left)
    for victim in range(len(leak)):
        if leak.examples is not None and leak.protocol.local_steps == 1:
            said, batch = int(leak.examples[victim]), leak.protocol.batch
            if said != batch:
                found[victim].append(
                    f"The client reports {said} examples and the protocol a batch of {batch}: its step was on another "
                    "batch, or on some of its examples only."
                )
    return found


def warned(leak: Leak, found: Sequence[Sequence[str]]) -> list[str]:
    """The doubts as lines to print: those that differ in figures alone once, with how many victims they are of."""
    groups: dict[str, list[str]] = {}
    for one in found:
        for sentence in one:
            groups.setdefault(re.sub(r"[\d.+-]+(e-?\d+)?", "#", sentence), []).append(sentence)
    return [f"{same[0]} ({len(same)} of {len(leak)} victims)" for same in groups.values()]


def _empty(leak: Leak, sent: dict[str, Tensor], left: frozenset[Trace]) -> list[str]:
    """Of a gradient, or a weight's part of it, that says nothing."""
    whole = torch.cat([tensor.flatten() for tensor in sent.values()]).abs()
    if not bool(whole.any()):
        return ["The gradient is zero in every entry: the client did not train, or its update was lost on the way."]
    if Trace.LAYERS in left:
        silent = [name for name, tensor in sent.items() if tensor.ndim > 1 and not bool(tensor.any())]
        if silent:
            more = f" and {len(silent) - 1} more" if len(silent) > 1 else ""
            return [
                f"The gradient of {silent[0]}{more} is zero in every entry: the layer is frozen, unused or dead, or "
                "its change was too small for the wire."
            ]
    nonzero = whole[whole > 0]
    alike = (nonzero - nonzero.median()).abs() < 1e-3 * nonzero.median()
    if Trace.SIZES in left and leak.protocol.optimiser == "sgd" and len(nonzero) > 16 and alike.double().mean() > 0.5:
        return [
            f"Most entries have the size {nonzero.median():.2g}, which is no plain gradient: a step of Adam, a "
            "compression to signs, or rounding that left nothing else."
        ]
    return []


def _of_weights(leak: Leak, sent: dict[str, Tensor]) -> list[str]:
    """Of one victim: whether it sent the weights that it was sent, in the place of a gradient."""
    weights = {name: tensor[0] if leak.stacked else tensor for name, tensor in (leak.weights or {}).items()}
    if weights and all(name in weights and torch.equal(tensor, weights[name]) for name, tensor in sent.items()):
        return ["The gradient is equal to the model's own weights in every entry: weights were given in its place."]
    return []


def _of_last_layer(leak: Leak, left: frozenset[Trace]) -> list[list[str]]:
    """What the gradient by the logits contradicts; nothing where the model does not end in a layer that shows it."""
    protocol, found = leak.protocol, [list[str]() for _ in range(len(leak))]
    try:
        name = logits_layer(leak.network, protocol.shape)
    except FedtapError:  # a model that cannot be tried out shows nothing here
        name = None
    gradient, prefix = loss_gradient(leak), f"{name}." if name else ""
    logit_gradients, weight = gradient.get(f"{prefix}bias"), gradient.get(f"{prefix}weight")
    decayed = protocol.weight_decay and leak.weights is None  # by weights that are not known
    if name is None or logit_gradients is None or logit_gradients.shape[1] != protocol.classes or decayed:
        return found
    batch, classes, error = protocol.batch, protocol.classes, entry_error(leak) / summands(protocol)
    if leak.weights is not None and leak.resolution:  # a difference of float32 is known to an ulp of the weights
        scale = protocol.learning_rate * local_steps(leak) * summands(protocol)
        largest = max(float(leak.weights[part].abs().max()) for part in (f"{prefix}weight", f"{prefix}bias"))
        error = max(error, torch.finfo(torch.float32).eps * largest / scale / math.sqrt(6))
    for victim, d in enumerate(logit_gradients.double()):
        grain = _grain(d)
        slack = grain * float(d.abs().sum()) + SIGMAS * math.sqrt(classes) * error
        if abs(total := float(d.sum())) > slack:
            found[victim].append(
                f"The last bias's gradient adds up to {total:.1g} and not to 0: another loss than the cross-entropy of "
                "these logits, weight decay, or noise, that the protocol does not tell of."
            )
        if (above := float(d.clamp_min(0).sum())) > 1 + slack:
            found[victim].append(
                f"What is over 0 in the last bias's gradient adds up to {above:.4g}, and in a mean to 1 at most: a sum "
                "over the batch, more steps, momentum or another learning rate than the protocol tells of."
            )
        below = int((d < -grain * float(d.abs().max()) - SIGMAS * error).sum())
        if below > batch:
            found[victim].append(
                f"The last bias's gradient is below 0 at {below} classes, and at a batch of {batch} at {batch} at "
                "most: more images than the protocol tells of, several or smoothed labels, or another loss."
            )
        most = batch * local_steps(leak)
        if weight is None or Trace.RANK not in left:
            continue
        sizes = torch.linalg.svdvals(torch.cat([weight[victim].double(), d[:, None]], dim=1))
        noise = 2 * error * (math.sqrt(classes) + math.sqrt(weight.shape[2] + 1))
        if (rank := int((sizes > grain * sizes[0] + noise).sum())) > most:
            found[victim].append(
                f"The last layer's gradient has rank {rank}, and {most} at most at this batch and these steps: more "
                "images or steps than the protocol tells of, weight decay, or noise."
            )
    return found


SIGMAS = 6
"""Standard errors that rounding and noise may take an entry away from what it should be."""


def _grain(values: Tensor) -> float:
    """Relative error of an entry, by the coarsest format that holds these values as they are."""
    for coarse in (torch.bfloat16, torch.float16):
        if torch.equal(values.to(coarse).to(values.dtype), values):
            return 4 * torch.finfo(coarse).eps
    return 1e-5
