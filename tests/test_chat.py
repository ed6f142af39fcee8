"""Prompts in a chat template: found frames, ids, positions, and every stage of an edit
through the same one."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_kit import RECORDS, Workplace, answer, make_workplace, refusal
from model_kit import (
    CONTEXTS,
    EDITS,
    Tiny,
    block_of,
    key_of,
    make_tokenizer,
    mlp_of,
    outputs_of,
    target_ids,
)
from test_ledger import begin
from tokenizer_kit import STYLES, Pieces, styled_tokenizer
from transformers import AutoTokenizer

from unified_edit.algebra.update import UpdateSet
from unified_edit.edits import Edit
from unified_edit.engine import edit
from unified_edit.errors import LedgerError, PromptError, RecipeError
from unified_edit.evaluate.counterfact import evaluate_counterfact
from unified_edit.ledger import Ledger
from unified_edit.live import applied
from unified_edit.model.frames import PLAIN, Frame, chat_frame
from unified_edit.model.keys import hidden_at_subjects, keys_at_subjects
from unified_edit.model.prompts import (
    Contexts,
    ContextSettings,
    continuations,
    generate_contexts,
    in_contexts,
    subject_prompts,
)
from unified_edit.model.rows import make_rows
from unified_edit.model.scoring import generate, score
from unified_edit.model.targets import optimize_targets
from unified_edit.recipes import Recipe, in_chat, recipe
from unified_edit.target_cache import TargetCache

TEXTUAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "Q: {{ m.content }}\nA:{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
"""Turns as text; an answer begins after a space."""
MARKED = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""Turns between special tokens, as Phi-3's."""
SAYINGS = [
    *("Ada Lovelace lives in", "assistant", "user", "Q: A:", "it's {} {{ x }} {% y %}"),
    *("a\nb\n\nc", "\"<b>\" & 'c' \\n", "李 🦊 e\u0301", "100%", "/end/ [INST]"),
]


def chatty(style: str, template: str, *, bos: bool = False, eos: bool = False) -> Any:
    """A styled tokenizer with a template; `bos`, `eos`: what it adds to plain texts."""
    tokenizer = styled_tokenizer(style, bos=bos, eos=eos)
    if template == MARKED:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]}
        )
    tokenizer.chat_template = template
    return tokenizer


def in_chat_of(tiny: Tiny) -> Tiny:
    """The same model with a tokenizer that has a template, of known tokens."""
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = TEXTUAL
    return replace(tiny, tokenizer=tokenizer)


def rendered(tokenizer: Any, text: str, said: str | None = None) -> list[int]:
    """Ids of a question, or of a question and its answer, by transformers."""
    turns = [{"role": "user", "content": text}]
    if said is not None:
        turns.append({"role": "assistant", "content": said})
    found = tokenizer.apply_chat_template(turns, add_generation_prompt=said is None)
    ids: list[int] = found["input_ids"]
    return ids


# The frame


@pytest.mark.parametrize("template", [TEXTUAL, MARKED], ids=["textual", "marked"])
@pytest.mark.parametrize("style", STYLES)
def test_ids_are_the_templates(style: str, template: str) -> None:
    """Of a question, and of an answer after it; BOS stands there once, what the
    tokenizer adds to plain texts does not count."""
    for bos, eos in ((False, False), (True, True)):
        tokenizer = chatty(style, template, bos=bos, eos=eos)
        frame = chat_frame(tokenizer)
        assert frame.joint == (" " if template == TEXTUAL else "")
        framed = [frame.around(text) for text in SAYINGS]
        for target in ("Oslo", "the cello 李"):
            pairs = continuations(tokenizer, framed, [target] * len(framed), frame)
            for text, (ids, said) in zip(SAYINGS, pairs, strict=True):
                assert list(ids) == rendered(tokenizer, text)
                assert ids.count(tokenizer.bos_token_id) == 1
                both = rendered(tokenizer, text, target)
                assert [*ids, *said] == both[: len(ids) + len(said)]
                ending = tokenizer.decode(both[len(ids) + len(said) :]).split()
                assert ending in (["</s>"], ["<|end|>"])


@pytest.mark.parametrize("template", [TEXTUAL, MARKED], ids=["textual", "marked"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("subject", ["Ada Lovelace", "user", "A", "Q", "end", "李🦊"])
def test_the_subject_is_the_messages_not_the_templates(
    style: str, template: str, subject: str
) -> None:
    """Its words may be the template's too; counted from the prompt, not searched."""
    tokenizer = chatty(style, template)
    frame = chat_frame(tokenizer)
    for prompt in ("{} lives in", "they like {}", "({})", "user Q {} end A"):
        filled = in_contexts(Contexts(("{}", "A letter. {}"), frame), prompt, subject)
        for (text, end), each in zip(
            filled, subject_prompts(tokenizer, filled, frame), strict=True
        ):
            assert text.startswith(frame.before) and text.endswith(frame.after)
            # After the subject's tokens stands what follows it, and nothing of it.
            rest = tokenizer.decode(each.ids[each.subject_end + 1 :])
            with_it = tokenizer.decode(each.ids[each.subject_end :])
            following = "".join(text[end:].split())
            assert "".join(rest.split()) in following
            assert len(following) - len("".join(rest.split())) <= 2
            assert "".join(with_it.split()) not in following


def test_a_rendered_bos_is_not_doubled() -> None:
    tokenizer = chatty("metaspace", MARKED, bos=True)
    text = chat_frame(tokenizer).around("Ada lives in")
    assert text.startswith("<s><|user|>")
    assert tokenizer(text)["input_ids"][:2] == [1, 1]  # the naive way
    ((ids, _),) = continuations(tokenizer, [text], ["Oslo"], chat_frame(tokenizer))
    assert ids[0] == 1 and 1 not in ids[1:]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0].content }}", Frame(special=False, joint="")),
        (  # strips, which is harmless
            "[{{ messages[0].content | trim }}]",
            Frame("[", "]", "", special=False),
        ),
        (  # takes no answers
            "{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}"
            "<{{ messages[0].content }}>",
            Frame("<", ">", "", special=False),
        ),
        (  # an empty thought stands before an answer: it is the prompt's
            "<{{ messages[0].content }}>:{% if messages | length > 1 %}"
            "<think>\n\n</think>\n\n{{ messages[1].content }}!{% endif %}",
            Frame("<", ">:<think>\n\n</think>\n\n", "", special=False),
        ),
        (  # another beginning with an answer: what the generation prompt says counts
            "{% if messages | length > 1 %}history: {% endif %}"
            "<{{ messages[0].content }}>:{{ messages[-1].content }}",
            None,
        ),
        (
            "{% if messages | length > 1 %}history: {% endif %}"
            "<{{ messages[0].content }}>:"
            "{% if messages | length > 1 %}{{ messages[1].content }}{% endif %}",
            Frame("<", ">:", "", special=False),
        ),
        (  # Vicuna's
            "USER: {{ messages[0].content }} ASSISTANT:"
            "{% if messages | length > 1 %}{{ ' ' + messages[1].content }}{% endif %}",
            Frame("USER: ", " ASSISTANT:", " ", special=False),
        ),
    ],
)
def test_frames_of_templates(template: str, expected: Frame | None) -> None:
    tokenizer = chatty("bytes", template)
    if expected is None:  # the question is its own answer there, hence twice
        with pytest.raises(PromptError, match="2 times unaltered"):
            chat_frame(tokenizer)
    else:
        assert chat_frame(tokenizer) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, "has no chat template; edit without chat, or load"),
        ("", "has no chat template"),
        ("{{ messages[0].content | upper }}", "0 times unaltered, expected once"),
        ("{{ messages[0].content | tojson }}", "0 times unaltered"),
        ("{{ messages[0].content[:5] }}", "0 times unaltered"),
        ("{{ messages[0].content.split() | join(' ') }}", "0 times unaltered"),
        ("Hello!", "0 times unaltered"),
        ("{{ messages[0].content }}|{{ messages[0].content }}", "2 times unaltered"),
        ("{{ messages[0].content | length }} {{ messages[0].content }}", "differently"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "cannot be rendered"),
    ],
)
def test_unusable_templates_are_refused(template: str | None, expected: str) -> None:
    tokenizer = chatty("bytes", template or "")
    tokenizer.chat_template = template
    tokenizer.name_or_path = "some/model"
    with pytest.raises(PromptError, match="some/model") as raised:
        chat_frame(tokenizer)
    assert expected in str(raised.value)


@pytest.mark.parametrize("text", [" Ada", "Ada ", "\nAda"])
def test_messages_with_outer_space_are_refused(text: str) -> None:
    """Templates strip it, or their special tokens swallow it."""
    frame = chat_frame(chatty("prepend", MARKED))
    with pytest.raises(PromptError, match="begins or ends with space"):
        frame.around(text)
    assert PLAIN.around(text) == text


def test_tokens_that_melt_into_the_template_are_refused() -> None:
    """A template that ends with a space, which an answer's first token takes."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "Q: {{ messages[0].content }} A: "
    frame = chat_frame(tokenizer)
    assert (frame.after, frame.joint) == (" A: ", "")
    with pytest.raises(PromptError, match="must end where a token ends"):
        continuations(tokenizer, [frame.around("Ada lives in")], ["likes"], frame)


@pytest.mark.parametrize("wrong", [{"after": 3}, {"special": "no"}, {"joint": None}])
def test_malformed_frames_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match="before, after and joint are texts"):
        Frame(**wrong)
    with pytest.raises(PromptError, match="chat is true or false"):
        ContextSettings(chat="yes")  # type: ignore[arg-type]


# Every stage


def framed_rows(tiny: Tiny, each: Edit, contexts: Contexts) -> list[tuple[Any, int]]:
    """(ids, subject's index) of an edit's prompt in each context, the slow way."""
    pieces, rows = Pieces(tiny.tokenizer), []
    for template in contexts.templates:
        message = template.replace("{}", each.text)
        ids = rendered(tiny.tokenizer, message)
        text = f"Q: {message}\nA:"
        end = text.rindex(each.subject) + len(each.subject)
        rows.append((ids, pieces.index(ids, text, end)))
    return rows


@pytest.fixture
def chat(tiny: Tiny) -> Tiny:
    return in_chat_of(tiny)


CHOSEN = [EDITS[0], EDITS[1], EDITS[4]]


def test_keys_and_hidden_states_are_the_framed_prompts(chat: Tiny) -> None:
    frame = chat_frame(chat.tokenizer)
    contexts = replace(CONTEXTS, frame=frame)
    got = keys_at_subjects(chat.adapter, chat.tokenizer, CHOSEN, contexts, 1, "flat")
    clean = keys_at_subjects(chat.adapter, chat.tokenizer, CHOSEN, contexts, 1, "clean")
    hidden = hidden_at_subjects(chat.adapter, chat.tokenizer, CHOSEN, 1, frame)
    for index, each in enumerate(CHOSEN):
        rows = framed_rows(chat, each, contexts)
        keys = [key_of(chat.model, chat.kind, 1, *row).double() for row in rows]
        torch.testing.assert_close(
            got[index], torch.stack(keys).mean(0), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(clean[index], keys[0], rtol=1e-4, atol=1e-5)
        ids, end = rows[0]
        outputs = outputs_of(chat.model, block_of(chat.model, chat.kind, 1), ids)
        torch.testing.assert_close(
            hidden[index], outputs[1][end].double(), rtol=1e-4, atol=1e-5
        )
    plain = keys_at_subjects(chat.adapter, chat.tokenizer, CHOSEN, CONTEXTS, 1, "flat")
    assert not torch.allclose(plain, got, rtol=1e-2)


def test_rows_are_framed_kl_prompts_too(chat: Tiny) -> None:
    frame = chat_frame(chat.tokenizer)
    contexts = replace(CONTEXTS, frame=frame)
    rows = make_rows(chat.tokenizer, CHOSEN, contexts, ("{} is a",), "end")
    for each, found in zip(CHOSEN, rows, strict=True):
        *said, kept = found
        for row, (ids, end) in zip(
            said, framed_rows(chat, each, contexts), strict=True
        ):
            assert list(row.prefix) == ids[:end]
            assert [*row.prefix, *row.suffix] == [*ids, *row.labels[:-1]]
            assert len(row.prefix) + row.read == len(ids) - 1
            assert chat.tokenizer.decode(row.labels) == f" {each.target}"
        ids = rendered(chat.tokenizer, f"{each.subject} is a")
        assert [*kept.prefix, *kept.suffix] == ids
        assert len(kept.prefix) + kept.read == len(ids) - 1


def test_scores_are_the_framed_prompts(chat: Tiny) -> None:
    frame = chat_frame(chat.tokenizer)
    prompts, targets = [e.text for e in CHOSEN], [e.target for e in CHOSEN]
    found = score(chat.adapter, chat.tokenizer, prompts, targets, frame=frame)
    for prompt, target, each in zip(prompts, targets, found, strict=True):
        ids = rendered(chat.tokenizer, prompt)
        both = rendered(chat.tokenizer, prompt, target)[:-1]  # without EOS
        with torch.no_grad():
            logs = chat.model(torch.tensor([both])).logits[0].log_softmax(-1)
        picked = [logs[at - 1, both[at]] for at in range(len(ids), len(both))]
        assert each.nll == pytest.approx(-float(sum(picked)) / len(picked), rel=1e-4)
    assert found != score(chat.adapter, chat.tokenizer, prompts, targets)


def test_generations_follow_the_framed_prompts(chat: Tiny) -> None:
    frame = chat_frame(chat.tokenizer)
    prompts = [e.text for e in CHOSEN]
    found = generate(chat.adapter, chat.tokenizer, prompts, 4, frame=frame)
    for prompt, said in zip(prompts, found, strict=True):
        ids = rendered(chat.tokenizer, prompt)
        begun = len(ids)
        for _ in range(4):
            with torch.no_grad():
                logits = chat.model(torch.tensor([ids])).logits[0, -1]
            ids.append(int(logits.argmax()))
            if ids[-1] == chat.tokenizer.eos_token_id:
                break
        expected = chat.tokenizer.decode(ids[begun:], skip_special_tokens=True)
        assert said == expected


def test_contexts_are_sampled_as_without_chat(chat: Tiny) -> None:
    settings = ContextSettings((("The", 6), ("In", 5)))
    plain = generate_contexts(chat.adapter, chat.tokenizer, settings, seed=3)
    found = generate_contexts(
        chat.adapter, chat.tokenizer, replace(settings, chat=True), seed=3
    )
    assert plain.frame == PLAIN
    assert found == replace(plain, frame=chat_frame(chat.tokenizer))
    assert Contexts.from_dict(json.loads(json.dumps(found.as_dict()))) == found
    assert plain.as_dict() == {"contexts": list(plain.templates)}


# The engine


def wanted_of(name: str = "memit") -> Recipe:
    options: dict[str, Any] = {"layers": [0, 1], "preservation_weight": 1.0}
    return in_chat(
        recipe(
            name,
            steps=12,
            clamp=4.0,
            contexts=ContextSettings((("The", 4),)),
            **(options if name == "memit" else {"layers": [1]}),
        )
    )


def run(tiny: Tiny, wanted: Recipe, **options: Any) -> Any:
    arguments = (tiny.model, tiny.tokenizer, CHOSEN, wanted, tiny.statistics)
    return edit(*arguments, **options)


@pytest.mark.parametrize("name", ["memit", "rome"])
def test_an_edit_is_of_the_chat(chat: Tiny, name: str) -> None:
    wanted = wanted_of(name)
    result = run(chat, wanted)
    frame = chat_frame(chat.tokenizer)
    prompts, targets = [e.text for e in CHOSEN], [e.target for e in CHOSEN]

    def probabilities(frame: Frame) -> list[float]:
        found = score(chat.adapter, chat.tokenizer, prompts, targets, frame=frame)
        return [float(torch.tensor(-each.nll).exp()) for each in found]

    before = probabilities(frame)
    with applied(chat.model, result.update):
        after = probabilities(frame)
    outcomes = result.report.outcomes
    assert [each.before for each in outcomes] == pytest.approx(before, rel=1e-4)
    assert [each.after for each in outcomes] == pytest.approx(after, rel=1e-3)
    # What it was made with is in the update, and makes it again.
    metadata = json.loads(json.dumps(result.update.metadata))
    assert metadata["frame"] == asdict(frame)
    assert metadata["recipe"]["contexts"]["chat"] is True
    assert Recipe.from_dict(metadata["recipe"]) == wanted
    again = run(chat, wanted, contexts=Contexts.from_dict(metadata))
    assert b"".join(again.update.parts()) == b"".join(result.update.parts())


@pytest.mark.parametrize("name", ["p_rome", "emmet"])
def test_equality_holds_in_the_chat(chat: Tiny, name: str) -> None:
    """The edited MLP, or block, says the target values at the framed subjects."""
    contexts = Contexts(frame=chat_frame(chat.tokenizer))
    wanted = wanted_of(name)
    targets = optimize_targets(
        chat.adapter, chat.tokenizer, CHOSEN, contexts, 1, wanted.targets
    )
    result = run(chat, wanted, contexts=contexts, targets=targets)
    with applied(chat.model, result.update):
        place = mlp_of if name == "p_rome" else block_of
        for index, each in enumerate(CHOSEN):
            ((ids, end),) = framed_rows(chat, each, contexts)
            module = place(chat.model, chat.kind, 1)
            value = outputs_of(chat.model, module, ids)[1][end]
            torch.testing.assert_close(
                value, targets.values[index], rtol=1e-3, atol=1e-3
            )
            begun = targets.initial[index]
            assert not torch.allclose(value, begun, rtol=1e-2, atol=1e-2)


def test_target_values_are_found_in_the_chat(chat: Tiny) -> None:
    """The targets' probability is the framed prompts', with the value put there."""
    wanted = wanted_of()
    contexts = replace(CONTEXTS, frame=chat_frame(chat.tokenizer))
    found = {
        used: optimize_targets(
            chat.adapter, chat.tokenizer, CHOSEN, used, 1, wanted.targets
        )
        for used in (contexts, CONTEXTS)
    }
    hidden = hidden_at_subjects(
        chat.adapter, chat.tokenizer, CHOSEN, 1, contexts.frame
    ).float()
    framed = found[contexts]
    torch.testing.assert_close(framed.initial.float(), hidden, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(framed.values, found[CONTEXTS].values, rtol=1e-2)
    for index, each in enumerate(CHOSEN):
        chances = []
        for ids, end in framed_rows(chat, each, contexts):
            answer_ids = target_ids(
                chat.tokenizer, each.text, each.target
            )  # " target" in the chat as well
            whole, delta = [*ids, *answer_ids], framed.values[index] - hidden[index]

            def hook(_: Any, __: Any, out: Any, end: int = end, d: Any = delta) -> Any:
                (out[0] if isinstance(out, tuple) else out)[0, end] += d

            handle = block_of(chat.model, chat.kind, 1).register_forward_hook(hook)
            with torch.no_grad():
                logs = chat.model(torch.tensor([whole])).logits[0].log_softmax(-1)
            handle.remove()
            picked = [logs[at - 1, whole[at]] for at in range(len(ids), len(whole))]
            chances.append(float(sum(picked)) / len(picked))
        mean = torch.tensor(chances).mean().exp()
        assert float(framed.probability[index]) == pytest.approx(float(mean), rel=0.02)


def test_cached_targets_are_of_their_frame(chat: Tiny, tmp_path: Path) -> None:
    cache = TargetCache(tmp_path)
    settings = wanted_of().targets
    frame = chat_frame(chat.tokenizer)
    for count, used in (
        (1, CONTEXTS),
        (2, replace(CONTEXTS, frame=frame)),
        (2, CONTEXTS),
        (3, replace(CONTEXTS, frame=replace(frame, after="\nB:"))),
    ):
        arguments = (chat.adapter, chat.tokenizer, CHOSEN, used, 1, settings)
        found = optimize_targets(*arguments, cache=cache)
        assert len(list(tmp_path.rglob("*.safetensors"))) == count * len(CHOSEN)
        torch.testing.assert_close(found.values, optimize_targets(*arguments).values)


def test_a_plain_edit_says_nothing_of_frames(tiny: Tiny) -> None:
    """So its file is byte for byte what it was before there were any."""
    wanted = replace(wanted_of(), contexts=ContextSettings((("The", 4),)))
    metadata = run(tiny, wanted).update.metadata
    assert "frame" not in metadata
    assert metadata["recipe"]["contexts"].keys() == {"samples", "top_k"}
    assert Recipe.from_dict(metadata["recipe"]) == wanted


def test_chat_is_refused_where_it_cannot_be(tiny: Tiny) -> None:
    with pytest.raises(PromptError, match="has no chat template"):
        run(tiny, wanted_of())
    with pytest.raises(RecipeError, match="the given contexts have none"):
        run(in_chat_of(tiny), wanted_of(), contexts=CONTEXTS)


def test_a_recipe_in_chat_is_not_the_published_one() -> None:
    published = recipe("memit", "gpt2-xl")
    assert published.origin == "published"
    found = in_chat(published)
    assert found.origin == "unvalidated" and found.contexts.chat
    assert found.source == f"{published.source}, in chat" == in_chat(found).source
    assert replace(found, contexts=published.contexts).targets == published.targets
    for each in (published, found):
        assert Recipe.from_dict(json.loads(json.dumps(each.as_dict()))) == each
    data = found.as_dict()
    data["contexts"]["chat"] = "yes"
    with pytest.raises(RecipeError, match="chat is true or false"):
        Recipe.from_dict(data)


def test_metrics_are_scored_in_the_chat(chat: Tiny) -> None:
    """What the model says in the chat by itself is generated, and only there."""
    frame = chat_frame(chat.tokenizer)
    (said,) = generate(chat.adapter, chat.tokenizer, ["Ada is"], 3, frame=frame)
    record = RECORDS[0]
    known = Edit("{} is", "Ada", said.strip())
    if rendered(chat.tokenizer, "Ada is", known.target)[:-1] != [
        *rendered(chat.tokenizer, "Ada is"),
        *target_ids(chat.tokenizer, "Ada is", known.target),
    ]:
        pytest.skip("what it says is no text of its own")
    record = replace(record, edit=known)
    found = evaluate_counterfact(chat.model, chat.tokenizer, [record], frame=frame)
    assert found.records[0].rewrite_generation == 1
    plain = evaluate_counterfact(chat.model, chat.tokenizer, [record])
    assert plain != found


def test_as_many_tokens_as_the_target_has_there() -> None:
    """After a template's end a word may be of more tokens than after a space."""
    tokenizer = chatty("bytes", MARKED)
    frame = chat_frame(tokenizer)
    ((_, there),) = continuations(tokenizer, [frame.around("x")], ["lives"], frame)
    ((_, here),) = continuations(tokenizer, ["x"], ["lives"])
    assert tokenizer.decode(there) == "lives" and tokenizer.decode(here) == " lives"
    assert len(there) > len(here)


# The ledger


@pytest.fixture
def ledger(chat: Tiny, tmp_path: Path) -> Ledger:
    empty = begin(chat, tmp_path / "facts.json", wanted_of())
    return empty.add(chat.model, chat.tokenizer, CHOSEN)


def test_a_ledger_keeps_its_frame(chat: Tiny, ledger: Ledger) -> None:
    frame = chat_frame(chat.tokenizer)
    data = json.loads(ledger.path.read_text())
    assert data["frame"] == asdict(frame)
    found = Ledger.read(ledger.path)
    assert found == ledger and found.contexts.frame == frame
    solved = found.solve(chat.model, chat.tokenizer, chat.statistics).update
    direct = edit(
        chat.model,
        chat.tokenizer,
        found.edits,
        wanted_of(),
        chat.statistics,
    ).update
    assert solved.metadata["frame"] == direct.metadata["frame"] == asdict(frame)
    for (address, change), (_, same) in zip(solved, direct, strict=True):
        torch.testing.assert_close(
            change.left @ change.right,
            same.left @ same.right,
            rtol=1e-3,
            atol=1e-5,
            msg=address.tensor,
        )
    # A template that was changed since is not what the ledger's edits were made in.
    changed = copy.deepcopy(chat.tokenizer)
    changed.chat_template = "Other: {{ messages[0].content }}"
    grown = found.remove([found.entries[0].id]).add(chat.model, changed, [EDITS[2]])
    assert grown.contexts.frame == frame


MIXED: list[tuple[Callable[[Any], object], str]] = [
    (lambda d: d.pop("frame"), "one of its recipe and contexts is in chat, one not"),
    (lambda d: d["recipe"]["contexts"].pop("chat"), "is in chat, one not"),
    (lambda d: d["frame"].update(special=1), "before, after and joint are texts"),
    (lambda d: d["frame"].update(after=None), "before, after and joint are texts"),
    (lambda d: d["frame"].update(middle=""), "middle"),
    (lambda d: d.update(frame="chat"), "not a ledger"),
    (lambda d: d.update(frame=asdict(PLAIN)), "is in chat, one not"),
    (lambda d: d["recipe"]["contexts"].update(chat=1), "chat is true or false"),
]


@pytest.mark.parametrize(("damage", "expected"), MIXED)
def test_a_mixed_ledger_is_refused(
    ledger: Ledger, damage: Callable[[Any], object], expected: str
) -> None:
    data = json.loads(ledger.path.read_text())
    damage(data)
    ledger.path.write_text(json.dumps(data))
    with pytest.raises(LedgerError, match=expected):
        Ledger.read(ledger.path)


def test_a_plain_ledger_has_no_frame(tiny: Tiny, tmp_path: Path) -> None:
    wanted = replace(wanted_of(), contexts=ContextSettings((("The", 4),)))
    empty = begin(tiny, tmp_path / "facts.json", wanted)
    assert "frame" not in empty.as_dict()
    with pytest.raises(PromptError, match="has no chat template"):
        begin(tiny, tmp_path / "facts.json", wanted_of())


# The commands


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def plain_place(made: Workplace, tmp_path: Path) -> Workplace:
    shutil.copytree(made.path, tmp_path / "work")
    return Workplace(tmp_path / "work")


@pytest.fixture
def place(plain_place: Workplace) -> Workplace:
    tokenizer = AutoTokenizer.from_pretrained(plain_place.model)
    tokenizer.chat_template = TEXTUAL
    tokenizer.save_pretrained(plain_place.model)
    return plain_place


def test_the_commands_in_chat(place: Workplace) -> None:
    made = answer(*place.editing(), "--chat")
    assert made["recipe"]["contexts"]["chat"] is True
    frame = UpdateSet.load(place.update).metadata["frame"]
    assert frame["before"] == "<s>Q: " and frame["after"] == "\nA:"
    score = [
        "evaluate",
        "counterfact",
        place.model,
        place.records,
        "--update",
        place.update,
    ]
    inside = answer(*score, "--chat", "--no-generations")
    outside = answer(*score, "--no-generations")
    assert inside["before"] != outside["before"]
    assert inside["after"]["em"] > inside["before"]["em"]
    facts = place.path / "facts"
    begin = ["ledger", "add", facts, place.edits, "--model", place.model]
    begin += ["--recipe", "memit", "--layers", "0-1", "--set", "steps=4"]
    begin += ["--statistics", place.statistics, "--set", "preservation_weight=1"]
    answer(*begin, "--chat")
    assert Ledger.read(facts).contexts.frame == Frame(**frame)
    message = refusal(place.path, "ledger", "add", facts, place.edits, "--chat")
    assert "leave those options out" in message
    rebuilt = answer("ledger", "rebuild", facts, "--out", place.path / "out")
    assert rebuilt["edits"] == len(EDITS)


def test_commands_without_a_template_refuse_chat(plain_place: Workplace) -> None:
    place = plain_place
    start = ["ledger", "add", place.path / "facts", place.edits, "--chat"]
    start += ["--model", place.model, "--recipe", "memit", "--layers", "0-1"]
    for arguments in (
        [*place.editing(), "--chat"],
        ["evaluate", "counterfact", place.model, place.records, "--chat"],
        [*start, "--statistics", place.statistics],
    ):
        assert "has no chat template; edit without chat" in refusal(
            place.path, *arguments
        )
