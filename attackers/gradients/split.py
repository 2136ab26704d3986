"""Two leaks from one, whose noises are independent: what one of them tells is not told again by the other.

Data thinning of a Gaussian: Neufeld, Dharamshi, Gao and Witten 2024, https://arxiv.org/abs/2301.07276; Rasines and
Young 2023, https://arxiv.org/abs/2112.11079.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from fedtap.simulator.attack import generator
from fedtap.simulator.auxiliary import Auxiliary, Pairs
from fedtap.simulator.defences.chained import sigma
from fedtap.simulator.leaks import Leak, Protocol

AnyLeak = TypeVar("AnyLeak", bound=Leak)


def split(leak: AnyLeak, share: float, draws: Sequence[torch.Generator]) -> tuple[AnyLeak, AnyLeak]:
    """The leak twice, with noise added so that their errors are independent; both are the leak where it has no noise.

    With G the leak, s its announced noise, a = share and e standard normal, they are

        G + s sqrt((1 - a) / a) e,  G - s sqrt(a / (1 - a)) e

    of variance s^2 / a and s^2 / (1 - a), whose errors have the covariance s^2 - s^2 = 0. Precisions add up to 1 / s^2,
    so that together they tell of the image what the leak did.

    Args:
        share: of the precision that the first one has, above 0 and below 1.
        draws: where each victim's e comes from.
    """
    s = sigma(leak.protocol)
    if not s:
        return leak, leak
    e = {
        name: torch.stack([torch.randn(tensor.shape[1:], generator=draw) for draw in draws]).to(tensor)
        for name, tensor in sorted(leak.observed.items())  # a file's tensors come in any order
    }

    def with_noise(size: float) -> AnyLeak:
        observed = {name: tensor + size * e[name] for name, tensor in leak.observed.items()}
        return dataclasses.replace(leak, observed=observed, protocol=announcing_more(leak.protocol, abs(size)))

    return with_noise(s * math.sqrt((1 - share) / share)), with_noise(-s * math.sqrt(share / (1 - share)))


def announcing_more(protocol: Protocol, size: float) -> Protocol:
    """The protocol with Gaussian noise of this standard deviation, of the whole reply, after its defence."""
    # sigma of a sum of clients is that of each over the root of their number
    return dataclasses.replace(protocol, defence=f"{protocol.defence}+noise({size * math.sqrt(protocol.summed)!r})")


@dataclass(frozen=True)
class FirstParts(Auxiliary):
    """Auxiliary pairs whose leaks are the first parts of a `split`."""

    whole: Auxiliary = dataclasses.field(kw_only=True)
    """The pairs before the split."""
    share: float = dataclasses.field(kw_only=True)
    """Of the precision that the first parts have."""

    def __iter__(self) -> Iterator[Pairs]:
        for number, pairs in enumerate(self.whole):
            draws = [generator("thinning", "auxiliary", number)] * len(pairs)
            yield dataclasses.replace(pairs, leak=split(pairs.leak, self.share, draws)[0])

    @staticmethod
    def of(whole: Auxiliary, share: float) -> Auxiliary:
        """Those of these pairs; the pairs themselves where their protocol announces no noise."""
        s = sigma(whole.about.protocol)
        if not s:
            return whole
        more = announcing_more(whole.about.protocol, s * math.sqrt((1 - share) / share))
        about = dataclasses.replace(whole.about, protocol=more)
        return FirstParts(whole.folder, about, whole.network, whole.device, whole=whole, share=share)
