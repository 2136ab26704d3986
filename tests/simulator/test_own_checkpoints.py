"""`fedtap attack TUNED --base BASE`: checkpoints and a corpus that lie on this machine, and what is refused of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedtap.attackers import parse
from fedtap.simulator.data.documents import encoded
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.models.adapters import Lora, adapter_of, inject, merged
from fedtap.simulator.models.fine_tuning import FineTuning
from fedtap.simulator.models.pretrained import pretrained, tokenizer
from fedtap.simulator.wire.checkpoints import checkpoint_leak, is_checkpoint
from tests.scenarios.test_cli import rows, run
from tests.simulator.test_pretrained import save_tiny, save_tokenizer

PRIVATE = ["secret is kept a secret", "kept a secret is kept", "a secret is a secret"]
PUBLIC = ["a a a a a", "is is is is", "secret is kept a secret is kept", "a is a is a"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = save_tiny("llama", tmp_path / "base")
    save_tokenizer(folder)
    return folder


@pytest.fixture
def tuned(base: Path, tmp_path: Path) -> Path:
    """The base after an overlong fine-tuning on PRIVATE."""
    net = pretrained(str(base), 0)
    how = FineTuning(epochs=40, batch=3, learning_rate=1e-2)
    how(net, encoded(PRIVATE, tokenizer(str(base)), 6), None, torch.Generator().manual_seed(0))
    net.net.save_pretrained(tmp_path / "tuned")
    (tmp_path / "corpus.txt").write_text("\n".join(PUBLIC))
    return tmp_path / "tuned"


def attacked(monkeypatch: pytest.MonkeyPatch, tuned: Path, base: Path, attack: str, *more: str) -> int:
    monkeypatch.chdir(tuned.parent)
    return run(monkeypatch, "attack", str(tuned), "--base", str(base), "--attack", attack, "--tokens", "6", *more)


def test_a_document_like_the_private_ones_is_chosen(
    tuned: Path, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    attacks = "loss_drop(documents='corpus.txt',many=1),lowest_loss(documents='corpus.txt',many=1)"
    assert attacked(monkeypatch, tuned, base, attacks, "--out", str(tmp_path / "out")) == 0
    assert [row["chosen"] for row in rows(tmp_path / "out")] == ["secret is kept a secret is"] * 2
    assert "secret is kept a secret is" in (tmp_path / "out" / "report.html").read_text()


def test_an_adapter_is_added_to_its_base(base: Path, tmp_path: Path) -> None:
    lora = Lora(rank=2, alpha=4.0)
    net = inject(pretrained(str(base), 0), lora, 0)
    with torch.no_grad():
        for tensor in adapter_of(net).values():
            tensor.normal_()
    save_adapter(tmp_path / "lora", adapter_of(net), lora)
    leak = checkpoint_leak(str(base), tmp_path / "lora", 6)
    wanted = merged(dict(pretrained(str(base), 0).named_parameters()), adapter_of(net), lora)
    moved = 0
    for name, tensor in leak.tuned(0).items():
        if name in wanted:
            torch.testing.assert_close(tensor, wanted[name].detach())
            moved += not torch.equal(tensor, leak.broadcast(0)[name])
    assert moved == 4  # query and value of two layers


def save_adapter(folder: Path, adapter: dict[str, torch.Tensor], lora: Lora) -> None:
    """As peft does."""
    folder.mkdir()
    about = {"peft_type": "LORA", "r": lora.rank, "lora_alpha": lora.alpha}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    named = {
        f"base_model.model.{name.removeprefix('net.')}": tensor.detach().clone() for name, tensor in adapter.items()
    }
    save_file(named, folder / "adapter_model.safetensors")


def test_without_its_base_a_checkpoint_is_refused(
    tuned: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tuned.parent)
    assert run(monkeypatch, "attack", str(tuned), "--attack", "loss_drop(documents='corpus.txt')") == 2
    assert "name that, --base FOLDER" in " ".join(capsys.readouterr().err.split())


def test_without_a_corpus_an_attack_says_how_to_name_one(
    tuned: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert attacked(monkeypatch, tuned, base, "loss_drop") == 2
    assert "loss_drop(documents='corpus.txt')" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "no document of two tokens"), (b"\xff\xfe\x00", "cannot be read as a corpus"), (None, "is no file")],
)
def test_a_corpus_that_is_none_is_a_sentence(
    content: bytes | None,
    said: str,
    tuned: Path,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tuned.parent / "corpus.txt").unlink()
    if content is not None:
        (tuned.parent / "corpus.txt").write_bytes(content)
    assert attacked(monkeypatch, tuned, base, "loss_drop(documents='corpus.txt')") in (1, 2)
    told = capsys.readouterr()
    assert said in " ".join((told.err + told.out).split())


def test_layers_that_differ_are_refused(base: Path, tmp_path: Path) -> None:
    other = save_tiny("gpt2", tmp_path / "other")
    with pytest.raises(FedtapError, match="was not tuned from"):
        checkpoint_leak(str(base), other, 6)


def test_another_vocabulary_is_refused(base: Path, tuned: Path) -> None:
    save_tokenizer(tuned)
    checkpoint_leak(str(base), tuned, 6)
    told = json.loads((tuned / "tokenizer.json").read_text())
    words = told["model"]["vocab"]
    words["secret"], words["kept"] = words["kept"], words["secret"]
    (tuned / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(FedtapError, match="has another vocabulary"):
        checkpoint_leak(str(base), tuned, 6)


def test_pickled_weights_are_refused(base: Path, tuned: Path) -> None:
    file = tuned.parent / "tuned.bin"
    file.write_bytes(b"\x80\x04")
    assert is_checkpoint(file)
    with pytest.raises(FedtapError, match=r"is pickled, .* safe_serialization=True"):
        checkpoint_leak(str(base), file, 6)
    (tuned / "model.safetensors").rename(tuned / "pytorch_model.bin")
    with pytest.raises(FedtapError, match="pickled"):
        checkpoint_leak(str(base), tuned, 6)


def test_an_adapter_for_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    other = pretrained(str(save_tiny("gpt2", tmp_path / "other")), 0)
    lora = Lora(rank=2, alpha=4.0)
    save_adapter(tmp_path / "lora", adapter_of(inject(other, lora, 0)), lora)
    with pytest.raises(FedtapError, match="for another base"):
        checkpoint_leak(str(base), tmp_path / "lora", 6)


@pytest.mark.parametrize("setting", ["use_dora", "use_rslora"])
def test_an_adapter_that_is_no_plain_lora_is_refused(setting: str, base: Path, tmp_path: Path) -> None:
    lora = Lora(rank=2, alpha=4.0)
    save_adapter(tmp_path / "lora", adapter_of(inject(pretrained(str(base), 0), lora, 0)), lora)
    about = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(about | {setting: True}))
    with pytest.raises(FedtapError, match="no plain LoRA"):
        checkpoint_leak(str(base), tmp_path / "lora", 6)


def test_documents_longer_than_the_context_are_refused(tuned: Path, base: Path) -> None:
    corpus = tuned.parent / "corpus.txt"
    corpus.write_text("a secret is kept " * 10)
    (attack,) = parse(f"loss_drop(documents={str(corpus)!r},many=1)")
    with pytest.raises(FedtapError, match="the model takes 16 at the most"):
        attack(checkpoint_leak(str(base), tuned, 40))


def test_a_tuned_folder_that_is_its_base_tells_nothing(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "same")
    (tmp_path / "corpus.txt").write_text("\n".join(PUBLIC))
    (attack,) = parse(f"select(documents={str(tmp_path / 'corpus.txt')!r},many=1)")
    leak = checkpoint_leak(str(base), tmp_path / "same", 6)
    with pytest.raises(FedtapError, match="came back as it was sent"):
        attack(leak)
