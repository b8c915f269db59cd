"""Samples as rows for SFTTrainer, with the reasoning where the student's chat template reads it."""

from typing import Any, Literal, NamedTuple

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from ...metagradients.config import SettingsError


Place = Literal["reasoning_content", "thinking", "reasoning", "content"]
"""Where a message has the reasoning: in a field of this name, or between tags in its content."""
PLACES: tuple[Place, ...] = ("reasoning_content", "thinking", "reasoning", "content")
_THOUGHT, _ANSWER = "Seven times six is the same as six times seven.", "The result is forty-two."


class LostError(SettingsError):
    """A chat template that leaves out a part of what the student should learn."""


class Rendered(NamedTuple):
    """
    A row as SFTTrainer renders it.

    Attributes:
        text (`str`): Prompt and completion.
        completion (`str`): The part of it with a loss: from where it differs from the prompt with the template's
            generation prompt.
    """

    text: str
    completion: str


def folded(reasoning: str, completion: str) -> str:
    """Reasoning and answer in one text, the reasoning between tags."""
    return f"<think>\n{reasoning}\n</think>\n\n{completion}"


def sft_row(prompt: str | list[dict[str, Any]], reasoning: str | None, completion: str, place: Place | None) -> dict:
    """
    The prompt and the completion of a row.

    Args:
        prompt (`str` or `list[dict]`):
            The prompt. A text becomes a user's message, unless `place` is `None`.
        reasoning (`str` or `None`), completion (`str`):
            Reasoning and answer. With a field as the place, an answer without reasoning has an empty one: in a dataset
            all messages have the same fields.
        place (`Place` or `None`):
            Where the reasoning goes. `None`: the student has no chat template, and the row is two texts.
    """
    if place in ("content", None):
        content = folded(reasoning, completion) if reasoning else completion
        message = {"role": "assistant", "content": content}
    else:
        message = {"role": "assistant", "content": completion, place: reasoning or ""}
    if place is None:
        return {"prompt": prompt, "completion": message["content"]}
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return {"prompt": messages, "completion": [message]}


def render(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> Rendered:
    """A row of messages as SFTTrainer renders it."""
    before = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
    same = next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), min(len(before), len(text)))
    return Rendered(text, text[same:])


def check_rendered(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], reasoning: str | None, completion: str
) -> None:
    """
    Check that all of a sample is in the rendered completion.

    Raises:
        `LostError`: If reasoning or answer are missing in it, or if the template refuses the row.
    """
    try:
        learned = render(tokenizer, row).completion
    except (TemplateError, TypeError) as error:
        raise LostError(f"the chat template refuses it: {error}") from error
    for name, part in (("reasoning", reasoning), ("answer", completion)):
        if part and part.strip() not in learned:
            raise LostError(f"the chat template leaves out its {name}")


def reasoning_place(tokenizer: PreTrainedTokenizerBase) -> Place:
    """
    Where the student's chat template reads the reasoning, found by rendering a message.

    Fields that templates have (`reasoning_content`, `thinking`, `reasoning`) come first, then tags in the content.

    Raises:
        `LostError`: If the template leaves the reasoning out in all places.
    """
    template = str(tokenizer.chat_template)
    for place in sorted(PLACES, key=lambda place: place not in template):  # transformers maps some names to others
        try:
            check_rendered(tokenizer, sft_row("What is seven times six?", _THOUGHT, _ANSWER, place), _THOUGHT, _ANSWER)
        except LostError:
            continue
        return place
    raise LostError(
        "The student's chat template leaves the reasoning out, wherever it stands: the student would learn the "
        "answers alone. Give the student another template, e.g. one of those that TRL has for training."
    )
