"""Small mechanisms for an auditor: honest ones, and one for each fault that it has to find.

Each takes an update, a dict of tensors, and returns what is sent. All are for ε = 1 at δ = 1e-5 and a clip of 1 unless
their name says otherwise.
"""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from torch import Tensor

from fedtap.simulator.defences.accountant import noise_for

Update = dict[str, Tensor]

DELTA = 1e-5
_SHARED_SEED = 1234


def clipped(update: Update, clip: float = 1.0) -> Update:
    """The whole update shortened to an L2 norm."""
    length = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in update.values()))
    factor = min(1.0, clip / max(length, 1e-30))
    return {name: tensor * factor for name, tensor in update.items()}


def noised(update: Update, sigma: float, draw: torch.Generator | None = None) -> Update:
    return {name: tensor + sigma * torch.randn(tensor.shape, generator=draw) for name, tensor in update.items()}


def sigma_for(epsilon: float, sensitivity: float = 1.0) -> float:
    return noise_for(epsilon, DELTA, sensitivity)


def classical(epsilon: float, sensitivity: float = 1.0) -> float:
    return sensitivity * math.sqrt(2 * math.log(1.25 / DELTA)) / epsilon


# honest


def honest_1(update: Update) -> Update:
    return noised(clipped(update), sigma_for(1))


def honest_2(update: Update) -> Update:
    return noised(clipped(update), sigma_for(2))


def honest_4(update: Update) -> Update:
    return noised(clipped(update), sigma_for(4))


def honest_8(update: Update) -> Update:
    return noised(clipped(update), sigma_for(8))


def honest_replacement(update: Update) -> Update:
    return noised(clipped(update), sigma_for(1, 2.0))


def honest_10_rounds(update: Update) -> Update:
    return noised(clipped(update), sigma_for(1, math.sqrt(10)))


def honest_laplace(update: Update) -> Update:
    """ε = 1 at δ = 0 after a clip of the L1 norm to 1."""
    length = sum(float(tensor.double().abs().sum()) for tensor in update.values())
    factor = min(1.0, 1 / max(length, 1e-30))
    drawn = torch.distributions.Laplace(0.0, 1.0)
    return {name: tensor * factor + drawn.sample(tensor.shape) for name, tensor in update.items()}


_OWN = torch.Generator()
_OWN.seed()


def honest_own_generator(update: Update) -> Update:
    return noised(clipped(update), sigma_for(1), _OWN)


def honest_random_state(update: Update) -> Update:
    """Noise from a generator that no auditor can set back."""
    draw = torch.Generator()
    draw.seed()
    return noised(clipped(update), sigma_for(4), draw)


def honest_examples(stack: Update) -> Update:
    """Of a stack of examples' gradients, each clipped to 1: their sum with noise, over a constant."""
    return _examples(stack, 16.0)


# the twelve faults


def scale_by_batch(stack: Update) -> Update:
    """What is divided by is a function of the number of examples, as in Opacus."""
    examples = len(next(iter(stack.values())))
    return _examples(stack, float(int(examples / math.ceil(examples / 8))))


def scale_by_update(update: Update) -> Update:
    """A tenth more noise where there is no update."""
    moved = any(bool(tensor.any()) for tensor in update.values())
    return noised(clipped(update), sigma_for(1) * (1.2 if moved else 1.3))


def sensitivity_1e_4(update: Update) -> Update:
    return noised(clipped(update), classical(1, 1e-4))


def sensitivity_of_average(update: Update) -> Update:
    """2 clips over 100 examples, on an average that is clipped itself."""
    return noised(clipped(update), sigma_for(1, 2.0 / 100))


def classical_10(update: Update) -> Update:
    """For ε = 10."""
    return noised(clipped(update), classical(10))


def half_sigma(update: Update) -> Update:
    return noised(clipped(update), sigma_for(1) / 2)


def no_clip(update: Update) -> Update:
    return noised(update, sigma_for(1))


def clip_after_noise(update: Update) -> Update:
    return clipped(noised(update, sigma_for(1)))


_STORED: Update = {}


def stored_noise(update: Update) -> Update:
    """Noise that is drawn once and used again in each round."""
    own = clipped(update)
    for name, tensor in own.items():
        _STORED.setdefault(name, sigma_for(1) * torch.randn(tensor.shape))
    return {name: tensor + _STORED[name] for name, tensor in own.items()}


def shared_seed(update: Update) -> Update:
    """A seed of 32 bits that all clients share, and a counter of rounds."""
    global _ROUND
    _ROUND += 1
    return noised(clipped(update), sigma_for(1), torch.Generator().manual_seed(_SHARED_SEED * 1000 + _ROUND))


_ROUND = 0


def few_bits(update: Update) -> Update:
    """A fresh seed of 32 bits in each call."""
    seed = random.SystemRandom().getrandbits(32)
    return noised(clipped(update), sigma_for(1), torch.Generator().manual_seed(seed))


def cycled_noise(update: Update) -> Update:
    """One of 50 noises, in turn."""
    global _TURN
    _TURN = (_TURN + 1) % 50
    draw = np.random.RandomState(_TURN)
    own = clipped(update)
    return {name: t + sigma_for(1) * torch.from_numpy(draw.randn(*t.shape)).float() for name, t in own.items()}


_TURN = 0


def buffers_in_the_clear(update: Update) -> Update:
    own = noised(clipped(update), sigma_for(1))
    return own | {name: update[name] for name in update if "running" in name or "num_batches" in name}


def biases_with_less_noise(update: Update) -> Update:
    own = clipped(update)
    return {name: t + sigma_for(1) * (0.05 if "bias" in name else 1) * torch.randn(t.shape) for name, t in own.items()}


def metric_in_the_clear(update: Update) -> Update:
    own = noised(clipped(update), sigma_for(1))
    length = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in update.values()))
    return own | {"loss": torch.tensor(length)}


def add_remove_noise(update: Update) -> Update:
    """For replacement."""
    return noised(clipped(update), sigma_for(1))


def one_round_noise(update: Update) -> Update:
    """For 10 rounds."""
    return noised(clipped(update), sigma_for(1))


# further ones


def no_noise(update: Update) -> Update:
    return clipped(update)


def clip_by_tensor(update: Update) -> Update:
    return noised({name: clipped({name: tensor})[name] for name, tensor in update.items()}, sigma_for(1))


def one_number_of_noise(update: Update) -> Update:
    """The same number on all entries of a tensor."""
    return {name: tensor + sigma_for(1) * torch.randn(()) for name, tensor in clipped(update).items()}


def laplace_after_l2(update: Update) -> Update:
    drawn = torch.distributions.Laplace(0.0, 1.0)
    return {name: tensor + drawn.sample(tensor.shape) for name, tensor in clipped(update).items()}


def multiplicative_noise(update: Update) -> Update:
    return {name: tensor * (1 + 5 * torch.randn(tensor.shape)) for name, tensor in clipped(update).items()}


def stops(update: Update) -> Update:
    """Refuses after a few rounds."""
    global _CALLS
    _CALLS += 1
    if _CALLS > 12:
        raise RuntimeError("privacy budget is spent")
    return noised(clipped(update), sigma_for(1))


_CALLS = 0


def no_dict(update: Update) -> Tensor:
    return next(iter(update.values()))


def needs_state(update: Update, state: object, round_number: int, more: int) -> Update:
    return update


def _examples(stack: Update, divisor: float) -> Update:
    lengths = torch.stack([tensor.flatten(1).square().sum(1) for tensor in stack.values()]).sum(0).sqrt()
    factors = (1 / lengths.clamp_min(1e-30)).clamp_max(1)
    summed = {name: torch.einsum("n,n...->...", factors, tensor) for name, tensor in stack.items()}
    return {name: tensor / divisor for name, tensor in noised(summed, sigma_for(1)).items()}
