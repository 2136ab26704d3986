"""Does a vision transformer's first attention hide the photograph that went in?

Expect: with the residual sum, no: patches have fewer pixels than tokens have numbers, so there are more equations than
unknowns, and from plain grey Newton's method gives every pixel back in about seven steps. Cut before the sum, only what
LayerNorm and a nearly uniform attention let through is sent, and what comes back is less and slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from flwr.serverapp import Grid
from torch import Tensor

from fedtap.attackers.activations.block import block_of
from fedtap.scenarios.activations.split import Split, attacks_on_blocks
from fedtap.scenarios.command.options import Knob
from fedtap.simulator.data.images import Dataset
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.settings import dataset_of
from fedtap.simulator.models.attention import Patches, first_attention, joined, patches_of
from fedtap.simulator.models.registry import ViT, build, with_weights
from fedtap.simulator.report.folder import Row
from fedtap.simulator.report.page import Picture
from fedtap.simulator.scores import blind, mse, psnr, relative_error
from fedtap.simulator.study import Outcome, rows_of_failed

CUTS = ("sum", "attention")
"""After the residual sum, or before it, where only the attention's own output is sent."""


@dataclass(frozen=True)
class AttentionViT(Split):
    """Photographs through a vision transformer's patch embedding and first attention."""

    columns: ClassVar[tuple[str, ...]] = (
        "client",
        "psnr",
        "psnr_blind",
        "psnr_stranger",
        "relative_error",
        "iterations",
        "converged",
        "residual",
        "attack",
        "error",
    )
    legend: ClassVar[str] = (
        "psnr: of the picture, dB, at most 100; blind: of the best guess without the answer; stranger: of the guess "
        "from another client's answer; relative error: of its pixels; residual: likewise, of the guess's output"
    )

    dataset: str = "photos"
    size: int = 32
    weights_seed: int = 1234
    weights: str = ""
    cut: str = "sum"

    @property
    def block(self) -> str:
        """The half, as a saved leak names it."""
        return f"vit(cut={self.cut!r})"

    def dataset_at(self, data_root: Path) -> Dataset:
        """Where the photographs are from.

        Raises:
            FedtapError: it has fewer than there are clients.
        """
        dataset = dataset_of(self.dataset, data_root, self.size)
        if self.victims > len(dataset.target):
            raise FedtapError(
                f"{self.victims} clients with a picture each are more than the {len(dataset.target)} on the victims' "
                f"side of {self.dataset}: lower --victims."
            )
        return dataset

    def vit(self, data_root: Path) -> ViT:
        """The model, before it is cut."""
        dataset = self.dataset_at(data_root)
        vit = build("vit", dataset.shape, len(dataset.classes), seed=self.weights_seed)
        assert isinstance(vit, ViT)
        return with_weights(vit, Path(self.weights)) if self.weights else vit  # type: ignore[return-value]

    def half(self, data_root: Path) -> Patches:
        """The model to its first attention, in float32."""
        return first_attention(self.vit(data_root), residual=self.cut == "sum")

    def patch(self, data_root: Path) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        high, wide = self.vit(data_root).embed.kernel_size
        return high, wide

    def shape(self, data_root: Path) -> tuple[int, int]:
        """Patches, and pixels of a patch."""
        return tuple(self.private(0, data_root).shape)  # type: ignore[return-value]

    def private(self, client: int, data_root: Path) -> Tensor:
        """A client's photograph, in patches."""
        images, _ = self.dataset_at(data_root).target.batch(slice(client, client + 1))
        return patches_of(images[0], *self.patch(data_root))

    def play(self, grid: Grid, part: int, device: torch.device, data_root: Path) -> Outcome:
        """Every attack on every client, from a start that needs no truth."""
        failed: dict[int, str] = {}
        leak = self.listen(grid, part, data_root, failed)
        dataset, (high, wide) = self.dataset_at(data_root), self.patch(data_root)
        truth = joined(self.truth(leak, data_root), dataset.shape, high, wide)
        floor = blind(dataset.auxiliary.batch(slice(None))[0])
        pictures = [
            Picture(f"client {client}", truth[v][None], {}, floor) for v, client in enumerate(leak.clients.tolist())
        ]
        rows: list[Row] = []
        for attack in self.attacks:
            guess = attack(leak.to(device), seed=self.seed).on_cpu()
            images = joined(guess.values.float(), dataset.shape, high, wide)
            own, none, strange = (
                psnr(mse(some, truth)).tolist() for some in (images, floor.expand_as(truth), images.roll(1, dims=0))
            )
            errors = relative_error(images, truth).tolist()
            residual = relative_error(block_of(leak)(guess.values), leak.observed["output"]).tolist()
            for victim, picture in enumerate(pictures):
                picture.guesses[attack.written()] = (images[victim][None].clamp(0, 1), own[victim])
                rows.append(
                    {
                        "attack": attack.written(),
                        "client": int(leak.clients[victim]),
                        "cut": self.cut,
                        "noise": self.noise,
                        "psnr": own[victim],
                        "psnr_blind": none[victim],
                        "psnr_stranger": strange[victim] if len(leak) > 1 else None,
                        "relative_error": errors[victim],
                        "iterations": int(guess.iterations[victim]),
                        "converged": bool(guess.converged[victim]),
                        "objective": float(guess.objective[victim]),
                        "residual": residual[victim],
                    }
                )
            rows += rows_of_failed(failed, {"attack": attack.written()})
        return Outcome(rows, leak, pictures=pictures)


def scenario(
    *,
    dataset: Annotated[str, Knob("photos, cifar10, a folder or zip of images, or an .npz", path=True)] = "photos",
    size: Annotated[
        int, Knob("pixels a side that photos and the images of a folder or zip are brought to", 8, 512)
    ] = 32,
    cut: Annotated[
        str, Knob("where the clients' half ends: after the residual sum, or before it", choices=CUTS)
    ] = "sum",
    noise: Annotated[
        float, Knob("what clients add to the output, as a share of its root mean square", 0.0, 100.0)
    ] = 0.0,
    attack: Annotated[
        str, Knob("NAME[,NAME…], each with settings if need be", swept=False)
    ] = "attention_newton(steps=30)",
    victims: Annotated[int, Knob("clients, all of which are attacked", 1, 1000)] = 4,
    weights_seed: Annotated[int, Knob("seed of the model's initial weights", 0, 2**31)] = 1234,
    weights: Annotated[str, Knob(".safetensors of initial weights, in the place of the seed's", swept=False)] = "",
    seed: Annotated[int, Knob("seed of all that is drawn, but for the weights", 0, 2**31)] = 0,
) -> AttentionViT:
    """One exchange: the first layers go out, and what they make of the clients' photographs comes back."""
    return AttentionViT(
        attacks=attacks_on_blocks(attack),
        dataset=dataset,
        size=size,
        cut=cut,
        noise=noise,
        victims=victims,
        weights_seed=weights_seed,
        weights=weights,
        seed=seed,
    )
