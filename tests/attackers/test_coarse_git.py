"""Coarse GIT: its stages are the network's, its closed forms autograd's, and what it learns is kept where it helps."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fedtap.attackers.baselines.flat_mlp import FlatGenerator, FlatMLP
from fedtap.attackers.baselines.training_mean import TrainingMean
from fedtap.attackers.gradients.coarse_git import CoarseGIT, compact
from fedtap.attackers.gradients.fused_git import FusedGIT
from fedtap.attackers.gradients.lti import LTI
from fedtap.attackers.parts.batch_rows import image_rows
from fedtap.attackers.parts.channel_means import ChannelMeans
from fedtap.attackers.parts.generator import Generator, Leaf, _ridge, stages
from fedtap.attackers.parts.labels import recovered
from fedtap.attackers.parts.module_chain import ModuleChain
from fedtap.attackers.parts.patches import PatchSolution
from fedtap.attackers.parts.teaching import ordered, teach
from fedtap.attackers.wrappers.saved import Saved
from fedtap.simulator.attack import Learner, _learned
from fedtap.simulator.auxiliary import Auxiliary, Pairs, gradients
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak, Tensors
from fedtap.simulator.models.registry import BUILDERS, Normalise, build
from tests.support.attack_leaks import auxiliary_for, leak_of, pictures

SHAPE = (3, 16, 16)


def heard(model: str = "lenet", victims: int = 4, batch: int = 1, seed: int = 0) -> Leak:
    return leak_of(*pictures(victims, batch, seed=seed), build(model, SHAPE, 10, seed=1234), model)


def names(network: nn.Module) -> list[list[str]]:
    with torch.device("meta"):
        return [[leaf.weight for leaf in stage.leaves] for stage in stages(network, SHAPE)]


def test_one_stage_a_layer_or_block_in_the_networks_order() -> None:
    assert names(build("lenet", SHAPE, 10)) == [[f"conv{n}.weight"] for n in (1, 2, 3)] + [["fc.weight"]]
    assert [len(stage) for stage in names(build("mlp", SHAPE, 10))] == [1, 1, 1]
    residual = stages(build("resnet20", SHAPE, 10), SHAPE)
    assert len(residual) == 11  # a stem, nine blocks, the last layer
    assert [len(stage.leaves) for stage in residual][1:4] == [2, 2, 2]
    blocks = stages(build("vit", SHAPE, 10), SHAPE)
    assert len({stage.name for stage in blocks}) == len(blocks) > 3
    for model in BUILDERS:
        network = build(model, SHAPE, 10)
        found = stages(network, SHAPE)
        read = [leaf.weight for stage in found for leaf in stage.leaves] + [n for s in found for n, _ in s.others]
        biases = {leaf.bias for stage in found for leaf in stage.leaves if leaf.bias}
        assert {name for name, _ in network.named_parameters()} == set(read) | biases
        assert len(read) == len(set(read))


def test_an_activation_before_a_layer_is_known_by_name() -> None:
    kinds = [stage.leaves[0].activation for stage in stages(build("lenet", SHAPE, 10), SHAPE)]
    assert kinds == ["", "sigmoid", "sigmoid", "sigmoid"]
    assert all(not stage.leaves[0].activation for stage in stages(build("convnet", SHAPE, 10), SHAPE))


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.integers(1, 2), st.integers(5, 9), st.integers(0, 10**6)
)
def test_a_convolutions_products_are_autograds(
    kernel: int, stride: int, padding: int, dilation: int, size: int, seed: int
) -> None:
    torch.manual_seed(seed)
    conv = nn.Conv2d(2, 3, kernel, stride, padding, dilation).double()
    x = torch.randn(4, 2, size, size + 1, dtype=torch.float64, requires_grad=True)
    z = conv(x)
    error = torch.randn_like(z)
    geometry = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    leaf = Leaf("w", None, tuple(conv.weight.shape), tuple(x.shape[1:]), tuple(z.shape[1:]), **geometry)
    down, whole = torch.autograd.grad(z, (x, conv.weight), error, retain_graph=True)
    torch.testing.assert_close(leaf.back(error, conv.weight), down)
    each = leaf.gradient(error, x)
    torch.testing.assert_close(each.sum(0), whole)
    kernels = torch.randn(4, *conv.weight.shape, dtype=torch.float64)
    for victim in range(4):  # the adjoint is back() under the victim's own gradient as the weight
        torch.testing.assert_close(
            leaf.adjoint(error, kernels)[victim], leaf.back(error[victim : victim + 1], kernels[victim])[0]
        )


@pytest.mark.parametrize("bias", [True, False])
def test_a_rows_input_is_read_in_closed_form(bias: bool) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(768, 20), nn.Tanh(), nn.Linear(20, 10, bias=bias))
    images, labels = pictures(3, 1)
    found = gradients(network, images, labels)
    leaf = stages(network, SHAPE)[-1].leaves[0]
    hidden = torch.tanh(network[1](images.flatten(1)))
    row = leaf.row(found)
    if bias:
        torch.testing.assert_close(row, hidden, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(
            leaf.features(row, torch.tensor(1e-6))[:, :20], torch.atanh(hidden), rtol=1e-2, atol=1e-3
        )
    else:  # up to its length
        assert bool((F.cosine_similarity(row, hidden) > 0.999).all())


@pytest.mark.parametrize("model", BUILDERS)
def test_every_model_is_learned_and_comes_back_from_its_files(model: str, tmp_path: Path) -> None:
    leak = heard(model)
    made = CoarseGIT(width=4, hidden=4, hints=4, epochs=1, batch=16).fit(auxiliary_for(leak, tmp_path, 60))
    guess = made(dataclasses.replace(leak, weights=None, buffers={}))
    assert guess.images.shape == (4, 1, *SHAPE)
    made.save(tmp_path / "git.safetensors")
    assert torch.equal(Saved(str(tmp_path / "git.safetensors"))(leak).images, guess.images)


def error(guess: Tensor, truth: Tensor) -> float:
    return float((guess - truth).square().mean())


def test_it_sees_far_more_than_the_mean_and_never_less_than_its_closed_form(tmp_path: Path) -> None:
    leak = heard(victims=32)
    truth, auxiliary = pictures(32, 1)[0], auxiliary_for(leak, tmp_path, 800)
    blind = error(TrainingMean().fit(auxiliary)(leak).images, truth)
    started = CoarseGIT(epochs=0).fit(auxiliary)
    learned = CoarseGIT(width=16, epochs=6, batch=40).fit(auxiliary)
    begun, ended = (error(attack(leak).images, truth) for attack in (started, learned))
    assert ended <= begun < 0.3 * blind
    assert abs(float(learned(leak).objective[0]) / ended - 1) < 0.5  # its own estimate
    stranger = learned(heard(victims=32, seed=77)).images
    assert error(stranger, truth) > 1.5 * blind


def named(auxiliary: Auxiliary, folder: Path, classes: int) -> Auxiliary:
    """Pairs of the same images, called by the first `classes` labels alone."""
    about = dataclasses.replace(auxiliary.about, digest=f"first {classes} classes")
    network = build("lenet", SHAPE, 10, seed=1234)

    def renamed() -> Iterator[Pairs]:
        for pairs in auxiliary:
            labels = pairs.labels % classes
            leak = dataclasses.replace(pairs.leak, observed=gradients(network, pairs.images, labels))
            yield Pairs(leak, pairs.images, labels)

    return Auxiliary.record(folder / "renamed", about, auxiliary.network, renamed())


def test_victims_of_a_label_never_met_get_the_ridge_regression(tmp_path: Path) -> None:
    truth, leak = pictures(32, 1)[0], heard(victims=32)
    every = auxiliary_for(leak, tmp_path, 400)
    some = CoarseGIT(width=8, epochs=6, batch=40).fit(named(every, tmp_path, 5))
    some.inverter.get_buffer("generator.trust").fill_(1.0)  # so few pairs hardly teach them
    strange = recovered(leak)[:, 0] >= 5
    assert 0 < int(strange.sum()) < 32
    some.inverter.generator.trust[:] = 1  # also where so few pairs do not earn the stages any trust
    safe = some(leak).images
    some.inverter.met[:] = True  # negative control: stages that are trusted with labels that they never met
    rash = some(leak).images
    assert torch.equal(safe[~strange], rash[~strange])
    assert error(rash[strange], truth[strange]) > 3 * error(safe[strange], truth[strange])
    # the regression itself hardly minds how its pairs are called
    assert error(safe[strange], truth[strange]) < 1.5 * error(CoarseGIT(epochs=0).fit(every)(leak).images, truth)


def test_files_without_the_labels_met_are_read_as_they_were_made(tmp_path: Path) -> None:
    leak = heard()
    for attack, prefix in ((SMALL, ""), (FusedGIT(prior=SMALL), "guess.")):
        made = attack.fit(auxiliary_for(leak, tmp_path, 60))
        tensors = {name: tensor for name, tensor in made.inverter.state_dict().items() if name != f"{prefix}met"}
        assert len(tensors) == len(made.inverter.state_dict()) - 1
        old = attack.restored(made.about, leak.network, tensors)
        assert bool(old.inverter.get_buffer(f"{prefix}met").all())
        assert {*old.inverter.state_dict()} == {*made.inverter.state_dict()}
        with pytest.raises(RuntimeError, match="error"):  # no other may be missing
            attack.restored(made.about, leak.network, {n: t for n, t in tensors.items() if n != f"{prefix}error"})


SMALL = CoarseGIT(width=4, hidden=4, hints=4, epochs=1, batch=16)


def test_learning_depends_on_the_seed_alone(tmp_path: Path) -> None:
    auxiliary, leak = auxiliary_for(heard(), tmp_path, 60), heard()
    attack = CoarseGIT(width=4, epochs=1, batch=16)
    same, other = dataclasses.replace(auxiliary), dataclasses.replace(auxiliary, folder=auxiliary.folder.resolve())
    one, two = attack.fit(same, 5), _learned.__wrapped__(attack, other, 5)  # the second is not the remembered first
    assert torch.equal(one(leak).images, two(leak).images)
    first = next(iter(one.inverter.parameters()))
    assert not torch.equal(first, next(iter(attack.fit(auxiliary, 6).inverter.parameters())))


def test_the_stages_learn_what_no_regression_starts_them_with(tmp_path: Path) -> None:
    auxiliary = auxiliary_for(heard(), tmp_path, 400)
    found = stages(build("lenet", SHAPE, 10), SHAPE)
    torch.manual_seed(0)
    generator = Generator(found, SHAPE, 16)
    read, images, _ = compact(generator, auxiliary)
    generator.fit_statistics(read, images)
    generator.ridge.zero_()
    adam, losses = torch.optim.Adam(generator.parameters(), 4e-3), []
    for some in torch.arange(400).repeat(8).split(40):
        guess, _ = generator.images({name: tensor[some] for name, tensor in read.items()}, truth=images[some])
        losses.append(F.mse_loss(guess, images[some]))
        adam.zero_grad()
        losses[-1].backward()
        adam.step()
    assert sum(loss.item() for loss in losses[-10:]) < 0.6 * sum(loss.item() for loss in losses[:10])


@pytest.mark.parametrize("model", BUILDERS)
def test_the_flat_mlp_has_as_many_parameters(model: str) -> None:
    found = stages(build(model, SHAPE, 10), SHAPE)
    sizes = [
        sum(parameter.numel() for parameter in kind(found, SHAPE, 32, 64, 32).parameters())
        for kind in (Generator, FlatGenerator)
    ]
    unit = sizes[0] / max(1, sizes[0] // 10_000)
    assert abs(sizes[0] - sizes[1]) < unit + 0.5 * sizes[0]
    assert FlatMLP().width == CoarseGIT().width
    assert not any(parameter.any() for parameter in FlatGenerator(found, SHAPE, 32, 64, 32).bootstrap[-1].parameters())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.GRU(48, 8, batch_first=True), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x.flatten(2).transpose(1, 2).reshape(len(x), -1, 48))[0][:, -1])  # type: ignore[no-any-return]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(768, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(self.conv(x)).flatten(1))  # type: ignore[no-any-return]


class Loose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part, self.fc = nn.Module(), nn.Linear(768, 10)
        self.part.scale = nn.Parameter(torch.ones(768))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1) * self.part.scale)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Recurrent, r"rnn \(GRU\)"),
        (Twice, r"conv \(Conv2d\) runs more than once"),
        (Loose, "part"),
        (lambda: nn.Sequential(nn.Conv2d(3, 10, 16), nn.Flatten()), "does not end in a linear layer"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.Flatten(), nn.Linear(1024, 10)),
            r"0 \(Conv2d\) is not one whose gradient can be read",
        ),
    ],
)
def test_a_layer_that_cannot_be_read_is_named(make: type[nn.Module], said: str) -> None:
    with pytest.raises(FedtapError, match=said):
        stages(make(), SHAPE)


def test_a_network_that_cannot_be_read_is_refused_before_auxiliary() -> None:
    leak = heard()
    same = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.Flatten(), nn.Linear(1024, 10)).to("meta")
    with pytest.raises(FedtapError, match=r"0 \(Conv2d\) is not one whose gradient can be read"):
        CoarseGIT().accepts(dataclasses.replace(leak, network=same))


def test_too_few_pairs_and_batches_without_classes_are_refused(tmp_path: Path) -> None:
    two = heard(batch=2)
    with pytest.raises(FedtapError, match="has one output: use lti"):
        CoarseGIT().accepts(dataclasses.replace(two, protocol=dataclasses.replace(two.protocol, classes=1)))
    with pytest.raises(FedtapError, match=r"at least 40 auxiliary pairs.*and has 20"):
        CoarseGIT().fit(auxiliary_for(heard(), tmp_path, 20))


def test_pixels_may_be_normalised_in_the_network(tmp_path: Path) -> None:
    network = nn.Sequential(Normalise(), nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.Sigmoid(), nn.Flatten())
    network.append(nn.Linear(6 * 64, 10))
    images, labels = pictures(4, 1)
    leak = leak_of(images, labels, network, "own", meta=lambda: network)
    auxiliary = auxiliary_for(leak, tmp_path, 200, network=network)
    assert math.isfinite(error(CoarseGIT(epochs=2).fit(auxiliary)(leak).images, images))


def drift_norm(weights: Tensors, seed: int) -> dict[str, Tensor]:
    """The same weights under other biases."""
    draw = torch.Generator().manual_seed(seed)
    return {n: t + (t.ndim == 1) * 0.1 * torch.randn(t.shape, generator=draw) for n, t in weights.items()}


def auxiliary_along(folder: Path, trainings: int, each: int) -> Auxiliary:
    """Pairs at as many different weights as there were trainings."""
    leak = heard()
    assert leak.weights is not None
    sets = [
        auxiliary_for(dataclasses.replace(leak, weights=drift_norm(leak.weights, k)), folder, each, seed=100 + k)
        for k in range(trainings)
    ]
    about = dataclasses.replace(sets[0].about, pairs=trainings * each, auxiliary_trainings=trainings, digest="along")
    return Auxiliary.record(folder / "along", about, sets[0].network, (pairs for one in sets for pairs in one))


def test_auxiliary_at_drifted_weights_carries_over_to_others(tmp_path: Path) -> None:
    images, labels = pictures(16, 1, seed=7)
    network = build("lenet", SHAPE, 10, seed=1234)
    network.load_state_dict(drift_norm(heard().weights or {}, 99), strict=False)
    leak = leak_of(images, labels, network, "lenet")
    attack = CoarseGIT(width=4, epochs=1, batch=16)
    along, fixed = attack.fit(auxiliary_along(tmp_path, 16, 24)), attack.fit(auxiliary_for(heard(), tmp_path, 384))
    found = along(leak).images
    assert error(found, images) < 0.6 * error(fixed(leak).images, images)
    assert error(found, images) < 0.6 * error(images.mean(0, keepdim=True), images)
    along.save(tmp_path / "along.safetensors")
    assert torch.equal(Saved(str(tmp_path / "along.safetensors"))(leak).images, found)


def test_a_fold_is_answered_by_the_others() -> None:
    draw = torch.Generator().manual_seed(0)
    given, wanted = torch.randn(60, 5, generator=draw), torch.randn(60, 2, generator=draw)
    folds = torch.arange(60) // 12  # as after drift: a training's pairs stay together
    matrices, others = _ridge(given, wanted, folds, (1e-2, 1.0))
    for which, strength in enumerate((1e-2, 1.0)):
        for k in [*range(5), None]:
            rest = given[folds != k].double() if k is not None else given.double()
            answer = wanted[folds != k].double() if k is not None else wanted.double()
            normal = rest.T @ rest
            normal = normal + strength * normal.diagonal().mean() * torch.eye(5)
            plain = torch.linalg.solve(normal, rest.T @ answer).float()
            if k is None:
                torch.testing.assert_close(matrices[which], plain)
            else:
                torch.testing.assert_close(others[folds == k, which], given[folds == k] @ plain)


def test_the_published_chain_has_a_module_a_stage_and_reads_all_gradients() -> None:
    network = build("lenet", SHAPE, 10).to("meta")
    found = stages(network, SHAPE)
    chain = ModuleChain(found, network, 2, 5)
    assert [flat.names for flat in chain.flat] == [
        [f"{layer}.weight", f"{layer}.bias"] for layer in ("fc", "conv3", "conv2", "conv1")
    ]
    outputs = [module[-1].out_features for module in (chain.bootstrap, *chain.modules_back)]
    assert outputs == [2 * math.prod(shape) for shape in ((10,), *(stage.input for stage in reversed(found)))]
    for stage, module, length in zip(reversed(found), chain.modules_back, chain.lengths, strict=True):
        assert module[0].in_features == length + 2 * math.prod(stage.output)


def test_the_published_chain_learns_and_of_shuffled_pairs_nothing() -> None:
    draw = torch.Generator().manual_seed(0)
    network = build("lenet", SHAPE, 10, seed=1234)
    # images of two numbers each, which few pairs suffice to learn
    images = torch.sigmoid(torch.randn(300, 2, generator=draw) @ torch.randn(2, 768, generator=draw))
    found = gradients(network, images.reshape(300, 1, *SHAPE), torch.zeros(300, 1, dtype=torch.long))
    blind = error(images[:280].mean(0), images[280:])

    def held_out_error(truth: Tensor) -> float:
        torch.manual_seed(0)
        chain = ModuleChain(stages(network, SHAPE), network, 1, 32)
        seen = chain.read(found)
        chain.fit_statistics(seen)
        adam = torch.optim.Adam(chain.parameters(), 1e-3)
        constant = torch.optim.lr_scheduler.ConstantLR(adam, 1.0)
        return float(teach(chain, seen, truth[:, None], adam, constant, epochs=8, batch=30, seed=0))

    assert held_out_error(images) < 0.5 * blind
    assert held_out_error(images.roll(1, 0)) > 0.95 * blind


def shuffled(auxiliary: Auxiliary, folder: Path) -> Auxiliary:
    """The same gradients, each beside the images of another pair."""
    about = dataclasses.replace(auxiliary.about, digest="shuffled")
    chunks = (Pairs(pairs.leak, pairs.images.roll(1, 0), pairs.labels.roll(1, 0)) for pairs in auxiliary)
    return Auxiliary.record(folder / "shuffled", about, auxiliary.network, chunks)


def set_error(guess: Tensor, truth: Tensor) -> float:
    """Mean squared error of batches, each in the order that lies closest to the truth."""
    return error(guess.flatten(2), ordered(truth.flatten(2), guess.flatten(2)))


@pytest.mark.parametrize("batch", [4, 8])
def test_batches_come_back_image_by_image_and_of_shuffled_pairs_nothing(batch: int, tmp_path: Path) -> None:
    leak, (images, labels) = heard(victims=16, batch=batch), pictures(16, batch)
    auxiliary = auxiliary_for(leak, tmp_path, 400 // batch)
    found = CoarseGIT(width=4, epochs=1, batch=20).fit(auxiliary)(leak)
    blind = set_error(images.mean((0, 1)).expand_as(images), images)
    assert set_error(found.images, images) < 0.7 * blind
    assert found.images.shape == images.shape
    assert float((found.labels == labels.sort(1).values).float().mean()) > 0.9
    assert set_error(CoarseGIT(epochs=0).fit(shuffled(auxiliary, tmp_path))(leak).images, images) > blind


@pytest.mark.parametrize("batch", [4, 8])
@pytest.mark.parametrize("attack", [LTI(width=8, epochs=1), CoarseGIT(published=True, units=8, epochs=1)])
def test_perceptrons_give_a_batch_of_images(attack: Learner, batch: int, tmp_path: Path) -> None:
    leak = heard(batch=batch)
    made = attack.fit(auxiliary_for(leak, tmp_path, 40))
    found = made(leak)
    assert found.images.shape == (4, batch, *SHAPE)
    made.save(tmp_path / "made.safetensors")
    assert torch.equal(Saved(str(tmp_path / "made.safetensors"))(leak).images, found.images)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(0, 10**6))
def test_the_assignment_is_the_best_of_all_permutations(batch: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    truth, predicted = (torch.rand(3, batch, 4, generator=draw) for _ in range(2))
    for some, guess, found in zip(truth, predicted, ordered(truth, predicted), strict=True):
        losses = [F.mse_loss(guess, some[list(order)]) for order in itertools.permutations(range(batch))]
        torch.testing.assert_close(F.mse_loss(guess, found), torch.stack(losses).min())
        torch.testing.assert_close(found.sort(0).values, some.sort(0).values)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(0, 10**6))
def test_rows_of_a_batch_are_exact_where_its_images_have_one_softmax(batch: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    classes, features = 10, 7
    labels = torch.randint(classes, (2, batch), generator=draw).sort(1).values
    softmax = torch.rand(2, classes, generator=draw).add(0.1)
    softmax = softmax / softmax.sum(1, keepdim=True)
    inputs = torch.rand(2, batch, features, generator=draw)
    signals = softmax[:, None] - F.one_hot(labels, classes)
    gradient = torch.einsum("vbc,vbf->vcf", signals, inputs) / batch
    errors, rows = image_rows(signals.mean(1), gradient, labels)
    torch.testing.assert_close(errors, signals, rtol=1e-4, atol=1e-5)
    named = F.one_hot(labels, classes).float()
    alike = named @ named.mT  # images of one class have the mean of their inputs
    torch.testing.assert_close(rows, alike @ inputs / alike.sum(2, keepdim=True), rtol=1e-2, atol=1e-3)


def test_patches_of_a_transformer_are_exact_without_its_weights(tmp_path: Path) -> None:
    leak, (images, _) = heard("vit"), pictures(4, 1)
    auxiliary = auxiliary_for(leak, tmp_path, 60)
    made = CoarseGIT(epochs=0).fit(auxiliary)
    found = made(dataclasses.replace(leak, weights=None, buffers={})).images
    assert error(found, images) < 1e-6
    # gradients of the positions that are another image's explain nothing
    other = heard("vit", seed=3).observed["position"]
    mixed = dataclasses.replace(leak, observed={**leak.observed, "position": other})
    assert error(made(mixed).images, images) > 0.5 * error(images.mean(0, keepdim=True), images)


def test_patches_are_left_alone_where_positions_are_no_error_signals() -> None:
    draw = torch.Generator().manual_seed(0)
    gradients = {"e": torch.randn(30, 6, 3, 4, 4, generator=draw), "p": torch.randn(30, 1, 16, 6, generator=draw)}
    images, starts = torch.rand(30, 768, generator=draw), torch.full((30, 768), 0.5)
    patches = PatchSolution("e", "p", (4, 4), SHAPE)
    patches.fit(gradients, images, starts)
    assert torch.equal(patches(gradients, starts), starts)


def channel_means(images: Tensor) -> tuple[ChannelMeans, Tensors, Tensor]:
    """Of a convolution before a norm, whose weighted means tell the images, with error signals of any sign and size."""
    draw = torch.Generator().manual_seed(1)
    beta = torch.randn(len(images), 6, generator=draw) * torch.rand(len(images), 1, generator=draw)
    told = images @ torch.randn(12, 6 * 18, generator=draw)
    found = {"conv": (beta[:, :, None] * told.unflatten(1, (6, 18))).unflatten(2, (2, 3, 3)), "norm": beta}
    means = ChannelMeans([("conv", "norm", (6, 2, 3, 3))], 3, 12)
    return means, found, torch.zeros(len(images), 3)


def test_channel_means_see_images_whatever_the_error_signals_are() -> None:
    images = torch.rand(200, 12, generator=torch.Generator().manual_seed(0))
    means, found, features = channel_means(images)
    folds, grey = torch.arange(200) % 5, images.mean(0).expand_as(images)
    without = means.fit(found, features, images, folds, grey)
    assert error(without, images) < 0.5 * error(grey, images)
    assert error(means(found, features, grey), images) <= error(without, images)
    flipped = {name: tensor * -3.0 for name, tensor in found.items()}
    torch.testing.assert_close(means.read(flipped, features), means.read(found, features))


def test_channel_means_are_left_alone_where_they_tell_nothing() -> None:
    images = torch.rand(100, 12, generator=torch.Generator().manual_seed(0))
    means, found, features = channel_means(images)
    others, grey = images.roll(1, 0), images.mean(0).expand_as(images)
    assert means.fit(found, features, others, torch.arange(100) % 5, grey) is grey
    assert means(found, features, grey) is grey


def test_the_norm_after_a_convolution_is_found() -> None:
    leaves = [leaf for stage in stages(build("resnet20", SHAPE, 10), SHAPE) for leaf in stage.leaves]
    norms = {leaf.weight: leaf.norm for leaf in leaves}
    assert norms["conv1.weight"] == "bn1.bias"
    assert norms["layer3.2.conv2.weight"] == "layer3.2.bn2.bias"
    assert norms["linear.weight"] is None
    assert all(leaf.norm is None for stage in stages(build("lenet", SHAPE, 10), SHAPE) for leaf in stage.leaves)
