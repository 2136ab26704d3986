"""Defences: what they do to a gradient, and that clients, compromised or not, send what they leave."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from fedtap.attackers.gradients.exact_git import ExactGIT
from fedtap.attackers.gradients.idlg import IDLG
from fedtap.clients.mod import mod_of
from fedtap.simulator.auxiliary import gradients
from fedtap.simulator.defences.announced import sigma
from fedtap.simulator.defences.chain import DEFENCES, Defences, parse
from fedtap.simulator.defences.hooks import Chain, StepDefence, UpdateDefence
from fedtap.simulator.defences.notation import WORDS, described, written
from fedtap.simulator.defences.precode import bottlenecks, training_loss
from fedtap.simulator.defences.steps import DPSGD, Soteria, effects
from fedtap.simulator.defences.updates import Clip, Laplace, LocalDP, Noise, Prune, Quantise, Sign
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.rounds import auxiliary, play
from fedtap.simulator.leaks import Protocol, load, stack
from fedtap.simulator.models.registry import build
from fedtap.simulator.wire.grid import LocalGrid
from fedtap.simulator.wire.records import tensors_of
from tests.simulator.test_federation import BASE, federation

UPDATES: tuple[UpdateDefence, ...] = (
    Clip(1.5),
    Noise(0.3),
    Laplace(0.2),
    Prune(0.4),
    Sign(),
    Quantise(3),
    LocalDP(1.0, 2.0, 8.0, 1e-5),
    Chain((Clip(1.0), Noise(0.1), Quantise(2), Laplace(0.1), Prune(0.5))),
)


def drawn(*names: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(names) % 2**31)


def update(*lead: int, seed: int = 0) -> dict[str, Tensor]:
    draw = drawn(seed)
    return {"b": torch.randn(*lead, 3, 4, generator=draw), "a": torch.randn(*lead, 5, generator=draw)}


def flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient[name].flatten() for name in sorted(gradient)])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "write none, or defences joined by"),
        ("clip(1)+", "cannot be read"),
        ("+clip(1)", "something else than defences"),
        ("clip(1)-noise(1)", "something else than defences"),
        ("clip(1)+none", "no defence named 'none'"),
        ("clip(1)++noise(1)", "something else"),
        ("noise", "takes 1: write noise.sigma."),
        ("noise()", "is given 0 values and takes 1"),
        ("noise(1, 2)", "is given 2 values and takes 1"),
        ("noise(1, sigma=2)", "given twice"),
        ("noise(scale=1)", "no argument of noise named 'scale'"),
        ("noise(*[1])", "cannot be read"),
        ("noise(**{'sigma': 1})", "no argument of noise"),
        ("noise(x)", "cannot be read"),
        ("noise(-1)", "sigma of noise is -1, and it is a number from 0"),
        ("noise(1e999)", "sigma of noise is inf"),
        ("noise(True)", "sigma of noise is True"),
        ("noise('1')", "sigma of noise is '1'"),
        ("clip(0)", "norm of clip is 0, and it is a number above 0"),
        ("laplace(0)", "scale of laplace is 0"),
        ("prune(1)", "share of prune is 1, and it is a number from 0 and below 1"),
        ("prune(-0.1)", "share of prune"),
        ("quantise(0)", "whole number from 1 to 16"),
        ("quantise(2.0)", "whole number"),
        ("quantise(17)", "whole number"),
        ("sign(1)", "takes 0"),
        ("local_dp(1, 1, 0, 1e-5)", "epsilon of local_dp is 0, and it is a number above 0"),
        ("local_dp(1, 1, 1, 1)", "delta of local_dp is 1, and it is a number above 0 and below 1"),
        ("local_dp(1, 1, 1, 0)", "delta of local_dp is 0"),
        ("soteria(1)", "share of soteria is 1"),
        ("dp_sgd(0, 1)", "clip of dp_sgd is 0"),
        ("dp_sgd(1, -1)", "noise_multiplier of dp_sgd is -1"),
        ("clip(1)+dp_sgd(1, 1)", r"acts on the step, before clip.*write it first, dp_sgd.1.0, 1.0.\+clip"),
        ("soteria(0.1)+dp_sgd(1, 1)", "both act on the step: keep one"),
        ("central_dp(1, 1)+noise(1)", r"acts on the update, before central_dp.*write it first, noise"),
        ("central_dp(1, -1)", "noise_multiplier of central_dp"),
        ("precode(0)", "features of precode is 0"),
        ("clip(1)+precode(2)", r"acts on the model, before clip"),
        ("dp(1)", "no defence named 'dp'"),
        ("clop(1)", "did you mean clip"),
        ("clip(clip(1))", "cannot be read"),
        ("clip(1)(2)", "something else"),
        ("[clip(1)]", "something else"),
        ("__import__('os').system('true')", "something else"),
        ("+".join(["sign()"] * 9999), "cannot be read"),
        (f"noise(1{'0' * 400})", "sigma of noise"),
    ],
)
def test_what_is_no_defence_is_refused_in_a_sentence(text: str, said: str) -> None:
    with pytest.raises(FedtapError, match=said) as caught:
        parse(text)
    assert str(caught.value).endswith((".", "?"))


def test_an_unknown_name_is_answered_with_the_list() -> None:
    with pytest.raises(FedtapError, match=", ".join(sorted(WORDS))):
        parse("dp(1)")


@given(st.text(max_size=30) | st.text("clipnoise(1.),+ ", max_size=30))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    with contextlib.suppress(FedtapError):
        assert written(described(text)) == "none" or parse(text) != Defences()


POSITIVE = st.floats(1e-6, 1e6)
ONES: st.SearchStrategy[UpdateDefence] = st.one_of(
    st.builds(Clip, POSITIVE),
    st.builds(Noise, POSITIVE),
    st.builds(Laplace, POSITIVE),
    st.builds(Prune, st.floats(0, 0.99)),
    st.builds(Sign),
    st.builds(Quantise, st.integers(1, 16)),
    st.builds(LocalDP, POSITIVE, POSITIVE, POSITIVE, st.floats(1e-9, 0.99)),
)


STEPS: st.SearchStrategy[StepDefence | None] = st.one_of(
    st.none(), st.builds(Soteria, st.floats(0, 0.99)), st.builds(DPSGD, POSITIVE, st.floats(0, 1e6))
)


@given(STEPS, st.lists(ONES, max_size=4))
def test_what_is_written_is_read_back(step: StepDefence | None, chain: list[UpdateDefence]) -> None:
    text = "+".join(map(repr, [*filter(None, [step]), *chain])) or "none"
    assert parse(text) == Defences(step, Chain(tuple(chain)))
    assert written(described(text)) == text


def test_one_meaning_has_one_spelling() -> None:
    for text in ("clip(1)+noise(.01)", " clip( norm=1 ) + ( noise(sigma=1e-2) )"):
        assert written(described(text)) == "clip(1.0)+noise(0.01)"
    assert written(described("sign")) == "sign()"
    assert not parse("none").update


def test_every_defence_has_its_words_and_its_paper() -> None:
    assert set(DEFENCES) == {name for name, kind in WORDS.items() if kind.hook in ("step", "update")}
    for name, kind in DEFENCES.items():
        assert [field.name for field in dataclasses.fields(kind)] == [a.name for a in WORDS[name].arguments]  # type: ignore[arg-type]
        assert "https://" in (kind.__doc__ or ""), name
        assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]


@pytest.mark.parametrize("defence", UPDATES, ids=repr)
@settings(deadline=None, max_examples=10)
@given(exchanges=st.integers(1, 5), seed=st.integers(0, 99), scale=st.sampled_from([0.0, 1e-6, 0.1, 10.0]))
def test_a_stack_is_defended_as_each_alone(defence: UpdateDefence, exchanges: int, seed: int, scale: float) -> None:
    gradients = {name: scale * tensor for name, tensor in update(exchanges, seed=seed).items()}
    before = {name: tensor.clone() for name, tensor in gradients.items()}
    found = defence.stacked(gradients, [drawn(seed, which) for which in range(exchanges)])
    for which in range(exchanges):
        alone = defence({name: tensor[which] for name, tensor in gradients.items()}, drawn(seed, which))
        assert alone.keys() == found.keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(found[name][which], tensor)
            assert tensor.dtype == gradients[name].dtype
    assert all(torch.equal(before[name], gradients[name]) for name in before), "it was changed in place"


def test_clip_shortens_what_is_too_long_and_nothing_else() -> None:
    gradient = update()
    length = float(flat(gradient).norm())
    torch.testing.assert_close(Clip(length * 1.01)(gradient, drawn()), gradient)
    for name, tensor in Clip(0.5)(gradient, drawn()).items():
        torch.testing.assert_close(tensor, gradient[name] * 0.5 / length)


@pytest.mark.parametrize(
    ("defence", "spread", "tail"),
    [(Noise(0.3), 0.3, 3.0), (Laplace(0.3), 0.3 * math.sqrt(2), 6.0), (LocalDP(1e9, 0.3, 2.0, 0.05), None, 3.0)],
    ids=repr,
)
def test_noise_has_the_spread_and_the_tails_it_says(defence: UpdateDefence, spread: float | None, tail: float) -> None:
    gradient = {"b": torch.ones(3, 50000), "a": torch.zeros(50000)}
    one, two = (defence(gradient, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for name, tensor in gradient.items():
        noise = one[name] - tensor
        wanted = spread or 0.3 * math.sqrt(2 * math.log(1.25 / 0.05)) / 2.0
        assert float(noise.std()) == pytest.approx(wanted, rel=0.02)
        assert float(noise.mean()) == pytest.approx(0, abs=0.02)
        assert float((noise / noise.std()).pow(4).mean()) == pytest.approx(tail, rel=0.1)  # kurtosis
        assert not torch.isclose(one[name], two[name]).all()


@given(share=st.floats(0, 0.999), seed=st.integers(0, 99), levels=st.integers(1, 4))
def test_prune_keeps_the_largest(share: float, seed: int, levels: int) -> None:
    gradient = {name: (tensor * levels).round() / levels for name, tensor in update(seed=seed).items()}  # with ties
    sent = Prune(share)(gradient, drawn())
    order = sorted(range(17), key=lambda place: (float(flat(gradient)[place].abs()), place))
    wanted = flat(gradient).clone()
    wanted[order[: min(round(share * 17), 16)]] = 0
    assert torch.equal(flat(sent), wanted)


def test_sign_says_no_size() -> None:
    sent = Sign()({"a": torch.tensor([-3.0, 0.0, 1e-9])}, drawn())
    assert sent["a"].tolist() == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("bits", [1, 3, 16])
def test_quantise_rounds_to_its_grid_without_bias(bits: int) -> None:
    gradient = update(seed=4) | {"constant": torch.full((3,), 0.7)}
    draws = [Quantise(bits)(gradient, drawn(trial)) for trial in range(100)]
    for name, tensor in gradient.items():
        sent = torch.stack([draw[name] for draw in draws])
        step = float(tensor.max() - tensor.min()) / (2**bits - 1)
        assert (sent - tensor).abs().max() <= step * 1.001 + 1e-6
        if step:
            place = (sent.double() - tensor.min()) / step
            assert (place - place.round()).abs().max() < 1e-2
        assert (sent.mean(0) - tensor).abs().max() < 5 * step / math.sqrt(100) + 1e-6


def test_local_dp_is_flowers_own_mod() -> None:
    gradient, state = update(), np.random.get_state()[1]
    sent = LocalDP(0.5, 1.0, 1e9, 1e-5)(gradient, drawn())  # so large an ε leaves no noise to see
    torch.testing.assert_close(sent, Clip(0.5)(gradient, drawn()), rtol=1e-5, atol=1e-6)
    assert np.array_equal(np.asarray(state), np.asarray(np.random.get_state()[1])), "numpy's generator was moved"
    LocalDpMod(1.0, 1.0, 0.0, 1e-5)  # Flower takes ε = 0, and then sends infinite noise
    with pytest.raises(FedtapError, match="above 0"):
        LocalDP(1.0, 1.0, 0.0, 1e-5)


def announcing(defence: str, batch: int = 1) -> float:
    return sigma(Protocol("lenet", (3, 16, 16), 10, batch, defence=defence))


def test_attackers_read_the_noise_off_what_is_announced() -> None:
    assert announcing("none") == announcing("clip(1.0)") == announcing("somebody's own") == 0
    assert announcing("noise(0.25)") == announcing("clip(1.0)+noise(0.25)+quantise(4)") == 0.25
    assert announcing("noise(0.3)+noise(0.4)") == pytest.approx(0.5)
    assert announcing("dp_sgd(2.0, 0.5)+clip(3)", batch=4) == 0.25
    for text in ("laplace(0.3)", "local_dp(1000000.0, 0.3, 2.0, 0.05)"):
        (part,) = parse(text).update.parts
        noise = part({"a": torch.zeros(100000)}, drawn())["a"]
        assert announcing(text) == pytest.approx(float(noise.std()), rel=0.02)


def gradients_of(defence: str, model: str = "lenet") -> list[dict[str, Tensor]]:
    """What the server hears of the victims, and of the compromised client that is fed the same images as them."""
    scenario = dataclasses.replace(BASE, model=model, defence=defence)
    grid, private = federation(scenario)
    heard = play(scenario, grid, private)
    leak = stack([heard.leaks[name] for name in private.names()])
    images, labels = (torch.stack(side) for side in zip(*(private(*name) for name in private.names()), strict=True))
    (pairs,) = auxiliary(grid, scenario, private, heard, images, labels)
    assert leak.protocol.defence == pairs.leak.protocol.defence == defence
    return [dict(leak.observed), dict(pairs.leak.observed)]


@pytest.mark.parametrize(
    "defence", ["clip(0.5)", "prune(0.9)", "sign()", "clip(0.5)+prune(0.9)", "soteria(0.5)", "dp_sgd(0.5, 0.0)"]
)
def test_the_compromised_client_defends_as_a_victim_does(defence: str) -> None:
    (plain, _), (victim, fed) = gradients_of("none"), gradients_of(defence)
    made = parse(defence.replace("dp_sgd(0.5, 0.0)", "clip(0.5)"))  # with one image a batch they are the same
    sent = made.update.stacked(plain, [drawn()] * 3)
    if made.step:
        sent |= {"fc.weight": torch.where(victim["fc.weight"] == 0, 0.0, plain["fc.weight"])}
        silent = (victim["fc.weight"] == 0).all(1)
        assert (silent.float().mean(1) == 0.5).all()
        assert torch.equal(silent, (fed["fc.weight"] == 0).all(1))
    for name, wanted in sent.items():
        # what travels as weights is known to float32's rounding of them, and at a threshold that may tip an entry
        for found in (victim, fed):
            assert torch.isclose(found[name], wanted, rtol=1e-3, atol=5e-6).float().mean() > 0.99, name
    assert not torch.isclose(victim["fc.weight"], plain["fc.weight"], rtol=1e-2, atol=1e-5).all()


@pytest.mark.parametrize(
    ("model", "defence"),
    [("lenet", "noise(0.5)"), ("resnet20", "noise(0.5)"), ("lenet", "local_dp(9999.0, 0.25, 2.0, 0.000419)")],
)
def test_clients_send_the_defended_gradient(model: str, defence: str) -> None:
    plain = dataclasses.replace(BASE, model=model)
    defended = dataclasses.replace(plain, defence=defence)
    leaks, fed = [], []
    for scenario in (plain, defended):
        grid, private = federation(scenario)
        heard = play(scenario, grid, private)
        leaks.append(stack([heard.leaks[name] for name in private.names()]))
        images, labels = private.dataset.auxiliary.batch(torch.arange(3))
        (pairs,) = auxiliary(grid, scenario, private, heard, images[:, None], labels[:, None])
        fed.append(pairs.leak)
    assert leaks[1].protocol.defence == fed[1].protocol.defence == defence
    for without, within in (leaks, fed):
        difference = torch.cat(
            [(within.observed[name] - without.observed[name]).flatten(1) for name in without.observed], dim=1
        )
        assert torch.allclose(difference.std(1), torch.tensor(0.5), rtol=0.05)
        assert not torch.isclose(difference[0], difference[1]).all()
    for name, buffer in leaks[0].buffers.items():  # what is no parameter is left as it is
        torch.testing.assert_close(leaks[1].buffers[name], buffer)


def batch_of(exchanges: int, images: int, size: int = 16) -> tuple[Tensor, Tensor]:
    return torch.rand(exchanges, images, 3, size, size, generator=drawn(3)), torch.arange(exchanges * images).view(
        exchanges, images
    ) % 10


@pytest.mark.parametrize(
    ("model", "step"),
    [
        *((model, DPSGD(0.7, 0.0)) for model in ("mlp", "lenet", "convnet", "vit")),
        *((model, Soteria(0.3)) for model in ("mlp", "lenet")),
    ],
)
def test_steps_in_a_stack_are_those_of_a_client(model: str, step: StepDefence) -> None:
    """For DP-SGD, Opacus is the oracle: it knows no stacks."""
    net, (images, labels) = build(model, (3, 16, 16), 10, seed=1), batch_of(3, 2)
    found = step.stacked(net, images, labels, [drawn()] * 3)
    for which in range(3):
        net.zero_grad()
        loss = step.backward(net, images[which], labels[which], drawn())
        assert loss.item() == pytest.approx(F.cross_entropy(net(images[which]), labels[which]).item(), rel=1e-5)
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(found[name][which], parameter.grad, rtol=1e-3, atol=1e-6)
            assert not {"grad_sample", "summed_grad"} & vars(parameter).keys(), "Opacus has left something behind"


def test_dp_sgd_clips_each_example_and_adds_the_noise_it_says() -> None:
    net, (images, labels) = build("lenet", (3, 16, 16), 10, seed=1), batch_of(2, 4)
    plain, loud = DPSGD(0.1, 0.0), DPSGD(0.1, 6.0)
    found = plain.stacked(net, images, labels, [drawn()] * 2)
    alone = gradients(net, images[0][:, None], labels[0][:, None])
    clipped = [flat(Clip(0.1)({name: tensor[one] for name, tensor in alone.items()}, drawn())) for one in range(4)]
    torch.testing.assert_close(flat({name: tensor[0] for name, tensor in found.items()}), sum(clipped) / 4)
    noisy = loud.stacked(net, images, labels, [drawn(1), drawn(2)])
    net.zero_grad()
    loud.backward(net, images[0], labels[0], drawn(4))
    opacus = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}
    for sent in (opacus, *({name: tensor[which] for name, tensor in noisy.items()} for which in range(2))):
        noise = flat(sent) - sum(clipped) / 4
        assert float(noise.std()) == pytest.approx(6.0 * 0.1 / 4, rel=0.1)
    assert not torch.isclose(noisy["fc.weight"][0], noisy["fc.weight"][1]).all()


def test_soteria_leaves_out_what_tells_most() -> None:
    net, (images, labels) = build("lenet", (3, 8, 8), 10, seed=1), batch_of(2, 3, size=8)
    found = effects(net, images)
    for which in range(2):  # one feature and one image after the other
        wanted = torch.zeros(found.shape[1])
        for image in images[which]:
            x = image[None].clone().requires_grad_()
            hidden = x
            for conv in (net.conv1, net.conv2, net.conv3):
                hidden = torch.sigmoid(conv(hidden))  # type: ignore[operator]
            r = hidden.flatten()
            for feature in range(len(r)):
                (slope,) = torch.autograd.grad(r[feature], x, retain_graph=True)
                wanted[feature] += r[feature].detach().abs() / slope.norm()
        torch.testing.assert_close(found[which], wanted, rtol=1e-3, atol=1e-3)
    sent, plain = Soteria(0.25).stacked(net, images, labels, [drawn()] * 2), gradients(net, images, labels)
    silent = (sent["fc.weight"] == 0).all(1)
    assert (silent.sum(1) == found.shape[1] // 4).all()
    for which in range(2):
        assert found[which][silent[which]].min() >= found[which][~silent[which]].max()
        kept = ~silent[which]
        assert torch.equal(sent["fc.weight"][which][:, kept], plain["fc.weight"][which][:, kept])
    assert torch.equal(sent["conv1.weight"], plain["conv1.weight"])


def test_a_feature_that_is_off_has_no_effect() -> None:
    found = effects(build("convnet", (3, 8, 8), 10, seed=1), batch_of(1, 1, size=8)[0])
    assert found.isfinite().all()
    assert (found == 0).any()


def test_precode_is_a_bottleneck_from_which_clients_draw() -> None:
    net, plain = build("lenet+precode(6)", (3, 16, 16), 10, seed=1), build("lenet", (3, 16, 16), 10, seed=1)
    assert torch.equal(net.fc[1].weight, plain.fc.weight)  # type: ignore[index,union-attr,arg-type]
    (bottleneck,), (images, labels) = bottlenecks(net), batch_of(1, 4)
    assert torch.equal(net(images[0]), net(images[0])), "others than clients take its mean"
    held: list[Tensor] = []
    bottleneck.encoder.register_forward_hook(lambda layer, fed, out: held.append(out))
    loss = training_loss(net, images[0], labels[0])
    mean, spread = held[0][:, :6], F.softplus(held[0][:, 6:] - 5)
    apart = kl_divergence(Normal(mean, spread), Normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(loss, F.cross_entropy(net(images[0]), labels[0]) + 1e-3 * apart)
    found = gradients(net, images, labels)
    net.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name][0], parameter.grad, rtol=1e-3, atol=1e-6)
    bottleneck.draws = True
    again = torch.stack([net(images[0]) for _ in range(50)])
    assert (again.std(0) > 0).all()
    drawn_twice = gradients(net, images.repeat(2, 1, 1, 1, 1), labels.repeat(2, 1))
    assert not torch.isclose(drawn_twice["fc.1.weight"][0], drawn_twice["fc.1.weight"][1]).all()


@pytest.mark.parametrize("defence", ["precode(8)", "precode(8)+dp_sgd(1.0, 0.0)", "precode(8)+soteria(0.5)+clip(1.0)"])
def test_an_attacker_is_told_of_the_bottleneck_and_not_of_the_draw(defence: str, tmp_path: Path) -> None:
    scenario = dataclasses.replace(BASE, defence=defence)
    grid, private = federation(scenario)
    heard = play(scenario, grid, private)
    leak = stack([heard.leaks[name] for name in private.names()])
    assert leak.protocol.model == "lenet+precode(8)"
    images, labels = (torch.stack(side) for side in zip(*(private(*name) for name in private.names()), strict=True))
    (pairs,) = auxiliary(grid, scenario, private, heard, images, labels)
    assert "fc.0.encoder.weight" in pairs.leak.observed
    leak.save(tmp_path / "leak.safetensors")
    again = load(tmp_path / "leak.safetensors", build)
    assert IDLG(steps=2)(again).images.isfinite().all()
    with pytest.raises(FedtapError, match="where undoing it would begin"):
        ExactGIT().accepts(again)
    if defence == "precode(8)":
        mean = build("lenet+precode(8)", (3, 16, 16), len(private.dataset.classes), seed=scenario.weights_seed)
        guessed = gradients(mean, images, labels)["fc.1.weight"]
        assert not torch.isclose(leak.observed["fc.1.weight"], guessed, rtol=1e-3, atol=1e-5).all()
        torch.testing.assert_close(leak.observed["fc.1.weight"], guessed, rtol=0.5, atol=0.05)


@pytest.mark.parametrize(
    ("model", "defence", "said"),
    [
        (
            "tests.simulator.test_defences:convolutional",
            "precode(8)",
            "stands before the linear layer that yields the logits, and there is none",
        ),
        ("resnet20", "dp_sgd(1.0, 1.0)", "BatchNorm mixes the examples.*ModuleValidator.fix"),
        ("resnet20", "central_dp(1, 1)", "also sends bn1.running_mean.*ModuleValidator.fix"),
        ("resnet20", "local_dp(1, 1, 1, 0.1)", "also sends bn1.running_mean.*ModuleValidator.fix"),
        ("tests.simulator.test_defences:recurrent", "dp_sgd(1.0, 1.0)", "LSTM"),
        ("tests.simulator.test_defences:convolutional", "soteria(0.1)", "with a weight of its own does"),
    ],
)
def test_a_model_that_a_defence_does_not_suit_is_refused_before_a_round(model: str, defence: str, said: str) -> None:
    scenario = dataclasses.replace(BASE, model=model, defence=defence)
    grid, private = federation(scenario)
    with pytest.raises(FedtapError, match=said):
        play(scenario, grid, private)


class Last(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0]


def recurrent(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LSTM(math.prod(shape), classes), Last())


def convolutional(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(shape[0], classes, shape[1:]), nn.Flatten())


def fixed(shape: tuple[int, int, int], classes: int) -> nn.Module:
    from opacus.validators import ModuleValidator

    return ModuleValidator.fix(build("resnet20", shape, classes, seed=0))


def test_opacus_fixer_makes_a_model_that_dp_sgd_takes() -> None:
    scenario = dataclasses.replace(
        BASE, model="tests.simulator.test_defences:fixed", defence="dp_sgd(1.0, 0.0)", batch=2, local_steps=2
    )
    grid, private = federation(scenario)
    heard = play(scenario, grid, private)
    assert set(heard.leaks) == set(private.names())
    for leak in heard.leaks.values():
        length = sum(float(tensor.square().sum()) for tensor in leak.observed.values()) ** 0.5
        assert 0 < length <= 2 * 1.001 * scenario.learning_rate


def test_central_dp_is_flowers_wrapper_and_the_server_hears_what_it_hides() -> None:
    heard = {}
    for defence in ("none", "central_dp(0.5, 0.0)", "central_dp(0.5, 8.0)"):
        scenario = dataclasses.replace(BASE, defence=defence, rounds=1)
        grid, private = federation(scenario)
        heard[defence] = play(scenario, grid, private)
        again = play(scenario, federation(scenario)[0], private)
        for name in ("fc.weight", "conv1.bias"):
            assert np.array_equal(again.arrays[name].numpy(), heard[defence].arrays[name].numpy())
    plain, clipped, noisy = ({n: t.double() for n, t in tensors_of(one.arrays).items()} for one in heard.values())
    start = {name: tensor.double() for name, tensor in tensors_of(heard["none"].start).items()}
    drift_norm = flat({name: clipped[name] - start[name] for name in start})
    further = flat({name: plain[name] - start[name] for name in start})
    rate = BASE.learning_rate
    assert 0.4 * 0.5 * rate < float(drift_norm.norm()) <= 0.5 * rate * 1.001 < float(further.norm())
    noise = flat({name: noisy[name] - clipped[name] for name in start})
    assert float(noise.std()) == pytest.approx(8.0 * 0.5 * rate / 4, rel=0.05)
    (victim, *_), (defended, *_) = (list(heard[which].leaks.values()) for which in ("none", "central_dp(0.5, 8.0)"))
    assert float(defended.observed["fc.weight"].norm()) > 0.2 * float(victim.observed["fc.weight"].norm())


RECEIVED = {"weight": torch.randn(4, 3, generator=drawn(7)), "running_mean": torch.zeros(3), "seen": torch.tensor(5)}
MOVED = {"weight": torch.full((4, 3), 0.1), "running_mean": torch.ones(3), "seen": torch.tensor(1)}


def own_app(defence: UpdateDefence, answer: Callable[[dict[str, Tensor]], RecordDict], **options: object) -> Message:
    """The answer of somebody's own ClientApp that has the mod."""
    app = ClientApp(mods=[mod_of(defence, **options)])  # type: ignore[arg-type]

    @app.train()
    def train(order: Message, context: Context) -> Message:
        received = tensors_of(order.content.array_records["arrays"])
        return Message(answer({name: tensor + MOVED[name] for name, tensor in received.items()}), reply_to=order)

    @app.evaluate()
    def evaluate(order: Message, context: Context) -> Message:
        return Message(order.content, reply_to=order)

    kind = MessageType.EVALUATE if options == {"learning_rate": 7} else MessageType.TRAIN
    (reply,) = LocalGrid(app, 1).send_and_receive([Message(RecordDict({"arrays": ArrayRecord(RECEIVED)}), 2, kind)])
    return reply


def both(after: dict[str, Tensor]) -> RecordDict:
    return RecordDict({"arrays": ArrayRecord(after), "metrics": MetricRecord({"num-examples": 3})})


def test_any_update_defence_is_a_mod_of_a_users_own_app() -> None:
    reply = own_app(Clip(0.2), both, parameters={"weight"})
    sent = tensors_of(reply.content.array_records["arrays"])
    assert list(sent) == list(RECEIVED)
    torch.testing.assert_close(sent["weight"] - RECEIVED["weight"], MOVED["weight"] * 0.2 / MOVED["weight"].norm())
    assert torch.equal(sent["running_mean"], MOVED["running_mean"]), "no parameter: it travels as it is"
    assert sent["seen"] == 6
    assert reply.content.metric_records["metrics"]["num-examples"] == 3

    sent = tensors_of(own_app(Sign(), both, learning_rate=0.5).content.array_records["arrays"])
    torch.testing.assert_close(sent["weight"] - RECEIVED["weight"], torch.full((4, 3), 0.5))
    torch.testing.assert_close(sent["running_mean"], torch.full((3,), 0.5))
    one, two = (
        tensors_of(own_app(Noise(1.0), both, **options).content.array_records["arrays"])["weight"]  # type: ignore[arg-type]
        for options in ({}, {})
    )
    assert not torch.isclose(one, two).any(), "noise that repeats can be taken off"


def test_a_mod_that_cannot_tell_what_to_defend_sends_nothing() -> None:
    def two(after: dict[str, Tensor]) -> RecordDict:
        return RecordDict({"arrays": ArrayRecord(after), "more": ArrayRecord(after)})

    def other(after: dict[str, Tensor]) -> RecordDict:
        return RecordDict({"arrays": ArrayRecord(after | {"new": torch.ones(2)})})

    for answer, said in ((two, "holds 2 ArrayRecords"), (other, "sends new, and was sent no array")):
        reply = own_app(Clip(1.0), answer)
        assert reply.has_error()
        assert said in reply.error.reason
    untouched = own_app(Sign(), both, learning_rate=7)  # a message of another kind
    assert torch.equal(tensors_of(untouched.content.array_records["arrays"])["weight"], RECEIVED["weight"])


def test_flowers_mod_is_quiet_in_a_simulation(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="flwr"):
        LocalDP(1.0, 2.0, 1.0, 1e-5).stacked({"w": torch.ones(1, 3)}, [torch.Generator().manual_seed(0)])
    assert not caplog.records


@pytest.mark.parametrize("name", ["lenet(depht=2)", "lenet(width=0)", "lenet()", "lenet(3)"])
def test_a_size_that_a_model_does_not_have_is_named(name: str) -> None:
    with pytest.raises(FedtapError, match="no size of lenet that can be built"):
        build(name, (3, 8, 8), 3)
