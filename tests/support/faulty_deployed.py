"""fedtap's ClientApp for SuperNodes, of which those with FAULT in their environment fail in the second round.

FAULT is `garbage`, `late` (the reply is held back until the file FAULT_UNTIL is there) or `hang` (there is none). A
node that has come to its fault makes the file FAULT_BEGUN, so that a test knows when to kill it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedtap.scenarios.app import client as sound

ROUND = 2
"""The round in which nodes fail."""


class FaultyNode(ClientApp):
    """fedtap's ClientApp, with this node's fault."""

    def __call__(self, message: Message, context: Context) -> Message:
        config = message.content.config_records.get("config", {})
        fault = os.environ.get("FAULT", "")
        if message.metadata.message_type != "train" or config.get("server-round") != ROUND or not fault:
            return sound(message, context)
        reply = sound(message, context)
        Path(os.environ["FAULT_BEGUN"]).touch()
        if fault == "garbage":
            content = RecordDict({"arrays": ArrayRecord(), "metrics": MetricRecord({"num-examples": -1})})
            return Message(content, reply_to=message)
        until = Path(os.environ.get("FAULT_UNTIL", "/nowhere"))
        while not until.exists():
            time.sleep(0.1)
        return reply


client = FaultyNode()
