"""The threat models: what an attacker observes of one exchange between server and client.

`curious_server` knows the weights it sent. `eavesdropper` sits on the clients' uplink: it sees what each client sends
(as a difference to what the client was sent) and knows the architecture, but not the weights; GIT's threat model
(https://arxiv.org/abs/2505.20026). `secure_aggregation` is a curious server to which the clients' replies come masked,
so that it observes their sum alone in each round (Bonawitz et al., CCS 2017, https://eprint.iacr.org/2017/281).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, RecordDict
from jaxtyping import Float
from torch import Tensor, nn

from fedtap.simulator.errors import FedtapError, short, unknown
from fedtap.simulator.federation.settings import FEWEST, SECURE
from fedtap.simulator.leaks import ROUNDING, GradientLeak, Leak, Protocol, Tensors, UpdateLeak, float_buffers
from fedtap.simulator.wire.records import records_of, tensors_of

ThreatModel = Callable[[Leak], Leak]


def curious_server(leak: Leak) -> Leak:
    """Knows everything that was exchanged, the weights included."""
    return leak


def eavesdropper(leak: Leak) -> Leak:
    """Knows architecture and replies; neither weights nor buffers."""
    return dataclasses.replace(leak, weights=None, buffers={}, stacked=False)


def secure_aggregation(leak: Leak) -> Leak:
    """Knows the weights, and its own client's reply, which is not masked. See `isolated` for the sum."""
    return leak


THREAT_MODELS: dict[str, ThreatModel] = {
    "curious_server": curious_server,
    "eavesdropper": eavesdropper,
    SECURE: secure_aggregation,
}


def threat_model(name: str) -> ThreatModel:
    """The named threat model.

    Raises:
        FedtapError: there is none of this name.
    """
    if name not in THREAT_MODELS:
        raise unknown("threat_model", name, THREAT_MODELS)
    return THREAT_MODELS[name]


@dataclass(frozen=True)
class Masked:
    """One reply of a masked sum, and the number of examples by which it is weighted there."""

    leak: Leak
    examples: float


def isolated(replies: Mapping[int, Masked], clients: int, others: str) -> Leak:
    """What a server behind secure aggregation learns of one round: the sum, less the replies that it knows.

    It reads the channel of the compromised client (number `clients`), and it knows whether the `others`, clients 1 to
    `clients` - 1, send zero, send what the compromised client sends, or collude and tell it what they send. What is
    left is the mean of the rest, weighted by examples as in FedAvg: after one local step, the gradient of the mean loss
    over all their images.

    Raises:
        FedtapError: a reply is missing, so that the sum is not unmasked, or is of fewer clients than announced.
    """
    _all_replied(replies, clients)
    revealed = _revealed(replies, clients, others)
    some, rest = replies[0].leak, [reply.examples for client, reply in replies.items() if client not in revealed]
    observed = {}
    for name in some.observed:
        left = torch.zeros_like(some.observed[name], dtype=torch.float64)
        for reply in replies.values():  # the server is given this sum
            left += reply.leak.observed[name].double() * reply.examples
        for client, tensors in revealed.items():
            left -= tensors[name].double() * replies[client].examples
        observed[name] = (left / sum(rest)).float()
    return dataclasses.replace(
        some,
        observed=observed,
        resolution=some.resolution * math.hypot(*rest) / sum(rest),
        examples=torch.tensor([round(sum(rest))]),
    )


def _all_replied(replies: Mapping[int, Masked], clients: int) -> None:
    absent = [client for client in range(clients) if client not in replies]
    if clients - len(absent) < FEWEST:
        raise FedtapError(
            f"Of the {clients} clients to be summed {clients - len(absent)} answered, and secure aggregation unmasks "
            f"no sum of fewer than {FEWEST}, as it would be one client's: play another round, or raise --clients."
        )
    if absent:
        raise FedtapError(
            f"Of the {clients} clients to be summed these dropped out: {', '.join(map(str, absent))}; the sum is of "
            "fewer images than the attack assumes: play another round, or lower --clients."
        )


def _revealed(replies: Mapping[int, Masked], clients: int, others: str) -> dict[int, Tensors]:
    """Replies that the server knows singly: the compromised client's, and those of clients that do not hide theirs."""
    revealed = {clients: replies[clients].leak.observed} if clients in replies else {}
    if others == "identical" and not revealed:
        raise FedtapError(
            "The compromised client did not answer, and only from it would the server know what the identical others "
            "sent: play another round."
        )
    for client in range(1, clients):
        its_own = replies[client].leak.observed
        if others == "silent":
            revealed[client] = {name: torch.zeros_like(tensor) for name, tensor in its_own.items()}
        elif others == "identical":
            revealed[client] = revealed[clients]
        elif others == "colluding":
            revealed[client] = its_own
    return revealed


def leak_of_exchange(
    before: Tensors,
    after: Tensors,
    protocol: Protocol,
    network: nn.Module,
    client: int,
    rnd: int,
    examples: int | None = None,
) -> Leak:
    """The leak of an exchange: of the weights that a client was sent and those that it sent back.

    One prescribed step of SGD gives away the gradient, (before - after) / learning rate; several give away their
    sum, after - before. What else the protocol says of loss and optimiser is left to whoever reads the leak. Rounding
    on the wire is that of the coarser of the two.

    Args:
        examples: how many the client says that it has; None where it does not say.

    Raises:
        FedtapError: they are not weights of this model, or not finite.
    """
    return Broadcast.of(before, network, client).answered(after, protocol, client, rnd, examples)


@dataclass(frozen=True)
class Broadcast:
    """What a client was sent, made ready once for all who were sent the same."""

    network: nn.Module
    """The model."""
    weights: Tensors
    """Its parameters, in single precision."""
    buffers: Tensors
    """Its floating point buffers, in single precision."""
    vector: Float[Tensor, "entries"]
    """The parameters one after the other, in double precision."""
    types: frozenset[torch.dtype]
    """Precisions in which the parameters were sent."""

    @staticmethod
    def of(sent: Tensors, network: nn.Module, client: int) -> Broadcast:
        """From the tensors of a message to this client.

        Raises:
            FedtapError: they are not all of the model's.
        """
        parameters, buffers = [name for name, _ in network.named_parameters()], list(float_buffers(network))
        _whole(sent, [*parameters, *buffers], "message to", client)
        return Broadcast(
            network,
            {name: sent[name].float() for name in parameters},
            {name: sent[name].float() for name in buffers},
            vector_of(sent, parameters),
            frozenset(sent[name].dtype for name in parameters),
        )

    def check(self, after: Tensors, client: int) -> None:
        """Refuse what a client sent back where it is no state of this model.

        Raises:
            FedtapError: it lacks a tensor, one has another shape, or a buffer is not finite.
        """
        wanted = {**self.weights, **self.buffers}
        _whole(after, list(wanted), "reply of", client)
        same_shapes(after, wanted, client)
        check_finite({name: after[name] for name in self.buffers}, client)

    def answered(self, after: Tensors, protocol: Protocol, client: int, rnd: int, examples: int | None) -> Leak:
        """The leak of a client that sent these weights back, as `leak_of_exchange`.

        Raises:
            FedtapError: they are not weights of this model, or not finite.
        """
        self.check(after, client)
        change = vector_of(after, self.weights) - self.vector
        types = self.types.union(after[name].dtype for name in self.weights)
        return self.leak(change, types, protocol, client, rnd, examples)

    def leak(
        self,
        change: Float[Tensor, "entries"],
        types: Iterable[torch.dtype],
        protocol: Protocol,
        client: int,
        rnd: int,
        examples: int | None = None,
    ) -> Leak:
        """The leak of a client whose parameters changed by this, as `leak_of_exchange`.

        Args:
            change: the parameters after training, less `vector`.
            types: precisions in which they went over the wire.

        Raises:
            FedtapError: the change is not finite.
        """
        single = protocol.local_steps == 1
        scale = -1 / protocol.learning_rate if single else 1.0
        scaled = (change * scale).float()  # of all at once: they are many and small
        sizes = [tensor.numel() for tensor in self.weights.values()]
        parts = dict(zip(self.weights, scaled.split(sizes), strict=True))  # type: ignore[no-untyped-call]
        check_finite(parts, client)
        return (GradientLeak if single else UpdateLeak)(
            observed={name: parts[name].view(1, *tensor.shape) for name, tensor in self.weights.items()},
            protocol=protocol,
            network=self.network,
            weights=self.weights,
            buffers=self.buffers,
            clients=torch.tensor([client]),
            rounds=torch.tensor([rnd]),
            restarts=torch.tensor([0]),
            resolution=max(map(_rounding, types)) * abs(scale),
            examples=None if examples is None else torch.tensor([examples]),
        )


def vector_of(tensors: Tensors, names: Iterable[str]) -> Float[Tensor, "entries"]:
    """Those of these names one after the other, in double precision."""
    return torch.cat([tensors[name].reshape(-1) for name in names]).double()


def same_shapes(after: Tensors, before: Tensors, client: int) -> None:
    """Refuse a client's tensors that have other shapes than those that it was sent.

    Raises:
        FedtapError: naming the first.
    """
    for name, tensor in before.items():
        if after[name].shape != tensor.shape:
            raise FedtapError(
                f"Client {client} answered {name} of shape {tuple(after[name].shape)} to one of "
                f"{tuple(tensor.shape)}, so there is no difference to take: it trains another model."
            )


def check_finite(tensors: Tensors, client: int, below: float = math.inf) -> None:
    """Refuse a client's tensors that hold NaN, or a number that is not below this one in size.

    Raises:
        FedtapError: naming the first.
    """
    if not tensors:
        return
    # all at once, since they are many and small; both ends are NaN if any number is
    ends = torch.cat([tensor.reshape(-1) for tensor in tensors.values()]).aminmax()
    if not all(abs(float(end)) < below for end in ends):
        raise _no_number(next(name for name, one in tensors.items() if not bool((one.abs() < below).all())), client)


def _no_number(name: str, client: int) -> FedtapError:
    return FedtapError(f"Client {client} answered NaN or infinity in {name}: its training diverged or it lies.")


def _rounding(precision: torch.dtype) -> float:
    """Standard error of a difference of two weights near 0.1 in this precision; ROUNDING in float32."""
    return ROUNDING * torch.finfo(precision).eps / torch.finfo(torch.float32).eps


def difference(before: Tensor, after: Tensor, scale: float) -> Tensor:
    """``(after - before) scale``, the change of the weights on the wire; of one client, or of a stack."""
    # in place: memory for more copies of a stack takes longer than the sums
    return after.to(torch.float64, copy=True).sub_(before).mul_(scale).float()


def weights_in(content: RecordDict, what: str) -> dict[str, Tensor]:
    """The arrays of a message as tensors, name -> tensor.

    Args:
        what: the message, in the sentence of an error.

    Raises:
        FedtapError: it holds no or several ArrayRecords, or arrays that are no tensors.
    """
    records = records_of(content, ArrayRecord)
    if len(records) != 1:
        raise FedtapError(
            f"The {what} holds {len(records)} ArrayRecords and FedAvg exchanges exactly one: "
            "send other leaks under a message action of their own."
        )
    (record,) = records
    try:
        return tensors_of(record)
    except Exception as error:  # the bytes are a client's, and numpy raises what it likes about them
        raise FedtapError(f"The {what} holds arrays that are no tensors ({short(error)}): send float32.") from error


def _whole(found: Tensors, wanted: list[str], what: str, client: int) -> None:
    if missing := [name for name in wanted if name not in found or not found[name].is_floating_point()]:
        raise FedtapError(
            f"The {what} client {client} lacks {short(', '.join(missing[:3]))}, which this model has: "
            "client, server and tap must have the same model."
        )
