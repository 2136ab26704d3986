"""Who replies: a client of federated analytics."""

from __future__ import annotations

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from jaxtyping import Float
from torch import Tensor


def moments_reply(message: Message, records: Float[Tensor, "records features"], client: int) -> Message:
    """Mean and covariance of the client's records."""
    moments = {"mean": records.mean(0), "covariance": records.T.cov(correction=0)}
    content = {"moments": ArrayRecord(moments), "metrics": MetricRecord({"partition": client})}
    return Message(RecordDict(content), reply_to=message)  # type: ignore[arg-type]
