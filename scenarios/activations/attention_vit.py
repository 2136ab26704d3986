"""Does a vision transformer's first attention hide the photograph that went in?

Expect: with the residual sum, no: patches have fewer pixels than tokens have numbers, so there are more equations than
unknowns, and from plain grey Newton's method gives every pixel back in about seven steps. Cut before the sum, only what
LayerNorm and a nearly uniform attention let through is sent, and what comes back is less and slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from fedtap.scenarios.activations.split import SplitLearning
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.options import ImageSize, ImageSource, Option, WeightsFile, WeightsSeed
from fedtap.simulator.report.columns import Column
from fedtap.simulator.scenario import Observed, Row, Scored, Trial

if TYPE_CHECKING:
    from torch import Tensor

    from fedtap.simulator.attack import Attack
    from fedtap.simulator.data.images import Dataset
    from fedtap.simulator.models.attention import Patches
    from fedtap.simulator.models.registry import ViT


@dataclass(frozen=True)
class AttentionViT(SplitLearning):
    """Photographs through a vision transformer's patch embedding and first attention."""

    columns: ClassVar[tuple[Column, ...]] = (
        Column("client", over="rows"),
        Column("psnr", "of the picture, dB, at most 100", "PSNR", ".1f"),
        Column("psnr_blind", "of the best guess without the reply", "blind PSNR", ".1f"),
        Column(
            "psnr_negative_control", "of the reconstruction from another client's reply", "negative control PSNR", ".1f"
        ),
        Column("relative_error", "of its pixels"),
        Column("iterations"),
        Column("converged", over="share"),
        Column("residual", "relative error of the reconstruction's output"),
        Column("error", over="same"),
        Column("objective", over="hidden"),
    )

    dataset: ImageSource = "photos"
    size: ImageSize = 32
    weights: WeightsFile = ""
    weights_seed: WeightsSeed = 1234
    cut: Annotated[
        Literal["sum", "attention"],
        Option("where the clients' half ends: after the residual sum, or before it", group="model"),
    ] = "sum"
    attack: str = "attention_newton(steps=30)"
    victims: int = 4

    @property
    def block(self) -> str:
        """The half, as a saved leak names it."""
        return f"vit(cut={self.cut!r})"

    def dataset_at(self, data_root: Path) -> Dataset:
        """Where the photographs are from.

        Raises:
            FedtapError: it has fewer than there are clients.
        """
        from fedtap.simulator.federation.settings import dataset_of

        dataset = dataset_of(self.dataset, data_root, self.size)
        if self.victims > len(dataset.target):
            raise FedtapError(
                f"{self.victims} clients with a picture each are more than the {len(dataset.target)} on the victims' "
                f"side of {self.dataset}: lower --victims."
            )
        return dataset

    def vit(self, data_root: Path) -> ViT:
        """The model, before it is cut."""
        from fedtap.simulator.models.registry import ViT, build, with_weights

        dataset = self.dataset_at(data_root)
        vit = build("vit", dataset.shape, len(dataset.classes), seed=self.weights_seed)
        assert isinstance(vit, ViT)
        return with_weights(vit, Path(self.weights)) if self.weights else vit  # type: ignore[return-value]

    def half(self, data_root: Path) -> Patches:
        """The model to its first attention, in float32."""
        from fedtap.simulator.models.attention import first_attention

        return first_attention(self.vit(data_root), residual=self.cut == "sum")

    def patch(self, data_root: Path) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        high, wide = self.vit(data_root).embed.kernel_size
        return high, wide

    def shape(self, data_root: Path) -> tuple[int, int]:
        """Patches, and pixels of a patch."""
        (channels, height, width), (high, wide) = self.dataset_at(data_root).shape, self.patch(data_root)
        return (height // high) * (width // wide), channels * high * wide

    def private(self, client: int, data_root: Path) -> Tensor:
        """A client's photograph, in patches."""
        from fedtap.simulator.models.attention import patches_of

        images, _ = self.dataset_at(data_root).target.batch(slice(client, client + 1))
        return patches_of(images[0], *self.patch(data_root))

    def settled(self, attack: Attack[Any], label: str, observed: Observed) -> Row:
        """Where the model is cut."""
        return super().settled(attack, label, observed) | {"cut": self.cut}

    def score(self, trial: Trial) -> Scored:
        """The pictures' errors, beside those of a blind guess, and of another client's reconstruction."""
        from fedtap.attackers.activations.block import block_of
        from fedtap.simulator.models.attention import joined
        from fedtap.simulator.report.pictures import Picture
        from fedtap.simulator.scores import blind, mse, psnr, relative_error

        leak, found, data_root = trial.observed.leak, trial.reconstruction, trial.session.data_root
        assert leak is not None
        dataset, (high, wide) = self.dataset_at(data_root), self.patch(data_root)
        truth = joined(self.truth(leak, data_root), dataset.shape, high, wide)
        images = joined(found.values.float(), dataset.shape, high, wide)
        guess = blind(dataset.auxiliary.batch(slice(None))[0])
        own, none, others = (
            psnr(mse(some, truth)).tolist() for some in (images, guess.expand_as(truth), images.roll(1, dims=0))
        )
        errors = relative_error(images, truth).tolist()
        residual = relative_error(block_of(leak)(found.values), leak.observed["output"]).tolist()
        written, rows, pictures = trial.attack.written(), [], {}
        said = "".join(f", {name.replace('_', ' ')} {value}" for name, value in self.swept)
        for victim, client in enumerate(leak.clients.tolist()):
            rows.append(
                {
                    "client": client,
                    "psnr": own[victim],
                    "psnr_blind": none[victim],
                    "psnr_negative_control": others[victim] if len(leak) > 1 else None,
                    "relative_error": errors[victim],
                    "iterations": int(found.iterations[victim]),
                    "converged": bool(found.converged[victim]),
                    "objective": float(found.objective[victim]),
                    "residual": residual[victim],
                }
            )
            shown = {written: (images[victim][None].clamp(0, 1), own[victim])}
            pictures[client, self.swept] = Picture(f"client {client}{said}", truth[victim][None], shown, guess)
        return Scored(rows, pictures)
