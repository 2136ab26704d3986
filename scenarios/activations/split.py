"""What scenarios of split learning share: clients send an attention block's output, and the server wants its input."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from fedtap.scenarios.attack_options import Attacked
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.options import Option
from fedtap.simulator.scenario import Observed, Row, Session

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from torch import Tensor, nn

    from fedtap.simulator.attack import Attack
    from fedtap.simulator.leaks import Leak
    from fedtap.simulator.wire.messages import Overheard

ACTION = "query.attention"
"""Type of the messages in which the block goes out and its output comes back."""


@dataclass(frozen=True)
class SplitLearning(Attacked):
    """Clients that each run one attention block, as broadcast, on one private input.

    Raises:
        FedtapError: an attack is none on an attention block's output.
    """

    reconstructs: ClassVar[str] = "Inputs"

    noise: Annotated[
        float, Option("what clients add to the output, as a share of its root mean square", 0.0, 100.0, "defence")
    ] = 0.0
    victims: Annotated[int, Option("clients, all of which are attacked", 1, 1000, "federation")] = 20
    attack: str = "attention_newton"

    def __post_init__(self) -> None:
        for attack in self.attacks:
            if attack.reconstructs.__name__ != self.reconstructs:
                raise FedtapError(
                    f"{attack.name} looks for no attention block's input: use attention_newton or attention_descent."
                )

    @property
    def nodes(self) -> int:
        """One a victim."""
        return self.victims

    @abstractmethod
    def half(self, data_root: Path) -> nn.Module:
        """The clients' half of the model, with its weights."""

    @property
    @abstractmethod
    def block(self) -> str:
        """What the half is called."""

    @abstractmethod
    def private(self, client: int, data_root: Path) -> Tensor:
        """A client's input: tokens, and numbers of a token."""

    @abstractmethod
    def shape(self, data_root: Path) -> tuple[int, int]:
        """That of every client's input."""

    def reply(self, message: Message, context: Context, data_root: Path) -> Message:
        """Its half's output."""
        from fedtap.clients import split

        client = int(context.node_config["partition-id"])
        private = self.private(client, data_root)
        return split.activation_reply(message, self.half(data_root), private, client, self.noise, self.seed)

    def observe(self, session: Session) -> Observed:
        """Broadcast the half, and observe what clients make of it.

        Raises:
            ClientError: all of them fail, or send something else.
        """
        import copy

        from flwr.app import ArrayRecord, RecordDict

        from fedtap.simulator.leaks import stack
        from fedtap.simulator.wire.messages import ask, check_nodes, read

        check_nodes(session.grid, self.nodes, self.name)
        half, shape = self.half(session.data_root), self.shape(session.data_root)
        weights = {name: weight.detach() for name, weight in half.named_parameters()}
        failed: dict[int, str] = {}
        heard = ask(session.grid, ACTION, RecordDict({"arrays": ArrayRecord(weights)}), session.number, failed=failed)
        bare = copy.deepcopy(half).to("meta")
        leak = stack(read(heard, lambda one: self._leak(one, bare, weights, shape), failed))
        return Observed(leak, {(client, 1): why for client, why in sorted(failed.items())})

    def _leak(self, heard: Overheard, bare: nn.Module, weights: dict[str, Tensor], shape: tuple[int, int]) -> Leak:
        import torch

        from fedtap.simulator.leaks import AttentionLeak, Protocol
        from fedtap.simulator.wire.records import tensors_of

        observed = heard.answer.array_records.get("attention")
        leak = AttentionLeak(
            observed={name: tensor[None] for name, tensor in tensors_of(observed).items()} if observed else {},
            protocol=Protocol(model=self.block, shape=shape, classes=1, batch=1),
            network=bare,
            weights=weights,
            buffers={},
            clients=torch.tensor([heard.client]),
            rounds=torch.ones(1, dtype=torch.long),
            restarts=torch.zeros(1, dtype=torch.long),
        )
        leak.check()
        return leak

    def truth(self, leak: Leak, data_root: Path) -> Tensor:
        """The inputs of a leak's victims, for the scores."""
        import torch

        return torch.stack([self.private(client, data_root) for client in leak.clients.tolist()])

    def settled(self, attack: Attack[Any], label: str, observed: Observed) -> Row:
        """The attack as it is written on the command line, and what clients add to their output."""
        return {"attack": attack.written(), "noise": self.noise}

    def threat(self, leak: Leak | None) -> Sequence[str]:
        """A curious server."""
        return (
            "A curious server. It broadcast the block, so it knows every weight in it, and observes its output for "
            "each client's input; it knows nothing else of that input but its shape.",
        )
