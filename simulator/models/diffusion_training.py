"""Training of a diffusion model on captioned images: a client's fine-tuning, in the manner of DreamBooth, or more.

Ruiz, Li, Jampani, Pritch, Rubinstein, Aberman, CVPR 2023. https://arxiv.org/abs/2208.12242
Departs from it in one way: there is no prior-preservation loss, as in the code of FineXtract.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedtap.simulator.data.vision import torchvision
from fedtap.simulator.defences.dp_sgd import DPSGD
from fedtap.simulator.models.diffusion import Condition, Denoiser, Frozen, Pixels, all_threads
from fedtap.simulator.progress import progress

HOLE = 0.5
"""Side of Cutout's square, as a share of the image's."""

AUGMENTATIONS: Mapping[str, str] = {
    "none": "images as they are",
    "cutout": "a grey square over a quarter of the image (DeVries, Taylor 2017, https://arxiv.org/abs/1708.04552)",
    "randaugment": "two random operations (Cubuk et al. 2020, https://arxiv.org/abs/1909.13719)",
}
"""What clients do to an image before each step on it, by name."""


@dataclass(frozen=True)
class DiffusionTraining:
    """How a diffusion model is trained."""

    steps: int = 600
    """Of the optimiser, AdamW with torch's other settings."""
    batch: int = 4
    """Images in a step."""
    learning_rate: float = 3e-4
    """Of the optimiser."""
    augmentation: str = "none"
    """One of AUGMENTATIONS."""

    def __call__(
        self,
        net: Denoiser,
        frozen: Frozen,
        images: Pixels,
        condition: Condition,
        draw: torch.Generator,
        private: DPSGD | None = None,
    ) -> None:
        """Train those of the net's parameters that have a gradient, in place.

        Args:
            images: in [0, 1].
            condition: one for all images, or one for each.
            draw: of everything random: images in a batch, steps of the schedule, noise, augmentation.
            private: what each step is done by, in the place of a plain gradient.

        Raises:
            FedtapError: the network is none that DP-SGD can train.
        """
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=self.learning_rate, fused=True)
        net.train()
        with all_threads():
            for some in progress(self.batches(len(images), draw), "fine-tuning"):
                optimiser.zero_grad()
                told = condition if len(condition) == 1 else condition[some]

                def loss_of(net: nn.Module, some: Tensor = some, told: Condition = told) -> Tensor:
                    return self.loss(net, frozen, images[some], told, draw)

                if private is None:
                    loss_of(net).backward()  # type: ignore[no-untyped-call]
                else:
                    private.clipped(net, loss_of, len(some), draw)
                optimiser.step()
        net.eval()

    def batches(self, images: int, draw: torch.Generator) -> list[Tensor]:
        """Which images are in each step: all in turns, shuffled in each pass, and none twice in a step, since a
        guarantee counts on it."""
        found: list[Tensor] = []
        left: list[int] = []
        for _ in range(self.steps):
            while len(left) < self.batch:
                fresh = torch.randperm(images, generator=draw).tolist()
                again = set(left)
                left += [one for one in fresh if one not in again] + [one for one in fresh if one in again]
            found.append(torch.tensor(left[: self.batch]))
            left = left[self.batch :]
        return found

    def loss(
        self, net: nn.Module, frozen: Frozen, images: Pixels, condition: Condition, draw: torch.Generator
    ) -> Float[Tensor, ""]:
        """Mean squared error of the prediction, at a random step of the schedule for each image."""
        latents = frozen.encoded(augmented(images, self.augmentation, draw))
        noise = torch.randn(latents.shape, generator=draw).to(latents.device)
        steps = torch.randint(frozen.train_steps, (len(latents),), generator=draw).to(latents.device)
        noisy, target = frozen.noisy(latents, noise, steps), frozen.target(latents, noise, steps)
        found = net(noisy, steps, condition.expand(len(latents), -1, -1))
        return torch.nn.functional.mse_loss(found, target)


def augmented(images: Pixels, how: str, draw: torch.Generator) -> Pixels:
    """The images after an augmentation, drawn anew for each."""
    if how == "none":
        return images
    torchvision()
    v2: Any = importlib.import_module("torchvision.transforms.v2")
    if how == "cutout":
        area = (HOLE**2, HOLE**2)
        does, given = v2.RandomErasing(p=1.0, scale=area, ratio=(1.0, 1.0), value=0.5), images
    else:
        does, given = v2.RandAugment(num_ops=2), (images * 255).round().to(torch.uint8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=draw)))
        found = torch.stack([does(one) for one in given]).float()
    return found if how == "cutout" else found / 255
