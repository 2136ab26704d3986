"""Linear: read the image off the gradient of a first linear layer, in closed form and without the weights.

Phong, Aono, Hayashi, Wang and Moriai 2018, https://eprint.iacr.org/2017/715, proposition 3; for batches, the rows of
units that one image alone switches on, as in Boenisch et al. 2021, https://arxiv.org/abs/2112.02918 (there the server
chooses the weights so that there are many; here it is honest and takes what it finds).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedtap.attackers.parts.checks import check_magnitudes
from fedtap.attackers.parts.gradients import how_to_write, zeroed
from fedtap.attackers.parts.labels import last_linear, recovered
from fedtap.simulator.attack import Attack, Images, Reconstruction
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import GradientLeak, Leak, UpdateLeak
from fedtap.simulator.wire.replay import undecayed

FirstLayer = tuple[str, Float[Tensor, "pixels"], Float[Tensor, "pixels"]]
"""Name of the first layer, and its input as ``scale * pixel + shift``."""


@dataclass(frozen=True)
class Linear(Attack):
    """With G the gradient of the first layer's weight and g that of its bias, ``g'G / g'g`` is the image.

    The objective is the share of the gradient that no signal along the returned images explains.
    """

    leaks = (GradientLeak, UpdateLeak)
    needs_weights = False

    def accepts(self, leak: Leak) -> None:
        """Leaks of networks that begin with a linear layer over all pixels and end in one that shows the labels."""
        super().accepts(leak)
        check_magnitudes(self, leak)
        first(leak)
        last_linear(leak)

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        name, scale, shift = first(leak)
        gradient = undecayed(leak)
        rows, biases = gradient[f"{name}.weight"], gradient[f"{name}.bias"]
        if leak.protocol.batch == 1:
            # dL/dW = d x' and dL/db = d, so x = d' (dL/dW) / d'd
            power = biases.square().sum(1, keepdim=True)
            seen = torch.einsum("vr,vrp->vp", biases, rows) / power.clamp_min(1e-30)
            pixels = torch.where(power > 0, (seen - shift) / scale, 0.5)[:, None]
        else:
            pixels = torch.stack(
                [
                    _distinct((row / bias[:, None] - shift) / scale, bias, leak.protocol.batch)
                    for row, bias in zip(rows, biases, strict=True)
                ]
            )
        pixels = pixels.clamp(0, 1)
        images = pixels.reshape(*pixels.shape[:2], *leak.protocol.shape)
        return Reconstruction(images, recovered(leak), _unexplained(rows, biases, scale * pixels + shift))


def first(leak: Leak, attack: str = "linear") -> FirstLayer:
    """The first layer with parameters, which has to be a linear one over all pixels, found by running images through.

    Args:
        attack: the name of the one that needs it, for the refusal.

    Raises:
        FedtapError: the network begins with another layer, which is named.
    """
    network = zeroed(leak.network).eval()
    calls: list[tuple[str, nn.Module, Tensor]] = []
    for name, module in network.named_modules():
        if _has_weights(module) and not any(_has_weights(child) for child in module.children()):
            module.register_forward_pre_hook(lambda m, inputs, name=name: calls.append((name, m, inputs[0].detach())))
    size = leak.protocol.shape[0] * leak.protocol.shape[1] * leak.protocol.shape[2]
    random = torch.rand(size, generator=torch.Generator().manual_seed(0))
    probes = torch.stack([torch.zeros(size), torch.ones(size), random])
    try:
        network(probes.reshape(3, *leak.protocol.shape))
    except Exception as error:  # a user's code may raise anything
        raise FedtapError(
            f"Model {leak.protocol.model!r} cannot be run on three images ({' '.join(str(error).split())[:200]}): "
            f"{how_to_write(error)}."
        ) from error
    name, module, inputs = calls[0]
    own = {id(parameter) for parameter in module.parameters()}
    if sum(bool(own & {id(parameter) for parameter in other.parameters()}) for _, other, _ in calls) > 1:
        raise FedtapError(
            f"{attack} reads the image off the first layer's gradient, and {leak.protocol.model!r} uses the weights of "
            f"its {name or 'layer'} more than once, so that their gradient is a sum: use idlg, which matches gradients."
        )
    trained = all(parameter.requires_grad for parameter in module.parameters())
    if isinstance(module, nn.Linear) and module.bias is not None and trained and tuple(inputs.shape) == (3, size):
        shift, scale = inputs[0], inputs[1] - inputs[0]
        if bool((scale != 0).all()) and torch.allclose(inputs[2], scale * random + shift, atol=1e-5):
            return name, scale.to(leak.device), shift.to(leak.device)
    kind = type(module).__name__ + ("" if trained else " (frozen)")
    raise FedtapError(
        f"{attack} needs a model whose first layer is an nn.Linear with bias over all pixels that is trained, and "
        f"{leak.protocol.model!r} begins with {name or 'itself'}, {kind}: "
        "use --model mlp, or idlg, which matches gradients."
    )


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _distinct(candidates: Float[Tensor, "rows pixels"], signal: Float[Tensor, "rows"], count: int) -> Tensor:
    """`count` images among what single units saw: in range, seen by several units alike, unlike those chosen before.

    A unit that several images activate shows a mixture of them, mostly out of range. All units that one image alone
    activates show that image.
    """
    calls = signal.abs() > 1e-6 * signal.abs().max()
    candidates = candidates[calls & candidates.isfinite().all(1)]
    candidates = candidates[(candidates.clamp(0, 1) - candidates).abs().amax(1).argsort()]  # the best in range first
    violation = (candidates.clamp(0, 1) - candidates).abs().amax(1)
    # alike: root mean square distance below 1e-2, some two of 255 grey levels
    near = torch.cdist(candidates, candidates) / candidates.shape[1] ** 0.5 < 1e-2
    # units that agree on an image in range come first; of others, the one least out of range
    worth = (violation < 1e-2) * near.sum(1) - violation
    chosen: list[Tensor] = []
    for _ in range(count):
        if not len(worth) or bool(worth.max() == -torch.inf):
            break
        best = worth.argmax()
        chosen.append(candidates[best])
        worth = worth.masked_fill(near[best], -torch.inf)
    grey = [candidates.new_full((candidates.shape[1],), 0.5)] * (count - len(chosen))
    return torch.stack(chosen + grey)


def _unexplained(rows: Tensor, biases: Tensor, seen: Tensor) -> Float[Tensor, "victims"]:
    """Share of ``[G, g]`` outside the span of ``[input, 1]`` of the returned images."""
    whole = torch.cat([rows, biases[:, :, None]], dim=2).double()
    basis = torch.cat([seen, torch.ones_like(seen[:, :, :1])], dim=2).double()
    basis = torch.linalg.qr(basis.transpose(1, 2)).Q
    # residual of the projection on the span, by QR
    rest = whole - whole @ basis @ basis.transpose(1, 2)
    power = whole.square().sum((1, 2))
    return torch.where(power > 0, rest.square().sum((1, 2)) / power.clamp_min(1e-300), 1.0).to(rows.dtype)
