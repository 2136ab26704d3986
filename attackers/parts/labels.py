"""Label recovery: which classes a batch holds, read off the gradient of the layer that yields the logits.

With z the logits and p = softmax(z), the bias gradient is ``mean(p - onehot)`` and the weight gradient
``mean((p - onehot) embedding^T)``: a class lowers its entry by its share of the batch.
Sign of one label's row: Zhao et al. 2020, https://arxiv.org/abs/2001.02610. Counts from the mean embedding and the
mean softmax are in the manner of Ma et al. 2023 (iLRG), https://arxiv.org/abs/2301.05928. For the other losses p
is the sigmoid (bce) or the logits themselves (mse), and a factor joins.

Of an update of several local steps, p is the mean along the client's training, whose weights are known at both ends.
What lies between is followed by training stand-in images as the client trains its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from fedtap.attackers.parts.gradients import Match, check_match, squared_distance
from fedtap.simulator.attack import Images
from fedtap.simulator.defences.chained import sigma
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak, Protocol
from fedtap.simulator.models.registry import logits_layer
from fedtap.simulator.wire.replay import (
    descended,
    local_steps,
    loss_gradient,
    stateless,
    summands,
    trained,
    weights_along,
)

Embedding = Float[Tensor, "features"]

_EMBEDDED_AT_ONCE = 512
"""Images in one pass of `mean_embedding`, which bounds its memory."""

ALIKE = 30
"""Power iterations that separate the rank-one gradient of one image from noise."""

SETTLE = 8
"""Rounds between the labels and the training of stand-ins that they cause, chosen on training images of CIFAR-10."""

_STAND_INS = 16
"""Images that are trained on in the place of the client's, chosen on training images of CIFAR-10."""


def recovered(leak: Leak, embedding: Embedding | None = None) -> Int[Tensor, "victims batch"]:
    """The labels of each victim's batch, in rising order: exact for one image, an estimate for several.

    ``logit gradient = mean softmax - share of the batch``, so the counts are the difference, rounded to sum to the
    batch.

    Args:
        embedding: as in `logit_gradients`.
    """
    gradients, protocol = logit_gradients(leak, embedding), leak.protocol
    if protocol.batch == 1 and protocol.loss != "mse":
        return gradients.argmin(dim=1, keepdim=True) if protocol.classes > 1 else (gradients < 0).long()
    # counts n_c = B (mean p_c - dL/dz_c)
    return rounded_labels(mean_softmax(leak) - gradients, protocol.batch)


def rounded_labels(shares: Float[Tensor, "victims classes"], batch: int) -> Int[Tensor, "victims batch"]:
    """The labels of each victim's batch, in rising order, from about what share each class has of it."""
    counts = _counts(shares, batch)
    if counts.shape[1] == 1:
        counts = torch.cat([batch - counts, counts], dim=1)
    classes = torch.arange(counts.shape[1], device=counts.device)
    return torch.stack([classes.repeat_interleave(each) for each in counts])


def _counts(shares: Float[Tensor, "victims classes"], batch: int) -> Int[Tensor, "victims classes"]:
    """Whole numbers near ``batch * shares`` that sum to the batch; of a single logit, of the label 1, up to the batch.

    They are filled one image at a time by the largest remainder.
    """
    owed = batch * shares
    if shares.shape[1] == 1:
        return owed.round().clamp(0, batch).long()
    counts = torch.zeros_like(owed, dtype=torch.long)
    for _ in range(batch):
        one = torch.nn.functional.one_hot(owed.argmax(dim=1), owed.shape[1])
        counts, owed = counts + one, owed - one
    return counts


def paired(leak: Leak, images: Images) -> Images:
    """Each victim's images in the order that fits the `recovered` labels best.

    Two images are exchanged as long as that lowers the matching loss. The order is left as it is where the weights are
    unknown, the labels cannot be read or the network cannot be matched.
    """
    batch = leak.protocol.batch
    try:
        last_linear(leak)
        check_match(leak)
    except FedtapError:
        return images
    if leak.weights is None or batch == 1:
        return images
    labels, match = recovered(leak), Match(leak, squared_distance)
    swaps = torch.arange(batch).repeat(1 + batch * (batch - 1) // 2, 1)  # the first leaves all as it is
    for row, pair in zip(swaps[1:], torch.combinations(torch.arange(batch)), strict=True):
        row[pair] = pair.flip(0)
    ordered = images.clone()
    for victim in range(len(leak)):
        elements, there = torch.full((len(swaps),), victim), labels[victim].expand(len(swaps), -1)
        for _ in range(batch):
            tried = ordered[victim][swaps]
            losses = match(tried, there, elements).nan_to_num(nan=float("inf"))
            # steepest descent over exchanges of two images
            best = int(losses.argmin())
            if not bool(losses[best] < losses[0]):
                break
            ordered[victim] = tried[best]
    return ordered


def last_linear(leak: Leak) -> tuple[str, nn.Linear]:
    """Name and module of the layer that yields the logits.

    Raises:
        FedtapError: the network ends in something else, or this layer is frozen.
    """
    name = logits_layer(leak.network, leak.protocol.shape)
    if name is None:
        raise FedtapError(
            f"Labels cannot be read off model {leak.protocol.model!r}: no nn.Linear of it yields its "
            f"{leak.protocol.classes} logits as they are; use dlg, which finds the labels along with the images."
        )
    layer = leak.network.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    sent = {f"{name}.{part}".removeprefix(".") for part in ("weight", "bias")} & {*trained(leak.network)}
    if leak.protocol.loss == "mse" and (leak.weights is None or f"{name}.bias".removeprefix(".") not in sent):
        raise FedtapError(
            "Under mse the label is what is missing from the logits, which are known where the weights and the last "
            f"bias's gradient are, and of {leak.protocol.model!r} they are not: use dlg, which finds labels too."
        )
    if not sent:
        raise FedtapError(
            f"Labels cannot be read off model {leak.protocol.model!r}: neither weight nor bias of the layer that "
            f"yields its logits, {name or 'itself'}, is trained; use dlg, which finds the labels along with the images."
        )
    return name, layer


def logit_gradients(leak: Leak, embedding: Embedding | None = None) -> Float[Tensor, "victims classes"]:
    """Gradient of the loss with respect to the logits, ``mean(p - onehot)``.

    That is the gradient of the bias; under announced noise, the estimate of `_denoised` from it and the weight's.
    Without a trained bias, the rows of the weight's gradient give it along the embedding up to the embedding's length,
    which is set so that the largest entry, of a class that is not in the batch, is 1 / classes.

    Args:
        embedding: the last layer's mean input over public images (`mean_embedding`); with it, `_matched` takes the
            place of all these.
    """
    name, _ = last_linear(leak)
    gradient, prefix = loss_gradient(leak), f"{name}." if name else ""
    if embedding is not None and f"{prefix}weight" in gradient:
        matched = _matched(gradient.get(f"{prefix}bias"), gradient[f"{prefix}weight"], embedding)
        return matched * _factor(leak.protocol)
    if f"{prefix}bias" in gradient:
        noise = sigma(leak.protocol) / local_steps(leak) / summands(leak.protocol)  # in units of one mean loss
        gradients, rows = gradient[f"{prefix}bias"], gradient.get(f"{prefix}weight")
        if noise and rows is not None:
            gradients = _denoised(gradients, rows, noise, leak.protocol.batch)
        return gradients * _factor(leak.protocol)
    rows = gradient[f"{prefix}weight"]
    steepest = rows.norm(dim=2).argmax(dim=1)  # its class is there, so its row points against the embedding
    # -G_y' is along the embedding for the label y
    against = rows[torch.arange(len(rows), device=rows.device), steepest]
    gradients = -torch.einsum("vcf,vf->vc", rows, against)
    return gradients / (gradients.shape[1] * gradients.amax(dim=1, keepdim=True)).clamp_min(1e-30)


def mean_embedding(leak: Leak, images: Float[Tensor, "images channel height width"]) -> Embedding:
    """The mean input of the layer that yields the logits, over these images, at a leak's known weights."""
    name, _ = last_linear(leak)
    network, seen = stateless(leak.network, leak.protocol.batchnorm), list[Tensor]()
    hook = network.get_submodule(name).register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].sum(0)))
    try:
        with torch.no_grad():
            for some in torch.split(images, _EMBEDDED_AT_ONCE):
                functional_call(network, {**(leak.weights or {}), **leak.buffers}, (some,))
    finally:
        hook.remove()
    return torch.stack(seen).sum(0) / len(images)


def _matched(
    bias: Float[Tensor, "victims classes"] | None, rows: Float[Tensor, "victims classes features"], embedding: Embedding
) -> Float[Tensor, "victims classes"]:
    """``d = mean(p - onehot)`` by the matched filter: ``[G, g] [h, 1] / |[h, 1]|^2``, with h the mean public embedding.

    An image's embedding is mostly the mean one where units are never below 0. The noise of an entry of d is that of
    an entry of the gradient over ``|[h, 1]|``, the least that a linear estimate can have (North 1943, reprinted in
    https://doi.org/10.1109/PROC.1963.2383).
    """
    along, square = rows @ embedding, embedding.square().sum()
    return along / square if bias is None else (along + bias) / (square + 1)


def _denoised(
    bias: Float[Tensor, "victims classes"], rows: Float[Tensor, "victims classes features"], noise: float, batch: int
) -> Float[Tensor, "victims classes"]:
    """``d = mean(p - onehot)`` from the bias's gradient ``d + noise`` and the weight's ``d h^T + noise`` together.

    Of one image the matrix [w G, g] is ``d [w h, 1]^T`` and noise, so its leading singular vectors, found from g by
    power iteration, give d. The rows weigh as much as they are signal: ``w^2 = S / (S + noise^2)`` with S the mean of
    ``|d|^2 h_f^2`` over the features, as far as it is sure. Of a batch G is not of rank one, so one step of the
    iteration has to do, and the bias then counts by how much further the two are apart than its noise would have it.
    """
    classes, features = rows.shape[1:]
    # the mean of n squares has the standard error sqrt(2 / n) noise^2
    sure = noise**2 * (1 + 2 * (2 / (classes * features)) ** 0.5)  # two standard errors of a mean of squares of noise
    # S = classes (mean square - noise^2): |d|^2 h^2, averaged over features
    signal = classes * (rows.square().mean((1, 2), keepdim=True) - sure).clamp_min(0)
    # [w G, g] with w^2 = S / (S + noise^2)
    matrix = torch.cat([(signal / (signal + noise**2)).sqrt() * rows, bias[:, :, None]], dim=2)
    found = bias
    for _ in range(ALIKE if batch == 1 else 1):
        # power iteration: h = M'd / |M'd|
        h = torch.nn.functional.normalize(torch.einsum("vcf,vc->vf", matrix, found), dim=1)
        found = torch.einsum("vcf,vf->vc", matrix, h) * h[:, -1:]
    # how far both differ beyond the noise's own variance
    apart = ((found - bias).square().mean(1, keepdim=True) - noise**2).clamp_min(0)
    return (apart * bias + noise**2 * found) / (apart + noise**2)


def mean_softmax(leak: Leak) -> Float[Tensor, "victims classes"]:
    """Mean output p of the network over the batch: the softmax, or what stands for it in the other losses.

    Where the weights are unknown, or half of the layer is frozen, a class with a positive logit gradient is taken as
    absent, so that this gradient is its mean softmax, and all others share the rest evenly.
    """
    name, _ = last_linear(leak)
    gradient, gradients, prefix = loss_gradient(leak), logit_gradients(leak), f"{name}." if name else ""
    if leak.weights is None or not {f"{prefix}weight", f"{prefix}bias"} <= gradient.keys():
        absent, present = gradients.clamp_min(0), gradients < 0
        return torch.where(present, (1 - absent.sum(1, keepdim=True)) / present.sum(1, keepdim=True), absent)
    if local_steps(leak) > 1:
        return torch.cat([_trained_on(leak[victim], gradients[[victim]]) for victim in range(len(leak))])
    rows = gradient[f"{prefix}weight"] * _factor(leak.protocol)
    respond = _OUTPUT[leak.protocol.loss]
    # G = d h', so h = G' d / |d|^2
    embedding = torch.einsum("vc,vcf->vf", gradients, rows) / gradients.square().sum(1, keepdim=True).clamp_min(1e-30)
    weight, bias = leak.weights[f"{prefix}weight"], leak.weights[f"{prefix}bias"]
    logits = (torch.einsum("vcf,vf->vc", weight, embedding) if leak.stacked else embedding @ weight.T) + bias
    return respond(logits)


def _trained_on(leak: Leak, gradients: Float[Tensor, "1 classes"]) -> Float[Tensor, "1 classes"]:
    """Mean output along the local steps of a stack of one victim.

    Stand-ins are trained from the broadcast weights, with the shares of the classes for each one's label. What their
    last weights lack to the client's own is added to each step's in proportion to the steps before it; at first that is
    the whole update, so that the weights move along a straight line. Of the rounds' counts, those are taken whose
    training comes closest to the leaked gradient of the logits.
    """
    protocol, steps, images = leak.protocol, local_steps(leak), _stand_ins(leak)
    network, respond = stateless(leak.network, protocol.batchnorm), _OUTPUT[protocol.loss]
    fixed = leak.broadcast(0)
    start = {name: fixed[name] for name in trained(leak.network)}
    weighing = _weights_of_steps(protocol, steps).to(gradients)

    def output_along(path: list[dict[str, Tensor]]) -> Tensor:
        outputs = []
        for step, here in enumerate(path[:-1]):
            corrected = {
                name: tensor + step / steps * (start[name] + leak.observed[name][0] - path[-1][name])
                for name, tensor in here.items()
            }
            with torch.no_grad():
                logits = functional_call(network, {**fixed, **corrected}, (images,))
            outputs.append(respond(logits).mean(0))
        return (weighing @ torch.stack(outputs))[None]

    shares = output_along([start] * (steps + 1)) - gradients  # share of the batch = p - dL/dz
    best, least = shares, float("inf")
    for _ in range(SETTLE):
        whole = _counts(shares, protocol.batch).to(shares) / protocol.batch
        found = output_along(weights_along(leak, images, whole.expand(len(images), -1))) - gradients
        if (apart := float((found - whole).norm())) < least:
            best, least = whole, apart
        shares = (shares + found) / 2
    return best + gradients


def _stand_ins(leak: Leak) -> Tensor:
    """Images in [0, 1] of random colours with smooth variation; of other inputs, uniform noise."""
    draw, shape = torch.Generator().manual_seed(0), leak.protocol.shape
    like = next(iter(leak.observed.values()))
    if len(shape) != 3:
        return torch.rand(_STAND_INS, *shape, generator=draw).to(like)
    images = 0.2 + 0.6 * torch.rand(_STAND_INS, shape[0], 1, 1, generator=draw)
    for cells in (2, 4, 8):
        coarse = torch.randn(_STAND_INS, shape[0], cells, cells, generator=draw)
        images = images + 0.15 * nn.functional.interpolate(coarse, size=shape[1:], mode="bicubic")
    return images.clamp(0, 1).to(like)


def _weights_of_steps(protocol: Protocol, steps: int) -> Float[Tensor, "steps"]:
    """Share of each step's gradient in the update, which sum to 1: equal ones without momentum."""
    impulses = iter(torch.eye(steps, dtype=torch.float64))
    start = {"": torch.zeros(steps, dtype=torch.float64)}
    response = descended(protocol, steps, start, lambda here: {"": next(impulses)})[""]
    return response / response.sum()


_OUTPUT: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda logits: logits.softmax(dim=1),
    "bce": torch.sigmoid,
    "mse": lambda logits: logits,
}
"""Loss -> p, with which the gradient with respect to the logits is ``(p - onehot) / factor``."""


def _factor(protocol: Protocol) -> float:
    return {"cross_entropy": 1.0, "bce": protocol.classes, "mse": protocol.classes / 2}[protocol.loss]
