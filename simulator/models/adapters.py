"""LoRA: fine-tune a model by a product of two thin matrices beside each projection of its attention.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, ICLR 2022. https://arxiv.org/abs/2106.09685
A layer's weight W becomes ``W + alpha / rank * B A``, with A `rank inputs` and B `outputs rank`; B begins at 0. Adapted
are the projections of query and value, or, where one layer makes query, key and value, that one; of a diffusion model's
U-Net those of query, key, value and output.
"""

from __future__ import annotations

import ast
import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.models.packages import text_package

Network = TypeVar("Network", bound=nn.Module)

PROJECTIONS = (
    *("query", "value", "q_proj", "v_proj", "c_attn", "qkv_proj", "query_key_value"),
    *("to_q", "to_k", "to_v", "to_out.0"),
)
"""Last names of the layers that get an adapter: those of models of texts, and those of diffusers' U-Nets."""

LARGEST_RANK, LARGEST_ALPHA = 1024, 2**20
"""Largest numbers that a LoRA may ask for."""


@dataclass(frozen=True)
class Lora:
    """Sizes of an adapter."""

    rank: int = 8
    """Rows of A and columns of B."""
    alpha: float = 16.0
    """The product of both counts ``alpha / rank``."""

    def __post_init__(self) -> None:
        if type(self.rank) is not int or not 1 <= self.rank <= LARGEST_RANK:
            raise _no_lora(f"rank is a whole number from 1 to {LARGEST_RANK}")
        if type(self.alpha) not in (int, float) or not 0 < self.alpha <= LARGEST_ALPHA:
            raise _no_lora(f"alpha is a number above 0, and {LARGEST_ALPHA:,} at the most")

    @property
    def scale(self) -> float:
        """Factor of the product."""
        return self.alpha / self.rank

    def written(self) -> str:
        """As `parse` reads it."""
        return f"lora(rank={self.rank}, alpha={int(self.alpha) if self.alpha == int(self.alpha) else self.alpha})"

    @staticmethod
    def parse(text: str) -> Lora:
        """From `lora`, or `lora(rank=8, alpha=16)`.

        Raises:
            FedtapError: it is written otherwise, or a number is out of range.
        """
        if text == "lora":
            return Lora()
        try:
            call = ast.parse(text, mode="eval").body
            if not isinstance(call, ast.Call) or ast.unparse(call.func) != "lora" or call.args or not call.keywords:
                raise ValueError(f"{short(text)!r} is none")
            sizes = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
            if len(sizes) < len(call.keywords):
                raise ValueError("a size is given twice")
            return Lora(**sizes)
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
            raise _no_lora(short(error, 80)) from error


def _no_lora(reason: str) -> FedtapError:
    return FedtapError(f"There is no such LoRA ({reason}): write lora(rank=8, alpha=16).")


def inject(network: Network, lora: Lora, seed: int) -> Network:
    """A copy of the network with an adapter that changes nothing yet, and of which alone there are gradients.

    Args:
        seed: of A's entries; those of B are 0.

    Raises:
        FedtapError: peft is not installed, or the network has no projections.
    """
    projections = _projections(network)
    peft = text_package("peft")
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=list(projections),
        fan_in_fan_out=any(_transposed(layer) for layer in projections.values()),
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that differ in fan_in_fan_out, which peft then sets right
        torch.manual_seed(seed)
        made: Network = peft.inject_adapter_in_model(config, copy.deepcopy(network))
    return made


def adapter_names(network: nn.Module) -> dict[str, str]:
    """Name of each tensor of the adapter, such as `blocks.0.query.lora_A.weight` -> that of the network's parameter."""
    return {name.replace(".default.", "."): name for name, _ in network.named_parameters() if ".lora_" in name}


def adapter_of(network: nn.Module) -> dict[str, Tensor]:
    """The adapter of a network that `inject` made: its parameters themselves, by their plain names."""
    parameters = dict(network.named_parameters())
    return {plain: parameters[name] for plain, name in adapter_names(network).items()}


def adapter_shapes(network: nn.Module, lora: Lora) -> dict[str, tuple[int, ...]]:
    """Plain name -> shape of each tensor of an adapter for a network that has none yet, and may be on the meta device.

    Raises:
        FedtapError: the network has no projections.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in _projections(network).items():
        rows, columns = _weight(layer).shape
        inputs, outputs = (rows, columns) if _transposed(layer) else (columns, rows)
        shapes |= {f"{name}.lora_A.weight": (lora.rank, inputs), f"{name}.lora_B.weight": (outputs, lora.rank)}
    return shapes


def merged(
    weights: Mapping[str, Tensor], adapter: Mapping[str, Tensor], lora: Lora, network: nn.Module | None = None
) -> dict[str, Tensor]:
    """The weights of a network without adapter that computes the same.

    Args:
        weights: of the base, by name.
        adapter: by plain name, of all its layers or some.
        network: the base's architecture, which tells which layers keep their weight as `inputs outputs`; without it,
            shapes tell, which those of square layers do not.

    Raises:
        FedtapError: the adapter's names or shapes are another base's.
    """
    found = dict(weights)
    turned = {name for name, layer in network.named_modules() if _transposed(layer)} if network is not None else set()
    layers = dict.fromkeys(name.rpartition(".lora_")[0] for name in adapter)
    if strange := set(adapter) ^ {f"{layer}.lora_{half}.weight" for layer in layers for half in "AB"}:
        raise _another_base(min(strange))
    for layer in layers:
        a, b, weight = (adapter[f"{layer}.lora_A.weight"], adapter[f"{layer}.lora_B.weight"], f"{layer}.weight")
        if weight not in weights or (a.ndim, b.ndim) != (2, 2) or not a.shape[0] == b.shape[1] == lora.rank:
            raise _another_base(layer)
        shape, product = tuple(weights[weight].shape), (b.shape[0], a.shape[1])
        if shape not in (product, product[::-1]):
            raise _another_base(layer)
        change = lora.scale * (b @ a)  # W + alpha / rank * B A
        found[weight] = weights[weight] + (change.T if layer in turned or shape != product else change)
    return found


def _another_base(name: str) -> FedtapError:
    return FedtapError(
        f"{short(name)} is that of an adapter for another base, or of another rank, since it does not fit the model's "
        "weights: give the model that the adapter was trained on, and its own rank."
    )


def _projections(network: nn.Module) -> dict[str, nn.Module]:
    """Name -> layer, of those that get an adapter."""
    if adapter_names(network):
        raise FedtapError(
            f"This {type(network).__name__} has a LoRA already, and a second would train beside it: start from the "
            "network without."
        )
    endings = tuple(f".{last}" for last in PROJECTIONS)
    found = {
        name: layer
        for name, layer in network.named_modules()
        if f".{name}".endswith(endings) and (isinstance(layer, nn.Linear) or _transposed(layer))
    }
    if not found:
        raise FedtapError(
            f"This {type(network).__name__} can be given no LoRA, since none of its layers is called "
            f"{', '.join(PROJECTIONS)}: take another model, or train all of its weights."
        )
    return found


def _transposed(layer: nn.Module) -> bool:
    """Whether its weight is `inputs outputs`, as in GPT-2."""
    return type(layer).__name__ == "Conv1D"


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight
