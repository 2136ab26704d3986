"""Which defences, and which sums, a model is fit for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fedtap.simulator.defences.notation import Part
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.leaks import float_buffers
from fedtap.simulator.models.registry import Shape, logits_layer


def check_model(parts: Sequence[Part], network: nn.Module, shape: Shape) -> None:
    """Refuse a network for which one of the defences is not what it says.

    Args:
        shape: of one input, without the batch.

    Raises:
        FedtapError: with the layer, the reason and what to use instead.
    """
    for part in parts:
        if part.name == "dp_sgd":
            _check_private(network)
        if part.name == "soteria" and not _weight(network, shape):
            raise FedtapError(
                "soteria leaves features out of the gradient of the linear layer that yields the logits, and no "
                "nn.Linear of this model with a weight of its own does: use prune, or another model."
            )
        if part.name in ("local_dp", "central_dp") and float_buffers(network):
            raise FedtapError(
                f"{part.name} is for weights, and this model also sends {next(iter(float_buffers(network)))}, for "
                f"whose privacy nothing accounts: {HOW_TO_FIX}."
            )


def _weight(network: nn.Module, shape: Shape) -> bool:
    """Whether a linear layer yields the logits whose weight is a parameter, which a normalised one is not."""
    layer = logits_layer(network, shape)
    return layer is not None and f"{layer}.weight".removeprefix(".") in dict(network.named_parameters())


def check_summed(network: nn.Module) -> None:
    """Refuse a network of which a mean of several clients' gradients is not the gradient of their images together.

    Raises:
        FedtapError: it has BatchNorm.
    """
    if name := next(iter(float_buffers(network)), None):
        raise FedtapError(
            f"Each client's BatchNorm ({name.rpartition('.')[0]}) normalises its own images alone, so a sum of clients "
            f"is not the gradient of one batch, which attacks look for: {HOW_TO_FIX}."
        )


FIXED = "give --model module:function of your own, which returns opacus.validators.ModuleValidator.fix(model)"

HOW_TO_FIX = f"{FIXED}, with GroupNorm in BatchNorm's place"


def _check_private(network: nn.Module) -> None:
    from opacus.grad_sample import GradSampleModule  # takes a second to import
    from opacus.validators import ModuleValidator

    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        raise FedtapError(
            "dp_sgd clips each example's own gradient, and there is none in this model, since BatchNorm mixes the "
            f"examples of a batch: {HOW_TO_FIX}."
        )
    why = "dp_sgd clips each example's own gradient, which Opacus does not find in this model"
    if wrong := ModuleValidator.validate(network):
        raise FedtapError(f"{why} ({_sentence(wrong[0])}): {FIXED}.")
    if wrong := GradSampleModule.validate(network):
        raise FedtapError(f"{why} ({_sentence(wrong[0])}): use a model without this layer.")


def _sentence(error: Exception) -> str:
    return short(" ".join(str(error).split()).partition(". ")[0], 100)
