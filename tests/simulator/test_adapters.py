"""LoRA: which layers it adapts, what it computes, and what it refuses."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtap.simulator.errors import FedtapError
from fedtap.simulator.models.adapters import (
    LARGEST_ALPHA,
    LARGEST_RANK,
    Lora,
    adapter_of,
    adapter_shapes,
    inject,
    merged,
)
from fedtap.simulator.models.language import build_language
from fedtap.simulator.models.pretrained import pretrained
from fedtap.simulator.models.text_model import TextModel, filled
from tests.simulator.test_pretrained import save_tiny

LORA = Lora(rank=2, alpha=3)
IDS = torch.tensor([[3, 1, 4, 1, 5], [2, 6, 5, 3, 5]])


def network_of(name: str, folder: Path, seed: int | None = 0) -> TextModel:
    if name in ("gpt2", "tied_llama"):
        return pretrained(str(save_tiny(name, folder)), seed)
    return build_language(f"{name}(vocabulary=11, width=8, heads=2, layers=2)", 5, 11, seed)


@pytest.fixture(params=["gpt2", "tied_llama", "gpt", "bert"])
def network(request: pytest.FixtureRequest, tmp_path: Path) -> TextModel:
    return network_of(request.param, tmp_path)


def trained(network: TextModel, lora: Lora = LORA) -> TextModel:
    """With an adapter that changes something."""
    made = inject(network, lora, seed=0)
    torch.manual_seed(1)
    for tensor in adapter_of(made).values():
        tensor.data.normal_()
    return made


@torch.no_grad()
def logits(network: TextModel) -> torch.Tensor:
    return network.logits(network.features(IDS))


def test_a_new_adapter_changes_nothing(network: TextModel) -> None:
    assert torch.equal(logits(inject(network, LORA, 0)), logits(network))


def test_merged_weights_compute_what_the_adapter_does(network: TextModel) -> None:
    made = trained(network)
    weights = dict(network.named_parameters())
    alone = filled(network, merged(weights, adapter_of(made), LORA) | dict(network.named_buffers()))
    assert isinstance(alone, TextModel)
    assert not torch.allclose(logits(made), logits(network), atol=1e-2)
    torch.testing.assert_close(logits(alone), logits(made), rtol=1e-5, atol=1e-5)


def test_the_adapter_alone_is_trained(network: TextModel) -> None:
    made = inject(network, LORA, 0)
    assert {name for name, tensor in made.named_parameters() if not tensor.requires_grad} | {
        name for name in dict(made.named_parameters()) if ".lora_" in name
    } == set(dict(made.named_parameters()))
    assert all(tensor.requires_grad for tensor in adapter_of(made).values())
    assert all(tensor.requires_grad for tensor in network.parameters())


def test_a_network_with_an_adapter_is_filled_as_it_is_trained(network: TextModel) -> None:
    made = trained(network)
    copied = filled(made, dict(made.named_parameters()) | dict(made.named_buffers()))
    assert isinstance(copied, TextModel)
    assert torch.equal(logits(copied), logits(made))
    assert [one.requires_grad for one in copied.parameters()] == [one.requires_grad for one in made.parameters()]


def test_shapes_are_those_of_an_adapter(network: TextModel) -> None:
    made = adapter_of(inject(network, LORA, 0))
    assert adapter_shapes(network, LORA) == {name: tuple(tensor.shape) for name, tensor in made.items()}


@pytest.mark.parametrize("name", ["gpt2", "gpt"])
def test_the_meta_device_is_enough_for_shapes_and_an_adapter(name: str, tmp_path: Path) -> None:
    real, meta = (network_of(name, tmp_path, seed) for seed in (0, None))
    assert adapter_shapes(meta, LORA) == adapter_shapes(real, LORA)
    assert {key: tuple(tensor.shape) for key, tensor in adapter_of(inject(meta, LORA, 0)).items()} == adapter_shapes(
        meta, LORA
    )


def test_names_are_plain() -> None:
    network = build_language("gpt(vocabulary=11, width=8, heads=2, layers=1)", 5, 11, 0)
    ends = [f"{layer}.lora_{half}.weight" for layer in ("query", "value") for half in "AB"]
    assert list(adapter_of(inject(network, LORA, 0))) == [f"blocks.0.{end}" for end in ends]


def test_the_seed_decides_what_is_drawn(network: TextModel) -> None:
    one, same, other = (adapter_of(inject(network, LORA, seed)) for seed in (0, 0, 1))
    name = next(iter(one))
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])


def test_an_adapter_for_another_base_is_refused(network: TextModel) -> None:
    weights, adapter = dict(network.named_parameters()), adapter_of(trained(network))
    first, second, *_ = adapter
    damaged = [
        {f"other.{name}": tensor for name, tensor in adapter.items()},
        {name: tensor for name, tensor in adapter.items() if name != first},
        adapter | {first: adapter[first][:, :-1]},
        adapter | {second: adapter[second][:-1]},
        adapter | {first: adapter[first][:1]},
        adapter | {first: adapter[first][0]},
        adapter | {"blocks.weight": adapter[first]},
    ]
    for one in damaged:
        with pytest.raises(FedtapError, match="adapter for another base"):
            merged(weights, one, LORA)
    with pytest.raises(FedtapError, match="or of another rank"):
        merged(weights, adapter, Lora(rank=3, alpha=3))


def test_a_second_adapter_is_refused(network: TextModel) -> None:
    made = inject(network, LORA, 0)
    for refused in (lambda: inject(made, LORA, 0), lambda: adapter_shapes(made, LORA)):
        with pytest.raises(FedtapError, match="has a LoRA already"):
            refused()


def test_a_network_without_projections_is_refused() -> None:
    network = build_language("gpt(vocabulary=11, width=8, heads=2, layers=1)", 5, 11, 0)
    network.blocks = torch.nn.ModuleList()
    with pytest.raises(FedtapError, match="can be given no LoRA"):
        inject(network, LORA, 0)


@given(
    rank=st.integers(1, LARGEST_RANK),
    alpha=st.floats(0, LARGEST_ALPHA, exclude_min=True) | st.integers(1, LARGEST_ALPHA),
)
def test_what_is_written_is_parsed(rank: int, alpha: float) -> None:
    lora = Lora(rank, alpha)
    assert Lora.parse(lora.written()) == lora


@given(text=st.text() | st.builds("lora({})".format, st.text() | st.integers() | st.floats()))
def test_any_text_is_a_lora_or_refused(text: str) -> None:
    with contextlib.suppress(FedtapError):
        lora = Lora.parse(text)
        assert Lora.parse(lora.written()) == lora


@pytest.mark.parametrize(
    "text",
    [
        *("", "(" * 10_000, "lora()", "Lora(rank=8)", "lora(8)", "lora(rank=8)(rank=8)", "lora(**{'rank': 8})"),
        *("lora(rank=0)", "lora(rank=True)", "lora(rank=2.0)", "lora(rank=2000)", "lora(rank=len('a'))"),
        *("lora(alpha=0)", "lora(alpha=-1)", "lora(alpha=1j)", "lora(alpha=1e999)", f"lora(alpha={10**400})"),
        *("lora(rank=8, rank=9)", "lora(rank=8, dropout=1)"),
    ],
)
def test_a_lora_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(FedtapError, match="no such LoRA"):
        Lora.parse(text)
