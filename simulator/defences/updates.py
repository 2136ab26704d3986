"""Defences of what a client sends, each `update -> update`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from flwr.app import DEFAULT_TTL, Array, ArrayRecord, Context, Message, MessageType, Metadata, RecordDict
from flwr.clientapp.mod import LocalDpMod
from jaxtyping import Float
from torch import Tensor

from fedtap.simulator.attack import numpy_seeded
from fedtap.simulator.defences.accountant import flower_local_dp
from fedtap.simulator.defences.hooks import Named, UpdateDefence
from fedtap.simulator.defences.source import Source, gaussian, laplace, uniform
from fedtap.simulator.leaks import Tensors

Rows = Float[Tensor, "exchanges entries"]
Draw = Callable[[Tensor, Source], Tensor]


@dataclass(frozen=True, repr=False)
class Clip(Named, UpdateDefence):
    """``g min(1, norm / |g|)``, |g| the L2 norm of the whole gradient.

    McMahan, Ramage, Talwar and Zhang 2018, https://arxiv.org/abs/1710.06963 (flat clipping).

    Args:
        norm: the most that is sent, in the gradient's units: times the learning rate it is that of the weights' change.
    """

    name = "clip"

    norm: float

    def stacked(self, gradients: Tensors, draws: Sequence[Source]) -> dict[str, Tensor]:
        length = sum(tensor.double().square().flatten(1).sum(1) for tensor in gradients.values()) ** 0.5
        factor = (self.norm / torch.as_tensor(length).clamp_min(1e-300)).clamp_max(1)
        return {name: tensor * _along(factor, tensor).to(tensor.dtype) for name, tensor in gradients.items()}


@dataclass(frozen=True, repr=False)
class Noise(Named, UpdateDefence):
    """Gaussian noise on each entry. By itself it gives no differential privacy: nothing bounds what it must hide.

    Dwork and Roth 2014, appendix A, https://doi.org/10.1561/0400000042; against gradient inversion, Zhu, Liu and Han
    2019, https://arxiv.org/abs/1906.08935.

    Args:
        sigma: its standard deviation, in the gradient's units.
    """

    name = "noise"

    sigma: float

    def stacked(self, gradients: Tensors, draws: Sequence[Source]) -> dict[str, Tensor]:
        def noisy(row: Tensor, source: Source) -> Tensor:
            return gaussian(row, self.sigma, source)

        return {name: _each(noisy, gradients[name], draws) for name in sorted(gradients)}


@dataclass(frozen=True, repr=False)
class Laplace(Named, UpdateDefence):
    """Laplace noise on each entry: the difference of two exponential variables. Its standard deviation is √2 scale.

    Dwork, McSherry, Nissim and Smith 2006, https://doi.org/10.1007/11681878_14; against gradient inversion, Zhu, Liu
    and Han 2019, https://arxiv.org/abs/1906.08935.

    Args:
        scale: mean size of the noise on an entry, in the gradient's units.
    """

    name = "laplace"

    scale: float

    def stacked(self, gradients: Tensors, draws: Sequence[Source]) -> dict[str, Tensor]:
        def noisy(row: Tensor, source: Source) -> Tensor:
            return laplace(row, self.scale, source)

        return {name: _each(noisy, gradients[name], draws) for name in sorted(gradients)}


@dataclass(frozen=True, repr=False)
class Prune(Named, UpdateDefence):
    """The largest entries of the whole gradient are kept, the rest are set to 0.

    Aji and Heafield 2017, https://arxiv.org/abs/1704.05021; against gradient inversion, Zhu, Liu and Han 2019,
    https://arxiv.org/abs/1906.08935. Departs from both in one way: one threshold for all layers, none for each.

    Args:
        share: of the entries that are dropped, rounded to whole ones; one at least is kept. Of equals, those that come
            first in the order of the names are dropped first.
    """

    name = "prune"

    share: float

    def stacked(self, gradients: Tensors, draws: Sequence[Source]) -> dict[str, Tensor]:
        flat = _flat(gradients)
        dropped = min(round(self.share * flat.shape[1]), flat.shape[1] - 1)
        smallest = flat.abs().sort(dim=1, stable=True).indices[:, :dropped]
        return _unflat(flat.scatter(1, smallest, 0.0), gradients)


@dataclass(frozen=True, repr=False)
class Sign(Named, UpdateDefence):
    """The sign of each entry, at the scale 1: -1, 0 or 1, whatever the gradient's length.

    Bernstein, Wang, Azizzadenesheli and Anandkumar 2018, https://arxiv.org/abs/1802.04434; against gradient inversion,
    Wu, Chen, Guo and Weinberger 2023 (LTI), https://arxiv.org/abs/2210.10880.
    """

    name = "sign"

    def stacked(self, gradients: Tensors, draws: Sequence[Source]) -> dict[str, Tensor]:
        return {name: tensor.sign() for name, tensor in gradients.items()}


@dataclass(frozen=True, repr=False)
class Quantise(Named, UpdateDefence):
    """Each tensor in 2^bits equally spaced values from its least to its largest, rounded at random without bias.

    Suresh, Yu, Kumar and McMahan 2017, section 2.2, https://arxiv.org/abs/1611.00429. QSGD (Alistarh et al. 2017,
    https://arxiv.org/abs/1610.02132) rounds likewise, on a grid from 0 to the norm.

    Args:
        bits: to an entry, 1 to 16. What is sent are still floating point numbers.
    """

    name = "quantise"

    bits: int

    def stacked(self, gradients: Tensors, draws: Sequence[Source]) -> dict[str, Tensor]:
        def drawn(row: Tensor, source: Source) -> Tensor:
            return uniform(row.shape, source)

        sent = {}
        for name in sorted(gradients):
            tensor = gradients[name]
            entries = tensor.flatten(1).double()
            low, high = _along(entries.amin(1), tensor), _along(entries.amax(1), tensor)
            step = ((high - low) / (2**self.bits - 1)).clamp_min(1e-300)
            place = (tensor.double() - low) / step
            place = (place + _each(drawn, tensor, draws)).floor().clamp_max(2**self.bits - 1)
            sent[name] = (low + step * place).to(tensor.dtype)
        return sent


@dataclass(frozen=True, repr=False)
class LocalDP(Named, UpdateDefence):
    """Flower's `LocalDpMod`: the whole gradient clipped, and Gaussian noise of ``sensitivity √(2 ln(1.25 / δ)) / ε``.

    Dwork and Roth 2014, theorem A.1, https://doi.org/10.1561/0400000042, which is proved for ε below 1 alone: beyond,
    the noise is not what its ε says. One exchange of one client is what it protects, if `sensitivity` is twice `clip`.

    A simulation calls Flower's mod itself, which draws from numpy's global generator, a Mersenne Twister and no
    cryptographic one. A real client's noise is the operating system's, at the same clip and standard deviation.

    Args:
        clip: L2 norm, in the gradient's units; Flower's own is that of the weights' change, `clip` times the rate.
        sensitivity: likewise; Flower leaves it to the user.
        epsilon: above 0. (Flower takes 0 too, and then its noise is infinite.)
        delta: between 0 and 1.
    """

    name = "local_dp"

    clip: float
    sensitivity: float
    epsilon: float
    delta: float

    def stacked(self, gradients: Tensors, draws: Sequence[Source]) -> dict[str, Tensor]:
        mod, sigma = LocalDpMod(self.clip, self.sensitivity, self.epsilon, self.delta), self.sigma

        def protected(row: Tensor, source: Source) -> Tensor:
            if source is None:
                clipped = Clip(self.clip)({"update": row}, None)["update"]
                return gaussian(clipped, sigma, None)
            return _through(mod, row, source)

        with _quiet():
            return _unflat(_each(protected, _flat(gradients), draws), gradients)

    @property
    def sigma(self) -> float:
        """Standard deviation of its noise."""
        return flower_local_dp(self.clip, self.sensitivity, self.epsilon, self.delta, "replace").sigma


def _through(mod: LocalDpMod, row: Float[Tensor, "entries"], draw: torch.Generator) -> Float[Tensor, "entries"]:
    """What a client's mod makes of an exchange in which zeros were sent and `row` comes back."""
    row = row.contiguous().clone()
    if not row.any():
        row[0] = 1e-18  # the mod divides by the norm
    metadata = Metadata(0, "", 0, 0, "", "", 0.0, DEFAULT_TTL, MessageType.TRAIN)  # of no run: none need be going on
    content = RecordDict({"arrays": _record(torch.zeros_like(row))})
    order = Message(content=content, metadata=metadata)  # type: ignore[call-overload]

    def client(order: Message, context: Context) -> Message:
        content = RecordDict({"arrays": _record(row)})
        return Message(content=content, metadata=metadata)  # type: ignore[call-overload,no-any-return]

    context = Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config={})
    with numpy_seeded(int(torch.randint(2**32, (), generator=draw))):
        answer = mod(order, context, client)
    return torch.from_numpy(answer.content.array_records["arrays"]["update"].numpy()).to(row.dtype)


def _record(row: Tensor) -> ArrayRecord:
    return ArrayRecord({"update": Array(row.numpy())})


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the mod's two lines in the log for each exchange."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.WARNING if before < logging.WARNING else before)
    try:
        yield
    finally:
        logger.setLevel(before)


def _each(drawn: Draw, tensor: Tensor, draws: Sequence[Source]) -> Tensor:
    """Each exchange's tensor by itself, with its own source."""
    return torch.stack([drawn(row, source) for row, source in zip(tensor.unbind(), draws, strict=True)])


def _along(factor: Float[Tensor, "exchanges"], tensor: Tensor) -> Tensor:
    """One number an exchange, to be multiplied with its tensor."""
    return factor.view(-1, *[1] * (tensor.dim() - 1))


def _flat(gradients: Tensors) -> Rows:
    """All entries of each exchange in a row, in the order of the names."""
    return torch.cat([gradients[name].flatten(1) for name in sorted(gradients)], dim=1)


def _unflat(rows: Rows, like: Tensors) -> dict[str, Tensor]:
    names = sorted(like)
    parts = rows.split([like[name][0].numel() for name in names], dim=1)  # type: ignore[no-untyped-call]
    return {name: part.reshape(like[name].shape) for name, part in zip(names, parts, strict=True)}
