"""The mean gradient of a batch, read once for each of its images by means of their labels; a part without a paper.

With p the softmax of an image and y its label, the last layer's bias has the gradient ``mean(p - onehot(y))``, so the
labels give the mean softmax p'. With p' in the place of each image's p, its weight's gradient

    G = 1/B sum_i (p_i - onehot(y_i)) h_i'

is linear in the inputs h_i of the layer. It has one unknown row for each class of the batch, the mean input of that
class's images, and these rows are a least-squares solution. Images that share their label share it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from fedtap.attackers.parts.generator import ERROR, KNOWN, Generator
from fedtap.attackers.parts.labels import logit_gradients, recovered, rounded_labels
from fedtap.simulator.leaks import GradientLeak

_SOFTENED = 1e-2
"""Added to a class's mean softmax, by which its equations are divided: the softmax of an image strays from the batch's
mean in proportion to it."""

_RIDGE = 1e-6
"""Ridge of the least squares, as a share of the mean diagonal: with all classes present one direction is free."""


def fit_labels(generator: Generator, leak: GradientLeak, labels: Int[Tensor, "victims batch"]) -> None:
    """Keep the mean softmax of auxiliary pairs, where it tells more of their labels than `recovered` does."""
    counts = _counts(labels, leak.protocol.classes)
    generator.softmax.copy_((logit_gradients(leak) + counts / leak.protocol.batch).mean(0))
    wrong = [
        (_counts(found, leak.protocol.classes) - counts).abs().sum()
        for found in (read_labels(generator, leak), recovered(leak))
    ]
    if wrong[0] >= wrong[1]:
        generator.softmax.zero_()


def read_labels(generator: Generator, leak: GradientLeak) -> Int[Tensor, "victims batch"]:
    """The labels of each victim's batch in rising order: as `recovered`, or by the mean softmax of auxiliary pairs."""
    if leak.protocol.batch == 1 or not bool(generator.softmax.any()):
        return recovered(leak)
    return rounded_labels(generator.softmax - logit_gradients(leak), leak.protocol.batch)


def _counts(labels: Tensor, classes: int) -> Tensor:
    return F.one_hot(labels, classes).sum(1)


def read_each_image(generator: Generator, leak: GradientLeak) -> dict[str, Tensor]:
    """What `Generator.read` returns, with an entry for each image: `victims * batch`, in the order of `read_labels`.

    An entry has the error signal and the last layer's input of its image, and the gradients of its batch.
    """
    read = generator.read(leak.observed)
    if (batch := leak.protocol.batch) == 1:
        return read
    labels, last = read_labels(generator, leak), generator.rows[0]
    each = {name: tensor.repeat_interleave(batch, 0) for name, tensor in read.items()}
    errors, inputs = image_rows(logit_gradients(leak), leak.observed[last.weight], labels)
    each[ERROR] = errors.flatten(0, 1)
    each[KNOWN][:, : inputs.shape[2]] = inputs.flatten(0, 1)
    return each


def image_rows(
    error: Float[Tensor, "victims classes"],
    gradient: Float[Tensor, "victims classes features"],
    labels: Int[Tensor, "victims batch"],
) -> tuple[Float[Tensor, "victims batch classes"], Float[Tensor, "victims batch features"]]:
    """Each image's error signal at the logits and input of the last layer, from their means over the batch.

    Args:
        error: gradient of the logits, averaged over the batch.
        gradient: of the last layer's weight.
    """
    classes = error.shape[1]
    named = F.one_hot(labels, classes).to(error)  # victims batch classes
    share = named.mean(1)
    # p' = mean(p - onehot) + share of the class
    softmax = (error + share).clamp_min(0)
    errors = softmax[:, None, :] - named
    # G_c = sum_k A_ck h_k over the classes k, A_ck = share_k (p'_c - [c = k]); absent classes have zero columns
    mixing = share[:, None, :] * (softmax[:, :, None] - torch.eye(classes).to(error))
    weight = 1 / (softmax + _SOFTENED)[:, :, None]
    given, wanted = (weight * mixing).double(), (weight * gradient).double()
    normal = given.mT @ given
    unit = normal.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp_min(1e-24)
    rows = torch.linalg.solve(normal + _RIDGE * unit * torch.eye(classes).to(normal), given.mT @ wanted)
    inputs = torch.einsum("vbc,vcf->vbf", named.double(), rows)
    return errors, inputs.to(gradient)
