"""How attacks are trained on auxiliary pairs: gradients as rows of numbers, pixels as targets, mean squared error."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from fedtap.attackers.parts.repeated import Repeated, capture_on
from fedtap.simulator.attack import Reconstruction, generator
from fedtap.simulator.auxiliary import Auxiliary
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak, Tensors
from fedtap.simulator.progress import progress

MEMORY = Path("/proc/meminfo")

HELD_OUT_EVERY = 20
"""One auxiliary pair in this many is held out of training, to estimate the error by."""

FeatureRows = Float[Tensor, "pairs numbers"]


class FeatureHashing(nn.Module):
    """Adds each number of a row to one of `most` numbers, with a sign, both drawn at random.

    Weinberger et al. 2009, https://arxiv.org/abs/0902.2206.

    Args:
        size: numbers of a row.
    """

    where: Tensor
    signs: Tensor

    def __init__(self, size: int, most: int, draw: torch.Generator) -> None:
        super().__init__()
        self.most = most
        where, signs = (torch.randint(high, (size,), generator=draw, device="cpu") for high in (most, 2))
        self.register_buffer("where", where, persistent=False)
        self.register_buffer("signs", signs * 2.0 - 1, persistent=False)

    def forward(self, rows: Float[Tensor, "pairs entries"]) -> FeatureRows:
        return rows.new_zeros(len(rows), self.most).index_add_(1, self.where, rows * self.signs)


class FlatGradient(nn.Module):
    """A gradient as one row of numbers; a longer one than `most` is hashed to that many (`FeatureHashing`).

    Its parameters are laid in a row in the network's own order.

    Args:
        names: of the parameters to read; all where none are given.
    """

    def __init__(self, network: nn.Module, most: int, names: Collection[str] = ()) -> None:
        super().__init__()
        read = {name: each.numel() for name, each in network.named_parameters() if not names or name in names}
        self.names, size = list(read), sum(read.values())
        self.length = min(size, most)
        draw = generator("feature hashing", size, most)
        self.hashing = FeatureHashing(size, most, draw) if size > most else nn.Identity()

    def forward(self, gradient: Tensors) -> FeatureRows:
        found: Tensor = self.hashing(torch.cat([gradient[name].flatten(1) for name in self.names], dim=1))
        return found


def rows(
    auxiliary: Auxiliary, features: Callable[[Tensors], FeatureRows]
) -> tuple[FeatureRows, Float[Tensor, "pairs batch pixels"]]:
    """Features of all pairs, and the images behind them, read chunk by chunk.

    Raises:
        FedtapError: they do not fit into memory.
    """
    seen: list[Tensor] = []
    images: list[Tensor] = []
    for pairs in progress(auxiliary, "reading pairs"):
        seen.append(features(pairs.leak.observed))
        images.append(pairs.images.flatten(2))
        if len(seen) == 1:
            check_room(len(auxiliary), seen[0].shape[1] + images[0][0].numel())
    return torch.cat(seen), torch.cat(images)


def free_memory() -> float:
    """Bytes of memory that are free; infinite where this system does not say."""
    if not MEMORY.is_file():
        return math.inf
    return next(1024 * int(line.split()[1]) for line in MEMORY.read_text().splitlines() if "MemAvailable" in line)


def check_room(pairs: int, numbers: int) -> None:
    """Refuse sizes of which memory does not hold two copies: one in chunks, and one as a whole.

    Args:
        numbers: float32 that each pair takes.

    Raises:
        FedtapError: with how many pairs would fit.
    """
    # two copies of 4 bytes for each number
    if (needed := 8 * pairs * numbers) > (free := free_memory()):
        raise FedtapError(
            f"{pairs:,} pairs of {numbers:,} numbers each take {needed / 1e9:.1f} GB to learn from, and "
            f"{free / 1e9:.1f} GB are free: use at most --pairs {int(pairs * free / needed):,}, "
            "or fewer of the attack's features."
        )


def teach(
    module: nn.Module,
    seen: FeatureRows,
    images: Float[Tensor, "pairs batch pixels"],
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    *,
    epochs: int,
    batch: int,
    seed: int,
) -> Float[Tensor, ""]:
    """Lower the mean squared error of `module(seen)` over all pairs but a few, and return it on those few.

    Args:
        schedule: stepped after each minibatch.
    """
    kept = len(seen) - max(1, len(seen) // HELD_OUT_EVERY)
    draw = generator(seed, "minibatches")

    def loss(some: Tensor) -> Tensor:
        predicted = module(seen[some])
        return F.mse_loss(predicted, ordered(images[some], predicted))

    module.train()
    differentiate = Differentiated(module.parameters(), loss, min(batch, kept), images.device, images.shape[1] == 1)
    descend(
        differentiate,
        optimiser,
        schedule,
        lambda: torch.randperm(kept, generator=draw).to(images.device).split(batch),  # type: ignore[no-untyped-call]
        epochs,
    )
    module.eval()
    with torch.no_grad():
        parts = [
            (module(x).clamp(0, 1), y)
            for x, y in zip(torch.split(seen[kept:], batch), torch.split(images[kept:], batch), strict=True)
        ]
        errors = [(predicted - ordered(truth, predicted)).square().mean((1, 2)) for predicted, truth in parts]
    return torch.cat(errors).mean()


class Differentiated:
    """`differentiate(pairs)` leaves the gradient of the loss on these pairs in the parameters; on a GPU, by a graph.

    Args:
        loss: from the numbers of a minibatch's pairs to a scalar.
        batch: pairs of a minibatch; fewer, as an epoch may end with, are differentiated without the graph.
        whole: whether the loss is computed on the device as a whole, without asking the host.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        loss: Callable[[Tensor], Tensor],
        batch: int,
        device: torch.device,
        whole: bool,
    ) -> None:
        self._parameters, self._loss = list(parameters), loss
        for parameter in self._parameters:  # a graph writes to the same memory each time
            parameter.grad = torch.zeros_like(parameter)
        self._some = torch.zeros(batch, dtype=torch.long, device=device)
        capture = capture_on(device) if whole else None
        self._again = Repeated(lambda: self._differentiate(self._some), capture)

    def __call__(self, some: Tensor) -> None:
        if len(some) == len(self._some):
            self._some.copy_(some)
            self._again()
        else:
            self._differentiate(some)

    def _differentiate(self, some: Tensor) -> None:
        found = torch.autograd.grad(self._loss(some), self._parameters, allow_unused=True)
        for parameter, gradient in zip(self._parameters, found, strict=True):
            if gradient is not None:  # of an unused one it stays zero, by which Adam moves nothing
                parameter.grad.copy_(gradient)  # type: ignore[union-attr]


def descend(
    differentiate: Differentiated,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    minibatches: Callable[[], Sequence[Tensor]],
    epochs: int,
) -> None:
    """A step of optimiser and schedule for each minibatch of each epoch.

    Args:
        minibatches: those of an epoch, in a new order: numbers of pairs.
    """
    with coarse_products():
        for _ in progress(epochs, "learning"):
            for some in minibatches():
                differentiate(some)
                optimiser.step()
                schedule.step()


@contextmanager
def coarse_products() -> Iterator[None]:
    """TF32 in matrix products and convolutions on a GPU, whose three digits are finer than what an inverter learns."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = True
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def ordered(truth: Float[Tensor, "pairs batch pixels"], predicted: Float[Tensor, "pairs batch pixels"]) -> Tensor:
    """Each pair's images in the order that lies closest to the predicted ones: a batch is a set, without an order."""
    if truth.shape[1] == 1:
        return truth
    # Hungarian method (scipy) on the squared distances of all predicted and true images
    costs = torch.cdist(predicted.detach(), truth).square().cpu().numpy()
    assignment = torch.stack([torch.as_tensor(linear_sum_assignment(cost)[1]) for cost in costs]).to(truth.device)
    return truth.gather(1, assignment[:, :, None].expand_as(truth))


def as_reconstruction(
    images: Float[Tensor, "victims *shape"], labels: Tensor, error: Tensor, leak: Leak
) -> Reconstruction:
    """The reconstruction of a leak of `leak.protocol.batch` images a victim.

    Args:
        images: all pixels of each victim, in any shape.
        error: the attack's own estimate, one for all or one a victim.
    """
    shaped = images.reshape(len(leak), leak.protocol.batch, *leak.protocol.shape)
    return Reconstruction(shaped, labels, error.expand(len(leak)))
