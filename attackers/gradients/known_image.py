"""Known image: which label a client has given to an image that the attacker knows; no attacker is right more often.

The attacker of the bound on reconstruction in Hayes, Mahloujifar and Balle, NeurIPS 2023,
https://arxiv.org/abs/2302.07225: the candidates are known and equally likely, and under Gaussian noise the likeliest is
the nearest one.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from fedtap.attackers.parts.checks import check_fields
from fedtap.simulator.attack import Attack, Images, Reconstruction
from fedtap.simulator.auxiliary import gradients
from fedtap.simulator.defences.clip import Clip
from fedtap.simulator.defences.layers import in_training
from fedtap.simulator.defences.notation import described
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import GradientLeak, Leak


@dataclass(frozen=True)
class KnownImage(Attack):
    """The label under which an image of one value has the gradient nearest to the leaked one, clipped as announced."""

    leaks = (GradientLeak,)

    value: float = 1.0
    """What every pixel of the known image is, in [0, 1]."""

    def __post_init__(self) -> None:
        check_fields(self)

    def accepts(self, leak: Leak) -> None:
        """A gradient of one image."""
        super().accepts(leak)
        if leak.protocol.batch != 1:
            raise FedtapError(
                f"known_image tells the label of one image, and a batch has {leak.protocol.batch}: use --batch 1."
            )

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        classes, shape = leak.protocol.classes, leak.protocol.shape
        images = torch.full((classes, 1, *shape), self.value, device=leak.device)
        network = copy.deepcopy(leak.network).to_empty(device=leak.device)
        network.load_state_dict({**(leak.weights or {}), **leak.buffers})
        in_training(network, leak.protocol.batchnorm)
        found = gradients(network, images, torch.arange(classes, device=leak.device)[:, None])
        names = sorted(found)
        candidates = torch.cat([found[name].flatten(1) for name in names], dim=1)
        for part in described(leak.protocol.defence):
            if isinstance(part, Clip):
                length = candidates.norm(dim=1, keepdim=True)
                candidates = candidates * (part.norm / length).clamp_max(1)
        observed = torch.cat([leak.observed[name].flatten(1) for name in names], dim=1)
        # |h - c|² = |h|² - 2 (h·c - |c|²/2)
        likelihood = observed @ candidates.T - candidates.square().sum(1) / 2
        best, labels = likelihood.max(1)
        apart = observed.square().sum(1) - 2 * best
        return Reconstruction(images[:1].expand(len(leak), 1, *shape), labels[:, None], apart)
