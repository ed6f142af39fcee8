"""What stands around every prompt: nothing, or a chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unified_edit.errors import PromptError


@dataclass(frozen=True)
class Frame:
    """What stands around every prompt: nothing, or a chat template."""

    before: str = ""
    after: str = ""
    joint: str = " "
    """Between the framed prompt and the target."""
    special: bool = True
    """Whether the tokenizer adds its special tokens; a rendered chat template has them
    as text already."""

    def __post_init__(self) -> None:
        texts = (self.before, self.after, self.joint)
        if not all(isinstance(t, str) for t in texts) or type(self.special) is not bool:
            raise PromptError(f"{self}: before, after and joint are texts")

    def around(self, text: str) -> str:
        """The text in its frame.

        Raises:
            PromptError: a chat message that begins or ends with space.
        """
        if not self.special and text != text.strip():
            raise PromptError(
                f"{text!r} begins or ends with space, which chat templates and their "
                "tokens may swallow; write it without"
            )
        return self.before + text + self.after


PLAIN = Frame()


def chat_frame(tokenizer: Any) -> Frame:
    """The frame that a tokenizer's chat template puts around one user's message, up to
    where the answer begins.

    Raises:
        PromptError: there is no template, or it changes what a user says.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(
            f"the tokenizer {name} has no chat template; edit without chat, or load "
            "the tokenizer of a model that is made for chat"
        )
    # What a template may escape, cut at or change the case of.
    frames = [
        _rendered_around(tokenizer, name, said, answer)
        for said, answer in (
            ("Zq\"x' & <Jk>\nüW", 'Yv & "p"\nÖ'),
            ("wHg {v}% \\zj.", "bXq."),
        )
    ]
    if frames[0] != frames[1]:
        raise PromptError(
            f"the chat template of {name} stands differently around different "
            "messages, so prompts cannot be put in it; edit without chat"
        )
    return frames[0]


def _rendered_around(tokenizer: Any, name: str, said: str, answer: str) -> Frame:
    def render(*turns: tuple[str, str], **options: Any) -> str:
        messages = [{"role": role, "content": text} for role, text in turns]
        rendered: str = tokenizer.apply_chat_template(
            messages, tokenize=False, **options
        )
        return rendered

    user = ("user", said)
    try:
        text = render(user, add_generation_prompt=True)
    except Exception as error:  # a template raises what it likes
        raise PromptError(
            f"the chat template of {name} cannot be rendered: {error}"
        ) from error
    if text.count(said) != 1:
        raise PromptError(
            f"the chat template of {name} has a user's message {text.count(said)} "
            "times unaltered, expected once, so prompts cannot be put in it; edit "
            "without chat"
        )
    # What the template has between there and an answer belongs to the frame: an empty
    # thought, a channel's name, a space (which is the target's).
    between = ""
    try:
        whole = render(user, ("assistant", answer))
    except Exception:  # takes no answers
        whole = ""
    if whole.startswith(text) and answer in whole[len(text) :]:
        between = whole[len(text) :].partition(answer)[0]
    joint = between[len(between.rstrip(" ")) :]
    before, _, after = (text + between.rstrip(" ")).partition(said)
    return Frame(before, after, joint, special=False)
