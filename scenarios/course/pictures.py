"""The private pictures and the small networks of the course's exercises, drawn from a student's seed."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

import fedtap
from fedtap.scenarios.course.exercise import student_draw
from fedtap.simulator.data.images import Dataset, photos
from fedtap.simulator.defences.chained import parse
from fedtap.simulator.leaks import GradientLeak
from fedtap.simulator.models.registry import build

PICTURE = 16
"""Pixels a side."""


def course_photos() -> Dataset:
    """scikit-image's photographs, small."""
    return photos(PICTURE)


def private_picture(student: str, *names: int | str) -> tuple[Float[Tensor, "1 3 side side"], Int[Tensor, "1"]]:
    """A photograph that is not flat, in [0, 1], and its class."""
    target = course_photos().target
    order = torch.randperm(len(target), generator=student_draw(student, "picture", *names))
    centred = target.images.double() - target.images.double().mean((2, 3), keepdim=True)
    lively = next(int(at) for at in order if float(centred[at].std()) > 40)
    return target.batch(torch.tensor([lively]))


def course_model(name: str, student: str, *names: int | str, shape: tuple[int, ...] = ()) -> nn.Module:
    """A network for the pictures, or for others of this shape, whose weights are drawn from the student's seed."""
    seed = int(torch.randint(2**31, (), generator=student_draw(student, "weights", *names)))
    dataset = course_photos()
    return build(name, shape or dataset.shape, len(dataset.classes), seed)


def client_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What a client computes, by the parameters' names: the gradient of the mean cross-entropy."""
    loss = nn.functional.cross_entropy(model(images), labels)
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


def private_leak(model: nn.Module, images: Tensor, labels: Tensor, defence: str = "none", **known: Any) -> GradientLeak:
    """What the server sees of one client, defended as announced."""
    sent = parse(defence).update(client_gradient(model, images, labels), student_draw("", "defence"))
    return fedtap.leak(model, sent, shape=tuple(images.shape[1:]), batch=len(images), defence=defence, **known)
