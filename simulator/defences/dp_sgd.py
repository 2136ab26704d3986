"""DP-SGD by Opacus.

Abadi et al. 2016, https://arxiv.org/abs/1607.00133; Opacus: Yousefpour et al. 2021, https://arxiv.org/abs/2109.12298.
Departs from the paper in one way: a batch is the client's own, of one size, and not a Poisson sample.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedtap.simulator.auxiliary import gradients
from fedtap.simulator.defences.accountant import Gaussian
from fedtap.simulator.defences.clip import Clip, shortened
from fedtap.simulator.defences.defence import (
    EVERYTHING,
    FIXED,
    FROM_0,
    HOW_TO_FIX,
    RISING,
    Density,
    Error,
    Exchange,
    Range,
    Replay,
    StepDefence,
    Trace,
)
from fedtap.simulator.defences.layers import batchnorms, training_loss
from fedtap.simulator.defences.source import Source, gaussian
from fedtap.simulator.defences.stacks import along
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.leaks import Tensors


@dataclass(frozen=True, repr=False)
class DPSGD(StepDefence):
    """Clips each example's gradient and adds Gaussian noise to their sum, all over the batch's size: DP-SGD by Opacus.

    Abadi et al. 2016, https://arxiv.org/abs/1607.00133; Opacus: Yousefpour et al. 2021,
    https://arxiv.org/abs/2109.12298. Departs from the paper in one way: a batch is the client's own, of one size, and
    not a Poisson sample.

    That size is public: the client says how many examples it has, and the noise on the mean tells it too. So neighbours
    are batches of one size that differ in one example, which is replaced, and their sums lie 2 `clip` apart at most. If
    an example were left out, the scale of the noise would show it, and the ε of add/remove would not hold.

    Opacus's own `PrivacyEngine.make_private` has that fault. With ``loss_reduction="mean"`` it divides the noisy sum by
    ``int(examples / batches)``, which differs between neighbours, and its accountants' ε is that of add/remove. Seen in
    1.4.1, 1.5.4 and 1.6.0, with and without Poisson sampling: 15, 16 and 17 examples in batches of 8 are divided by 7,
    8 and 5, or with ``drop_last`` by 15, 8 and 8. ``loss_reduction="sum"`` has not the fault, if what is divided by
    afterwards is chosen beforehand.

    Args:
        clip: L2 norm of an example's gradient.
        noise_multiplier: the noise's standard deviation over `clip`; on an entry of the mean gradient that is
            ``noise_multiplier clip / batch``.
    """

    clip: Annotated[float, Range()]
    noise_multiplier: Annotated[float, Range(ends=FROM_0, strengths=RISING)]

    survives = EVERYTHING - {Trace.SCALE}

    def backward(
        self,
        network: nn.Module,
        images: Float[Tensor, "images channel height width"],
        labels: Int[Tensor, "images"],
        draw: Source,
    ) -> Float[Tensor, ""]:
        return self.clipped(network, lambda net: training_loss(net, images, labels), len(images), draw)

    def clipped(
        self, network: nn.Module, loss_of: Callable[[nn.Module], Float[Tensor, ""]], examples: int, draw: Source
    ) -> Float[Tensor, ""]:
        """Leave the clipped and noisy gradient of any mean over examples in the parameters' `grad`; that mean.

        Args:
            loss_of: from the network to the mean of so many examples' losses.

        Raises:
            FedtapError: Opacus finds no gradient of one example.
        """
        from opacus.grad_sample import GradSampleModule  # takes a second to import
        from opacus.optimizers import DPOptimizer

        self.check(network, ())
        for module in network.modules():
            if getattr(module, "inplace", False) is True:  # Opacus keeps what layers return, which must stay as it is
                setattr(module, "inplace", False)  # noqa: B010
        simulated = draw is not None  # Opacus takes no noise from the operating system
        sampled = GradSampleModule(network)
        try:
            optimiser = DPOptimizer(
                torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1.0),
                noise_multiplier=self.noise_multiplier if simulated else 0.0,
                max_grad_norm=self.clip,
                expected_batch_size=examples,
                generator=draw,
            )
            loss = loss_of(sampled)
            with warnings.catch_warnings():  # torch says that images have no gradient, and they need none
                warnings.simplefilter("ignore", UserWarning)
                loss.backward()  # type: ignore[no-untyped-call]
            for unused in optimiser.params:
                if unused.grad_sample is None:
                    unused.grad_sample = unused.new_zeros(examples, *unused.shape)
            optimiser.pre_step()
        except (RuntimeError, ValueError, TypeError) as error:  # of a user's model
            raise FedtapError(
                "dp_sgd clips each example's own gradient, which Opacus cannot take of this model "
                f"({short(error, 120)}): write it of layers that it knows, without operations in place."
            ) from error
        finally:
            sampled.to_standard_module()
        for parameter in network.parameters():
            vars(parameter).pop("summed_grad", None)
            if not simulated and parameter.grad is not None:
                parameter.grad = gaussian(parameter.grad, self.spread(examples), None)
        return loss

    def spread(self, batch: int) -> float:
        """Standard deviation of the noise on an entry of the mean gradient of so many examples."""
        return self.noise_multiplier * self.clip / batch

    def stacked(
        self,
        network: nn.Module,
        images: Float[Tensor, "exchanges batch channel height width"],
        labels: Int[Tensor, "exchanges batch"],
        draws: Sequence[Source],
    ) -> dict[str, Float[Tensor, "exchanges *parameter"]]:
        self.check(network, tuple(images.shape[2:]))
        batch, found = images.shape[1], []
        at_once = max(1, len(images) // batch)  # in memory are no more gradients than there are exchanges
        for some in torch.arange(len(images)).split(at_once):  # type: ignore[no-untyped-call]
            examples = gradients(network, images[some].flatten(0, 1)[:, None], labels[some].view(-1, 1))
            clipped = Clip(self.clip).stacked(examples, [])
            found.append({name: tensor.view(-1, batch, *tensor.shape[1:]).mean(1) for name, tensor in clipped.items()})
        mean = {name: torch.cat([part[name] for part in found]) for name in found[0]}
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                noisy = (gaussian(row, self.spread(batch), draw) for row, draw in zip(mean[name], draws, strict=True))
                mean[name] = torch.stack(list(noisy))
        return mean

    def error(self, batch: int) -> Error | None:
        return Error(Density.GAUSSIAN, self.spread(batch))

    def replay(self, exchange: Exchange) -> Replay | None:
        """One image's gradient is clipped; of several, clipped one by one, the mean's length is not known."""
        if exchange.alone:
            return Replay(lambda dummy, sent: shortened(dummy, self.clip), exact=True, prior=0.0)
        return Replay(_scaled, exact=False, prior=0.0)

    def averaged(self, times: int) -> DPSGD:
        return self

    def bound(self, norm: float) -> float:
        return math.inf

    def release(self, clip: float, adjacency: str, releases: int, steps: int) -> Gaussian | None:
        return Gaussian(self.noise_multiplier * self.clip, self.clip, "example", "replace", releases * steps)

    def check(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        from opacus.grad_sample import GradSampleModule  # takes a second to import
        from opacus.validators import ModuleValidator

        if batchnorms(network):
            raise FedtapError(
                "dp_sgd clips each example's own gradient, and there is none in this model, since BatchNorm mixes the "
                f"examples of a batch: {HOW_TO_FIX}."
            )
        why = "dp_sgd clips each example's own gradient, which Opacus does not find in this model"
        if wrong := ModuleValidator.validate(network):
            raise FedtapError(f"{why} ({_sentence(wrong[0])}): {FIXED}.")
        if wrong := GradSampleModule.validate(network):
            raise FedtapError(f"{why} ({_sentence(wrong[0])}): use a model without this layer.")


def _scaled(dummy: Tensors, sent: Tensors) -> dict[str, Tensor]:
    """At the length at which it is nearest."""
    product = torch.stack([(dummy[name] * sent[name]).flatten(1).sum(1) for name in sent]).sum(0)
    square = torch.stack([dummy[name].flatten(1).square().sum(1) for name in sent]).sum(0).clamp_min(1e-30)
    return {name: tensor * along((product / square).clamp_min(0), tensor) for name, tensor in dummy.items()}


def _sentence(error: Exception) -> str:
    return short(" ".join(str(error).split()).partition(". ")[0], 100)
