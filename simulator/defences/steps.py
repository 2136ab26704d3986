"""Defences inside a client's local step."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, replace_all_batch_norm_modules_, vjp, vmap

from fedtap.simulator.auxiliary import gradients
from fedtap.simulator.defences.hooks import Named, StepDefence
from fedtap.simulator.defences.precode import training_loss
from fedtap.simulator.defences.source import Source, gaussian
from fedtap.simulator.defences.suited import check_model
from fedtap.simulator.defences.updates import Clip
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.models.registry import logits_layer


@dataclass(frozen=True, repr=False)
class DPSGD(Named, StepDefence):
    """DP-SGD by Opacus: each example's gradient clipped, Gaussian noise on their sum, all over the batch's size.

    Abadi et al. 2016, https://arxiv.org/abs/1607.00133; Opacus, Yousefpour et al. 2021,
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

    name = "dp_sgd"

    clip: float
    noise_multiplier: float

    def backward(
        self,
        network: nn.Module,
        images: Float[Tensor, "images channel height width"],
        labels: Int[Tensor, "images"],
        draw: Source,
    ) -> Float[Tensor, ""]:
        from opacus.grad_sample import GradSampleModule  # takes a second to import
        from opacus.optimizers import DPOptimizer

        check_model((self.part,), network, tuple(images.shape[1:]))
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
                expected_batch_size=len(images),
                generator=draw,
            )
            loss = training_loss(sampled, images, labels)
            with warnings.catch_warnings():  # torch says that images have no gradient, and they need none
                warnings.simplefilter("ignore", UserWarning)
                loss.backward()  # type: ignore[no-untyped-call]
            for unused in optimiser.params:
                if unused.grad_sample is None:
                    unused.grad_sample = unused.new_zeros(len(images), *unused.shape)
            optimiser.pre_step()
        except (RuntimeError, ValueError) as error:  # of a user's model
            raise FedtapError(
                "dp_sgd clips each example's own gradient, which Opacus cannot take of this model "
                f"({short(error, 120)}): write it of layers that it knows, without operations in place."
            ) from error
        finally:
            sampled.to_standard_module()
        for parameter in network.parameters():
            vars(parameter).pop("summed_grad", None)
            if not simulated and parameter.grad is not None:
                parameter.grad = gaussian(parameter.grad, self.spread(len(images)), None)
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
        check_model((self.part,), network, tuple(images.shape[2:]))
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


@dataclass(frozen=True, repr=False)
class Soteria(Named, StepDefence):
    """The last layer is not told of those features from which the images could be told best.

    With r what is fed to the last linear layer, the columns of that layer's weight gradient for which
    ``|r_i| / |dr_i/dx|`` is largest, summed over the batch, are set to 0.
    Sun et al. 2021, https://arxiv.org/abs/2012.06043. Departs from the authors' code in two ways: there 0.1 is added to
    r, so that features that are off come first although their columns are 0 anyway, and a batch's inverses are summed.

    Args:
        share: of the features that are left out, rounded to whole ones; one at least stays.
    """

    name = "soteria"

    share: float

    def backward(
        self,
        network: nn.Module,
        images: Float[Tensor, "images channel height width"],
        labels: Int[Tensor, "images"],
        draw: Source,
    ) -> Float[Tensor, ""]:
        kept = self.kept(network, images[None])[0]
        loss = training_loss(network, images, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        slope = network.get_parameter(_last(network, images.shape[1:])).grad
        if slope is not None:
            slope.mul_(kept)
        return loss

    def stacked(
        self,
        network: nn.Module,
        images: Float[Tensor, "exchanges batch channel height width"],
        labels: Int[Tensor, "exchanges batch"],
        draws: Sequence[Source],
    ) -> dict[str, Float[Tensor, "exchanges *parameter"]]:
        found = gradients(network, images, labels)
        found[_last(network, images.shape[2:])].mul_(self.kept(network, images)[:, None])
        return found

    def kept(
        self, network: nn.Module, images: Float[Tensor, "exchanges batch channel height width"]
    ) -> Float[Tensor, "exchanges features"]:
        """1 for each feature that the last layer is told of, 0 for the others."""
        each = effects(network, images)
        left_out = min(round(self.share * each.shape[1]), each.shape[1] - 1)
        first = each.sort(dim=1, descending=True, stable=True).indices[:, :left_out]
        return torch.ones_like(each).scatter(1, first, 0.0)


def _last(network: nn.Module, shape: torch.Size) -> str:
    """Name of the weight of the layer that yields the logits."""
    return f"{logits_layer(network, tuple(shape))}.weight".removeprefix(".")


def effects(
    network: nn.Module, images: Float[Tensor, "exchanges batch channel height width"]
) -> Float[Tensor, "exchanges features"]:
    """``sum over the batch of |r_i| / |dr_i/dx|`` of each feature that is fed to the layer that yields the logits."""
    stateless = replace_all_batch_norm_modules_(copy.deepcopy(network).train())
    layer = stateless.get_submodule(str(logits_layer(network, tuple(images.shape[2:]))))
    weights = {name: weight.detach() for name, weight in stateless.named_parameters()}

    def features(x: Tensor) -> Tensor:
        fed: list[Tensor] = []
        hook = layer.register_forward_pre_hook(lambda layer, inputs: fed.append(inputs[0]))
        try:
            functional_call(stateless, weights, (x,))
        finally:
            hook.remove()
        return fed[0]

    def one(x: Tensor) -> Tensor:
        r, pull = vjp(features, x)[:2]
        slopes = vmap(lambda which: pull(which.expand_as(r))[0], chunk_size=64)(torch.eye(r.shape[1]))
        each: Tensor = r.abs().T / slopes.flatten(2).square().sum(2).sqrt()
        return each.nan_to_num(nan=0.0, posinf=torch.inf).sum(1)  # 0 / 0: a feature that is off says nothing

    return vmap(one, chunk_size=8, randomness="different")(images)
