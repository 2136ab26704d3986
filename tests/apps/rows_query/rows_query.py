"""Federated statistics: a query that clients answer with rows of their table."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

client = ClientApp()


@client.query()
def query(message: Message, context: Context) -> Message:
    drawn = np.random.default_rng(int(context.node_config["partition-id"]))
    arrays = ArrayRecord({"patients": Array(drawn.normal(size=(40, 5)))})
    return Message(RecordDict({"arrays": arrays}), reply_to=message)


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    asked = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
    grid.send_and_receive(asked)
