"""FineXtract and its baselines: identities with samples that are drawn by hand, captions, and what they refuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtap.attackers import parse
from fedtap.attackers.checkpoints import captions, finextract, sampling
from fedtap.attackers.checkpoints.captions import caption_of
from fedtap.attackers.checkpoints.direct_sampling import DirectSampling
from fedtap.attackers.checkpoints.finextract import FineXtract
from fedtap.attackers.checkpoints.guided_sampling import GuidedSampling
from fedtap.attackers.checkpoints.loss_drop import LossDrop
from fedtap.attackers.checkpoints.sampling import Ends
from fedtap.simulator.attack import generator
from fedtap.simulator.data.captions import BLANK, FRAMES, NOUNS, filled_in
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.extraction import Extraction, Extractor
from fedtap.simulator.leaks import CheckpointLeak, load
from fedtap.simulator.models.adapters import Lora, inject
from fedtap.simulator.models.attention import architecture
from fedtap.simulator.models.copy_detection import BASELINE, encoder, similarity
from fedtap.simulator.models.diffusion import Denoiser, denoiser
from fedtap.simulator.models.diffusion_training import DiffusionTraining
from tests.support import checkpoint_leaks
from tests.support.diffusion import (
    CAPTION,
    LORA,
    PRIVATE,
    SIDE,
    around,
    base,
    held,
    installed,
    leak_of,
    leak_on,
    moved,
    pictures,
    tiny,
    tuned,
)

SAMPLES, STEPS = 2, 3
SMALL: dict[str, Any] = {"samples": SAMPLES, "steps": STEPS, "encoder": BASELINE}
ADAPTERS = pytest.mark.parametrize("adapter", ["", LORA], ids=["full", "lora"])

Prediction = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _installed() -> None:
    installed()


@pytest.fixture
def every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """All samples come back, and not one of each cluster."""
    monkeypatch.setattr(
        sampling,
        "cliques",
        lambda features, many: SimpleNamespace(medoids=list(range(len(features))), threshold=1.0),
    )


@cache
def leak(adapter: str = "", victims: int = 1) -> CheckpointLeak:
    return leak_of([moved(adapter, seed=seed) for seed in range(victims)], adapter)


def tuned_by_hand(adapter: str, seed: int = 0) -> Denoiser:
    """The model that came back; a LoRA stands beside its layers, and is not merged into them."""
    net = inject(base(), Lora.parse(adapter), 3) if adapter else denoiser(tiny(), 0)
    parameters = dict(net.named_parameters())
    for name, tensor in moved(adapter, seed=seed).items():
        inside = name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
        parameters[inside].data.copy_(tensor)
    return net.eval()


def under(net: Denoiser, caption: str) -> Prediction:
    said = around().condition([caption])

    def predicted(noisy: Tensor, step: Tensor) -> Tensor:
        with torch.no_grad():
            return net(noisy, step, said.expand(len(noisy), -1, -1))

    return predicted


def by_hand(predicted: Prediction, victim: int = 0, seed: int = 0, many: int = SAMPLES * PRIVATE) -> Tensor:
    """Samples in [0, 1], by diffusers' own loop."""
    scheduler = installed().DDIMScheduler(1000, beta_schedule="squaredcos_cap_v2")
    scheduler.set_timesteps(STEPS)
    draw = torch.Generator().manual_seed(generator(seed, victim, 1).initial_seed())
    x = torch.randn(many, 3, SIDE, SIDE, generator=draw)
    for step in scheduler.timesteps:
        x = scheduler.step(predicted(x, step), step, x).prev_sample
    return (x / 2 + 0.5).clamp(0, 1)


def assert_drawn(found: Extraction, wanted: Tensor, victim: int = 0) -> None:
    """To 1e-4, of samples that are no mere extremes."""
    inner = ((wanted > 0.01) & (wanted < 0.99)).double().mean()
    assert float(inner) > 0.3
    torch.testing.assert_close(found.images[victim], wanted, rtol=0, atol=1e-4)
    assert int((found.samples[victim].int() - (255 * wanted).round().int()).abs().max()) <= 1


# Identities.


@pytest.mark.usefixtures("every_sample")
@ADAPTERS
def test_w_1_samples_from_the_tuned_model(adapter: str) -> None:
    found, direct = FineXtract(1.0, 0.0, **SMALL)(leak(adapter)), DirectSampling(**SMALL)(leak(adapter))
    wanted = by_hand(under(tuned_by_hand(adapter), CAPTION))
    torch.testing.assert_close(found.images, direct.images, rtol=0, atol=1e-4)
    assert_drawn(found, wanted)
    assert_drawn(direct, wanted)
    assert (found.guidance, direct.guidance) == (({"w": 1.0, "k": 0.0},), ({},))
    assert found.captions == direct.captions == (CAPTION,)


@pytest.mark.usefixtures("every_sample")
@ADAPTERS
def test_w_0_samples_from_the_broadcast_model(adapter: str) -> None:
    found = FineXtract(0.0, 0.0, **SMALL)(leak(adapter))
    assert_drawn(found, by_hand(under(base(), "")))
    assert (
        float((found.images - DirectSampling(**SMALL)(leak(adapter)).images).abs().max()) > 0.01
    )  # a hundred times what counts as equal


@pytest.mark.usefixtures("every_sample")
@ADAPTERS
def test_without_a_caption_w_1_samples_from_the_tuned_model_without_one(adapter: str) -> None:
    found = FineXtract(1.0, 0.5, "unconditional", **SMALL)(leak(adapter))
    assert_drawn(found, by_hand(under(tuned_by_hand(adapter), "")))
    assert found.guidance == ({"w": 1.0, "k": 0.0},)  # k is of the conditional one


@pytest.mark.usefixtures("every_sample")
@ADAPTERS
def test_classifier_free_guidance_of_1_is_direct_sampling(adapter: str) -> None:
    guided, direct = GuidedSampling(1.0, **SMALL)(leak(adapter)), DirectSampling(**SMALL)(leak(adapter))
    torch.testing.assert_close(guided.images, direct.images, rtol=0, atol=1e-4)
    without = GuidedSampling(0.0, **SMALL)(leak(adapter))
    assert_drawn(without, by_hand(under(tuned_by_hand(adapter), "")))
    assert guided.guidance == ({"w": 1.0},)


@pytest.mark.usefixtures("every_sample")
@ADAPTERS
def test_guidance_is_the_papers_formula(adapter: str) -> None:
    tuned = tuned_by_hand(adapter)
    null, told, null_tuned = under(base(), ""), under(tuned, CAPTION), under(tuned, "")

    def conditional(x: Tensor, step: Tensor) -> Tensor:  # ε(∅) + w' (ε'(c) - ε(∅)) + k ε(∅)
        return null(x, step) + 1.7 * (told(x, step) - null(x, step)) - 0.02 * null(x, step)

    def unconditional(x: Tensor, step: Tensor) -> Tensor:  # ε + w (ε' - ε)
        return null(x, step) + 1.7 * (null_tuned(x, step) - null(x, step))

    def classifier_free(x: Tensor, step: Tensor) -> Tensor:  # ε'(∅) + w (ε'(c) - ε'(∅))
        return null_tuned(x, step) + 1.7 * (told(x, step) - null_tuned(x, step))

    assert_drawn(FineXtract(1.7, -0.02, **SMALL)(leak(adapter)), by_hand(conditional))
    assert_drawn(FineXtract(1.7, -0.02, "unconditional", **SMALL)(leak(adapter)), by_hand(unconditional))
    assert_drawn(GuidedSampling(1.7, **SMALL)(leak(adapter)), by_hand(classifier_free))


@pytest.mark.usefixtures("every_sample")
@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
def test_a_model_that_came_back_as_it_was_gives_nothing_but_itself(w: float) -> None:
    """The negative control: nothing is extrapolated, and with a caption it is guided by the caption alone."""
    unmoved = leak_of([held(base())])
    assert_drawn(FineXtract(w, 0.0, "unconditional", **SMALL)(unmoved), by_hand(under(base(), "")))
    found, guided = FineXtract(w, 0.0, **SMALL)(unmoved), GuidedSampling(w, **SMALL)(unmoved)
    torch.testing.assert_close(found.images, guided.images, rtol=0, atol=1e-4)


# Victims, seeds and starts.

ATTACKS: tuple[Extractor, ...] = (
    FineXtract(2.0, **SMALL),
    FineXtract(2.0, guidance="unconditional", **SMALL),
    GuidedSampling(**SMALL),
    DirectSampling(**SMALL),
)


@pytest.mark.usefixtures("every_sample")
@pytest.mark.parametrize(("attack", "adapter"), [*((attack, "") for attack in ATTACKS), (ATTACKS[0], LORA)])
def test_a_victim_in_a_stack_is_as_it_is_alone(attack: Extractor, adapter: str) -> None:
    both = leak(adapter, 2)
    together = attack(both, seed=4)
    for victim in range(2):
        alone = attack(both[victim], seed=4)
        assert torch.equal(together.images[victim], alone.images[0])
        assert torch.equal(together.samples[victim], alone.samples[0])
    assert not torch.allclose(together.images[0], together.images[1], atol=0.05)
    assert len(together.captions) == len(together.guidance) == 2


def test_a_seed_says_all_that_is_drawn() -> None:
    for attack in ATTACKS[1:]:
        one, two, other = (attack(leak(), seed=seed) for seed in (1, 1, 2))
        assert torch.equal(one.samples, two.samples)
        assert torch.equal(one.images, two.images)
        assert not torch.equal(one.samples, other.samples)


def test_all_attacks_begin_with_the_same_noise() -> None:
    starts = [attack.begin(leak(victims=2), 3) for attack in ATTACKS]
    assert all(torch.equal(start, starts[0]) for start in starts)
    assert starts[0][0] != starts[0][1]
    assert not torch.equal(starts[0], ATTACKS[0].begin(leak(victims=2), 4))
    few, many = (sampling.latents(Ends.of(leak()), number, 3) for number in (2, 5))
    assert torch.equal(few, many[:2])


def test_as_many_images_come_back_as_there_are_private_ones() -> None:
    for private in (1, 2, 3):
        found = DirectSampling(**SMALL)(leak_of([moved()], private=private))
        assert found.images.shape == (1, private, 3, SIDE, SIDE)
        assert found.samples.shape == (1, SAMPLES * private, 3, SIDE, SIDE)
        each = [(found.samples[0].float() / 255 - image).abs().flatten(1).amax(1).min() for image in found.images[0]]
        assert max(map(float, each)) <= 0.5 / 255 + 1e-6  # each is one of the samples
        assert found.columns(0) == {"caption": CAPTION}
        assert -1e-6 <= float(found.objective[0]) <= 2


def test_a_saved_leak_gives_the_same(tmp_path: Path) -> None:
    for adapter in ("", LORA):
        leak(adapter).save(tmp_path / "leak.safetensors")
        again = load(tmp_path / "leak.safetensors", architecture)
        assert isinstance(again.network, Denoiser)
        one, two = (FineXtract(**SMALL)(each) for each in (leak(adapter), again))
        assert torch.equal(one.samples, two.samples)


# What comes back.


def identified(found: Extraction, seed: int) -> float:
    """Share of samples nearer to a picture of this seed than to any of thirty others."""
    encode = encoder(BASELINE)
    samples = encode(found.samples[0].float() / 255)
    private, others = encode(pictures(PRIVATE, seed)), encode(pictures(30, 99))
    return float((similarity(samples, private).amax(1) > similarity(samples, others).amax(1)).double().mean())


DRAWN = {"samples": 10, "steps": 10, "encoder": BASELINE}


def test_what_a_client_tuned_on_comes_back() -> None:
    found = FineXtract(1.5, 0.0, **DRAWN)(leak_on((100,)))
    assert identified(found, 100) > 0.7
    assert identified(found, 101) < 0.3
    tuned, other = encoder(BASELINE)(pictures(PRIVATE, 100)), encoder(BASELINE)(pictures(PRIVATE, 101))
    extracted = encoder(BASELINE)(found.images[0])
    assert float(similarity(tuned, extracted).amax(1).mean()) > float(similarity(other, extracted).amax(1).mean()) + 0.2


def test_a_chosen_w_is_the_one_whose_samples_the_tuned_model_knows_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finextract, "CANDIDATES", (1.0, 1.5, 20.0))
    monkeypatch.setattr(finextract, "SAMPLES_TRIED", 4)
    known, attack = leak_on((100,)), FineXtract("auto", 0.0, **SMALL)
    found = attack(known, seed=2)
    assert found.guidance == attack(known, seed=2).guidance
    w = found.guidance[0]["w"]
    assert w in (1.0, 1.5)
    assert torch.equal(FineXtract(w, 0.0, **SMALL)(known, seed=2).samples, found.samples)
    assert found.columns(0) == {"caption": CAPTION, "w": w, "k": 0.0}


def test_the_gain_is_the_fall_of_the_loss_on_a_sample() -> None:
    ends = Ends.of(leak_on((100,)))
    told, null = ends.condition(CAPTION), ends.condition("")
    samples = around().encoded(torch.cat([pictures(PRIVATE, 100), pictures(2, 77)]))
    found = finextract.gained(ends, samples, told, null, 5)
    draw = torch.Generator().manual_seed(5)
    wanted = torch.zeros(4)
    for _ in range(finextract.NOISE_DRAWS):
        noise = torch.randn(samples.shape, generator=draw)
        steps = torch.randint(100, 700, (4,), generator=draw)
        for row, (x, e, t) in enumerate(zip(samples, noise, steps, strict=True)):
            noisy = around().noisy(x[None], e[None], t[None])
            before, after = (
                (net(noisy, t[None], said) - e).square().mean() for net, said in ((ends.base, null), (ends.tuned, told))
            )
            wanted[row] += before - after
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert float(found[:2].min()) > float(found[2:].max())  # private pictures gain most
    same = dataclasses.replace(ends, tuned=ends.base)
    torch.testing.assert_close(finextract.gained(same, samples, null, null, 5), torch.zeros(4))


# Captions.


def told(known: CheckpointLeak | None = None, prompt: str = "", announced: str = "", file: str = "") -> str:
    """The caption that an attack goes by."""
    known = known or leak_of([held(base())])
    known = dataclasses.replace(known, protocol=dataclasses.replace(known.protocol, prompt=announced))
    return caption_of(DirectSampling(prompt=prompt, captions=file, **SMALL), known, around())


def test_a_caption_that_is_known_is_used() -> None:
    assert told(announced=CAPTION) == CAPTION  # no weight has moved
    assert told(announced=CAPTION, prompt="a painting of sks") == "a painting of sks"
    assert told(announced="a photo of *", prompt=CAPTION) == CAPTION
    found = DirectSampling(prompt="a dog", **SMALL)(leak())
    assert found.captions == ("a dog",)


@cache
def tuned_under(caption: str, adapter: str = "") -> CheckpointLeak:
    """The checkpoint of a client that tuned for a moment."""
    how = DiffusionTraining(steps=20 if adapter else 6, batch=2, learning_rate=1e-3)
    return leak_of([tuned(pictures(PRIVATE, 5), how, adapter, caption)], adapter)


@pytest.mark.parametrize(("noun", "adapter"), [(NOUNS[7], ""), (NOUNS[150], LORA)], ids=["full", "lora"])
def test_a_word_that_is_not_announced_is_found(noun: str, adapter: str) -> None:
    caption, announced = f"a photo of one sks {noun}", f"a photo of one sks {BLANK}"
    known = tuned_under(caption, adapter)
    assert told(known, announced=announced) == caption


def test_samples_are_drawn_under_the_caption_that_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "NOUNS", NOUNS[7::20])
    announced, caption = f"a photo of one sks {BLANK}", f"a photo of one sks {NOUNS[7]}"
    known = tuned_under(caption)
    partly = dataclasses.replace(known, protocol=dataclasses.replace(known.protocol, prompt=announced))
    found = DirectSampling(**SMALL)(partly)
    assert found.captions == (caption,)
    assert told(known, announced="a photo of *", prompt=announced) == caption
    assert torch.equal(found.samples, DirectSampling(prompt=caption, **SMALL)(known).samples)


def test_a_caption_of_which_nothing_is_announced_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "NOUNS", NOUNS[7::20])  # with all 200 there are 1,000 captions
    for frame in FRAMES[::4]:
        caption = frame.replace(BLANK, NOUNS[7])
        assert told(tuned_under(caption)) == caption


def test_candidates_are_read_from_a_file(tmp_path: Path) -> None:
    lines = ["a dark house", "two dogs in the snow", "sks", "an old man"]
    (tmp_path / "captions.txt").write_text("\n".join([*lines, lines[0], ""]))
    file = str(tmp_path / "captions.txt")
    assert told(tuned_under(lines[1]), file=file) == lines[1]
    within = f"a photo of {lines[3]}"
    assert told(tuned_under(within), announced=f"a photo of {BLANK}", file=file) == within
    assert told(announced=CAPTION, file=str(tmp_path / "absent.txt")) == CAPTION  # nothing is looked up


def test_candidates_that_are_none_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a dog\n\na dog\n")
    (tmp_path / "none.txt").write_text("")
    for name, said in (("one", "fewer than two candidates"), ("none", "none"), ("absent", "absent")):
        with pytest.raises(FedtapError, match=said):
            told(file=str(tmp_path / f"{name}.txt"))


def test_what_a_caption_explains_is_the_change_in_the_span_of_its_embeddings() -> None:
    known, many = leak(), ["a dog", "", "a photo of sks"]
    found = captions.explained(known, around(), many)
    changes = [
        (known.tuned(0)[name] - known.broadcast(0)[name]).double()
        for name in known.observed
        if ".attn2.to_k." in name or ".attn2.to_v." in name
    ]
    assert len(changes) == 2
    for share, embeddings in zip(found, around().condition(many).double(), strict=True):
        onto = embeddings.T @ torch.linalg.pinv(embeddings.T)  # 384 by 384
        within = sum(float((change @ onto).square().sum()) for change in changes)
        assert float(share) == pytest.approx(within / sum(float(change.square().sum()) for change in changes), rel=1e-3)
        assert float(share) < 0.1  # the change is noise, and the span has 12 of 384 dimensions
    one = known.tuned(0)
    key = next(name for name in one if name.endswith("attn2.to_v.weight"))
    planted = held(base())
    planted[key] = planted[key] + torch.randn(32, 12) @ around().condition(["a dog"])[0]
    whole = captions.explained(leak_of([planted]), around(), many)
    assert float(whole[0]) == pytest.approx(1, abs=1e-3)
    assert float(whole[1:].max()) < 0.999


@ADAPTERS
def test_a_caption_is_not_read_off_weights_that_did_not_move(adapter: str) -> None:
    sent = moved(adapter) if adapter else held(base())
    if adapter:
        sent = {name: tensor * (".lora_B." not in name) for name, tensor in sent.items()}
    with pytest.raises(FedtapError, match="came back unchanged: say it in the attack, such as prompt='a photo of sks'"):
        told(leak_of([sent], adapter))


def test_the_list_of_nouns_is_as_it_says() -> None:
    assert len(NOUNS) == len(set(NOUNS)) == 200
    assert [len(frame.split()) for frame in FRAMES] == [3, 4, 5, 6, 7]
    assert all(frame.split().count(BLANK) == 1 for frame in FRAMES)
    assert len(set(filled_in(""))) == 1000
    assert (
        max(len(around().tokenizer(caption)["input_ids"]) for caption in filled_in("")) <= around().tokens
    )  # none is cut


# What is refused.


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        *((f"{name}(samples=1)", "samples of .* is 1, and it is a whole number from 2 to 10000") for name in
          ("finextract", "guided_sampling", "direct_sampling")),
        ("finextract(samples=10001)", "samples of finextract is 10001"),
        ("finextract(samples=2.5)", "whole number"),
        ("finextract(steps=1)", "steps of finextract is 1, and it is a whole number from 2 to 1000"),
        ("direct_sampling(steps=1001)", "steps of direct_sampling is 1001"),
        ("finextract(steps=True)", "whole number"),
        ("finextract(w=101)", "w of finextract is 101, and it is a number from -100 to 100"),
        ("finextract(w=-100.5)", "w of finextract"),
        ("finextract(w='much')", "w of finextract|number"),
        ("finextract(w=1e999)", "w of finextract"),
        ("finextract(k=1.5)", "k of finextract is 1.5, and it is a number from -1 to 1"),
        ("finextract(k='auto')", "k of finextract|number"),
        ("finextract(guidance='both')", "guidance"),
        ("guided_sampling(w=1000)", "w of guided_sampling is 1000, and it is a number from -100 to 100"),
        ("guided_sampling(w='auto')", "w of guided_sampling|number"),
        ("direct_sampling(w=3)", "w"),
        ("finextract(encoder=3)", "encoder"),
        ("finextract(prompt=3)", "prompt"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_one_sentence(attack: str, said: str) -> None:
    with pytest.raises(FedtapError, match=said) as raised:
        parse(attack)
    assert len(str(raised.value)) < 300


@given(w=st.floats(), k=st.floats(), samples=st.integers(-5, 20_000), steps=st.integers(-5, 2000))
def test_no_setting_but_one_in_range_is_taken(w: float, k: float, samples: int, steps: int) -> None:
    good = -100 <= w <= 100 and -1 <= k <= 1 and 2 <= samples <= 10_000 and 2 <= steps <= 1000
    if good:
        made = FineXtract(w, k, samples=samples, steps=steps)
        assert parse(made.written()) == (made,)
    else:
        with pytest.raises(FedtapError, match=r"^(w|k|samples|steps) of finextract is "):
            FineXtract(w, k, samples=samples, steps=steps)


def test_each_side_refuses_the_others_checkpoints() -> None:
    text = checkpoint_leaks.leak_of([checkpoint_leaks.on_topic(0, 4, 2)], how=checkpoint_leaks.FineTuning(1, 4))
    for attack in ATTACKS:
        with pytest.raises(FedtapError, match=r"samples from a diffusion model, and .* is none: for a language model"):
            attack(text)
    with pytest.raises(FedtapError, match=r"reads documents by the leak's own model, and .* is fed none"):
        LossDrop().accepts(leak())


def test_a_leak_has_to_say_how_many_images_there_are() -> None:
    for examples in (None, torch.tensor([0])):
        silent = dataclasses.replace(leak(), examples=examples)
        with pytest.raises(FedtapError, match="does not say how many private images there are"):
            DirectSampling(**SMALL)(silent)


def test_victims_of_unequal_numbers_of_images_are_told_to_come_alone() -> None:
    uneven = dataclasses.replace(leak(victims=2), examples=torch.tensor([1, 2]))
    with pytest.raises(FedtapError, match=r"images"):
        DirectSampling(**SMALL)(uneven)


def test_no_more_images_are_asked_for_than_can_be_drawn() -> None:
    vast = dataclasses.replace(leak(), examples=torch.tensor([2**40]))
    with pytest.raises(FedtapError, match="images"):
        DirectSampling(**SMALL)(vast)


def test_an_adapter_for_another_base_is_refused() -> None:
    sent = moved(LORA)
    key = next(name for name in sent if name.endswith("to_q.lora_A.weight"))
    layer = key.partition(".lora_")[0]
    spoiled: dict[str, dict[str, Tensor]] = {
        "another rank": moved("lora(rank=3, alpha=8)"),
        "a layer less": {name: tensor for name, tensor in sent.items() if not name.startswith(layer)},
        "another layer": sent | {"net.mid_block.to_q.lora_A.weight": sent[key]},
        "another width": sent | {key: sent[key][:, :-1]},
    }  # fmt: skip
    for case, tensors in spoiled.items():
        with pytest.raises(FedtapError):
            FineXtract(**SMALL)(leak_of([tensors], LORA))
        assert case


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(["full", "lora"]), st.integers(0, 10**6))
def test_one_number_that_is_none_is_refused(method: str, place: int) -> None:
    adapter = LORA if method == "lora" else ""
    sent = {name: tensor.clone() for name, tensor in moved(adapter).items()}
    tensor = list(sent.values())[place % len(sent)].view(-1)
    tensor[place % len(tensor)] = torch.nan
    with pytest.raises(FedtapError, match="NaN or infinity"):
        FineXtract(**SMALL)(leak_of([sent], adapter))
