"""The vmapped gradients against plain autograd, one victim at a time."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fedtap.attackers.parts import gradients
from fedtap.attackers.parts.convolutions import COMPILED_TABLE, CUDA_TABLE, TABLE, correlate, filters_gradient, spread
from fedtap.attackers.parts.gradients import Match, check_match, cosine_distance, squared_distance
from fedtap.attackers.parts.priors import isotropic_variation, statistics_gap, total_variation
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak
from fedtap.simulator.models.registry import build
from tests.support.attack_leaks import InPlace, OfTheUsers, WithConstant, leak_of, pictures

KINDS = [("gradient", 1), ("update", 1), ("update", 3)]


def plain_answer(leak: Leak, network: nn.Module, images: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The oracle: gradients with `create_graph`, local steps one by one."""
    weights = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    here, total = weights, {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    for _ in range(leak.protocol.local_steps):
        logits = torch.func.functional_call(network, here, (images,))
        loss = -(target * logits.log_softmax(-1)).sum(-1).mean()
        slopes = torch.autograd.grad(loss, list(here.values()), create_graph=True)
        total = {name: total[name] + slope for name, slope in zip(here, slopes, strict=True)}
        here = {
            name: here[name] - leak.protocol.learning_rate * slope for name, slope in zip(here, slopes, strict=True)
        }
    return {name: tensor / leak.protocol.local_steps for name, tensor in total.items()}


@pytest.mark.parametrize("model", ["mlp", "lenet", "convnet", "resnet20", "vit", "lenet frozen"])
@pytest.mark.parametrize(("kind", "steps"), KINDS)
def test_the_vmapped_slope_is_that_of_plain_autograd(model: str, kind: str, steps: int) -> None:
    images, labels = pictures(2, 2)
    model, _, frozen = model.partition(" ")
    network = build(model, (3, 16, 16), 10, seed=5).double()
    for parameter in list(network.parameters())[: 3 if frozen else 0]:
        parameter.requires_grad_(False)
    leak = leak_of(images.double(), labels, network, model, kind=kind, steps=steps, learning_rate=0.01)
    guess = torch.rand(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    soft = torch.rand(2, 2, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64).softmax(-1)
    for target in (labels, soft):
        x, t = guess.clone().requires_grad_(), target.clone()
        if t.is_floating_point():
            t.requires_grad_()
        values = Match(leak, squared_distance)(x, t)
        slopes = torch.autograd.grad(values.sum(), [x, t] if t.is_floating_point() else [x])
        for lane in range(2):
            xi, ti = guess[lane].clone().requires_grad_(), target[lane].clone()
            ti = ti.requires_grad_() if ti.is_floating_point() else F.one_hot(ti, 10).double()
            answer = plain_answer(leak, network, xi, ti)
            leaked = {name: tensor[lane] for name, tensor in gradients.mean_gradient(leak).items()}
            value = squared_distance(answer, leaked)
            expected = torch.autograd.grad(value, [xi, ti] if ti.requires_grad else [xi])
            torch.testing.assert_close(values[lane], value.detach(), rtol=1e-6, atol=1e-9)
            for got, wanted in zip(slopes, expected, strict=True):
                torch.testing.assert_close(got[lane], wanted, rtol=1e-5, atol=1e-8 * float(wanted.abs().max()) + 1e-12)


@pytest.mark.parametrize("model", ["mlp", "lenet", "convnet", "resnet20", "vit"])
@pytest.mark.parametrize(("kind", "steps"), [("gradient", 1), ("update", 2)])
def test_nothing_is_amiss_at_the_true_images(model: str, kind: str, steps: int) -> None:
    images, labels = pictures(2, 2)
    leak = leak_of(images, labels, build(model, (3, 16, 16), 10, seed=5), model, kind=kind, steps=steps)
    scale = sum(tensor.square().sum() for tensor in gradients.mean_gradient(leak).values())
    assert float(Match(leak, squared_distance)(images, labels).max()) < 1e-6 * float(scale)
    assert float(Match(leak, cosine_distance)(images, labels).max()) < 1e-4


@pytest.mark.parametrize(("kind", "steps"), [("gradient", 1), ("update", 2)])
def test_frozen_parameters_stay_as_they_are_and_out_of_the_match(kind: str, steps: int) -> None:
    images, labels = pictures(2, 2)
    network = build("resnet20", (3, 16, 16), 10, seed=5)
    network.conv1.requires_grad_(False)
    network.bn1.requires_grad_(False)
    network.layer1.requires_grad_(False)
    leak = leak_of(images, labels, network, "resnet20", kind=kind, steps=steps)
    assert not leak.observed["conv1.weight"].any()
    scale = sum(tensor.square().sum() for tensor in leak.observed.values())
    assert float(Match(leak, squared_distance)(images, labels).max()) < 1e-6 * float(scale)
    assert "conv1.weight" not in gradients.mean_gradient(leak)
    assert gradients.mean_gradient(leak).keys() == set(gradients.trained(network)) > {"linear.weight"}
    rough = Match(dataclasses.replace(leak, resolution=1.0), squared_distance)
    assert rough.tolerance * (leak.protocol.learning_rate * steps if kind == "update" else 1) ** 2 == pytest.approx(
        sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    )


@pytest.mark.parametrize("kind", ["gradient", "update"])
@pytest.mark.parametrize("distance", [squared_distance, cosine_distance])
def test_every_gradient_tensor_takes_part_in_the_match(kind: str, distance: gradients.Distance) -> None:
    images, labels = pictures(1, 1)
    leak = leak_of(images, labels, build("lenet", (3, 16, 16), 10, seed=5), "lenet", kind=kind, steps=2)
    before = Match(leak, distance)(images, labels)
    for name, tensor in leak.observed.items():
        louder = dataclasses.replace(leak, observed={**leak.observed, name: tensor * 1.5})
        assert float(Match(louder, distance)(images, labels)) > float(before) + 1e-6, name


def test_own_weights_of_each_victim_are_used() -> None:
    images, labels = pictures(2, 1)
    both = [
        leak_of(images[i : i + 1], labels[i : i + 1], build("lenet", (3, 16, 16), 10, seed=i), "lenet") for i in (0, 1)
    ]
    from fedtap.simulator.leaks import stack

    leak = stack(both)
    assert leak.stacked
    torch.testing.assert_close(
        Match(leak, squared_distance)(images * 0.5, labels),
        torch.cat(
            [Match(one, squared_distance)(images[i : i + 1] * 0.5, labels[i : i + 1]) for i, one in enumerate(both)]
        ),
        rtol=1e-4,
        atol=0,
    )


def test_dropout_is_left_out_and_a_model_that_cannot_be_vmapped_is_refused() -> None:
    images, labels = pictures(2, 1)
    leak = leak_of(images, labels, OfTheUsers(False).eval(), "own", meta=lambda: OfTheUsers(False))
    match = Match(leak, squared_distance)
    assert torch.equal(match(images, labels), match(images, labels))
    noisy = leak_of(images, labels, OfTheUsers(True), "own", meta=lambda: OfTheUsers(True))
    with pytest.raises(FedtapError, match="without random numbers"):
        Match(noisy, squared_distance)(images, labels)
    with pytest.raises(FedtapError, match="without random numbers"):
        check_match(noisy)


def test_a_tensor_kept_as_a_plain_attribute_is_to_be_a_buffer() -> None:
    images, labels = pictures(2, 1)
    leak = leak_of(images, labels, WithConstant(False), "own", meta=lambda: WithConstant(False))
    with pytest.raises(FedtapError, match="register it as a buffer"):
        check_match(leak)
    check_match(leak_of(images, labels, WithConstant(True), "own", meta=lambda: WithConstant(True)))


def test_a_model_that_is_frozen_throughout_is_refused() -> None:
    network = build("lenet", (3, 16, 16), 10, seed=5)
    one, labels = pictures(1, 1)
    leak = leak_of(one, labels, network, "lenet")
    leak.network.requires_grad_(False)
    with pytest.raises(FedtapError, match="train at least one layer"):
        check_match(leak)


@pytest.mark.parametrize(
    "model", ["mlp", "lenet", "convnet", "resnet20", pytest.param("vit", marks=pytest.mark.slow), "in place"]
)
def test_a_trace_agrees(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "CALLS_BEFORE_TRACING", 1)
    images, labels = pictures(2, 1)
    own = InPlace if model == "in place" else None
    network = (own() if own else build(model, (3, 16, 16), 10, seed=5)).double()
    match = Match(leak_of(images.double(), labels, network, model, meta=own), squared_distance)
    guess = images.flip(0).double()
    (value, slope), (traced_value, traced_slope) = (match.with_input_gradient(guess, labels) for _ in range(2))
    torch.testing.assert_close(traced_value, value, rtol=1e-9, atol=0)
    torch.testing.assert_close(traced_slope, slope, rtol=1e-7, atol=1e-9 * float(slope.abs().max()))


@pytest.mark.parametrize("model", ["lenet", "convnet", pytest.param("resnet20", marks=pytest.mark.slow)])
@pytest.mark.parametrize("count", [1, 3])
def test_each_devices_convolutions_give_the_same_slope(model: str, count: int) -> None:
    images, labels = pictures(count, 2)
    leak = leak_of(images.double(), labels, build(model, (3, 16, 16), 10, seed=5).double(), model)
    match = Match(leak, squared_distance)
    inputs = (leak.weights, leak.buffers, match.leaked, images.double() / 2, F.one_hot(labels, 10).double())
    function = match._function(count, soft=False)
    (wanted,), value = function(*inputs)
    for table in (TABLE, COMPILED_TABLE, CUDA_TABLE):
        (slope,), traced = gradients._without_repeats(make_fx(function, decomposition_table=table)(*inputs))(*inputs)
        torch.testing.assert_close(traced, value, rtol=1e-9, atol=0)
        torch.testing.assert_close(slope, wanted, rtol=1e-7, atol=1e-9 * float(wanted.abs().max()))


def test_a_trace_has_no_repeats_where_nothing_is_written_in_place() -> None:
    def twice(x: Tensor) -> Tensor:
        return x.exp() + x.exp()

    def written(x: Tensor) -> Tensor:
        return x.new_zeros(3).add_(x) * x.new_zeros(3).add_(2)

    point = torch.arange(3.0)
    for function, exps in ((twice, 1), (written, 0)):
        trace = gradients._without_repeats(make_fx(function)(point))
        assert torch.equal(trace(point), function(point))
        assert sum(node.target is torch.ops.aten.exp.default for node in trace.graph.nodes) == exps


def test_lanes_are_taken_from_anywhere() -> None:
    images, labels = pictures(7, 1)
    match = Match(leak_of(images, labels, build("lenet", (3, 16, 16), 10, seed=5), "lenet"), squared_distance)
    guess, some = images.flip(0), torch.tensor([5, 2])
    torch.testing.assert_close(match(guess[some], labels[some], some), match(guess, labels)[some], rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["lenet", "convnet"])
def test_the_compiled_slope_is_the_vmapped_one(model: str) -> None:
    images, labels = pictures(3, 1)
    leak = leak_of(images, labels, build(model, (3, 16, 16), 10, seed=5), model)
    guess = images.flip(0).clone().requires_grad_()
    slopes = [
        torch.autograd.grad(Match(leak, squared_distance, compiled=compiled)(guess, labels).sum(), guess)[0]
        for compiled in (False, True)
    ]
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-4, atol=1e-5 * float(slopes[0].abs().max()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("model", ["lenet", "convnet", "resnet20", "vit"])
def test_cpu_and_cuda_agree(model: str) -> None:
    images, labels = pictures(3, 1)
    leak = leak_of(images.double(), labels, build(model, (3, 16, 16), 10, seed=5).double(), model)
    guess = images.flip(0).double()
    here, there = Match(leak, squared_distance), Match(leak.to("cuda"), squared_distance)
    torch.testing.assert_close(there(guess.cuda(), labels.cuda()).cpu(), here(guess, labels), rtol=1e-6, atol=1e-9)


def test_the_tables_convolutions_are_torchs() -> None:
    draw = torch.Generator().manual_seed(0)
    cases = [
        (3, 12, 5, 2, 2, 16, 1, 2),
        (3, 12, 5, 2, 2, 16, 4, 1),
        (12, 8, 5, 2, 2, 15, 4, 2),
        (2, 3, 1, 2, 0, 9, 2, 2),
    ]
    for inputs, outputs, kernel, stride, padding, size, groups, n in cases:
        images = torch.randn(n, groups * inputs, size, size, generator=draw)
        filters = torch.randn(groups * outputs, inputs, kernel, kernel, generator=draw)
        forward = F.conv2d(images, filters, None, stride, padding, groups=groups)
        signal = torch.randn(forward.shape, generator=draw)
        s, p = [stride] * 2, [padding] * 2
        terms = (signal, images, filters, None, s, p, [1, 1], False, [0, 0], groups, [True, True, False])
        images_slope, filter_slope, _ = torch.ops.aten.convolution_backward(*terms)
        close = {"rtol": 1e-4, "atol": 1e-3}
        torch.testing.assert_close(correlate(images, filters, s, p, groups), forward, **close)
        for in_columns in (False, True):
            found = spread(signal, filters, images.shape[2:], s, p, groups, in_columns=in_columns)
            torch.testing.assert_close(found, images_slope, **close)
        torch.testing.assert_close(filters_gradient(signal, images, filters.shape, s, p, groups), filter_slope, **close)


def test_priors_on_known_pictures() -> None:
    ramp = torch.arange(4.0).expand(4, 4)[None, None, None]  # one step to the right, none down
    assert float(total_variation(ramp)) == 1
    assert float(total_variation(torch.ones(1, 1, 3, 8, 8))) == 0
    assert float(isotropic_variation(torch.ones(1, 1, 3, 8, 8))) < 1e-4
    network = build("resnet20", (3, 16, 16), 10, seed=0)
    weights, buffers = dict(network.named_parameters()), dict(network.named_buffers())
    meta = build("resnet20", (3, 16, 16), 10)
    seen: list[Tensor] = []
    for module in (plain := copy.deepcopy(network)).modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = pictures(1, 2)[0][0]
    plain(images)
    expected = sum(
        h.mean((0, 2, 3)).norm() + (h.var((0, 2, 3), correction=0) - 1).norm() for h in seen
    )  # running mean 0, variance 1
    floats = {name: buffer for name, buffer in buffers.items() if buffer.is_floating_point()}
    torch.testing.assert_close(statistics_gap(meta, weights, floats, images), expected, rtol=1e-4, atol=1e-4)
