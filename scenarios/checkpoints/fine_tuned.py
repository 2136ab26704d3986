"""Rounds of federated fine-tuning with a tap: what the server broadcast, and the checkpoints that came back."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from jaxtyping import Int
from torch import Tensor, nn

from fedtap.simulator.attack import generator
from fedtap.simulator.data.documents import Documents, concatenated
from fedtap.simulator.errors import ClientError, FedtapError, short
from fedtap.simulator.leaks import CheckpointLeak, Protocol, Tensors, float_buffers, stack
from fedtap.simulator.scenario import Name, Session
from fedtap.simulator.wire.messages import Overheard, ask, check_nodes, read
from fedtap.simulator.wire.records import tensors_of

if TYPE_CHECKING:
    from fedtap.scenarios.checkpoints.selection import Selecting
    from fedtap.scenarios.checkpoints.tasks import Task


class TunedFederation(typing.Protocol):
    """What a scenario about fine-tuning says of its federation."""

    @property
    def name(self) -> str:
        """As it is called on the command line."""

    @property
    def victims(self) -> int:
        """Sums of clients."""

    @property
    def averaged(self) -> int:
        """Clients of a sum."""

    @property
    def rounds(self) -> int:
        """Of the federation."""

    @property
    def nodes(self) -> int:
        """The clients of all sums."""

    def behind(self, victim: int) -> range:
        """The clients of a sum."""


@dataclass(frozen=True)
class TunedTerms:
    """What every client is told, and says of itself.

    Args:
        weights: parameters and buffers that the server sends first.
        network: the architecture, on the meta device.
        examples: of each client.
        what: they are, such as `documents`.
    """

    weights: Tensors
    network: nn.Module
    protocol: Protocol
    examples: int
    what: str


def checkpoints(
    session: Session, setting: TunedFederation, terms: TunedTerms
) -> tuple[CheckpointLeak, dict[Name, str]]:
    """Play the rounds of a setting: the checkpoints of all victims and rounds, and victim -> why there is none.

    Behind secure aggregation a victim is a sum of clients, and it is missing where one of its clients is.

    Raises:
        ClientError: no client sent one, or no sum is whole.
    """
    check_nodes(session.grid, setting.nodes, setting.name)
    weights = terms.weights
    leaks: list[CheckpointLeak] = []
    missing: dict[Name, str] = {}
    for number in range(1, setting.rounds + 1):
        failed: dict[int, str] = {}
        replies = _replies(session, terms, weights, number, failed)
        sums: list[CheckpointLeak] = []
        for victim in range(setting.victims):
            clients = setting.behind(victim)
            if lost := [failed[client] for client in clients if client not in replies]:
                missing[victim, number] = lost[0]
            else:
                sums.append(_mean([replies[client] for client in clients], victim))
        leaks += sums
        if sums and number < setting.rounds:  # the server averages what it sees
            weights = _averaged([leak.tuned(0) for leak in sums])
    if not leaks:
        raise ClientError(
            f"No sum of {setting.averaged} clients was whole, so nothing was observed: {next(iter(missing.values()))}"
        )
    found = stack(leaks)
    assert isinstance(found, CheckpointLeak)
    return found, missing


def _replies(
    session: Session, terms: TunedTerms, weights: Tensors, number: int, failed: dict[int, str]
) -> dict[int, CheckpointLeak]:
    """Client -> what it sent in one round; the others are entered in `failed`, with the reason."""
    content = RecordDict({"arrays": ArrayRecord(dict(weights)), "round": ConfigRecord({"number": number})})
    exchanges = ask(session.grid, "train.checkpoint", content, session.number, failed=failed)
    leaks = read(exchanges, lambda exchange: _leak(exchange, terms, number), failed)
    return {int(leak.clients[0]): leak for leak in leaks}


def candidates(setting: Selecting, task: Task) -> Int[Tensor, "candidates tokens"]:
    """Private documents of every victim, and as many others of its domain, in an order that tells nothing."""
    asked = [one.ids for victim in range(setting.victims) for one in members_and_others(setting, task, victim)]
    return torch.cat(asked)[candidate_order(setting)]


def candidate_order(setting: Selecting) -> Int[Tensor, "candidates"]:
    """The order in which candidates are handed to attacks, of those that stand victim by victim, members first."""
    many = 2 * setting.victims * setting.candidates
    return torch.randperm(many, generator=generator(setting.seed, "candidates"))


def members_and_others(setting: Selecting, task: Task, victim: int) -> tuple[Documents, ...]:
    """A victim's candidates: those that are private, of all its clients in turns, and those that are not."""
    return tuple(evenly(setting, side, victim, setting.candidates) for side in (task.private, task.outside))


def evenly(setting: Selecting, side: Mapping[int, Documents], victim: int, many: int) -> Documents:
    """The first documents of a sum's clients, `many` in all, as many of each as can be."""
    shares = [len(range(place, many, setting.averaged)) for place in range(setting.averaged)]
    return concatenated([side[client][:few] for client, few in zip(setting.behind(victim), shares, strict=True)])


def _leak(exchange: Overheard, terms: TunedTerms, number: int) -> CheckpointLeak:
    sent = tensors_of(exchange.order.array_records["arrays"])
    parameters = dict(terms.network.named_parameters()).keys()
    buffers = float_buffers(terms.network).keys()
    back = tensors_of(exchange.answer.array_records["arrays"])
    examples = exchange.answer.metric_records["metrics"]["num-examples"]
    if examples != terms.examples:
        raise FedtapError(
            f"Client {exchange.client} says it has {short(examples)} {terms.what}, and every client has "
            f"{terms.examples}."
        )
    leak = CheckpointLeak(
        observed={name: tensor[None] for name, tensor in back.items() if name not in buffers},
        protocol=terms.protocol,
        network=terms.network,
        weights={name: tensor for name, tensor in sent.items() if name in parameters},
        buffers={name: tensor for name, tensor in sent.items() if name not in parameters},
        clients=torch.tensor([exchange.client]),
        rounds=torch.tensor([number]),
        restarts=torch.zeros(1, dtype=torch.long),
        examples=torch.tensor([terms.examples]),
    )
    leak.check()
    return leak


def terms_of(setting: Selecting, task: Task) -> TunedTerms:
    """Of clients that tune a model of texts."""
    protocol = Protocol(
        model=task.model,
        shape=(task.tokens,),
        classes=task.outputs,
        batch=setting.batch * setting.averaged,
        local_steps=setting.epochs * math.ceil(setting.documents / setting.batch),
        learning_rate=setting.learning_rate,
        optimiser=setting.optimiser,
        defence=setting.defence,
        threat_model="secure_aggregation" if setting.averaged > 1 else "curious_server",
        summed=setting.averaged,
        adapter=setting.adapter if setting.lora else "",
    )
    return TunedTerms(task.broadcast(setting.weights_seed), task.network(), protocol, setting.documents, "documents")


def _mean(leaks: list[CheckpointLeak], victim: int) -> CheckpointLeak:
    """What the server sees of clients whose checkpoints are averaged."""
    observed = _averaged([leak.observed for leak in leaks])
    examples = torch.stack([leak.examples for leak in leaks if leak.examples is not None]).sum(0)
    return replace(leaks[0], observed=observed, clients=torch.tensor([victim]), examples=examples)


def _averaged(checkpoints: Sequence[Tensors]) -> Tensors:
    """The mean of each tensor: what a sum shows, and FedAvg's next weights."""
    return {name: torch.stack([one[name] for one in checkpoints]).mean(0) for name in checkpoints[0]}
