"""One exchange with clients that reply with a posterior: what was observed, all of them in one stack."""

from __future__ import annotations

from typing import cast

import torch
from flwr.app import RecordDict

from fedtap.simulator.errors import ClientError
from fedtap.simulator.leaks import PosteriorLeak, Protocol, stack
from fedtap.simulator.models.likelihoods import NORMAL, Likelihood, LinearRegression
from fedtap.simulator.scenario import Session
from fedtap.simulator.wire.messages import Overheard, ask, read
from fedtap.simulator.wire.records import tensors_of

POSTERIOR = "train.posterior"
"""Message type under which clients are asked for their posterior."""


def posteriors(session: Session, model: Likelihood, prior: str) -> PosteriorLeak:
    """All clients' posteriors in one stack.

    Raises:
        ClientError: a client fails, or sends another number of draws than the first one did.
    """
    heard = ask(session.grid, POSTERIOR, RecordDict({}), session.number)
    leaks = read(heard, lambda one: _leak(model, prior, one))
    for leak in leaks[1:]:
        if leak.sent() != leaks[0].sent():
            raise ClientError(
                f"Client {int(leak.clients[0])} sent other draws, or another number of them, than the first did, and "
                "all are attacked at once: let all clients sample alike."
            )
    return cast(PosteriorLeak, stack(leaks))


def _leak(model: Likelihood, prior: str, one: Overheard) -> PosteriorLeak:
    name = torch.tensor([one.client])
    leak = PosteriorLeak(
        observed={key: tensor[None] for key, tensor in tensors_of(one.answer.array_records["posterior"]).items()},
        protocol=Protocol(
            model=str(model),
            shape=(model.inputs,),
            classes=1,
            batch=1,
            prior=prior if isinstance(model, LinearRegression) else NORMAL,
        ),
        network=model.network(),
        weights=None,
        buffers={},
        clients=name,
        rounds=torch.ones_like(name),
        restarts=torch.zeros_like(name),
    )
    leak.check()
    return leak
