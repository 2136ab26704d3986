"""What is read in an exchange with one of fedtap's own clients: weights out, weights back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from torch import Tensor, nn

from fedtap.simulator.defences.defence import ServerDefence
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.leaks import Leak, Protocol, Tensors, float_buffers
from fedtap.simulator.wire.records import record_named, tensors_of
from fedtap.simulator.wire.roll import check_name
from fedtap.simulator.wire.threat_models import Broadcast, check_finite, weights_in

METRICS = ("num-examples", "partition")
"""What fedtap's clients report beside their update; where victims drift, `drift_norm` too."""


class ExchangeReader:
    """Reads the exchanges of a federation. What was sent to many clients is read once.

    Args:
        network: the clients' model, on the meta device.
        reported: names of the metrics.
        server: what the server does to the change of the weights.
    """

    def __init__(
        self,
        network: nn.Module,
        protocol: Protocol,
        reported: Sequence[str] = METRICS,
        server: Sequence[ServerDefence] = (),
    ) -> None:
        self._network, self._protocol, self._server = network, protocol, server
        self._metrics = {"metrics": sorted(reported)}
        self._wanted = dict(network.named_parameters()) | float_buffers(network)
        self._arrays = {"arrays": list(self._wanted)}
        self._sent: tuple[ArrayRecord, Tensors, Broadcast] | None = None

    def leak(self, order: RecordDict, answer: RecordDict, client: int, rnd: int) -> Leak:
        """The leak of one exchange.

        Raises:
            FedtapError: the answer is not what a client of this protocol sends.
        """
        after = self._checked(answer, client)
        before, broadcast = self._broadcast(order, client)
        self._check_change(before, after, client)
        examples = int(record_named("metrics", answer, MetricRecord)["num-examples"])  # type: ignore[arg-type]
        return broadcast.answered(after, self._protocol, client, rnd, examples)

    def check(self, order: RecordDict, answer: RecordDict, client: int) -> None:
        """Refuse what `leak` refuses, of an exchange that nobody attacks: without the leak that takes half the time.

        Raises:
            FedtapError: the answer is not what a client of this protocol sends.
        """
        after = self._checked(answer, client)
        # a gradient read off these weights is finite in float32
        rate = self._protocol.learning_rate if self._protocol.local_steps == 1 else 1.0
        check_finite(after, client, torch.finfo(torch.float32).max * min(rate, 1.0))
        if self._server:
            self._check_change(self._broadcast(order, client)[0], after, client)

    def _broadcast(self, order: RecordDict, client: int) -> tuple[Tensors, Broadcast]:
        """What the client was sent; read once where many were sent the same."""
        record = record_named("arrays", order, ArrayRecord)
        if self._sent is None or self._sent[0] is not record:
            sent = weights_in(order, "message")
            self._sent = record, sent, Broadcast.of(sent, self._network, client)
        return self._sent[1:]

    def _check_change(self, before: Tensors, after: Tensors, client: int) -> None:
        if self._server:
            change = {name: after[name] - before[name] for name in after}
            for defence in self._server:
                defence.check_change(change, client)

    def _checked(self, answer: RecordDict, client: int) -> Tensors:
        """The arrays of a reply that a strategy can average with the others': it would end the run for all of them.

        Arrays are those of the network: the same names, shapes and dtypes, in the same order, by which Flower's
        wrappers pair them. Metrics are finite numbers.

        Raises:
            FedtapError: they are not.
        """
        sent = list(answer.items())
        for kind, mine, theirs in (
            ("arrays", {name: list(one) for name, one in sent if isinstance(one, ArrayRecord)}, self._arrays),
            ("metrics", {name: sorted(one) for name, one in sent if isinstance(one, MetricRecord)}, self._metrics),
        ):
            if mine != theirs:
                raise FedtapError(
                    f"Client {client} sent other {kind} than the rest, so they cannot be averaged: "
                    f"send one record named {kind!r} with the keys that fedtap's clients send, in their order."
                )
        check_name(answer, client)
        metrics = record_named("metrics", answer, MetricRecord)
        for name, value in metrics.items():
            if type(value) not in (int, float) or not abs(value) < 2**63:  # type: ignore[arg-type]
                raise FedtapError(f"Client {client} sent {short(value)} as its {name}: send a finite number.")
        if type(metrics["num-examples"]) is not int or metrics["num-examples"] < 1:
            raise FedtapError(
                f"Client {client} says that it has {metrics['num-examples']} examples: send a count from 1."
            )
        got = tensors_of(record_named("arrays", answer, ArrayRecord))
        for name, tensor in got.items():
            wanted = self._wanted[name]
            if (tensor.shape, tensor.dtype) != (wanted.shape, wanted.dtype):
                raise FedtapError(
                    f"Client {client} answered {short(name)} as {kind_of_array(tensor)} in the place of "
                    f"{kind_of_array(wanted)}: client and server must name the same --model."
                )
        return got


def kind_of_array(tensor: Tensor) -> str:
    """Dtype and shape."""
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {short(tuple(tensor.shape))}"
