"""What scenarios of split learning share: clients send an attention block's output, and the server wants its input."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor, nn

from fedtap.attackers import parse
from fedtap.clients import split
from fedtap.simulator.attack import Attack, Inputs
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import AttentionLeak, Leak, Protocol, stack
from fedtap.simulator.study import Exchange, Study, ask, read
from fedtap.simulator.wire.records import tensors_of

ACTION = "query.attention"


@dataclass(frozen=True)
class Split(Study):
    """Clients that each run one attention block, as broadcast, on one private input."""

    threat: ClassVar[str] = (
        "A curious server. It broadcast the block, so it knows every weight in it, and hears its output for each "
        "client's input; it knows nothing else of that input but its shape."
    )

    victims: int = 20
    attacks: tuple[Attack[Inputs], ...] = ()
    noise: float = 0.0
    """Standard deviation of what clients add to the output, as a share of its root mean square."""

    @property
    def clients(self) -> int:
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

    def answer(self, order: Message, client: int, data_root: Path) -> Message:
        """Its half's output."""
        return split.activation_reply(
            order, self.half(data_root), self.private(client, data_root), client, self.noise, self.seed
        )

    def listen(self, grid: Grid, part: int, data_root: Path, failed: dict[int, str]) -> Leak:
        """Broadcast the half, and hear what clients make of it.

        Args:
            failed: client -> why it failed or sent something else, filled in here.

        Raises:
            ClientError: all of them did.
        """
        half = self.half(data_root)
        weights = {name: weight.detach() for name, weight in half.named_parameters()}
        heard = ask(grid, ACTION, RecordDict({"arrays": ArrayRecord(weights)}), part, failed=failed)
        bare = copy.deepcopy(half).to("meta")
        return stack(read(heard, lambda one: self._leak(one, bare, weights, self.shape(data_root)), failed))

    def _leak(self, heard: Exchange, bare: nn.Module, weights: dict[str, Tensor], shape: tuple[int, int]) -> Leak:
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
        return torch.stack([self.private(client, data_root) for client in leak.clients.tolist()])


def attacks_on_blocks(text: str) -> tuple[Attack[Inputs], ...]:
    """The attacks that are named.

    Raises:
        FedtapError: one of them is none on an attention block's output.
    """
    attacks: Sequence[Attack[Inputs]] = parse(text)  # type: ignore[assignment]
    for attack in attacks:
        if attack.reconstructs is not Inputs:
            raise FedtapError(
                f"{attack.name} looks for no attention block's input: use attention_newton or attention_descent."
            )
    return tuple(attacks)
