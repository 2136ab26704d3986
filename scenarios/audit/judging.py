"""An exchange judged, its inputs noted, whatever a client's bytes and models raise."""

from __future__ import annotations

from flwr.app import Message

from fedtap.scenarios.audit.attacks import Ranges, note_inputs
from fedtap.scenarios.audit.observe import LocalTraining
from fedtap.scenarios.audit.verdict import NOT_UNDERSTOOD, AuditedExchange, judged
from fedtap.simulator.errors import short


def judged_and_noted(
    message: Message, reply: Message, training: LocalTraining, client: int, rnd: int, ranges: Ranges
) -> tuple[AuditedExchange, tuple[int, ...] | None] | None:
    """An exchange and the shape of its inputs; None where nothing came back that is to be judged.

    Args:
        client: partition of the client.
        rnd: number of the round.
        ranges: widened by the inputs that were seen.
    """
    try:
        exchange = judged(message, reply, training, client, rnd)
        return None if exchange is None else (exchange, note_inputs(ranges, exchange))
    except Exception as error:
        reason = f"fedtap could not judge the exchange ({type(error).__name__}: {short(error, 120)})."
        return AuditedExchange(client, rnd, NOT_UNDERSTOOD, reason), None
