"""What attacks share that invert a network from its logits to its pixels, however they solve each layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedtap.attackers.gradients.matching import check_matching
from fedtap.attackers.parts.gradients import Match, squared_distance
from fedtap.attackers.parts.labels import recovered
from fedtap.attackers.parts.layers import Layer, LayerChain, chain
from fedtap.simulator.attack import Attack, Reconstruction
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak
from fedtap.simulator.wire.replay import undecayed

LARGEST_LAYER = 2**14
"""Inputs of a layer, at most: the float64 matrix of their normal equations takes 2 GiB."""

ENTRIES_AT_ONCE = 2**25
"""Entries of the largest tensor at any time: 256 MiB of float64, of which a few are alive."""

Solved = Callable[[LayerChain], Sequence[Layer]]
"""The layers of a chain for whose inputs a system of equations is solved."""


def check_undoable(attack: Attack, leak: Leak, solved: Solved) -> None:
    """Refuse all but one image a victim, and a chain of invertible layers that are small enough to be solved for.

    Raises:
        FedtapError: with the reason and the attack to use instead.
    """
    if leak.protocol.batch != 1:
        raise FedtapError(
            f"{attack.name} undoes the gradient of one image, and this one is the mean over {leak.protocol.batch}: "
            "use --batch 1, or idlg, which matches gradients of batches."
        )
    if (largest := max((layer.inputs for layer in solved(chain(leak))), default=0)) > LARGEST_LAYER:
        raise FedtapError(
            f"{attack.name} solves for all inputs of a layer at once, and model {leak.protocol.model!r} has one with "
            f"{largest:,}, where memory ends at {LARGEST_LAYER:,}: use smaller images, or idlg."
        )
    check_matching(attack, leak)


def undone(leak: Leak, solved: Solved, undo: Callable[[Leak, LayerChain], Tensor]) -> Reconstruction:
    """The reconstruction by `undo`, which yields the flat input of the first layer, victims grouped to fit memory."""
    network, dtype, as_sent = chain(leak), dtype_of(leak), leak
    leak = dataclasses.replace(leak, observed={**leak.observed, **undecayed(leak)})
    room = max([sum(tensor[0].numel() for tensor in leak.observed.values()), *map(_room, solved(network))])
    at_once = max(1, ENTRIES_AT_ONCE // room)
    fed = torch.cat([undo(leak[first : first + at_once], network) for first in range(0, len(leak), at_once)])
    # the first layer's input is scale pixel + shift
    pixels = (fed - network.shift) / network.scale
    images, labels = pixels.reshape(len(leak), 1, *leak.protocol.shape).to(dtype).clamp(0, 1), recovered(as_sent)
    return Reconstruction(images, labels, Match(as_sent, squared_distance)(images, labels))


def linear_input(
    gradient: Float[Tensor, "victims filters inputs"], d: Float[Tensor, "victims filters"]
) -> Float[Tensor, "victims inputs"]:
    """Input of a linear layer, ``G = d a^T`` solved by least squares: ``a = G^T d / |d|^2``."""
    power = d.square().sum(1, keepdim=True).clamp_min(1e-300)
    return torch.einsum("vf,vfi->vi", d, gradient) / power


def gradients_below(
    above: Layer,
    weight: Tensor,
    d: Float[Tensor, "victims places filters"],
    derivative: Float[Tensor, "victims inputs"],
) -> Float[Tensor, "victims inputs"]:
    """``(W^T d) * s'``: gradient of the loss with respect to z of the layer below `above`."""
    return above.scatter(d @ weight) * derivative


def normal_matrix(
    layer: Layer,
    weight: Float[Tensor, "victims filters patch"],
    worth: Float[Tensor, "victims places filters"],
    d: Float[Tensor, "victims places filters"],
    trust: Float[Tensor, "victims"],
) -> Float[Tensor, "victims inputs inputs"]:
    """``W' diag(worth) W + trust K(d)'K(d)``, summed where it is not zero, since an equation sees few inputs.

    Of W: at each place ``sum_filters w w' worth``, on the pairs of entries of its patch. Of K: for each entry of a
    patch ``sum_filters d d' trust``, on the pairs of places that see it.
    """
    patches, side = layer.patches, layer.inputs + 1
    total = weight.new_zeros(len(weight), side * side)
    # sum_f worth w_i w_j at each place, on the inputs that the place sees
    of_places = torch.einsum("vpf,vfi,vfj->vpij", worth, weight, weight)
    _add_pairs(total, patches, of_places)
    # sum_f d_p d_q trust, for each entry of a patch on the inputs that it meets at places p and q
    between = d @ d.transpose(1, 2) * trust[:, None, None]
    _add_pairs(total, patches.T, between[:, None].expand(-1, patches.shape[1], -1, -1))
    return total.reshape(-1, side, side)[:, :-1, :-1].contiguous()


def dtype_of(leak: Leak) -> torch.dtype:
    """Floating point format of the gradient."""
    return next(iter(leak.observed.values())).dtype


def _add_pairs(total: Tensor, groups: Tensor, values: Float[Tensor, "victims groups size size"]) -> None:
    """Add to the flat square matrices `total` each group's square, at the pairs of the group's members.

    `index_add_` would do too, but on a GPU its order of summation varies from call to call.
    """
    side = math.isqrt(total.shape[1])
    pairs = (groups[:, :, None] * side + groups[:, None, :]).flatten()
    victims = torch.arange(len(total), device=total.device)[:, None]
    total.index_put_((victims, pairs[None]), values.flatten(1), accumulate=True)


def _room(layer: Layer) -> int:
    """Entries of the largest tensor that solving for one victim takes."""
    places, patch = layer.patches.shape
    return max(layer.inputs**2, places * places * patch, places * patch * patch)
