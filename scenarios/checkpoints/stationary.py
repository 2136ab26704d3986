"""What studies of trained models share: cases of clients that train a small network on a table, and their exchange.

Private and public rows are from the same dataset: features from N(0, 1), labels by a hyperplane through the origin,
with noise; the hyperplane is the seed's.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedtap.attackers.checkpoints.stationary_mmd import STATIONARY_SHARE, unexplainable
from fedtap.clients.stationary import Training, train_to_the_end
from fedtap.simulator import scores
from fedtap.simulator.attack import PseudoData, generator
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.leaks import Leak, Protocol, TrainedWeightsLeak, stack
from fedtap.simulator.models.registry import build
from fedtap.simulator.models.regulariser import Regulariser
from fedtap.simulator.report.folder import Row
from fedtap.simulator.study import Exchange, Study, ask, read
from fedtap.simulator.wire.records import tensors_of

NEAR = 0.01
"""Relative distance up to which an example counts as recovered."""

NOISE = 0.3
"""Of the labels, against the hyperplane's normal of length √d."""

PUBLIC = 400
"""Public rows."""

Table = tuple[Float[Tensor, "rows features"], Int[Tensor, "rows"]]

THREAT = (
    "A curious server: it knows the weights that it sent, those that come back, the model, the regulariser, how many "
    "examples a client has, and how features are distributed. It needs no second exchange."
)


@dataclass(frozen=True)
class Case:
    """A model, what it is trained on, and how."""

    width: int = 64
    depth: int = 1
    activation: str = "tanh"
    examples: int = 10
    features: int = 10
    regulariser: str = "fedprox(0.05)"
    training: str = "lbfgs"
    precision: str = "float64"

    @property
    def model(self) -> str:
        """As it is named."""
        return f"mlp(width={self.width}, depth={self.depth}, activation={self.activation!r})"

    @property
    def protocol(self) -> Protocol:
        """The public terms."""
        return Protocol(
            model=self.model, shape=(self.features,), classes=2, batch=self.examples, prior=self.regulariser
        )

    @property
    def entries(self) -> int:
        """Parameters of the model."""
        hidden = (self.features + 1) * self.width + (self.depth - 1) * (self.width + 1) * self.width
        return hidden + 2 * (self.width + 1)

    def network(self, seed: int | None = None) -> nn.Module:
        """With the weights that are broadcast, or on the meta device."""
        return build(self.model, (self.features,), 2, seed)

    def table(self, seed: int, rows: int, *names: int | str) -> Table:
        """So many rows of the dataset, drawn under these names."""
        normal = torch.randn(self.features, generator=generator(seed, "hyperplane"), dtype=torch.float64)
        draw = generator(seed, *names)
        inputs = torch.randn(rows, self.features, generator=draw, dtype=torch.float64)
        noise = NOISE * torch.randn(rows, generator=draw, dtype=torch.float64)
        return inputs, (inputs @ normal + noise > 0).long()

    def private(self, seed: int, client: int) -> Table:
        """What this client trains on."""
        return self.table(seed, self.examples, "private", client)

    def public(self, seed: int) -> Table:
        """What everyone has."""
        return self.table(seed, PUBLIC, "public")


@dataclass(frozen=True)
class Heard:
    """A case's exchange with all clients."""

    leak: TrainedWeightsLeak
    left: Sequence[float]
    """What each client says is left of its gradient, as a share of the regulariser's."""


@dataclass(frozen=True)
class Trained(Study):
    """Clients that train a model to the end, and a server that looks at what they send."""

    threat: ClassVar[str] = THREAT

    victims: int = 4

    @property
    def clients(self) -> int:
        """The victims, each on a node of its own."""
        return self.victims

    @property
    @abstractmethod
    def cases(self) -> Sequence[Case]:
        """What is played, one exchange each."""

    def answer(self, order: Message, client: int, data_root: Path) -> Message:
        """Train the case that the order names."""
        case = self.cases[int(order.content.config_records["case"]["number"])]  # type: ignore[arg-type]
        training = Training(Regulariser.parse(case.regulariser), case.training)
        return train_to_the_end(
            order, client, case.network(0), *case.private(self.seed, client), training, case.precision
        )

    def hear(self, grid: Grid, part: int, number: int, failed: dict[int, str] | None = None) -> Heard:
        """Broadcast the case's initial weights, and hear what comes back.

        Args:
            failed: client -> why it failed, or sent other tensors than it was sent, filled in here; None where all are
                needed.

        Raises:
            ClientError: one of those that are needed did.
        """
        case = self.cases[number]
        arrays = ArrayRecord({name: value.detach() for name, value in case.network(self.seed).named_parameters()})
        order = RecordDict({"arrays": arrays, "case": ConfigRecord({"number": number})})
        exchanges = ask(grid, "train", order, part, failed=failed)
        made = read(exchanges, lambda exchange: _leak(exchange, case), failed)
        leak = stack([leak for leak, _ in made])
        assert isinstance(leak, TrainedWeightsLeak)
        return Heard(leak, [left for _, left in made])

    def judged(self, case: Case, heard: Heard, guess: PseudoData) -> list[Row]:
        """A row for each client: what came back, beside what as many random points would have got."""
        rows = []
        least = unexplainable(heard.leak).tolist()
        for victim, client in enumerate(heard.leak.clients.tolist()):
            truth, labels = case.private(self.seed, client)
            weights = guess.weights[victim]
            apart = scores.matched_distances(guess.points[victim], weights, truth)
            many = int((weights >= scores.FAINT).sum())
            random, _ = case.table(self.seed, max(many, case.examples), "blind", client)
            blind = scores.matched_distances(random, torch.ones(len(random)), truth)
            residual = float(guess.objective[victim]) ** 0.5
            rows.append(
                {
                    "client": client,
                    "recovered": float((apart <= NEAR).double().mean()),
                    "distance": float(apart.median()),
                    "blind": float((blind <= NEAR).double().mean()),
                    "blind_distance": float(blind.median()),
                    "residual": residual,
                    "explained": residual < STATIONARY_SHARE,
                    "left": heard.left[victim],
                    "unexplainable": least[victim],
                    "layer_rank": _rank(heard.leak, victim),
                    "one_label": bool((labels == labels[0]).all()),
                    "parameters": sum(parameter.numel() for parameter in heard.leak.network.parameters()),
                }
            )
        return rows


def _leak(exchange: Exchange, case: Case) -> tuple[Leak, float]:
    """What the client's weights are, and what it says is left of its gradient."""
    name, metrics = torch.tensor([exchange.client]), exchange.answer.metric_records["metrics"]
    examples, left = metrics["num-examples"], float(metrics["left"])  # type: ignore[arg-type]
    if type(examples) is not int or examples != case.examples:
        raise FedtapError(
            f"Client {exchange.client} says it has {short(examples)} examples, and every client has {case.examples}."
        )
    if not math.isfinite(left):
        raise FedtapError(f"Client {exchange.client} says that {left} is left of its gradient: send a finite number.")
    leak = TrainedWeightsLeak(
        observed={
            name: tensor.double()[None] for name, tensor in tensors_of(exchange.answer.array_records["arrays"]).items()
        },
        protocol=case.protocol,
        network=case.network(),
        weights=tensors_of(exchange.order.array_records["arrays"]),
        buffers={},
        clients=name,
        rounds=torch.ones_like(name),
        restarts=torch.zeros_like(name),
    )
    leak.check()
    return leak, left


def _rank(leak: Leak, victim: int) -> int:
    """Of the first layer's trained weights: singular values above a thousandth of the largest."""
    first = next(tensor for tensor in leak.observed.values() if tensor.dim() == 3)[victim]
    spread = torch.linalg.svdvals(first)
    return int((spread > 1e-3 * spread[0]).sum())
