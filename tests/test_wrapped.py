"""Text decoders inside vision-language models: every type in `WRAPPERS` is edited as
plain families are, by text prompts without pictures, and its files are found by the
names that they have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import test_conformance as plain
import torch
import transformers
from families import (
    FAMILIES,
    FEW,
    LAYER,
    TOKENS,
    Built,
    Family,
    build,
    logits_of,
    statistics_of,
)
from model_kit import CONTEXTS, EDITS, TEXTS, assert_same_bits, make_tokenizer, state_of
from safetensors.torch import save_file
from test_target_families import CHOSEN, SETTINGS, keep_softmax_wide
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from benchmarks.plain_targets import plain_rows, plain_target
from covariance_cache import StatisticsStore, model_fingerprint
from covariance_cache.__main__ import app
from covariance_cache.modules import WRAPPERS
from unified_edit import applied, apply, export_lora, patch, revert
from unified_edit.checkpoint.sharded import Checkpoint
from unified_edit.doctor import examine
from unified_edit.errors import UnsupportedModel
from unified_edit.loading import Source, load_model
from unified_edit.model.adapter import ModelAdapter, resolve_architecture, text_config
from unified_edit.model.architectures import ARCHITECTURES
from unified_edit.model.targets import optimize_targets
from unified_edit.presets import PRESETS
from unified_edit.recipes import matching_preset

PROMPTS = [each.text for each in EDITS[:3]]
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
SQUARE = {**TOWER, "image_size": [16, 16], "patch_size": [8, 8]}
PIXTRAL = {**TOWER, "head_dim": 8}
SAM = {
    **TOWER,
    "output_channels": 8,
    "mlp_dim": 24,
    "window_size": 2,
    "global_attn_indexes": [0],
}
QWEN: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 24,
}
GLM = {**QWEN, "image_size": 16}
VQ = {
    "embed_dim": 4,
    "num_embeddings": 8,
    "latent_channels": 32,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "projection_dim": 24,
    "image_token_embed_dim": 24,
    "num_patches": 2,
}
RESAMPLER = {
    "hidden_size": 24,
    "resampler_n_latents": 2,
    "resampler_depth": 1,
    "resampler_n_heads": 2,
    "resampler_head_dim": 4,
    "num_key_value_heads": 1,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1]}


@dataclass(frozen=True)
class Wrapped(Family):
    """A type that wraps a text decoder, and how to make a small one."""

    wrapper: str = ""
    around: dict[str, Any] = field(default_factory=dict)
    """Of its config, besides the text decoder's."""

    def configure(self, **settings: Any) -> Any:
        if self.wrapper not in CONFIG_MAPPING:
            pytest.skip(f"transformers {transformers.__version__} has none")
        text = {"model_type": self.model_type, **settings}
        return AutoConfig.for_model(self.wrapper, text_config=text, **self.around)


def _around(text: str, tower: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Settings of a wrapper around a family that is also tested alone."""
    known = vars(FAMILIES[text])
    return {**known, "around": {"vision_config": tower, **more}}


def _only_inside(text: str, tower: dict[str, Any], **config: Any) -> dict[str, Any]:
    """Of one around a decoder that exists only there."""
    rope = {"rope_parameters": {**ROPE, **config.pop("rope", {})}}
    around = {"vision_config": tower}
    return {"model_type": text, "config": {**rope, **config}, "around": around}


WRAPPED = {
    name: Wrapped(wrapper=name, **settings)
    for name, settings in {
        "aya_vision": _around("cohere2", TOWER),
        "cohere2_vision": _around("cohere2", TOWER, alignment_intermediate_size=16),
        "deepseek_vl": _around("llama", TOWER),
        "deepseek_vl_hybrid": _around("llama", TOWER, high_res_vision_config=SAM),
        "gemma3": _around("gemma3_text", TOWER, mm_tokens_per_image=4),
        "glm46v": _only_inside("glm4v_text", GLM, rope={"partial_rotary_factor": 1.0}),
        "glm4v": _only_inside("glm4v_text", GLM, rope={"partial_rotary_factor": 1.0}),
        "got_ocr2": _around("qwen2", SAM),
        "idefics2": _around("mistral", TOWER, perceiver_config=RESAMPLER),
        "idefics3": _around("llama", TOWER),
        "internvl": _around("qwen2", SQUARE),
        "janus": _around("llama", {**TOWER, "projection_dim": 24}, vq_config=VQ),
        "lighton_ocr": _around("qwen3", PIXTRAL),
        "llava": _around("llama", TOWER),
        "llava_next": _around("mistral", TOWER),
        "llava_next_video": _around("llama", TOWER),
        "llava_onevision": _around("qwen2", TOWER),
        "mistral3": _around("mistral", PIXTRAL),
        "ovis2": _around(
            "qwen2", {**TOWER, "vocab_size": 20}, vocab_size=360, hidden_size=24
        ),
        "qwen2_5_vl": _only_inside("qwen2_5_vl_text", QWEN),
        "qwen2_vl": _only_inside(
            "qwen2_vl_text", {**QWEN, "embed_dim": 16, "hidden_size": 24}
        ),
        "qwen3_vl": _only_inside(
            "qwen3_vl_text",
            {**QWEN, "num_position_embeddings": 4, "deepstack_visual_indexes": [0]},
            head_dim=6,
        ),
        "smolvlm": _around("llama", TOWER),
        "video_llava": _around("llama", TOWER),
        "vipllava": _around("llama", TOWER, vision_feature_layer=[-1]),
    }.items()
}
_LLAVA = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", ""),
)
_QWEN = (("model.language_model.", "model."), ("model.visual.", "visual."))
OLDER: dict[str, tuple[tuple[str, str], ...]] = {
    **dict.fromkeys(
        (
            *("aya_vision", "gemma3", "got_ocr2", "internvl", "llava", "llava_next"),
            *("llava_next_video", "llava_onevision", "mistral3", "video_llava"),
            "vipllava",
        ),
        _LLAVA,
    ),
    **dict.fromkeys(("qwen2_5_vl", "qwen2_vl"), _QWEN),
}
"""What names begin with in models, and in files of older versions of transformers:
most of those that are published. Newer ones read them, and some write them."""
LOOPED = ("gemma3", "glm4v", "qwen2_5_vl", "qwen2_vl", "qwen3_vl")
"""That make attention masks or positions of several dimensions themselves."""


@pytest.fixture(scope="module", params=WRAPPED)
def wrapped(request: Any, tmp_path_factory: Any) -> Built:
    folder = tmp_path_factory.mktemp("model")
    return build(WRAPPED[request.param], folder, layers=FEW)


def test_every_wrapper_is_tried_and_every_decoder_that_only_they_have() -> None:
    assert list(WRAPPED) == list(WRAPPERS) == sorted(WRAPPERS)
    inside = {name for name, record in ARCHITECTURES.items() if not record.alone}
    assert inside <= {family.model_type for family in WRAPPED.values()}


def test_it_resolves_to_its_text_decoder(wrapped: Built) -> None:
    family, adapter = wrapped.family, wrapped.adapter
    assert isinstance(family, Wrapped)
    assert wrapped.model.config.model_type == family.wrapper
    assert adapter.architecture.model_type == adapter.config.model_type
    assert adapter.config.model_type == family.model_type
    assert adapter.layer_count == FEW
    text = wrapped.model.get_submodule(WRAPPERS[family.wrapper])
    assert adapter.block(LAYER) is text.layers[LAYER]
    assert adapter.down_projection(LAYER) is text.layers[LAYER].mlp.down_proj
    assert adapter.head is wrapped.model.lm_head
    # Weights that loading drops would make the files another model than what they load.
    assert not wrapped.model._keys_to_ignore_on_load_unexpected
    assert wrapped.statistics[LAYER].provenance.module == adapter.key_module(LAYER)
    if not adapter.architecture.alone:
        plain.test_the_record_says_what_the_model_does(wrapped)


def test_keys_and_statistics_are_what_plain_passes_show(wrapped: Built) -> None:
    plain.test_keys_are_what_plain_passes_show(wrapped)
    plain.test_statistics_are_what_plain_passes_show(wrapped)


def test_edits_reach_their_values_and_make_targets_likelier(wrapped: Built) -> None:
    site = wrapped.adapter.target_site("block_output")
    plain.test_an_equality_edit_reaches_its_values(wrapped, site)
    plain.test_an_edit_makes_its_target_likelier(wrapped)


def layouts(built: Built, folder: Path) -> dict[str, Path]:
    """Folders of the model by the edited weight's name there, `{}` for the layer: as
    transformers saves it, and with the names of newer or older files."""
    family, state = built.family, dict(built.model.state_dict())
    assert isinstance(family, Wrapped)
    if _tied(built.model):
        del state["lm_head.weight"]
    saved = Checkpoint.open(built.folder).tensors
    found = {}
    for pairs in ((), OLDER.get(family.wrapper, ())):
        edited = _older(f"{built.adapter.architecture.down_projection}.weight", pairs)
        found[edited] = built.folder
        if edited.format(LAYER) not in saved:
            found[edited] = folder / "otherwise"
            shutil.copytree(built.folder, found[edited])
            tensors = {_older(name, pairs): tensor for name, tensor in state.items()}
            file = found[edited] / "model.safetensors"
            save_file(tensors, file, {"format": "pt"})
    assert built.folder in found.values()
    return found


def _older(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    for begin, older in pairs:
        if name.startswith(begin):
            return older + name.removeprefix(begin)
    return name


def _tied(model: Any) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head.weight is embedding.weight


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_files_are_edited_by_the_names_they_have(
    wrapped: Built, tmp_path: Path
) -> None:
    model, tokenizer = wrapped.model, wrapped.tokenizer
    update = wrapped.edit(EDITS[:1], steps=2).update
    before = state_of(model)
    with applied(model, update):
        live = logits_of(model, PROMPTS, tokenizer)
    assert_same_bits(model, before)
    kept = tmp_path / "statistics"
    StatisticsStore(kept).save(wrapped.statistics[LAYER])
    for tensor, folder in layouts(wrapped, tmp_path).items():
        report = examine(str(folder), kept)
        assert report.supported and report.problems == ()
        assert report.model_type == model.config.model_type
        assert report.fingerprint == model_fingerprint(model)
        assert report.weights is not None
        assert report.weights.tensor == tensor
        assert report.weights.layers == FEW

        base = Checkpoint.open(folder)
        sums = base.sha256()
        patched = patch(folder, update, out=tmp_path / f"{folder.name}-patched")
        assert patched.verify().ok
        assert Checkpoint.open(patched.path).tensors.keys() == base.tensors.keys()
        again = load_model(patched.path, model.config, "auto", "cpu")
        assert torch.equal(logits_of(again, PROMPTS, tokenizer), live)
        revert(patched.path)
        assert Checkpoint.open(patched.path).sha256() == sums

    adapter = export_lora(update, tmp_path / "adapter", base=wrapped.folder)
    again.load_state_dict(before)
    adapted = peft.PeftModel.from_pretrained(again, adapter.folder)
    error = (logits_of(adapted, PROMPTS, tokenizer) - live).abs().max()
    assert float(error) < 1e-4 * float(live.abs().max())


@pytest.mark.parametrize("name", LOOPED)
def test_targets_equal_the_plain_loop(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = WRAPPED[name]
    model, tokenizer = family.make(), make_tokenizer("llama")
    adapter = ModelAdapter.of(model)
    keep_softmax_wide(monkeypatch)
    sites = sorted({adapter.target_site("block_output"), "mlp_output"})
    settings = [replace(SETTINGS, site=site) for site in sites]
    found = [
        optimize_targets(adapter, tokenizer, CHOSEN, CONTEXTS, LAYER, each)
        for each in settings
    ]
    for each, targets in zip(settings, found, strict=True):
        module = adapter.site(each.site, LAYER)
        for index, edit in enumerate(CHOSEN):
            rows = plain_rows(tokenizer, edit, CONTEXTS, each)
            loop = plain_target(model, module, rows, each)
            expected = loop.value - loop.initial
            delta = targets.values[index] - targets.initial[index]
            size = float(expected.norm())
            assert size > 0.3
            assert float((delta - expected).norm()) / size < family.tolerance
            probability = pytest.approx(loop.probabilities[-1], rel=family.tolerance)
            assert float(targets.probability[index]) == probability


def test_files_of_the_body_alone(tmp_path: Path) -> None:
    """Without the head, which is the embedding."""
    built = build(WRAPPED["lighton_ocr"], tmp_path / "model", layers=FEW)
    (built.folder / "model.safetensors").unlink()
    built.model.model.save_pretrained(built.folder)
    assert f"language_model.layers.{LAYER}.mlp.down_proj.weight" in (
        Checkpoint.open(built.folder).tensors
    )
    update = built.edit(steps=3).update
    path = patch(built.folder, update, out=tmp_path / "patched").path
    again, _ = Source.of(str(path)).load("auto", "cpu")
    with applied(built.model, update):
        assert_same_bits(again, state_of(built.model))


def test_half_precision(tmp_path: Path) -> None:
    family, half = WRAPPED["qwen2_5_vl"], torch.bfloat16
    built = build(family, tmp_path / "model", dtype=half, layers=FEW)
    update = built.edit(steps=3).update
    path = patch(built.folder, update, out=tmp_path / "patched").path
    again, _ = Source.of(str(path)).load("auto", "cpu")
    apply(built.model, update)
    assert_same_bits(again, state_of(built.model))


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_its_decoder_alone_gets_the_same_edit(name: str, tmp_path: Path) -> None:
    """Saved without the rest, where the head is the embedding, or with its head."""
    whole = build(WRAPPED[name], tmp_path / "whole", save=False, layers=FEW)
    text = whole.model.get_submodule(WRAPPERS[name])
    if not _tied(whole.model):
        alone = AutoModelForCausalLM.from_config(whole.adapter.config)
        alone.base_model.load_state_dict(text.state_dict())
        alone.lm_head.load_state_dict(whole.model.lm_head.state_dict())
        text = alone
    folder = tmp_path / "alone"
    text.save_pretrained(folder)
    whole.tokenizer.save_pretrained(folder)
    model, tokenizer = Source.of(str(folder)).load("auto", "cpu")
    statistics = statistics_of(model, tokenizer)
    moments = [each[LAYER].second_moment for each in (statistics, whole.statistics)]
    assert torch.equal(*moments)
    family = FAMILIES[whole.family.model_type]
    decoder = Built(family, model, tokenizer, statistics, folder)
    update = decoder.edit(steps=3).update
    ((address, change),) = update
    ((inside, expected),) = whole.edit(steps=3).update
    assert inside.tensor == address.tensor.replace("model", WRAPPERS[name], 1)
    assert torch.equal(change.dense(), expected.dense())

    path = patch(folder, update, out=tmp_path / "patched").path
    again, _ = Source.of(str(path)).load("auto", "cpu")
    with applied(model, update):
        assert_same_bits(again, state_of(model))


def test_a_decoder_that_only_others_have_is_refused_alone() -> None:
    config = AutoConfig.for_model("qwen2_vl_text")
    with pytest.raises(UnsupportedModel, match="'qwen2_vl_text' is a part of another"):
        resolve_architecture(config)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("qwen2_moe", "is a mixture of experts"),
        ("jamba", "mixes tokens by state-space"),
        ("bert", "is an encoder"),
        ("longformer", "is not in the architecture table"),
    ],
)
def test_other_decoders_are_refused_by_name_and_reason(
    model_type: str, reason: str
) -> None:
    config = AutoConfig.for_model("llava", text_config={"model_type": model_type})
    with pytest.raises(UnsupportedModel, match=f"'{model_type}' in 'llava' {reason}"):
        resolve_architecture(config)


@pytest.mark.parametrize("part", [False, True])
def test_a_quantized_one_is_refused(part: bool) -> None:
    config = AutoConfig.for_model("llava")
    quantized = config.text_config if part else config
    quantized.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(UnsupportedModel, match=r"quantized \(gptq\)"):
        resolve_architecture(config)


@pytest.mark.parametrize("wrapper", ["llava", "idefics3"])
def test_presets_are_of_the_text_decoder(wrapper: str) -> None:
    preset = PRESETS["llama-3-8b"]
    text = {
        "model_type": "llama",
        "num_hidden_layers": preset.layers,
        "hidden_size": preset.d_value,
        "vocab_size": preset.vocabulary,
    }
    config = AutoConfig.for_model(wrapper, text_config=text)
    assert matching_preset(config) == "llama-3-8b"
    config.text_config.num_hidden_layers = 3
    assert matching_preset(config) is None


@pytest.mark.parametrize("wrapper", ["qwen2_5_vl", "qwen2_vl"])
def test_a_flat_config_has_its_text_decoder(wrapper: str, tmp_path: Path) -> None:
    """As the first of these were published: the decoder's settings are the whole's."""
    settings = {"model_type": wrapper, "num_hidden_layers": 3, "hidden_size": 24}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = AutoConfig.from_pretrained(tmp_path)
    assert resolve_architecture(config).model_type == f"{wrapper}_text"
    text = text_config(config)
    assert (text.num_hidden_layers, text.hidden_size) == (3, 24)


def test_statistics_by_command(tmp_path: Path) -> None:
    built = build(WRAPPED["llava"], tmp_path / "model", layers=FEW)
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "statistics"
    corpus.write_text("".join(json.dumps({"text": each}) + "\n" for each in TEXTS))
    command = ["collect", str(built.folder), "--corpus", str(corpus)]
    command += ["--layers", str(LAYER), "--tokens", str(TOKENS), "--window", "48"]
    result = CliRunner().invoke(app, [*command, "--out", str(out)])
    assert result.exit_code == 0, result.output
    found = StatisticsStore(out).open(LAYER)
    assert torch.equal(found.second_moment, built.statistics[LAYER].second_moment)
    assert examine(str(built.folder), out).problems == ()
