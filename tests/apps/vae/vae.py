"""A variational autoencoder: what is minimised is a sum of a reconstruction error and a divergence."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn


class Vae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(64, 8), nn.Linear(4, 64)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, log_variance = self.encoder(x.flatten(1)).chunk(2, dim=1)
        drawn = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return self.decoder(drawn).view_as(x), mean, log_variance


client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    model = Vae()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    draw = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
    images = 2 * torch.rand(16, 1, 8, 8, generator=draw) - 1
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    for some in images.split(8):
        adam.zero_grad()
        seen, mean, log_variance = model(some)
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
        (nn.functional.mse_loss(seen, some, reduction="sum") + divergence).backward()
        adam.step()
    metrics = MetricRecord({"num-examples": 16})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    FedAvg().start(
        grid=grid,
        initial_arrays=ArrayRecord(Vae().state_dict()),
        num_rounds=int(context.run_config["num-server-rounds"]),
    )
