"""Do a mean and a covariance hide the records behind them?

Expect: two records come back to the bit of rounding; of more, what lies off the first principal axis stays hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from fedtap.scenarios.attack_options import Attacked
from fedtap.simulator.options import Option
from fedtap.simulator.report.columns import Column
from fedtap.simulator.scenario import Observed, Scored, Session, Trial

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from torch import Tensor

    from fedtap.simulator.leaks import Leak
    from fedtap.simulator.wire.messages import Overheard

FEATURES = 3


@dataclass(frozen=True)
class Moments(Attacked):
    """Clients of federated analytics, each with a few standard normal records."""

    reconstructs: ClassVar[str] = "Records"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("client", over="rows"),
        Column("rmse", "of the records, in the order that fits them best"),
        Column("blind", "that of zeros"),
        Column("error", over="same"),
    )

    records: Annotated[int, Option("of each client", 1, 4, "data")] = 2
    victims: Annotated[int, Option("clients", 1, 100, "federation")] = 3
    lost: Annotated[int, Option("a client that fails; -1: none does", -1, 99, "federation")] = -1
    attack: str = "tests.support.moments.pair_of_moments:PairOfMoments"

    @property
    def nodes(self) -> int:
        """One a victim."""
        return self.victims

    def private(self, client: int) -> Tensor:
        """A client's records."""
        import torch

        from fedtap.simulator.attack import generator

        draw = generator(self.seed, "records", client)
        return torch.randn(self.records, FEATURES, generator=draw, dtype=torch.float64)

    def reply(self, message: Message, context: Context, data_root: Path) -> Message:
        """The moments of its records."""
        from tests.support.moments.client import moments_reply

        client = int(context.node_config["partition-id"])
        if client == self.lost:
            raise ValueError("its disk is gone")
        return moments_reply(message, self.private(client), client)

    def observe(self, session: Session) -> Observed:
        """Ask every client once."""
        from flwr.app import RecordDict

        from fedtap.simulator.leaks import stack
        from fedtap.simulator.wire.messages import ask, check_nodes, read

        check_nodes(session.grid, self.nodes, self.name)
        failed: dict[int, str] = {}
        heard = ask(session.grid, "query.moments", RecordDict({}), session.number, failed=failed)
        leak = stack(read(heard, self._leak, failed))
        return Observed(leak, {(client, 1): why for client, why in sorted(failed.items())})

    def _leak(self, heard: Overheard) -> Leak:
        import torch
        from torch import nn

        from fedtap.simulator.leaks import Protocol
        from fedtap.simulator.wire.records import tensors_of
        from tests.support.moments.leak import MomentsLeak

        sent = tensors_of(heard.answer.array_records["moments"])
        leak = MomentsLeak(
            observed={name: tensor[None] for name, tensor in sent.items()},
            protocol=Protocol(model="none", shape=(FEATURES,), classes=1, batch=self.records),
            network=nn.Identity(),
            weights=None,
            buffers={},
            clients=torch.tensor([heard.client]),
            rounds=torch.ones(1, dtype=torch.long),
            restarts=torch.zeros(1, dtype=torch.long),
        )
        leak.check()
        return leak

    def score(self, trial: Trial) -> Scored:
        """The error of the best order."""
        import itertools

        rows = []
        for client, guess in zip(trial.leak.clients.tolist(), trial.reconstruction.records, strict=True):
            truth = self.private(client)
            orders = itertools.permutations(range(self.records))
            best = min(float((guess[list(order)] - truth).square().mean()) for order in orders)
            rows.append({"client": client, "rmse": best**0.5, "blind": float(truth.square().mean().sqrt())})
        return Scored(rows)

    def threat(self, leak: Leak | None) -> Sequence[str]:
        """A curious server."""
        return ("A curious server. It observes each client's mean and covariance, and knows the number of records.",)
