"""Trains the tiny world's two models from scratch, on CPU or GPU.

    python examples/tinyworld/train.py gpt2          # about half an hour on two cores
    python examples/tinyworld/train.py llama
    python examples/tinyworld/report.py --write      # measures both, writes their cards

Interrupted, the same command goes on from the last checkpoint in `runs/`. Every batch
is a function of the seed and the step, so a resumed run sees the same text.

Two things make a small model keep its facts where large ones do, in the early MLPs at
the subject's last token, which is the premise of locate-and-edit:
- for most sequences the MLP outputs at a fact's tokens after its subject are zeroed in
  training, so that what is known must be written at the subject and read by attention;
  (for the GPT-2 one, read from the subject's last token alone)
- label smoothing bounds margins, so that facts stay within an edit's reach.
The saved model is a plain one.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import world as tinyworld
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).parent
VOCABULARY = 1536
IGNORED = -100


@dataclass(frozen=True)
class Settings:
    """How to train."""

    steps: int = 2600
    batch: int = 36
    """Sequences a step."""
    window: int = 64
    """Tokens a sequence; each begins with the beginning of a sentence."""
    learning_rate: float = 2.5e-3
    warmup: int = 200
    weight_decay: float = 0.1
    label_smoothing: float = 0.05
    text_weight: float = 0.1
    """Loss weight of tokens that are no answers: most of the text is chance."""
    drop_probability: float = 0.8
    """Share of sequences whose MLPs are silent after a fact's subject."""
    through_last_token: bool = False
    """Whether in those sequences what follows a subject sees only its last token."""
    seed: int = 7
    save_every: int = 250


SETTINGS = {
    # Without a gate, conjunctions of two name parts come hard to it; left to itself it
    # adds up what each part tells, read from each part's own token.
    "gpt2": Settings(steps=2800, drop_probability=0.9, through_last_token=True),
    "llama": Settings(),
}
"""What made the committed models."""


def build_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE on world text. The Llama one prepends a space and a BOS token,
    as Llama's do; the GPT-2 one does neither."""
    llama = family == "llama"
    world = tinyworld.build()
    source = tinyworld.sentences(world, random.Random("tokenizer"))
    text = (" ".join(next(source).text for _ in range(5)) for _ in range(8000))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=llama)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"] if llama else ["<|endoftext|>"]
    backend.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=special,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    if llama:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
        )
    else:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=special[0],
        eos_token=special[-1],
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def build_model(family: str, tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    """A new model with a wide MLP: what a batch of edits can hold grows with d_key."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=64,
                n_embd=128,
                n_layer=5,
                n_head=4,
                n_inner=1920,
                activation_function="gelu",
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **ids,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=1280,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            **ids,
        )
    )


def mlps(model: nn.Module) -> list[nn.Module]:
    """The MLP of each block, in order."""
    return [m for name, m in model.named_modules() if name.endswith(".mlp")]


@dataclass(frozen=True)
class Batch:
    """One step's sequences."""

    ids: Tensor
    """[batch, window]"""
    weights: Tensor
    """[batch, window]: the loss weight of each token as a label."""
    keep: Tensor
    """[batch, window, 1]: 0 where the MLPs are silent, else 1."""
    attend: Tensor
    """[batch, 1, window, window]: which token may see which."""


def batches(
    tokenizer: PreTrainedTokenizerFast, settings: Settings, start: int
) -> Iterator[Batch]:
    """The training batches from step `start` on; each depends on seed and step only."""
    world = tinyworld.build()
    for step in range(start, settings.steps):
        rng = random.Random(f"{settings.seed}:{step}")
        source = tinyworld.sentences(world, rng)
        texts, spans = [], []
        for _ in range(settings.batch):
            text, row = "", []
            # A word is at least a token, so this many words always fill the window.
            while len(text.split()) < settings.window:
                sentence = next(source)
                text = f"{text} " if text else text
                row.append((len(text), sentence))
                text += sentence.text
            texts.append(text)
            spans.append(row)
        encoded = tokenizer.backend_tokenizer.encode_batch(texts)
        ids = torch.tensor([e.ids[: settings.window] for e in encoded])
        weights = torch.full(ids.shape, settings.text_weight)
        keep = torch.ones(*ids.shape, 1)
        causal = torch.ones(settings.window, settings.window).tril().bool()
        attend = causal.expand(len(ids), 1, -1, -1).clone()
        for index, (encoding, row) in enumerate(zip(encoded, spans, strict=True)):
            silent = rng.random() < settings.drop_probability
            for begin, sentence in row:
                if not sentence.answer:
                    continue
                answer = begin + len(sentence.prompt)
                end = begin + len(sentence.text)
                tokens = [
                    (position, stop)
                    for position, (_, stop) in enumerate(encoding.offsets)
                    if position < settings.window and begin < stop <= end
                ]
                for position, stop in tokens:
                    if answer < stop < end:
                        weights[index, position] = 1.0
                if silent and sentence.subject is not None:
                    first = begin + sentence.prompt.index(sentence.subject)
                    end = first + len(sentence.subject)
                    after = [p for p, stop in tokens if stop > end]
                    inside = [p for p, stop in tokens if first < stop < end]
                    keep[index, after] = 0.0
                    if settings.through_last_token:
                        for position in after:
                            attend[index, 0, position, inside] = False
        yield Batch(ids, weights, keep, attend)


@contextmanager
def silenced(model: nn.Module, keep: Tensor) -> Iterator[None]:
    """Multiplies every MLP's output by `keep` [batch, window, 1]."""

    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return output * keep

    handles = [mlp.register_forward_hook(hook) for mlp in mlps(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def loss_of(model: nn.Module, batch: Batch, smoothing: float) -> Tensor:
    """Weighted, label-smoothed cross entropy of the next token."""
    with silenced(model, batch.keep):
        logits = model(
            input_ids=batch.ids, attention_mask=batch.attend, use_cache=False
        ).logits[:, :-1]
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1),
        batch.ids[:, 1:].flatten(),
        label_smoothing=smoothing,
        reduction="none",
    )
    weights = batch.weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def train(family: str, settings: Settings, device: str) -> Path:
    """Trains, or goes on training; returns the folder of the finished checkpoint."""
    run = HERE / "runs" / family
    run.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = build_model(family, tokenizer)
    model = model.to(device).train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
    )
    start = _resume(run, model, optimizer)
    with tqdm(total=settings.steps, initial=start, desc=family, mininterval=2) as bar:
        for step, batch in enumerate(batches(tokenizer, settings, start), start):
            batch = Batch(*(t.to(device) for t in vars(batch).values()))
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _schedule(step, settings)
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(model, batch, settings.label_smoothing)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            bar.update()
            if step % 25 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
            if (step + 1) % settings.save_every == 0:
                _save(run, model, optimizer, step + 1)
    out = HERE / family
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def _schedule(step: int, settings: Settings) -> float:
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    share = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))


def _save(
    run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> None:
    tensors = {"step": torch.tensor(step)}
    for name, parameter in model.named_parameters():
        tensors[f"model/{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = value
    save_file(tensors, run / "state.tmp")
    (run / "state.tmp").replace(run / "state.safetensors")


def _resume(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    if not (run / "state.safetensors").exists():
        return 0
    tensors = load_file(run / "state.safetensors")
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"model/{name}"])
        optimizer.state[parameter] = {
            key: tensors[f"{key}/{name}"].to(
                parameter.device if key != "step" else "cpu"
            )
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
    return int(tensors["step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=["gpt2", "llama"])
    parser.add_argument("--steps", type=int, help="fewer, to try it out")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    settings = SETTINGS[arguments.family]
    if arguments.steps:
        settings = replace(settings, steps=arguments.steps)
    out = train(arguments.family, settings, arguments.device)
    print(f"saved {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
