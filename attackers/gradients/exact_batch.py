"""Exact batches: all images of a batch from the gradient of a linear layer before a ReLU, with a certificate.

In the spirit of SPEAR (Dimitrov, Baader, Mueller and Vechev, NeurIPS 2024), https://arxiv.org/abs/2403.03945: the
gradient ``G = D X`` of the first layer has the rank of the batch, and the columns of D are the vectors of its column
space that vanish where a ReLU is off.
Departs from the paper in four ways: the weights are known, as a curious server's are, so the next layer's weights and
gradient tell what a column is where the ReLU is on, and the columns follow from linear algebra (`relu_columns`) where
the layer is wide enough; where it is not, sparse columns are sought by iteratively reweighted least squares, and not in
sampled submatrices; a column counts as an example's if it fits those equations, and not by its sparsity; and a
certificate says whether the result is right.
Of a linear layer behind convolutions the same equations would give features and no pixels, so such networks are
refused. After several local steps a unit that an example leaves off throughout still has no gradient of it, and the
sparsest directions are taken until the certificate holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedtap.attackers.gradients import relu_columns
from fedtap.attackers.gradients.linear import FirstLayer, first
from fedtap.attackers.gradients.relu_columns import ColumnSpace
from fedtap.attackers.parts.checks import check_fields, check_magnitudes
from fedtap.attackers.parts.gradients import zeroed
from fedtap.attackers.parts.labels import last_linear
from fedtap.simulator.attack import Attack, CertifiedReconstruction, Images, Labels, generator
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import GradientLeak, Leak, Tensors, UpdateLeak
from fedtap.simulator.wire.replay import (
    local_steps,
    mean_gradient,
    mean_loss,
    stateless,
    targets,
    turns,
    undecayed,
    weights_along,
)
from fedtap.simulator.wire.soundness import entry_error, unexplained

_AGREES = 1e-4
"""Error of the recomputed gradient, relative to the leaked one and beyond the wire's own, up to which a result is
certified. One image of six that is blended with a tenth of another leaves over 3e-4."""

_BLURRED = 1e-2
"""Relative error of the wire and the announced noise from which the comparison decides nothing."""

_SEEN = 0.85
"""Share of the units on which an image agrees with its own column, from which it counts as recovered. Two images in
[0, 1] agree on some 75 %; along several local steps an image disagrees with itself on some percent."""

_PRECISE = 1e-2
"""Standard error of a recovered image's pixels, at most, from the wire's noise."""

_ROBUST = 10
"""Rounds in which the equations of several local steps are solved, with ever less weight on outliers."""

_FITS = 0.02
"""Misfit up to which a direction is an example's: 1e-7 of one step's, 1e-4 to 1e-2 along several steps. That of a
mixture is 0.1 and more after one step; after several it may be as small, and the certificate decides."""

_SHARPENED_FROM = 0.05
"""Misfit from which a direction is sharpened after several local steps, where its own says little."""

_WHOLE = 1e-5
"""Singular values of the next layer's gradient below this share of the largest one are left out."""


@dataclass(frozen=True)
class ExactBatch(Attack[CertifiedReconstruction]):
    """Columns of the first layer's gradient told apart, images by their dual basis, labels by what is sent back.

    Inputs are ratios of the weight's gradient to the bias's, so a clip costs nothing. The objective is the share of the
    gradient that the images do not cause.
    """

    leaks = (GradientLeak, UpdateLeak)

    rounds: int = 12
    """Rounds of random starts, at most, where the layer is too narrow for the equations alone."""
    starts: int = 64
    """Random starts of a round, all searched at once."""
    steps: int = 40
    """Steps of reweighted least squares from each start."""
    turns: int = 20
    """Turns, at most, of telling which units are on and solving for the column anew."""

    def __post_init__(self) -> None:
        check_fields(self, starts=1, steps=1, turns=1)

    def accepts(self, leak: Leak) -> None:
        """Networks that begin with a linear layer over all pixels, a ReLU and another linear layer."""
        super().accepts(leak)
        check_magnitudes(self, leak)
        name, scale, _ = first(leak, self.name)
        last_linear(leak)
        _next_layer(leak, name)
        if turns(leak.protocol) > 1 < leak.protocol.local_steps:
            raise FedtapError(
                "exact_batch undoes local steps on the whole batch, and these are on parts of it in turn: "
                "use inverting_gradients or idlg."
            )
        units, batch = leak.network.get_parameter(f"{name}.weight").shape[0], leak.protocol.batch
        if batch > min(units - 1, len(scale)):
            raise FedtapError(
                f"exact_batch tells examples apart by the rank of the first layer's gradient, and with {units} units "
                f"on {len(scale):,} pixels that is too small for a batch of {batch}: use a wider layer, or idlg."
            )

    def reconstruct(self, leak: Leak, start: Images) -> CertifiedReconstruction:
        layer = first(leak)
        following = _next_layer(leak, layer[0])
        exact = _in_double(leak)
        each = []
        for victim in range(len(leak)):
            draw = generator(str(float(start[victim].flatten()[0])))  # the start is drawn from the seed and the victim
            each.append(self._batch(exact[victim], layer, following, draw))
        pixels, classes, recovered = (torch.stack(part) for part in zip(*each, strict=True))
        share, holds = certificate(exact, pixels, classes)
        certified = holds & (recovered == 1)
        return CertifiedReconstruction(
            pixels.to(start.dtype), classes, share.to(start.dtype), certified=certified, recovered=recovered.float()
        )

    def _batch(
        self, leak: Leak, layer: FirstLayer, following: str, draw: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images in [0, 1], their labels, and the share of the images that is recovered, of a stack of one victim."""
        space = _space(leak, layer[0], following, draw)
        batch, pixels = leak.protocol.batch, len(layer[1])
        images = space.v.new_full((batch, pixels), 0.5).reshape(batch, *leak.protocol.shape)
        labels, recovered = torch.zeros(batch, dtype=torch.long, device=leak.device), images.new_tensor(0.0)
        if len(space.s):
            for q, fits in self._directions(space.alive(), local_steps(leak), draw):
                images, labels, recovered = _read(leak, layer, space, q)
                if fits or (bool(recovered == 1) and bool(certificate(leak, images[None], labels[None])[1])):
                    break
        return images, labels, recovered

    def _directions(
        self, space: ColumnSpace, local_steps: int, draw: torch.Generator
    ) -> Iterator[tuple[Float[Tensor, "rank found"], bool]]:
        """A direction for each example as columns, and of those that are not found the best, better each round; and
        whether all fit the equations.

        Along several local steps the next layer's weights move and some units switch, so that mixtures may fit as well
        as examples do; but a unit that is off throughout is exactly zero, and examples have the most such units.
        """
        q, misfit = space.u.new_zeros(len(space.s), 0), space.u.new_zeros(0)
        matrices = relu_columns.solutions(space, 1 if local_steps == 1 else _ROBUST, draw)
        for number in range(1 + self.rounds):
            tried = [q[:, :0] if matrices is None else relu_columns.told_apart(matrices, draw)]
            if number or local_steps > 1:
                tried.append(relu_columns.sparse_directions(space, self.starts, self.steps, draw))
            near, apart = relu_columns.refitted(space, torch.cat(tried, 1), self.turns)
            near, apart = near[:, apart.isfinite()], apart[apart.isfinite()]
            if local_steps > 1:
                near = torch.cat([near, *tried], 1)
                apart = torch.full_like(near[0], _SHARPENED_FROM)
            near = relu_columns.sharpened(space, near, apart)
            if local_steps > 1:
                apart = relu_columns.not_zero(space, near)
            q, misfit = relu_columns.independent(torch.cat([q, near], 1), torch.cat([misfit, apart]))
            yield q, local_steps == 1 and q.shape[1] == len(q) and bool((misfit < _FITS).all())


def _read(leak: Leak, layer: FirstLayer, space: ColumnSpace, q: Float[Tensor, "rank found"]) -> tuple[Tensor, ...]:
    """Images in [0, 1], their labels, and the share of the images that is recovered, of a stack of one victim."""
    name, scale, shift = layer
    batch, pixels = leak.protocol.batch, len(scale)
    images = space.v.new_full((batch, pixels), 0.5)
    labels = torch.zeros(batch, dtype=torch.long, device=leak.device)
    # [X, 1] up to each row's length = Q^-1 diag(s) V, the length by its last entry
    inverse = torch.linalg.pinv(q)
    rows = inverse @ (space.s[:, None] * space.v)
    inputs = (rows[:, :-1] / rows[:, -1:]).nan_to_num(0.0, 0.0, 0.0)
    columns = (space.u @ q) * rows[:, -1]
    seen = ((inputs - shift) / scale).clamp(0, 1)
    images[: len(seen)] = seen
    labels[: len(seen)] = _labels(leak, name, images[: len(seen)], columns)
    images = images.reshape(batch, *leak.protocol.shape)
    on = _switched_on(leak, layer, images, labels)[: len(seen)]
    # an entry's error e becomes e |Q^-1| in the products of [X, 1] with their length
    entry = space.noise / sum(length**0.5 for length in (len(space.u), pixels))
    error = entry * inverse.norm(dim=1, keepdim=True) / rows[:, -1:].abs() / scale.abs()
    precise = (error * (1 + inputs.abs())).square().mean(1).sqrt() < _PRECISE
    agreed = int((precise & (_agreement(columns.T, on) >= _SEEN)).sum())
    return images, labels, images.new_tensor(agreed / batch)


def _switched_on(leak: Leak, layer: FirstLayer, images: Tensor, labels: Tensor) -> Bool[Tensor, "images units"]:
    """Which units each image switches on in some of the local steps on all of these images."""
    name, scale, shift = layer
    inputs, target = scale * images.flatten(1) + shift, targets(labels, leak.protocol.classes).to(images)
    path = weights_along(leak, images, target)[:-1]
    on = [inputs @ here[f"{name}.weight"].T + here[f"{name}.bias"] > 0 for here in path]
    return torch.stack(on).any(0)


def certificate(leak: Leak, images: Images, labels: Labels) -> tuple[Float[Tensor, "victims"], Bool[Tensor, "victims"]]:
    """The share of each victim's gradient that the images do not cause, and whether that is the wire's error alone.

    It cannot be told, and so does not hold, where the defence, the optimiser or the wire's error leave nothing to
    compare.
    """
    gradient = mean_gradient(leak)
    length = torch.stack([tensor.double().flatten(1).square().sum(1) for tensor in gradient.values()]).sum(0)
    entries = sum(tensor[0].numel() for tensor in gradient.values())
    sharp = entries * entry_error(leak) ** 2 < _BLURRED**2 * length
    share = unexplained(leak, images, labels)
    if share is None:
        return torch.ones_like(length), torch.zeros_like(sharp)
    return share.nan_to_num(1.0, 1.0), sharp & (share <= _AGREES**2)  # NaN is no agreement


def _space(leak: Leak, name: str, following: str, draw: torch.Generator) -> ColumnSpace:
    gradient = undecayed(leak)
    matrix = torch.cat([gradient[f"{name}.weight"][0], gradient[f"{name}.bias"][0][:, None]], dim=1)
    u, s, v, noise = relu_columns.column_space(matrix, leak.protocol.batch, draw)
    weight, sent = leak.broadcast(0)[f"{following}.weight"], gradient[f"{following}.weight"][0]
    if isinstance(leak, UpdateLeak):
        # the mean of W + (t / T) update over the steps t = 0 .. T - 1, at which the gradients are taken
        passed = (leak.protocol.local_steps - 1) / (2 * leak.protocol.local_steps)
        weight = weight + passed * leak.observed[f"{following}.weight"][0]
    left, values, *_ = relu_columns.column_space(sent, leak.protocol.batch, draw)
    return ColumnSpace(u, s, v, float(noise), weight.T @ left[:, values > _WHOLE * values[:1]])


def _agreement(columns: Float[Tensor, "images units"], on: Bool[Tensor, "images units"]) -> Float[Tensor, "images"]:
    """Share of the units that have a gradient where the image switches them on, and none where it does not."""
    size = columns.square().mean(1, keepdim=True).sqrt()
    return ((columns.abs() > 1e-2 * size) == on).double().mean(1)


def _labels(leak: Leak, name: str, images: Float[Tensor, "images pixels"], columns: Tensor) -> Tensor:
    """The class for which each image would send back what is most parallel to its column of ``dL/dz``."""
    protocol, network = leak.protocol, stateless(leak.network, "eval")
    fixed = leak.broadcast(0)
    bias = f"{name}.bias"

    def sent_back(image: Tensor, target: Tensor) -> Tensor:
        def loss(moved: Tensors) -> Tensor:
            return mean_loss(protocol, functional_call(network, {**fixed, **moved}, (image[None],)), target[None])

        moved: dict[str, Tensor] = grad(loss)({bias: fixed[bias]})
        return moved[bias]

    number = max(2, protocol.classes)
    every = targets(torch.arange(number, device=columns.device), protocol.classes).to(columns)
    each = vmap(vmap(sent_back, (None, 0)), (0, None))(images.reshape(-1, *protocol.shape), every)
    likeness = torch.einsum("icu,ui->ic", torch.nn.functional.normalize(each, dim=2), columns)
    return likeness.argmax(1)


def _in_double(leak: Leak) -> Leak:
    def doubled(tensors: Tensors) -> dict[str, Tensor]:
        return {name: tensor.double() for name, tensor in tensors.items()}

    weights = doubled(leak.weights or {})
    return dataclasses.replace(leak, observed=doubled(leak.observed), weights=weights, buffers=doubled(leak.buffers))


def _next_layer(leak: Leak, name: str) -> str:
    """Name of the linear layer that a ReLU feeds with the first one's output, and nothing else, found by running it.

    Raises:
        FedtapError: there is none, or it is frozen.
    """
    network = zeroed(leak.network).double().eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    outputs: dict[str, tuple[Tensor, Tensor]] = {}
    for here, module in network.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda m, inputs, output, here=here: outputs.update({here: (inputs[0], output)})
            )
    images = torch.rand(4, *leak.protocol.shape, generator=draw, dtype=torch.float64)
    logits = network(images)
    z = outputs[name][1]
    for here, (fed, output) in outputs.items():
        if here != name and fed.shape == z.shape and torch.equal(fed, z.relu()):
            # all that comes back to z goes through this layer and the ReLU
            at_z, at_output = torch.autograd.grad(logits.square().sum(), (z, output))
            weight = network.get_parameter(f"{here}.weight")
            if weight.requires_grad and torch.allclose(at_z, (at_output @ weight) * (z > 0)):
                return here
    raise FedtapError(
        f"exact_batch reads which units a ReLU switches off, and in model {leak.protocol.model!r} the output of "
        f"{name or 'the first layer'} does not go through a ReLU into one linear layer that is trained: use --model "
        "mlp, or idlg, which matches gradients."
    )
