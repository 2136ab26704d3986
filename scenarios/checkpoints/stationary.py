"""What scenarios about trained models share: cases of clients that train a small network on a table, to the end.

Private and public rows are from the same dataset: features from N(0, 1), labels by a hyperplane through the origin,
with noise; the hyperplane is the seed's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from fedtap.scenarios.attack_options import Attacked
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.options import Option
from fedtap.simulator.scenario import Observed

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from jaxtyping import Float, Int
    from torch import Tensor, nn

    from fedtap.simulator.leaks import Leak, Protocol, TrainedWeightsLeak

    Table = tuple[Float[Tensor, "rows features"], Int[Tensor, "rows"]]

NOISE = 0.3
"""Of the labels, against the hyperplane's normal of length √d."""

PUBLIC = 400
"""Public rows."""

_THREAT = (
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
        from fedtap.simulator.leaks import Protocol

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
        from fedtap.simulator.models.registry import build

        return build(self.model, (self.features,), 2, seed)

    def table(self, seed: int, rows: int, *names: int | str) -> Table:
        """Rows of the dataset, drawn under these names."""
        import torch

        from fedtap.simulator.attack import generator

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
class TrainedObserved(Observed):
    """What was observed of clients that trained to the end, and what they say of it."""

    sent: TrainedWeightsLeak = field(kw_only=True)
    """The clients' trained weights."""
    left: Sequence[float] = field(kw_only=True)
    """What each client says is left of its gradient, as a share of the regulariser's."""


@dataclass(frozen=True)
class TrainedModels(Attacked):
    """Clients that train a model to the end, and a server that looks at what they send.

    Raises:
        FedtapError: an attack works on another kind of leak, or on these would fill the memory.
    """

    reconstructs: ClassVar[str] = "PseudoData"

    victims: Annotated[int, Option("clients of a setting, each attacked", 1, 1000, "federation")] = 4

    def __post_init__(self) -> None:
        from fedtap.simulator.leaks import TrainedWeightsLeak

        for attack in self.attacks:
            if TrainedWeightsLeak not in attack.leaks:
                raise FedtapError(
                    f"--attack {short(attack.written())} is none on a trained model's weights: write stationary_mmd."
                )

    @property
    def nodes(self) -> int:
        """The victims, each on a node of its own."""
        return self.victims

    @property
    @abstractmethod
    def trained(self) -> Case:
        """What is played."""

    def reply(self, message: Message, context: Context, data_root: Path) -> Message:
        """Weights after training to the end."""
        from fedtap.clients.stationary import Training, train_to_the_end
        from fedtap.simulator.models.regulariser import Regulariser

        case, client = self.trained, int(context.node_config["partition-id"])
        training = Training(Regulariser.parse(case.regulariser), case.training)
        return train_to_the_end(
            message, client, case.network(0), *case.private(self.seed, client), training, case.precision
        )

    def threat(self, leak: Leak | None) -> Sequence[str]:
        """The server of a federation that trains once."""
        return (_THREAT,)
