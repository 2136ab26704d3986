"""Label recovery: which classes a batch holds, read off the last linear layer's gradient.

With z the logits and p = softmax(z), the bias gradient is ``mean(p - onehot)`` and the weight gradient
``mean((p - onehot) embedding^T)``: a class that is there pulls its entry down by its share of the batch.
Sign of one label's row: Zhao et al. 2020, https://arxiv.org/abs/2001.02610. Counts from the mean embedding and the
mean softmax are in the manner of Ma et al. 2023 (iLRG), https://arxiv.org/abs/2301.05928.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attackers.parts.gradients import mean_gradient
from simulator.errors import FedtapError
from simulator.leaks import Leak


def recovered(leak: Leak) -> Int[Tensor, "victims batch"]:
    """The labels of each victim's batch, in rising order: exact for one image, an estimate for several."""
    batch = leak.protocol.batch
    slopes, shares = class_slopes(leak), None
    if batch == 1:
        return slopes.argmin(dim=1, keepdim=True)
    shares = mean_softmax(leak)
    counts = batch * (shares - slopes)
    return _listed(_rounded(counts, batch), batch)


def last_linear(leak: Leak) -> tuple[str, nn.Linear]:
    """Name and module of the layer that yields the logits.

    Raises:
        FedtapError: the network ends in something else.
    """
    layers = [
        (name, module)
        for name, module in leak.network.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == leak.protocol.classes
    ]
    if not layers:
        raise FedtapError(
            f"Labels cannot be read off model {leak.protocol.model!r}: it has no nn.Linear with "
            f"{leak.protocol.classes} outputs to end in; use dlg, which finds the labels along with the images."
        )
    return layers[-1]


def class_slopes(leak: Leak) -> Float[Tensor, "victims classes"]:
    """``mean(p - onehot)`` for each class, up to a positive factor where the last layer has no bias."""
    name, layer = last_linear(leak)
    gradient, prefix = mean_gradient(leak), f"{name}." if name else ""
    if layer.bias is not None:
        return gradient[f"{prefix}bias"]
    rows = gradient[f"{prefix}weight"]
    return rows @ _axis(rows)[:, :, None].squeeze(2)[:, :, None].squeeze(2) if rows.ndim == 2 else _along(rows)


def mean_softmax(leak: Leak) -> Float[Tensor, "victims classes"]:
    """What the network thinks of the batch on average; where its weights are not known, all classes alike."""
    name, layer = last_linear(leak)
    slopes, prefix = class_slopes(leak), f"{name}." if name else ""
    if leak.weights is None or layer.bias is None:
        return torch.full_like(slopes, 1 / slopes.shape[1])
    rows = mean_gradient(leak)[f"{prefix}weight"]
    embedding = torch.einsum("vc,vcf->vf", slopes, rows) / slopes.square().sum(1, keepdim=True).clamp_min(1e-30)
    weight, bias = leak.weights[f"{prefix}weight"], leak.weights[f"{prefix}bias"]
    logits = torch.einsum("vcf,vf->vc", weight, embedding) if leak.stacked else embedding @ weight.T
    return (logits + bias).softmax(dim=1)
