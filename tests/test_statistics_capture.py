from collections import Counter

import pytest
import torch
from statistics_helpers import LAYERS, MODULE, make_model
from torch import nn

from covariance_cache import CaptureError, capture_inputs, captured_inputs


def count_calls(model):
    calls = Counter()
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda *_, name=name: calls.update([name]),
        )
    return calls


def ids(batch=2, length=5):
    return torch.arange(batch * length).view(batch, length)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_captures_the_inputs_the_modules_get(kind):
    model = make_model(kind)
    names = [MODULE[kind].format(layer) for layer in range(LAYERS)]
    seen = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: seen.update({name: (args[0], output)})
        )
    model(ids())
    inputs = captured_inputs(model, reversed(names), lambda: model(ids()))
    assert list(inputs) == names  # in order of execution
    for name in names:
        assert torch.equal(inputs[name], seen[name][0])
        assert torch.equal(model.get_submodule(name)(inputs[name]), seen[name][1])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_stops_after_the_last_named_module(kind):
    model = make_model(kind)
    calls = count_calls(model)
    block = MODULE[kind].split(".mlp")[0]
    model(ids())
    assert calls[block.format(2)] == calls["lm_head"] == 1
    calls.clear()
    names = [MODULE[kind].format(layer) for layer in (1, 0)]
    captured_inputs(model, names, lambda: model(ids()))
    assert calls[block.format(0)] == 1
    # Layer 1 got as far as its own down-projection, which did not run.
    assert calls[f"{block.format(1)}.mlp.{'c_fc' if kind == 'gpt2' else 'up_proj'}"]
    assert not any(calls[name] for name in (names[0], block.format(2), "lm_head"))


def test_leaves_no_hook_behind_and_the_model_whole():
    model = make_model("gpt2")
    before = model(ids()).logits
    name = MODULE["gpt2"].format(0)
    captured_inputs(model, [name], lambda: model(ids()))
    with pytest.raises(ZeroDivisionError), capture_inputs(model, [name], print):
        raise ZeroDivisionError
    assert torch.equal(model(ids()).logits, before)
    assert not model.get_submodule(name)._forward_pre_hooks


def test_keeps_the_graph_when_gradients_are_on():
    model = make_model("gpt2")
    name = MODULE["gpt2"].format(1)
    keys = captured_inputs(model, [name], lambda: model(ids()))[name]
    keys.square().sum().backward()
    assert model.transformer.wte.weight.grad.abs().sum() > 0


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Bilinear(3, 3, 2)

    def forward(self, x, again=False):
        out = self.inner(input2=x, input1=x + 1)
        return self.inner(x, x) if again else out


def test_takes_the_first_tensor_also_by_keyword():
    model, x = ByKeyword(), torch.ones(4, 3)
    inputs = captured_inputs(model, ["inner"], lambda: model(x))
    assert torch.equal(inputs["inner"], x)


def test_unknown_names_list_near_ones():
    model = make_model("gpt2")
    with pytest.raises(CaptureError, match=r"mlp\.c_prj.*transformer\.h\.0\.mlp\.c_pr"):
        captured_inputs(model, ["transformer.h.0.mlp.c_prj"], lambda: model(ids()))
    with pytest.raises(CaptureError, match="no module was named"):
        captured_inputs(model, [], lambda: model(ids()))


def test_modules_that_never_run_or_run_twice_are_refused():
    model = make_model("gpt2")
    names = [MODULE["gpt2"].format(0), "lm_head"]
    with pytest.raises(CaptureError, match="never reached lm_head"):
        captured_inputs(model, names, lambda: model.transformer(ids()))
    with pytest.raises(CaptureError, match=r"c_proj ran twice before lm_head"):
        captured_inputs(
            model, names, lambda: [model.transformer(ids()) for _ in range(2)]
        )


def test_a_module_without_a_tensor_is_refused():
    class Wordy(nn.Module):
        def forward(self, text):
            return text

    model = nn.Sequential(Wordy())
    with pytest.raises(CaptureError, match="0 was called without a tensor"):
        captured_inputs(model, ["0"], lambda: model("words"))
