"""Small tokenizers in the styles that are about, and what their tokens stand for, byte
by byte: another way to find positions than character offsets."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

from model_kit import TEXTS, make_tokenizer, token_bytes
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

_SPECIAL = ["<unk>", "<s>", "</s>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_SPACE = "▁"

STYLES = ("bytes", "bytes+space", "bytes+nfc", "prepend", "metaspace", "unigram")
"""GPT-2's; with a space before the text; with a normalizer, as Qwen and NeoX;
Llama 2's and Phi-3's; Mistral's; SentencePiece's Unigram."""


def styled_tokenizer(style: str, *, bos: bool = False, eos: bool = False) -> Any:
    """A tokenizer of one of the styles, which puts BOS before a text or EOS after."""
    if style.startswith("bytes"):
        made = make_tokenizer("llama" if style == "bytes+space" else "gpt2")
        if style == "bytes+nfc":
            made.backend_tokenizer.normalizer = normalizers.NFC()
        special = (("<s>", 0), ("</s>", 1))
        made.backend_tokenizer.post_processor = processors.Sequence(
            [processors.ByteLevel(trim_offsets=True), *_template(special, bos, eos)]
        )
        made.bos_token = "<s>"
        return made
    backend = _unigram() if style == "unigram" else _merges()
    if style == "prepend":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme="first" if style == "metaspace" else "always",
            split=style == "unigram",
        )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    template = _template((("<s>", 1), ("</s>", 2)), bos, eos)
    if template:
        backend.post_processor = template[0]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )


def _template(special: tuple[tuple[str, int], ...], bos: bool, eos: bool) -> list[Any]:
    if not bos and not eos:
        return []
    single = " ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos)
    return [processors.TemplateProcessing(single=single, special_tokens=[*special])]


def _merges() -> Tokenizer:
    """BPE over characters, other characters as bytes; no pieces over words' ends."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[*_SPECIAL, *_BYTES], show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    trained = json.loads(backend.to_str())["model"]
    model = models.BPE(
        trained["vocab"],
        [tuple(pair) for pair in trained["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    return Tokenizer(model)


def _unigram() -> Tokenizer:
    return Tokenizer(models.Unigram(_scored(), unk_id=0, byte_fallback=True))


@cache  # its training is not repeatable to the last bit
def _scored() -> list[tuple[str, float]]:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=_SPECIAL, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    pieces = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["vocab"]]
    pieces[3:3] = [(byte, 0.0) for byte in _BYTES]
    return pieces


class Pieces:
    """What a tokenizer's tokens stand for."""

    def __init__(self, tokenizer: Any) -> None:
        backend = tokenizer.backend_tokenizer
        added = set(tokenizer.get_added_vocab().values())
        special = set(tokenizer.all_special_ids)
        known = {token: name for name, token in tokenizer.get_vocab().items()}
        self._nfc = "NFC" in str(backend.normalizer)
        self._bytes = dict.fromkeys(special, b"")
        plain = [token for token in known if token not in added | special]
        if "ByteLevel" in str(backend.decoder):
            pieces = token_bytes(tokenizer, plain)
        else:
            pieces = [
                bytes([int(name[3:5], 16)])
                if len(name) == 6 and name.startswith("<0x")
                else name.replace(_SPACE, " ").encode()
                for name in map(known.__getitem__, plain)
            ]
        self._bytes |= dict(zip(plain, pieces, strict=True))
        self._bytes |= {token: known[token].encode() for token in added - special}

    def normal(self, text: str) -> str:
        """The text as the tokenizer's normalizer has it."""
        return unicodedata.normalize("NFC", text) if self._nfc else text

    def joined(self, ids: Sequence[int]) -> bytes:
        return b"".join(self._bytes[token] for token in ids)

    def index(self, ids: Sequence[int], text: str, end: int) -> int:
        """Index of the token with the last byte of `text[:end]`, counted; the tokens
        must make the text, but for a space before it."""
        whole, part = self.normal(text), self.normal(text[:end])
        made = self.joined(ids)
        shift = len(made) - len(whole.encode())
        assert made == b" "[:shift] + whole.encode(), (made, text)
        wanted, total = shift + len(part.encode()), 0
        for index, token in enumerate(ids):
            total += len(self._bytes[token])
            if total >= wanted:
                return index
        raise AssertionError(f"{text!r} has no byte {wanted}")
