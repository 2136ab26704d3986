"""Attention outputs: the Jacobian, Newton's method on it, and what split learning clients give away."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fedtap.attackers.activations.attention_descent import AttentionDescent
from fedtap.attackers.activations.attention_newton import AttentionNewton
from fedtap.attackers.activations.block import Dense, Products, block_of, nearest_embeddings
from fedtap.scenarios.activations import attention, attention_vit
from fedtap.scenarios.activations.attention_report import found, order, reached
from fedtap.scenarios.activations.split import SplitLearning
from fedtap.simulator.attack import Attack, Inputs
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import AttentionLeak, Leak, Protocol
from fedtap.simulator.models.attention import (
    AROUND,
    HALVES,
    Attention,
    Patches,
    Words,
    first_attention,
    joined,
    patches_of,
)
from fedtap.simulator.models.registry import ViT, build
from fedtap.simulator.options import options_of
from fedtap.simulator.scenario import Observed, Row
from fedtap.simulator.scores import mse, psnr, relative_error
from tests.support.played import no_attack_runs, planned, play, reconstructions, untimed


def block_with(d: int, heads: int, seed: int = 0, columns: int = 0, **around: object) -> Attention:
    """A block in double precision, biases and norms away from their defaults too."""
    block = Attention(d, heads, columns, **around).double()  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(seed)
    block.reset_parameters(draw)
    for name, parameter in block.named_parameters():
        if name.endswith("bias") or "before" in name or "after" in name:
            nn.init.normal_(parameter, 1.0, 0.3, generator=draw)
    return block


def leak_of(network: nn.Module, x: Tensor) -> AttentionLeak:
    """What clients with these inputs send."""
    victims, n, d = x.shape
    with torch.no_grad():
        output = network(x)
    return AttentionLeak(
        observed={"output": output},
        protocol=Protocol(model="attention", shape=(n, d), classes=1, batch=1),
        network=_bare(network),
        weights={name: weight.detach().clone() for name, weight in network.named_parameters()},
        buffers={},
        clients=torch.arange(victims),
        rounds=torch.ones(victims, dtype=torch.long),
        restarts=torch.zeros(victims, dtype=torch.long),
    )


def _bare(network: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(network).to("meta")


def tokens(victims: int, n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(victims, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def near(x: Tensor, off: float, seed: int = 9) -> Tensor:
    way = tokens(*x.shape, seed=seed)
    return x + off * way * (x.flatten(1).norm(dim=1) / way.flatten(1).norm(dim=1))[:, None, None]


def patches_with(tokens: int, pixels: int, width: int) -> Patches:
    patches = Patches(tokens, pixels, block_with(width, 2, 0, 3, residual=True, project=True, norm="before", bias=True))
    patches = patches.double()
    for parameter in (patches.position, patches.embed.weight, patches.embed.bias):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    return patches


EVERY = {name: lambda around=around: block_with(6, 2, **around) for name, around in AROUND.items()} | {
    "one head": lambda: block_with(6, 1),
    "three columns, biases": lambda: block_with(6, 3, columns=3, bias=True),
    "all of it, biases": lambda: block_with(6, 2, columns=3, residual=True, project=True, norm="after", bias=True),
    "no residual, after": lambda: block_with(6, 2, norm="after"),
    "pixels": lambda: patches_with(5, 6, 8),
}


@pytest.mark.parametrize("name", EVERY)
def test_the_jacobian_is_that_of_finite_differences_and_of_autograd(name: str) -> None:
    network, x = EVERY[name](), tokens(2, 5, 6)
    leak = leak_of(network, x)
    block = block_of(leak)
    out, slope = block.linearised(x)
    torch.testing.assert_close(out, leak.observed["output"])  # the client's own forward pass
    torch.testing.assert_close(block(x), out)
    step = 1e-5
    for lane in range(2):
        slow = torch.autograd.functional.jacobian(lambda x: network(x[None])[0], x[lane])  # type: ignore[no-untyped-call]
        assert float((slope[lane] - slow.reshape(slope[lane].shape)).abs().max()) < 1e-12
        for number in range(30):
            way = F.one_hot(torch.tensor(number), 30).double().reshape(1, 5, 6)
            there, back = (block(x[lane : lane + 1] + sign * step * way) for sign in (1, -1))
            assert float((slope[lane][:, number] - ((there - back) / (2 * step)).flatten()).abs().max()) < 1e-6


@given(n=st.integers(1, 6), d=st.integers(2, 6), heads=st.integers(1, 3), lanes=st.integers(1, 3), data=st.data())
@settings(max_examples=10, deadline=None)
def test_products_and_steps_are_those_of_the_jacobian(
    n: int, d: int, heads: int, lanes: int, data: st.DataObject
) -> None:
    around = AROUND[data.draw(st.sampled_from(sorted(AROUND)))]
    x = tokens(lanes, n, d)
    block = block_of(leak_of(block_with(d, heads, **around), x))
    dense, products = Dense(block, x), Products(block, x)
    v, r = tokens(lanes, n, d, seed=1).flatten(1), torch.randn_like(dense.out.flatten(1))
    torch.testing.assert_close(products.times(v), dense.times(v), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(products.transposed_times(r), dense.transposed_times(r), atol=1e-9, rtol=1e-9)
    added = torch.full((lanes,), 0.5, dtype=torch.float64)
    slow = torch.linalg.solve(dense.jacobian.mT @ dense.jacobian + 0.5 * torch.eye(n * d), v)
    torch.testing.assert_close(dense.solve(v, added), slow, atol=1e-9, rtol=1e-9)
    assert float((products.solve(v, added) - slow).norm() / slow.norm()) < 1e-3


def test_the_block_is_that_of_pytorch() -> None:
    """`MultiheadAttention` has biases, scale and projection; `scaled_dot_product_attention` is the heads alone."""
    block, x = block_with(8, 4, columns=2, project=True, scaled=True, bias=True), tokens(3, 5, 8)
    theirs = nn.MultiheadAttention(8, 4, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([layer.weight for layer in (block.query, block.key, block.value)]))
        theirs.in_proj_bias.copy_(torch.cat([layer.bias for layer in (block.query, block.key, block.value)]))
        assert block.project is not None
        theirs.out_proj.load_state_dict(block.project.state_dict())
        torch.testing.assert_close(block(x), theirs(x, x, x, need_weights=False)[0])
    plain = block_with(8, 2)
    heads = [layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (plain.query, plain.key, plain.value)]
    mixed = F.scaled_dot_product_attention(*heads, scale=1.0).transpose(1, 2).flatten(2)
    torch.testing.assert_close(plain(x), mixed)


def test_newton_finds_the_input_of_four_heads_in_a_few_quadratic_steps() -> None:
    x = tokens(20, 8, 8)
    leak, start = leak_of(block_with(8, 4), x), near(x, 0.1)
    errors = [relative_error(start, x)]
    for steps in range(1, 11):
        guess = AttentionNewton(steps=steps)(leak, start=start)
        errors.append(relative_error(guess.values, x))
    assert float((errors[-1] < 1e-6).double().mean()) >= 0.95
    assert bool(guess.converged.all())
    paths = [list(enumerate(path)) for path in torch.stack(errors).T.tolist()]
    assert order(paths) >= 1.8  # type: ignore[operator]
    for path in paths:
        last, first = reached(path, 1e-10), reached(path, 1e-2)
        assert last is not None
        assert first is not None
        assert last - first <= 8  # a step a decade, at most
    assert float(guess.objective.max()) < 1e-20


def test_victims_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    x = tokens(5, 4, 4)
    leak, start = leak_of(block_with(4, 2), x), near(x, 0.3)
    together = AttentionNewton()(leak, start=start)
    for victim in range(5):
        alone = AttentionNewton()(leak[victim], start=start[victim : victim + 1])
        torch.testing.assert_close(alone.values[0], together.values[victim], rtol=1e-6, atol=1e-8)
        assert int(alone.iterations[0]) == int(together.iterations[victim])
    monkeypatch.setattr("fedtap.attackers.activations.attention_newton.ENTRIES", 1)  # then one at a time, however large
    torch.testing.assert_close(AttentionNewton()(leak, start=start).values, together.values, rtol=1e-6, atol=1e-8)


def test_a_solver_in_products_ends_where_the_dense_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    x = tokens(2, 6, 6)
    leak, start = leak_of(block_with(6, 4), x), near(x, 0.1)
    dense = AttentionNewton()(leak, start=start)
    monkeypatch.setattr("fedtap.attackers.activations.attention_newton.DENSE", 1)
    products = AttentionNewton()(leak, start=start)
    torch.testing.assert_close(products.values, dense.values, rtol=1e-7, atol=1e-9)


def test_one_head_has_other_inputs_with_the_same_output() -> None:
    """A residual of zero is no proof: one head has as many equations as unknowns, and more than one solution."""
    x = tokens(40, 4, 4)
    leak, start = leak_of(block_with(4, 1), x), near(x, 0.5)
    guess = AttentionNewton()(leak, start=start)
    matched = relative_error(block_of(leak)(guess.values), leak.observed["output"]) < 1e-9
    errors = relative_error(guess.values, x)
    assert bool((matched & (errors > 0.1)).any())
    assert bool((matched & (errors < 1e-4)).any())


def test_the_regulariser_moves_the_minimum_and_one_heads_far_more() -> None:
    x = tokens(10, 8, 8)
    medians = {}
    for heads in (1, 4):
        leak, start = leak_of(block_with(8, heads), x), near(x, 0.05)
        for gamma in (0.0, 1e-6):
            medians[heads, gamma] = float(
                relative_error(AttentionNewton(gamma=gamma)(leak, start=start).values, x).median()
            )
    assert medians[4, 0.0] < 1e-12
    assert 1e-7 < medians[4, 1e-6] < 1e-5
    assert medians[1, 1e-6] > 100 * medians[4, 1e-6]


def test_restarts_keep_the_lowest_loss_and_need_no_truth() -> None:
    x = tokens(3, 6, 6)
    leak = leak_of(block_with(6, 4), x)
    one, many = AttentionNewton()(leak, seed=1), AttentionNewton(restarts=8)(leak, seed=1)
    assert bool((many.objective <= one.objective).all())
    assert float((relative_error(many.values, x) < 1e-6).double().mean()) == 1.0


@pytest.mark.parametrize("attack", [AttentionNewton(steps=30), AttentionDescent(steps=40)], ids=repr)
def test_a_strangers_output_gives_a_stranger_and_a_run_repeats_itself(
    attack: AttentionNewton | AttentionDescent,
) -> None:
    x = tokens(6, 6, 6)
    leak = leak_of(block_with(6, 4), x)
    one, two = attack(leak, seed=3), attack(leak, seed=3)
    start = near(x, 0.1)
    attack(leak, start=start)
    assert torch.equal(start, near(x, 0.1))
    assert torch.equal(one.values, two.values)
    others = leak[torch.arange(6).roll(1)]
    theirs = attack(others, start=near(x, 0.1))
    assert float(relative_error(theirs.values, x).median()) > 0.5
    mine = attack(leak, start=near(x, 0.1))
    assert float(relative_error(mine.values, x).median()) < 0.1


def test_descent_lowers_the_loss_and_is_far_behind() -> None:
    x = tokens(4, 4, 4)
    leak, start = leak_of(block_with(4, 4), x), near(x, 0.1)
    begin = (block_of(leak)(start) - leak.observed["output"]).flatten(1).square().sum(1)
    slow, fast = AttentionDescent(steps=50)(leak, start=start), AttentionNewton(steps=10)(leak, start=start)
    assert bool((slow.objective < begin).all())
    assert bool((relative_error(slow.values, x) > 1e3 * relative_error(fast.values, x)).all())


def test_whole_steps_lead_one_head_astray_where_damped_ones_do_not() -> None:
    x = tokens(20, 8, 8)
    leak, start = leak_of(block_with(8, 1), x), near(x, 0.2)
    damped, whole = (AttentionNewton(damped=damped)(leak, start=start) for damped in (True, False))
    shares = [float((relative_error(guess.values, x) < 1e-6).double().mean()) for guess in (damped, whole)]
    assert shares[0] > shares[1] + 0.3


def test_words_come_back_whole_from_the_output_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    network = Words(300, block_with(8, 4, **AROUND["gpt"]), draw)
    words = torch.randint(300, (4, 8), generator=draw)
    leak = leak_of(network, network.embedded(words))
    guess = AttentionNewton()(leak, seed=0)
    assert torch.equal(nearest_embeddings(block_of(leak), guess.values, network.table.detach()), words)
    with pytest.raises(FedtapError, match="Token 300 is outside the vocabulary of 300 words"):
        network.embedded(torch.tensor([[3, 300]]))
    with pytest.raises(FedtapError, match="Token -1 is outside"):
        network.embedded(torch.tensor([-1]))


def test_where_norm_hides_scale_and_mean_a_word_is_told_by_the_rest() -> None:
    draw = torch.Generator().manual_seed(0)
    network = Words(50, block_with(8, 4, norm="before"), draw)
    x = network.embedded(torch.randint(50, (2, 8), generator=draw))
    block = block_of(leak_of(network, x))
    drift_norm = 3 * x + 1
    torch.testing.assert_close(block(drift_norm), block(x), atol=1e-4, rtol=1e-4)  # LayerNorm's eps is all that differs
    assert torch.equal(
        nearest_embeddings(block, drift_norm, network.table.detach()),
        nearest_embeddings(block, x, network.table.detach()),
    )


def test_patches_are_cut_and_joined_and_the_cut_model_is_the_models_first_part() -> None:
    vit = build("vit", (3, 16, 16), 10, seed=5).eval()
    assert isinstance(vit, ViT)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(joined(patches_of(images, 2, 2), (3, 16, 16), 2, 2), images)
    unfolded = F.unfold(images, 2, stride=2).transpose(1, 2)
    assert torch.equal(patches_of(images, 2, 2), unfolded)
    heard: list[Tensor] = []
    vit.blocks[0].norm2.register_forward_pre_hook(lambda module, given: heard.append(given[0]))  # type: ignore[union-attr]
    with torch.no_grad():
        vit(images)
        torch.testing.assert_close(first_attention(vit)(patches_of(images, 2, 2)), heard[0], atol=1e-5, rtol=1e-4)
        tokens = vit.embed(vit.normalise(images)).flatten(2).transpose(1, 2) + vit.position
        own = first_attention(vit, residual=False)(patches_of(images, 2, 2))
        torch.testing.assert_close(own + tokens, heard[0], atol=1e-5, rtol=1e-4)


def test_a_photograph_comes_back_from_grey(tmp_path: Path) -> None:
    vit = build("vit", (1, 16, 16), 10, seed=5).eval()
    assert isinstance(vit, ViT)
    images = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    leak = leak_of(first_attention(vit), patches_of(images, 2, 2))
    guess = AttentionNewton(steps=10)(leak)
    found = joined(guess.values.float(), (1, 16, 16), 2, 2)
    assert bool((psnr(mse(found, images)) > 50).all())
    assert bool((psnr(mse(found.roll(1, dims=0), images)) < 15).all())


def played(tmp_path: Path, name: str, **options: object) -> list[Row]:
    return planned(name, options, tmp_path / "out")


def test_the_scenario_says_how_often_and_how_fast(tmp_path: Path) -> None:
    rows = played(tmp_path, "attention", n=3, d=3, victims=2, start_near_truth="0.05,0.1", vocabulary=20)
    wanted = {"relative_error", "iterations", "converged", "residual", "condition", "tokens_right", "blind", "heads"}
    assert all(wanted <= row.keys() for row in rows)
    assert [(row["heads"], row["start_error"]) for row in rows] == [(4, 0.05)] * 2 + [(4, 0.1)] * 2
    assert found(rows) == found(rows, steps=10) == 1.0
    assert {row["tokens_right"] for row in rows} == {1.0}
    page = (tmp_path / "out/report.html").read_text()
    for heading in ("How often, and how fast", "Error after each step", "Against the start&#x27;s distance"):
        assert heading in page


@pytest.mark.parametrize("attack", ["attention_newton", "attention_descent(steps=30)"])
def test_the_errors_path_begins_at_the_start(tmp_path: Path, attack: str) -> None:
    for row in played(tmp_path, "attention", n=3, d=3, victims=2, start_near_truth=0.1, attack=attack):
        steps, errors = zip(*row["path"], strict=True)
        assert errors[0] == pytest.approx(0.1)
        assert errors[-1] == row["relative_error"]
        assert list(steps) == sorted(set(steps))


def test_noise_comes_back_as_error_and_differs_by_client(tmp_path: Path) -> None:
    errors = [row["relative_error"] for row in played(tmp_path, "attention", n=4, d=4, victims=4, noise=1e-3)]
    assert all(1e-5 < error < 1e-1 for error in errors)
    assert len(set(errors)) == 4


@dataclasses.dataclass(frozen=True)
class Plain(Attack[Inputs]):
    """Brings back its start, without a regulariser."""

    leaks = (AttentionLeak,)
    reconstructs = Inputs

    def reconstruct(self, leak: Leak, start: Tensor) -> Inputs:
        steps = torch.zeros(len(leak), dtype=torch.long)
        return Inputs(start, steps.double(), steps, steps.bool())


def test_gamma_of_the_scenario_is_that_of_its_attacks() -> None:
    setting = attention.Attention(gamma=0.01)
    assert setting.attacks == attention.Attention(attack="attention_newton(gamma=0.01)").attacks
    row = setting.settled(setting.attacks[0], "", Observed(None))
    assert (row["gamma"], row["attack"]) == (0.01, "attention_newton")  # as it is written on the command line
    with pytest.raises(FedtapError, match="has no regulariser that --gamma could weigh"):
        attention.Attention(gamma=0.01, attack=f"{__name__}:Plain")


def test_an_attack_of_a_users_own_is_scored_as_any(tmp_path: Path) -> None:
    rows = played(tmp_path, "attention", n=3, d=3, victims=2, start_near_truth=0.5, attack=f"{__name__}:Plain")
    assert [row["relative_error"] for row in rows] == pytest.approx([0.5] * 2)
    assert [(row["gamma"], row["path"]) for row in rows] == [(None, [])] * 2


PLAYED: dict[str, dict[str, object]] = {
    "attention": {"n": 3, "d": 3, "victims": 3, "attack": "attention_newton,attention_descent(steps=20)"},
    "attention_vit": {"size": 8, "victims": 3, "attack": "attention_newton(steps=2),attention_descent(steps=2)"},
}


@pytest.mark.parametrize("name", PLAYED)
def test_a_resumed_run_makes_only_the_attack_that_is_missing(name: str, tmp_path: Path) -> None:
    before = played(tmp_path, name, **PLAYED[name])
    pictures = (tmp_path / "out/report.html").read_text().count("<img")
    (lost,) = (tmp_path / "out/reconstructions").glob("part_0-1-*")
    lost.unlink()
    with no_attack_runs(AttentionNewton):
        again = planned(name, PLAYED[name], tmp_path / "out", resume=True)
    assert again[:3] == before[:3]
    assert untimed(again) == untimed(before)
    assert lost.is_file()
    assert (tmp_path / "out/report.html").read_text().count("<img") == pictures


@pytest.mark.parametrize("name", PLAYED)
def test_no_attack_on_a_block_is_helped_by_the_truth(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scorer is given another client's truth: the scores change, and not one bit of what came back."""
    options = PLAYED[name] | ({"start_near_truth": 0} if name == "attention" else {})
    honest = played(tmp_path / "honest", name, **options)
    truth = SplitLearning.truth
    monkeypatch.setattr(SplitLearning, "truth", lambda *given: truth(*given).roll(1, dims=0))
    deceived = played(tmp_path / "deceived", name, **options)
    one, other = (reconstructions(tmp_path / which / "out") for which in ("honest", "deceived"))
    assert one.keys() == other.keys()
    assert len(one) == 2
    for file, tensors in one.items():
        assert all(torch.equal(tensor, other[file][key]) for key, tensor in tensors.items())
    assert all(row["relative_error"] != lied["relative_error"] for row, lied in zip(honest, deceived, strict=True))
    assert [row["objective"] for row in honest] == [row["objective"] for row in deceived]


def test_choices_are_those_that_the_models_know() -> None:
    assert options_of(attention.Attention)["around"].choices == tuple(AROUND)
    cuts = {f"vit(cut={cut!r})" for cut in options_of(attention_vit.AttentionViT)["cut"].choices}
    assert cuts == set(HALVES)


@pytest.mark.parametrize("size", [(16, 16), (32, 16), (24, 40), (4, 8)])
def test_a_vit_cuts_an_image_into_eight_patches_a_side(size: tuple[int, int]) -> None:
    network = build("vit", (3, *size), 10, seed=0)
    assert network.position.shape[1] == min(size[0], 8) * min(size[1], 8)  # type: ignore[union-attr]
    assert network(torch.rand(2, 3, *size)).shape == (2, 10)


def test_the_vit_scenario_leaves_a_strip_of_pictures(tmp_path: Path) -> None:
    rows = played(tmp_path, "attention_vit", victims=2, size=8, attack="attention_newton(steps=6)")
    assert all(row["psnr"] > row["psnr_blind"] + 20 for row in rows)
    assert all(row["psnr_negative_control"] < row["psnr"] - 20 for row in rows)
    assert (tmp_path / "out/strip.png").stat().st_size > 1000


def test_the_inputs_shape_is_told_without_an_input(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = attention_vit.AttentionViT(size=16)
    shape = tuple(setting.private(0, Path("data")).shape)
    monkeypatch.setattr(attention_vit.AttentionViT, "private", lambda *_: pytest.fail("it is private"))
    assert setting.shape(Path("data")) == shape


@dataclasses.dataclass(frozen=True)
class Odd(attention.Attention):
    sent: str = "wide"

    def reply(self, message: Message, context: Context, data_root: Path) -> Message:
        output = torch.zeros(4, 17 if self.sent == "wide" else 16, dtype=torch.float64)
        output = output + (torch.nan if self.sent == "nan" else 0)
        records = {"attention": ArrayRecord({"output": output})} if self.sent != "nothing" else {}
        metrics = MetricRecord({"partition": int(context.node_config["partition-id"])})
        return Message(RecordDict(records | {"metrics": metrics}), reply_to=message)


@pytest.mark.parametrize(("sent", "said"), [("wide", "shape"), ("nan", "NaN"), ("nothing", "missing output")])
def test_an_output_of_another_shape_and_other_nonsense_is_refused(sent: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(FedtapError, match=said):
        play([Odd(n=4, d=4, victims=2, name="attention", sent=sent)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_start_that_is_no_number_or_of_another_shape_is_refused() -> None:
    x = tokens(2, 4, 4)
    leak = leak_of(block_with(4, 2), x)
    broken = x.clone()
    broken[1, 2, 3] = torch.nan
    for attack in (AttentionNewton(), AttentionDescent()):
        with pytest.raises(FedtapError, match="start holds NaN"):
            attack(leak, start=broken)
        with pytest.raises(FedtapError, match="start has shape"):
            attack(leak, start=x[:1])
        with pytest.raises(FedtapError, match="works on a AttentionLeak"):
            attack(other_kind(leak))
        with pytest.raises(FedtapError, match="does not know them"):
            attack(dataclasses.replace(leak, weights=None))


def other_kind(leak: Leak) -> Leak:
    class OtherLeak(Leak):
        kind = "no_attention"

    return OtherLeak(**{field.name: getattr(leak, field.name) for field in dataclasses.fields(leak)})


def test_blocks_that_are_not_ours_and_attacks_on_other_leaks_are_refused() -> None:
    x = tokens(1, 4, 4)
    foreign = leak_of(nn.Linear(4, 4).double(), x)
    with pytest.raises(FedtapError, match=r"no block of fedtap\.simulator\.models\.attention"):
        AttentionNewton()(foreign)
    with pytest.raises(FedtapError, match="looks for no attention block's input"):
        attention.Attention(attack="idlg")
    with pytest.raises(FedtapError, match="looks for no attention block's input"):
        attention_vit.AttentionViT(attack="attention_newton,linear")
    with pytest.raises(FedtapError, match="one word"):
        attention.Attention(vocabulary=1)
    with pytest.raises(FedtapError, match="lower --victims"):
        attention_vit.AttentionViT(victims=999).dataset_at(Path("data"))
    assert AttentionNewton.reconstructs is Inputs
