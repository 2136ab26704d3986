"""Training of diffusion models: what is learned, by which parameters, in which order, and by DP-SGD."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedtap.simulator.attack import generator
from fedtap.simulator.defences.dp_sgd import DPSGD
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.models.adapters import Lora, adapter_of, inject
from fedtap.simulator.models.diffusion import Denoiser, denoiser
from fedtap.simulator.models.diffusion_training import AUGMENTATIONS, DiffusionTraining, augmented
from tests.support.diffusion import CAPTION, LORA, MEMORISED, around, base, held, installed, pictures, tiny, tuned

QUICK = DiffusionTraining(steps=3, batch=2, learning_rate=1e-3)


@pytest.fixture(autouse=True)
def _installed() -> None:
    installed()


def told(*captions: str) -> Tensor:
    return around().condition(captions or [CAPTION])


def fresh(adapter: str = "") -> Denoiser:
    net = denoiser(tiny(), 0)
    return inject(net, Lora.parse(adapter), 3) if adapter else net


def trainable(net: Denoiser) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in net.named_parameters() if tensor.requires_grad}


def change(net: Denoiser) -> Tensor:
    """What training did to the weights."""
    before = held(base())
    return torch.cat([(tensor - before[name]).flatten() for name, tensor in held(net).items()])


def loss(net: Denoiser, images: Tensor, caption: str = CAPTION) -> float:
    """Mean over many steps of the schedule and draws of noise."""
    with torch.no_grad():
        many = images.repeat(24, 1, 1, 1)
        return float(DiffusionTraining().loss(net, around(), many, told(caption), generator("judge")))


# What is learned.


def test_training_lowers_the_loss_of_what_it_is_on() -> None:
    images = pictures(2, 0)
    net = fresh()
    dataclasses.replace(MEMORISED, steps=40)(net, around(), images, told(), generator(0))
    before, after = loss(base(), images), loss(net, images)
    assert after < 0.5 * before
    assert after < 0.9 * loss(net, pictures(2, 50))
    assert not net.training


def test_an_adapter_alone_is_trained() -> None:
    images, net = pictures(2, 0), fresh(LORA)
    before = held(net)
    dataclasses.replace(QUICK, steps=20, learning_rate=1e-2)(net, around(), images, told(), generator(0))
    after = held(net)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (".lora_" not in name), name
    assert loss(net, images) < 0.98 * loss(base(), images)
    assert {name.rpartition(".lora_")[0].rpartition(".")[2] for name in adapter_of(net)} == {
        *("to_q", "to_k", "to_v", "0"),
    }


def test_all_weights_are_trained_and_nothing_else() -> None:
    net, before = fresh(), held(base())
    QUICK(net, around(), pictures(2, 0), told(), generator(0))
    assert all(not torch.equal(tensor, before[name]) for name, tensor in held(net).items())
    part = fresh()
    for name, tensor in part.named_parameters():
        tensor.requires_grad_("conv_in" in name)
    QUICK(part, around(), pictures(2, 0), told(), generator(0))
    assert {name for name, tensor in held(part).items() if not torch.equal(tensor, before[name])} == {
        "net.conv_in.weight",
        "net.conv_in.bias",
    }


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_training_repeats_itself_and_leaves_torchs_generator_alone(augmentation: str) -> None:
    how, images = dataclasses.replace(QUICK, augmentation=augmentation), pictures(3, 0)
    before = torch.get_rng_state()
    one, two, other = fresh(), fresh(), fresh()
    for net, seed in ((one, 0), (two, 0), (other, 1)):
        how(net, around(), images, told(), generator(seed))
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in held(one).items():
        assert torch.equal(tensor, held(two)[name])
    assert not torch.equal(held(one)["net.conv_in.weight"], held(other)["net.conv_in.weight"])
    assert torch.equal(images, pictures(3, 0))


def test_a_step_is_on_the_mean_squared_error_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: the same draws in the same order, one image at a time; by SGD, since AdamW begins with signs."""
    images, how, settings = pictures(4, 0), DiffusionTraining(steps=2, batch=3, learning_rate=0.1), []

    def optimiser(parameters: list[torch.nn.Parameter], **given: float) -> torch.optim.Optimizer:
        settings.append(given)
        return torch.optim.SGD(parameters, **given)

    monkeypatch.setattr(torch.optim, "AdamW", optimiser)
    net, plain = fresh(), fresh()
    how(net, around(), images, told(), generator(7))
    assert settings == [{"lr": 0.1, "fused": True}]
    draw = generator(7)
    for some in how.batches(4, draw):
        clean = 2 * images[some] - 1
        noise = torch.randn(clean.shape, generator=draw)
        steps = torch.randint(1000, (3,), generator=draw)
        each = [
            (plain(around().noisy(x[None], e[None], t[None]), t[None], told()) - e).square().mean()
            for x, e, t in zip(clean, noise, steps, strict=True)
        ]
        weights = list(plain.parameters())
        for weight, gradient in zip(weights, torch.autograd.grad(torch.stack(each).mean(), weights), strict=True):
            weight.data -= 0.1 * gradient
    found, wanted = (change(one) for one in (net, plain))
    assert float((found - wanted).norm()) < 1e-3 * float(wanted.norm())


def test_each_image_can_have_its_own_caption() -> None:
    images, captions = pictures(3, 0), ("a dog", "a cat", "a red boat")
    of_each, of_one = fresh(), fresh()
    QUICK(of_each, around(), images, told(*captions), generator(0))
    QUICK(of_one, around(), images, told("a dog").expand(3, -1, -1), generator(0))
    same = fresh()
    QUICK(same, around(), images, told("a dog"), generator(0))
    for name, tensor in held(same).items():
        torch.testing.assert_close(held(of_one)[name], tensor, rtol=1e-4, atol=1e-5)
    key = next(name for name in held(same) if name.endswith("attn2.to_v.weight"))
    assert not torch.allclose(held(of_each)[key], held(same)[key], rtol=1e-4, atol=1e-5)


# Which images are in a step.


@given(steps=st.integers(1, 40), batch=st.integers(1, 9), images=st.integers(1, 30), seed=st.integers(0, 99))
def test_batches_have_all_images_in_each_pass(steps: int, batch: int, images: int, seed: int) -> None:
    how = DiffusionTraining(steps=steps, batch=batch)
    found = how.batches(images, generator(seed))
    assert [len(some) for some in found] == [batch] * steps
    order = torch.cat(found).tolist()
    for first in range(0, len(order), images):
        one_pass = order[first : first + images]
        assert len(set(one_pass)) == len(one_pass)  # none twice before all were once
        if len(one_pass) == images:
            assert set(one_pass) == set(range(images))
    counts = Counter(order)
    assert max(counts.values()) - min(counts.get(image, 0) for image in range(images)) <= 1
    assert torch.equal(torch.cat(how.batches(images, generator(seed))), torch.cat(found))


# What is done to an image before a step.


def test_without_an_augmentation_images_are_as_they_are() -> None:
    images = pictures(3, 0)
    draw = generator(0)
    assert augmented(images, "none", draw) is images
    assert torch.equal(draw.get_state(), generator(0).get_state())


@pytest.mark.parametrize("side", [8, 16, 32])
def test_cutout_is_a_grey_square_over_a_quarter(side: int) -> None:
    images = torch.rand(40, 3, side, side, generator=torch.Generator().manual_seed(0)) * 0.4  # never grey
    found = augmented(images, "cutout", generator(0))
    assert (found.shape, found.dtype) == (images.shape, images.dtype)
    grey = (found == 0.5).all(1)
    assert torch.equal(torch.where(grey[:, None], 0.5, images), found)  # all else is as it was
    for one in grey:
        rows, columns = (one.any(axis).nonzero()[:, 0] for axis in (1, 0))
        square = one[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert bool(square.all())
        assert square.shape == (side // 2, side // 2)
    assert len({tuple(one.nonzero()[0].tolist()) for one in grey}) > 5  # elsewhere in each image
    assert float(images.max()) < 0.4  # it changes no image in place


def test_randaugment_keeps_shape_and_range_and_differs_from_image_to_image() -> None:
    images = pictures(1, 0, 16).expand(12, -1, -1, -1)
    found = augmented(images, "randaugment", generator(0))
    assert (found.shape, found.dtype) == (images.shape, images.dtype)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert len({one.numpy().tobytes() for one in found}) > 6
    assert torch.equal(found, augmented(images, "randaugment", generator(0)))
    assert not torch.equal(found, augmented(images, "randaugment", generator(1)))


# DP-SGD.


def gradients(net: Denoiser, images: Tensor, private: DPSGD | None, seed: int = 0) -> dict[str, Tensor]:
    """Of one step, whose noise and steps of the schedule are drawn from the seed."""
    net.zero_grad()
    draw = generator("step", seed)
    training = DiffusionTraining()

    def loss_of(net: torch.nn.Module) -> Tensor:
        return training.loss(net, around(), images, told(), draw)

    if private is None:
        loss_of(net).backward()  # type: ignore[no-untyped-call]
    else:
        private.clipped(net, loss_of, len(images), draw)
    return {name: tensor.grad.clone() for name, tensor in trainable(net).items() if tensor.grad is not None}


def norm(tensors: dict[str, Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors.values()]).norm())


def each_alone(net: Denoiser, images: Tensor) -> list[dict[str, Tensor]]:
    """The gradient of each image's loss, under the draws that the whole batch had."""
    draw, clean = generator("step", 0), 2 * images - 1
    noise = torch.randn(clean.shape, generator=draw)
    steps = torch.randint(1000, (len(clean),), generator=draw)
    found = []
    for x, e, t in zip(clean, noise, steps, strict=True):
        lost = (net(around().noisy(x[None], e[None], t[None]), t[None], told()) - e).square().mean()
        names = trainable(net)
        found.append(dict(zip(names, torch.autograd.grad(lost, [*names.values()]), strict=True)))
    return found


@pytest.fixture(params=["", LORA], ids=["all weights", "adapter"])
def net(request: pytest.FixtureRequest) -> Denoiser:
    made = fresh(request.param)
    for number, tensor in enumerate(trainable(made).values()):  # an adapter's B is 0 at first
        tensor.data += 0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number))
    made.train()  # as in a training; Opacus looks at no layer in evaluation mode
    return made


def test_without_noise_and_with_a_huge_clip_it_is_the_plain_gradient(net: Denoiser) -> None:
    images = pictures(3, 0)
    plain, private = gradients(net, images, None), gradients(net, images, DPSGD(1e9, 0.0))
    assert plain.keys() == private.keys() == trainable(net).keys()
    size = norm(plain)
    assert size > 0
    for name, tensor in plain.items():
        torch.testing.assert_close(private[name], tensor, rtol=1e-3, atol=1e-4 * size)


def test_each_images_gradient_is_clipped(net: Denoiser) -> None:
    images = pictures(3, 0)
    alone = each_alone(net, images)
    clip = 0.5 * min(map(norm, alone))
    found = gradients(net, images, DPSGD(clip, 0.0))
    assert norm(found) <= clip * (1 + 1e-5)
    for name, tensor in found.items():
        wanted = sum(one[name] * clip / norm(one) for one in alone) / len(alone)
        torch.testing.assert_close(tensor, wanted, rtol=1e-3, atol=1e-4 * clip)
    huge = gradients(net, 20 * images, DPSGD(clip, 0.0))  # whatever an image is
    assert norm(huge) <= clip * (1 + 1e-5)


def test_noise_is_of_the_clips_size(net: Denoiser) -> None:
    images = pictures(2, 0)
    without, noisy = (gradients(net, images, DPSGD(0.5, multiplier)) for multiplier in (0.0, 3.0))
    noise = torch.cat([(noisy[name] - tensor).flatten() for name, tensor in without.items()])
    assert float(noise.std()) == pytest.approx(DPSGD(0.5, 3.0).spread(2), rel=0.05)
    assert float(noise.mean()) == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("adapter", ["", LORA], ids=["all weights", "adapter"])
def test_training_by_dp_sgd_repeats_itself_and_leaves_a_plain_network(adapter: str) -> None:
    images, how = pictures(2, 0), dataclasses.replace(QUICK, steps=2)
    nets = [fresh(adapter) for _ in range(4)]
    for one, seed, private in zip(
        nets, (0, 0, 1, 0), (DPSGD(1.0, 0.5), DPSGD(1.0, 0.5), DPSGD(1.0, 0.5), DPSGD(1.0, 0.0)), strict=True
    ):
        how(one, around(), images, told(), generator(seed), private)
    names = [name for name in trainable(fresh(adapter)) if "to_v.lora_B" in name or "attn1.to_v.weight" in name]
    first, again, other, without = ([held(one)[name] for name in names] for one in nets)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert not any(map(torch.equal, first, without))
    begun = fresh(adapter)
    untouched = {name: tensor for name, tensor in held(begun).items() if name not in trainable(begun)}
    for one in nets:
        after = held(one)
        assert after.keys() == held(begun).keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in untouched.items())
        assert not any(hasattr(tensor, "grad_sample") for tensor in one.parameters())
        one(torch.zeros(1, 3, 8, 8), torch.tensor([0]), told()).sum().backward()  # no hook is left


def test_no_image_counts_twice_in_a_private_step() -> None:
    """ε counts on it: an image that is in a batch twice can move the sum by twice the clip."""
    for images, batch in ((6, 4), (5, 3), (4, 4), (7, 2)):
        for some in DiffusionTraining(steps=30, batch=batch).batches(images, generator(images)):
            assert len(set(some.tolist())) == batch, (images, batch)


def test_a_network_that_opacus_cannot_take_is_one_sentence() -> None:
    class Mixing(torch.nn.Module):
        """Has a parameter of its own, of which Opacus knows no gradient of one example."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(3, 1, 1))

        def forward(self, noisy: Tensor, steps: Tensor, condition: Tensor) -> Tensor:
            return self.scale * noisy

    with pytest.raises(FedtapError, match="dp_sgd clips each example's own gradient, which Opacus"):
        DPSGD(1.0, 1.0).clipped(
            Mixing(), lambda net: QUICK.loss(net, around(), pictures(2, 0), told(), generator(0)), 2, generator(0)
        )


def test_what_a_client_sends_repeats_itself() -> None:
    one, two = (tuned(pictures(2, 0), QUICK, LORA) for _ in range(2))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
