import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from statistics_helpers import LAYERS, MODULE, TEXTS, make_model, make_tokenizer

from covariance_cache import (
    CaptureError,
    CorpusError,
    CorpusExhausted,
    NonFiniteActivations,
    StatisticsError,
    StatisticsMismatch,
    collect,
    model_fingerprint,
    tokenizer_fingerprint,
)
from covariance_cache.checkpoint import Checkpoint
from covariance_cache.corpus import Documents, packed_windows

KINDS = ["gpt2", "llama"]
TOKENS = 1000


def gather(model, layers=range(LAYERS), corpus=TEXTS, **settings):
    settings = {"tokens": TOKENS, "window": 32, "batch_size": 4} | settings
    tokenizer = settings.pop("tokenizer", make_tokenizer(bos=True))
    return collect(model, tokenizer, corpus, layers, progress=False, **settings)


def brute_force(model, kind, layer, tokenizer, seed=0):
    """Full forwards, one window at a time; every key kept, summed in float64."""
    keys = []
    name = MODULE[kind].format(layer)
    handle = model.get_submodule(name).register_forward_hook(
        lambda _, args, __: keys.append(args[0].double())
    )
    windows = packed_windows(
        tokenizer, Documents(TEXTS, seed=seed), length=32, budget=TOKENS
    )
    with torch.no_grad():
        for window in windows:
            model(input_ids=torch.tensor([window.ids]))
    handle.remove()
    rows = torch.cat([each[0] for each in keys])
    return rows.T @ rows / len(rows), len(rows)


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[layer].second_moment, other[layer].second_moment)
        and one[layer].count == other[layer].count
        and one[layer].provenance == other[layer].provenance
        for layer in one
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bos", [False, True])
def test_equals_a_float64_brute_force(kind, bos):
    model, tokenizer = make_model(kind), make_tokenizer(bos=bos)
    found = gather(model, tokenizer=tokenizer)
    assert list(found) == [0, 1, 2]
    for layer, statistics in found.items():
        expected, count = brute_force(model, kind, layer, tokenizer)
        assert statistics.count == count == TOKENS
        error = (statistics.second_moment.double() - expected).norm()
        assert error < 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_equals_a_pass_per_layer(kind):
    model = make_model(kind)
    together = gather(model)
    for layer in range(LAYERS):
        assert same(gather(model, [layer]), {layer: together[layer]})


def test_the_first_position_is_in_the_mean_in_its_proportion():
    # With a window of 4, a quarter of all keys are at BOS, all of them the same.
    model, tokenizer = make_model("llama"), make_tokenizer(bos=True)
    short = gather(model, [0], window=4)[0]
    first = brute_force_first_key(model, tokenizer.bos_token_id)
    rest = 4 / 3 * (short.second_moment - torch.outer(first, first) / 4)
    assert torch.linalg.eigvalsh(rest.double()).min() > -1e-9
    assert not torch.allclose(rest, short.second_moment)


def brute_force_first_key(model, token):
    keys = []
    handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda _, args: keys.append(args[0][0, 0])
    )
    with torch.no_grad():
        model(input_ids=torch.tensor([[token]]))
    handle.remove()
    return keys[0]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batch_size_changes_only_rounding(batch_size):
    model = make_model("llama")
    expected = gather(model)
    for layer, found in gather(model, batch_size=batch_size).items():
        assert found.provenance == expected[layer].provenance
        torch.testing.assert_close(
            found.second_moment, expected[layer].second_moment, rtol=1e-5, atol=1e-9
        )


def test_the_same_inputs_give_the_same_statistics_and_the_seed_matters():
    model = make_model("gpt2")
    once = gather(model)
    state = torch.random.get_rng_state()
    assert same(once, gather(model))
    assert torch.equal(state, torch.random.get_rng_state())
    other = gather(model, seed=1)
    assert not torch.equal(other[0].second_moment, once[0].second_moment)
    fingerprints = {each[0].provenance.corpus_fingerprint for each in (once, other)}
    assert len(fingerprints) == 2


def test_files_lists_and_iterators_give_the_same(tmp_path):
    model = make_model("gpt2")
    texts = [text.strip() for text in TEXTS]
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("\n\n".join(texts))
    lines.write_text("\n".join(json.dumps({"t": text}) for text in texts))
    expected = gather(model, corpus=texts)
    assert same(gather(model, corpus=plain), expected)
    assert same(gather(model, corpus=str(lines), field="t"), expected)
    unshuffled = gather(model, corpus=texts, seed=None)
    assert same(gather(model, corpus=iter(texts), seed=None), unshuffled)


@pytest.mark.parametrize("kind", KINDS)
def test_forwards_stop_after_the_last_layer(kind):
    model = make_model(kind)
    calls = dict.fromkeys([0, 1, 2, "head"], 0)

    def count(key):
        calls[key] += 1

    blocks = model.transformer.h if kind == "gpt2" else model.model.layers
    for layer, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, key=layer: count(key))
    model.lm_head.register_forward_pre_hook(lambda *_: count("head"))
    gather(model, [0, 1])
    # 31 full windows and a rest: 8 batches and the short one, and one for the widths.
    assert calls == {0: 10, 1: 10, 2: 0, "head": 0}


def test_the_budget_is_ten_tokens_a_dimension_unless_given():
    found = gather(make_model("llama"), [1], tokens=None)
    assert found[1].d_key == 40
    assert found[1].count == 400


def test_provenance_says_what_was_used():
    model, tokenizer = make_model("gpt2"), make_tokenizer()
    found = gather(model, [2], tokenizer=tokenizer, seed=4)[2]
    assert found.layer == 2
    source = found.provenance
    assert source.module == "transformer.h.2.mlp.c_proj"
    assert source.model_fingerprint == model_fingerprint(model)
    assert source.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)
    assert (source.window, source.seed, source.model_dtype) == (32, 4, "float32")


def test_the_model_is_left_as_it_was():
    model = make_model("gpt2").train()
    model.transformer.h[1].eval()
    flags = [module.training for module in model.modules()]
    before = model_fingerprint(model)
    gather(model)
    with pytest.raises(CorpusError):
        gather(model, corpus=[])
    assert [module.training for module in model.modules()] == flags
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model_fingerprint(model) == before
    # Dropout was off: the statistics are those of the model in evaluation mode.
    assert same(gather(model, [0]), gather(model.eval(), [0]))


def test_half_precision_and_double_precision_models():
    model = make_model("llama")
    expected = gather(model, [1])[1]
    half = gather(make_model("llama").bfloat16(), [1])[1]
    double = gather(make_model("llama").double(), [1])[1]
    assert half.second_moment.dtype == torch.float32
    assert half.provenance.model_dtype == "bfloat16"
    assert double.second_moment.dtype == torch.float64
    scale = expected.second_moment.norm()
    assert (half.second_moment - expected.second_moment).norm() < 0.1 * scale
    assert (double.second_moment - expected.second_moment).norm() < 1e-5 * scale


class Killed(BaseException):
    """What ends a run between two instructions."""


def killed_after(model, forwards):
    """The model, which dies in the midst of a later forward."""
    left = forwards + 1  # one forward finds the widths

    def die(*_):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed

    return model.transformer.h[1].register_forward_pre_hook(die)


@pytest.mark.parametrize("forwards", [0, 1, 2, 5, 7, 8])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, forwards, every):
    model = make_model("gpt2")
    expected = gather(model)
    settings = {"checkpoint_dir": tmp_path, "checkpoint_every": every}
    handle = killed_after(model, forwards)
    with pytest.raises(Killed):
        gather(model, **settings)
    handle.remove()
    assert (tmp_path / Checkpoint.NAME).exists() == (forwards >= every)
    calls = []
    handle = model.transformer.h[0].register_forward_hook(lambda *_: calls.append(1))
    resumed = gather(model, **settings)
    handle.remove()
    assert same(resumed, expected)
    assert len(calls) - 1 == 9 - forwards // every * every  # no batch done twice
    assert list(tmp_path.iterdir()) == []


def test_an_iterator_resumes_when_given_anew(tmp_path):
    model = make_model("gpt2")
    settings = {"checkpoint_dir": tmp_path, "checkpoint_every": 2, "seed": None}
    handle = killed_after(model, 5)
    with pytest.raises(Killed):
        gather(model, corpus=iter(TEXTS), **settings)
    handle.remove()
    resumed = gather(model, corpus=iter(TEXTS), **settings)
    assert same(resumed, gather(model, seed=None))


@pytest.fixture
def interrupted(tmp_path):
    model = make_model("gpt2")
    handle = killed_after(model, 5)
    with pytest.raises(Killed):
        gather(model, checkpoint_dir=tmp_path, checkpoint_every=2)
    handle.remove()
    return model, tmp_path


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"tokens": 900}, "tokens: 1000 there, 900 now"),
        ({"window": 16}, "window: 32 there, 16 now"),
        ({"batch_size": 8}, "batch_size: 4 there, 8 now"),
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"layers": [0, 1]}, "module of layer 2: transformer.h.2.mlp.c_proj there"),
        ({"tokenizer": make_tokenizer()}, "tokenizer_fingerprint: "),
        ({"corpus": [text + "!" for text in TEXTS]}, "text is not the one"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(interrupted, changed, named):
    model, folder = interrupted
    before = (folder / Checkpoint.NAME).read_bytes()
    with pytest.raises(StatisticsMismatch, match=named):
        gather(model, checkpoint_dir=folder, **changed)
    assert (folder / Checkpoint.NAME).read_bytes() == before


def test_a_checkpoint_of_another_model_is_refused(interrupted):
    with pytest.raises(StatisticsMismatch, match="model_fingerprint: "):
        gather(make_model("gpt2", seed=1), checkpoint_dir=interrupted[1])


def tampered(path, change):
    with safe_open(str(path), "pt") as file:
        header = json.loads(file.metadata()["covariance_cache"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    change(header, tensors)
    save_file(tensors, path, metadata={"covariance_cache": json.dumps(header)})


@pytest.mark.parametrize(
    "change",
    [
        lambda header, tensors: tensors["1/total"].mul_(2),
        lambda header, tensors: tensors["0/count"].add_(1),
        lambda header, tensors: tensors.pop("0/count"),
        lambda header, tensors: header["cursor"].update(used=0),
        lambda header, tensors: header.pop("cursor"),
        lambda header, tensors: header.update(format="another"),
    ],
)
def test_a_tampered_checkpoint_is_refused(interrupted, change):
    model, folder = interrupted
    tampered(folder / Checkpoint.NAME, change)
    with pytest.raises(StatisticsError, match="damaged|format"):
        gather(model, checkpoint_dir=folder)


def test_a_truncated_checkpoint_is_refused(interrupted):
    model, folder = interrupted
    path = folder / Checkpoint.NAME
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StatisticsError, match="cannot be read"):
        gather(model, checkpoint_dir=folder)


def test_non_finite_keys_stop_with_layer_and_place_in_the_text(tmp_path):
    model, tokenizer = make_model("llama"), make_tokenizer()
    letter = tokenizer("Q")["input_ids"][0]
    ids = []
    model.model.embed_tokens.register_forward_pre_hook(
        lambda _, args: ids.append(args[0])
    )
    model.model.layers[1].mlp.act_fn.register_forward_hook(
        lambda *args: args[-1].masked_fill(ids[-1][..., None] == letter, torch.inf)
    )
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(["nothing wrong here. " * 5] * 3 + ["then Q comes"]))
    with pytest.raises(NonFiniteActivations) as caught:
        gather(model, [1, 2], path, tokenizer=tokenizer, seed=None)
    # 303 tokens come before the last document: the letter is token 308 of the text.
    assert "layer 1 (model.layers.1.mlp.down_proj)" in str(caught.value)
    assert f"token {308 % 32} of the window" in str(caught.value)
    assert f"{path}, line 7" in str(caught.value)


def test_a_text_that_is_too_short_is_told():
    with pytest.warns(CorpusExhausted, match="after 13 of 1000 tokens"):
        found = gather(make_model("gpt2"), [0], ["hello", "world"])
    assert found[0].count == 13
    with pytest.raises(CorpusError, match="no tokens"):
        gather(make_model("gpt2"), corpus=["", ""])


def test_layers_and_modules_that_do_not_exist_are_refused():
    model = make_model("gpt2")
    with pytest.raises(StatisticsError, match="layer 3 does not exist.* 0 to 2"):
        gather(model, [1, 3])
    with pytest.raises(StatisticsError, match="layer -1 does not exist"):
        gather(model, [-1])
    with pytest.raises(StatisticsError, match="no layer"):
        gather(model, [])
    with pytest.raises(CaptureError, match="no module 'h.0'"):
        gather(model, {0: "h.0"})
    with pytest.raises(StatisticsError, match="two layers name one module"):
        gather(model, dict.fromkeys([0, 1], "transformer.h.0.mlp.c_proj"))


def test_an_unknown_architecture_needs_its_modules_named():
    model = make_model("gpt2")
    expected = gather(model, [0, 2])
    model.config.model_type = "novel"
    with pytest.raises(StatisticsError, match="'novel' is not known.*explicitly"):
        gather(model, [0])
    modules = {layer: f"transformer.h.{layer}.mlp.c_proj" for layer in (2, 0)}
    assert same(gather(model, modules), expected)


@pytest.mark.parametrize("name", ["tokens", "window", "batch_size", "checkpoint_every"])
def test_settings_out_of_range_are_refused(name):
    with pytest.raises(StatisticsError, match=f"{name} must be at least 1, got 0"):
        gather(make_model("gpt2"), **{name: 0})


def test_the_window_is_bounded_by_the_model_not_chosen_by_it():
    with pytest.raises(StatisticsError, match="window of 65 .* 64 positions"):
        gather(make_model("gpt2"), window=65)
    # This one claims a million positions; inputs stay as long as the window.
    model, lengths = make_model("llama"), set()
    assert model.config.max_position_embeddings == 1_000_000
    model.model.embed_tokens.register_forward_pre_hook(
        lambda _, args: lengths.add(args[0].shape[1])
    )
    gather(model)
    assert max(lengths) == 32


def test_a_tokenizer_of_another_model_is_refused():
    model = make_model("gpt2")
    model.resize_token_embeddings(100)
    with pytest.raises(CorpusError, match=r"token id \d+, but .* 100 embeddings"):
        gather(model)


def test_the_bar_says_what_it_is_doing(capsys):
    collect(make_model("gpt2"), make_tokenizer(), TEXTS, [0], tokens=64, window=32)
    assert "collecting key statistics" in capsys.readouterr().err
    gather(make_model("gpt2"), [0])
    assert capsys.readouterr().err == ""
