"""A small leak of every kind, with a measure of what came back: a new kind of leak adds a maker to MAKERS."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedtap.simulator.leaks import Leak
from fedtap.simulator.models.copy_detection import BASELINE, encoder, similarity
from fedtap.simulator.models.registry import build
from tests.attackers import test_attention, test_dager, test_posterior, test_stationary
from tests.attackers.test_exact_git import announcing, noisy
from tests.support import diffusion
from tests.support.attack_leaks import leak_of, pictures
from tests.support.checkpoint_leaks import leak_on, precision


@dataclass(frozen=True)
class Example:
    """A leak of two victims, and what is behind it."""

    leak: Leak
    error: Callable[[Any], float]
    """How far a reconstruction is from the private data."""
    blind: float
    """The error of the best guess that uses no leak, or of nothing at all."""
    solved_by: str
    """An attack that brings the data back, as it is written; empty where none is that quick."""


class OtherLeak(Leak):
    """No attack is on this kind."""

    kind = "other"


def of_images(seed: int, kind: str, model: str, sigma: float = 0.0) -> Example:
    images, labels = pictures(2, 1, seed=seed)
    leak = leak_of(images, labels, build(model, (3, 16, 16), 10, seed=1234), model, kind=kind, steps=2)
    if sigma:
        leak = announcing(noisy(leak, sigma), sigma)
    grey = float((images - images.mean()).square().mean())
    return Example(
        leak, lambda found: float((found.images - images).square().mean()), grey, "linear" if model == "mlp" else ""
    )


def of_texts(seed: int) -> Example:
    texts = test_dager.texts_of(2, 1, seed)
    return Example(test_dager.leak_of(texts), lambda found: float((found.ids != texts).double().mean()), 1.0, "dager")


def of_attention(seed: int) -> Example:
    inputs = test_attention.tokens(2, 4, 4, seed=50 + seed)
    leak = test_attention.leak_of(test_attention.block_with(4, 4), inputs)
    size = float(inputs.square().mean())
    return Example(
        leak, lambda found: float((found.values - inputs).square().mean()), size, "attention_newton(restarts=8)"
    )


def of_a_posterior(seed: int) -> Example:
    """A victim's records lie around 4 + 15 = 19; another one's, mirrored, around -19."""
    model, sign = test_posterior.MODELS[0], 1 - 2 * (seed % 2)
    each = [test_posterior.records(200, seed=seed + 2 * victim) * sign for victim in range(2)]
    draws = [test_posterior.exact(model, records, 400, seed=seed) for records in each]
    leak = test_posterior.leak_of(model, {"draws": torch.stack(draws)})
    means = torch.stack([records[:, -1].mean() for records in each])

    def error(found: Any) -> float:
        weights = found.weights / found.weights.sum(1, keepdim=True)
        return float(((weights * found.targets).sum(1) - means).square().mean())

    return Example(leak, error, float(means.square().mean()), "posterior_mmd")


def of_trained_weights(seed: int) -> Example:
    case = test_stationary.SMALL
    leak = test_stationary.leaked(case, seed=seed)

    def error(found: Any) -> float:
        return 1 - sum(test_stationary.recovered(v, v, case, found, seed) for v in range(2)) / 2

    return Example(leak, error, 1.0, test_stationary.QUICK.written())


def of_checkpoints(seed: int) -> Example:
    """Each victim is tuned on one of eight topics, and another one's, seven seeds away, on another."""
    first = 2 * seed % 8
    topics = (first, first + 1)

    def error(found: Any) -> float:
        return 1 - precision(found.chosen, topics)

    return Example(leak_on(topics), error, 1 - 1 / 8, "loss_drop")


def of_diffusion(seed: int) -> Example:
    """Each victim tuned on one picture; the error is the share of samples that are nearer to one of twenty others."""
    seeds = (100 + 2 * seed, 101 + 2 * seed)
    encode, others = encoder(BASELINE), diffusion.pictures(20, 99)

    def error(found: Any) -> float:
        missed = []
        for samples, of in zip(found.samples, seeds, strict=True):
            private = encode(diffusion.pictures(1, of))
            mine, away = (similarity(encode(samples.float() / 255), side) for side in (private, encode(others)))
            missed.append(float((mine.amax(1) <= away.amax(1)).double().mean()))
        return sum(missed) / len(missed)

    return Example(diffusion.leak_on(seeds, private=1), error, 1 - 1 / (1 + len(others)), DRAWN)


DRAWN = f"finextract(w=1.5, k=0.0, samples=10, steps=10, encoder={BASELINE!r})"

SMALL = "lenet(width=4)"
MODELS = (SMALL, "mlp", "convnet", "vit", "resnet20", "lenet")

Maker = Callable[[int], Example]

MAKERS: Mapping[str, Sequence[Maker]] = {
    "gradient": (
        *(functools.partial(of_images, kind="gradient", model=model) for model in MODELS),
        functools.partial(of_images, kind="gradient", model=SMALL, sigma=0.01),
        of_texts,
    ),
    "update": tuple(functools.partial(of_images, kind="update", model=model) for model in MODELS),
    "attention": (of_attention,),
    "posterior": (of_a_posterior,),
    "trained_weights": (of_trained_weights,),
    "checkpoint": (of_checkpoints, of_diffusion),
}
"""Kind of leak -> what makes an example from a seed; of several, an attack is given the first that it accepts."""


@functools.lru_cache(maxsize=32)
def example(maker: Maker, seed: int) -> Example:
    """One that is made once."""
    return maker(seed)
