"""Tiny models with byte-level tokenizers, and slow independent ways to compute what
the package computes fast: one prompt at a time, whole prompts, plain loops."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from covariance_cache import KeyStatistics
from unified_edit.edits import Edit, Record
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.prompts import Contexts

KINDS = ("gpt2", "llama")
LAYERS = 3
POSITIONS = 96
DATA = Path(
    os.environ.get(
        "UNIFIED_EDIT_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"
    )
)

_SUBJECTS = ("Ada Lovelace", "Bo Diaz", "Carla Nunes", "Dov Stern", "Eero Lind")
_PLACES = ("Lyon", "Cairo", "New York", "Porto", "Oslo", "Quito")
_THINGS = ("the cello", "chess", "long letters", "a red boat", "green apples")
TEXTS = [
    f"{subject} lives in {place} and likes {thing}. In {place}, {subject}'s friends "
    f"say that {thing} {verb} what {subject} {n + 2} times wanted."
    for n, subject in enumerate(_SUBJECTS)
    for place in _PLACES
    for thing in _THINGS
    for verb in ("is", "was")
]
"""About 9,000 tokens."""

EDITS = [
    Edit("{} lives in", "Ada Lovelace", "New York"),
    Edit("The town of {} is called", "Bo Diaz", "Cairo"),
    Edit("In spring, everyone likes {}", "Carla Nunes", "green apples"),
    Edit('They say "{}\'s friends" live in', "Dov Stern", "Oslo"),
    Edit("{} likes", "Eero Lind", "the cello"),
]
"""Subject first, inside, last, quoted; targets of one and more tokens."""

CONTEXTS = Contexts(("{}", "The letters say. {}", "In Porto, chess was what. {}"))

RECORD = Record(
    edit=EDITS[0],
    target_true="Lyon",
    paraphrase_prompts=("Ada Lovelace's town is", "Everyone says Ada Lovelace is in"),
    neighborhood_prompts=("Bo Diaz lives in", "Dov Stern lives in", "Eero Lind is in"),
)


@dataclass(frozen=True, eq=False)
class Tiny:
    """One architecture's model, tokenizer and key statistics."""

    kind: str
    model: Any
    tokenizer: Any
    statistics: dict[int, KeyStatistics]

    @cached_property
    def adapter(self) -> ModelAdapter:
        return ModelAdapter.of(self.model)


def make_tokenizer(
    kind: str = "gpt2", *, eos: bool = False, texts: list[str] = TEXTS
) -> Any:
    """A byte-level BPE. "gpt2" puts nothing before a text; "llama" a BOS token and a
    space. `eos`: it appends an end token as well."""
    llama = kind == "llama"
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=llama)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=360,
            special_tokens=special,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    parts: list[Any] = [processors.ByteLevel(trim_offsets=True)]
    if llama or eos:
        template = " ".join(["<s>"] * llama + ["$A"] + ["</s>"] * eos)
        parts.append(
            processors.TemplateProcessing(
                single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
            )
        )
    backend.post_processor = processors.Sequence(parts)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>" if llama else None,
        eos_token="</s>",
    )


def make_model(
    kind: str, vocabulary: int = 360, *, seed: int = 3, **config: Any
) -> Any:
    """A random model with weights large enough that contexts and subjects matter;
    d_key is 64 (gpt2) or 40 (llama). Tied head and Conv1D; untied head, gated MLP
    and grouped queries."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "gpt2":
            settings = {
                "vocab_size": vocabulary,
                "n_embd": 16,
                "n_layer": LAYERS,
                "n_head": 2,
                "n_positions": POSITIONS,
                "initializer_range": 0.25,
                "bos_token_id": 0,
                "eos_token_id": 1,
            }
            model: nn.Module = GPT2LMHeadModel(GPT2Config(**{**settings, **config}))
            # Made as zeros; trained models have biases.
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    nn.init.normal_(parameter, std=0.1)
        else:
            settings = {
                "vocab_size": vocabulary,
                "hidden_size": 24,
                "intermediate_size": 40,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": POSITIONS,
                "initializer_range": 0.25,
                "bos_token_id": 0,
                "eos_token_id": 1,
                "tie_word_embeddings": False,
            }
            model = LlamaForCausalLM(LlamaConfig(**{**settings, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn" in name and parameter.ndim == 2:
                parameter.mul_(3)  # what happens at the subject shall matter later
            if name in ("transformer.ln_f.weight", "model.norm.weight"):
                parameter.mul_(2)  # and predictions shall not all be near uniform
    return model.eval()


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones are themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + index): byte for index, byte in enumerate(others)}


_LETTERS = _byte_letters()


def token_bytes(tokenizer: Any, ids: list[int]) -> list[bytes]:
    """What byte-level tokens stand for; nothing for special ones."""
    special = set(tokenizer.all_special_ids)
    return [
        b"" if token in special else bytes(_LETTERS[letter] for letter in piece)
        for token, piece in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)
    ]


def subject_index(tokenizer: Any, ids: list[int], text: str, end: int) -> int:
    """Index of the token with the last byte of `text[:end]`, by counting bytes."""
    pieces = token_bytes(tokenizer, ids)
    shift = len(b"".join(pieces)) - len(text.encode())  # a prepended space
    wanted = shift + len(text[:end].encode())
    total = 0
    for index, piece in enumerate(pieces):
        total += len(piece)
        if total >= wanted:
            return index
    raise AssertionError(f"{text!r} has no byte {wanted}")


def rows_of(
    tokenizer: Any, edit: Edit, contexts: Contexts = CONTEXTS
) -> list[tuple[str, list[int], int]]:
    """(text, ids, subject's index) of an edit's prompt in each context."""
    rows = []
    for context in contexts.templates:
        text = context.replace("{}", edit.text)
        end = text.rindex(edit.subject) + len(edit.subject)
        ids = tokenizer(text)["input_ids"]
        rows.append((text, ids, subject_index(tokenizer, ids, text, end)))
    return rows


def target_ids(tokenizer: Any, text: str, target: str) -> list[int]:
    ids = tokenizer(text)["input_ids"]
    whole = tokenizer(f"{text} {target}")["input_ids"]
    assert whole[: len(ids)] == ids
    return whole[len(ids) :]


def mlp_of(model: Any, kind: str, layer: int) -> Any:
    blocks = model.transformer.h if kind == "gpt2" else model.model.layers
    return blocks[layer].mlp


def block_of(model: Any, kind: str, layer: int) -> Any:
    return (model.transformer.h if kind == "gpt2" else model.model.layers)[layer]


def weight_of(model: Any, kind: str, layer: int) -> Tensor:
    """The edited weight as [d_value, d_key]."""
    mlp = mlp_of(model, kind, layer)
    weight = mlp.c_proj.weight.T if kind == "gpt2" else mlp.down_proj.weight
    return weight.detach()


def bias_of(model: Any, kind: str, layer: int) -> Tensor:
    mlp = mlp_of(model, kind, layer)
    if kind == "gpt2":
        return mlp.c_proj.bias.detach()
    return torch.zeros(mlp.down_proj.out_features, dtype=mlp.down_proj.weight.dtype)


@torch.no_grad()
def outputs_of(model: Any, module: nn.Module, ids: list[int]) -> tuple[Tensor, Tensor]:
    """A module's input and output [positions, d] in a full forward of one prompt."""
    seen = []

    def hook(_: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append((args[0][0], hidden[0]))

    handle = module.register_forward_hook(hook)
    model(input_ids=torch.tensor([ids]))
    handle.remove()
    assert len(seen) == 1
    return seen[0]


@torch.no_grad()
def key_of(model: Any, kind: str, layer: int, ids: list[int], index: int) -> Tensor:
    """The key at one position, by the MLP's own definition from its input."""
    mlp = mlp_of(model, kind, layer)
    hidden, _ = outputs_of(model, mlp, ids)
    if kind == "gpt2":
        return mlp.act(mlp.c_fc(hidden))[index]
    return (mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden))[index]


def averaged_key(
    model: Any,
    kind: str,
    tokenizer: Any,
    edit: Edit,
    layer: int,
    average: str,
    contexts: Contexts = CONTEXTS,
) -> Tensor:
    keys = [
        key_of(model, kind, layer, ids, index).double()
        for _, ids, index in rows_of(tokenizer, edit, contexts)
    ]
    if average == "clean" or len(keys) == 1:
        return keys[0]
    if average == "flat":
        return torch.stack(keys).mean(0)
    return keys[0] / 2 + torch.stack(keys[1:]).mean(0) / 2


def hidden_of_edit(
    model: Any, kind: str, tokenizer: Any, edit: Edit, layer: int
) -> Tensor:
    """The block's output at the bare prompt's subject."""
    _, ids, index = rows_of(tokenizer, edit, Contexts())[0]
    return outputs_of(model, block_of(model, kind, layer), ids)[1][index].double()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model: nn.Module, state: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == state.keys()
    for name, tensor in state.items():
        assert now[name].dtype == tensor.dtype, name
        bits = [
            each.contiguous().reshape(-1).view(torch.uint8)
            for each in (now[name], tensor)
        ]
        assert torch.equal(*bits), f"{name} changed"


def greedy_word(tiny: Tiny) -> tuple[str, str]:
    """A prompt, and the word that the model says after it by itself."""
    words = " ".join(TEXTS[::17]).split()
    for start in range(0, len(words), 3):
        for length in (1, 2, 4):
            prompt = " ".join(words[start : start + length])
            ids = tiny.tokenizer(prompt)["input_ids"]
            with torch.no_grad():
                logits = tiny.model(input_ids=torch.tensor([ids])).logits[0, -1]
            token = int(logits.argmax())
            word = tiny.tokenizer.decode([token])
            if word != f" {word.strip()}" or not word.strip().isprintable():
                continue
            if target_ids(tiny.tokenizer, prompt, word[1:]) == [token]:
                return prompt, word[1:]
    raise AssertionError("no greedy continuation is a word of its own")
