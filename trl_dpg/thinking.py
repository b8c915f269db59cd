"""
The thought and the answer of a completion.

A thinking model writes its reasoning first and its answer after it. Where the border is depends on the model:

- most templates put the reasoning between `<think>` and `</think>`;
- some of them write `<think>` at the end of the prompt, so that the completion has only the closing tag;
- others use sentinels of their own (gpt-oss, Gemma 4). They are read by the tokenizer's `response_template`, or by the
  one that TRL has for its chat template;
- an API has already cut the text, and a message has a field `reasoning_content`, `reasoning` or `thinking`.

A thought is *unfinished* if it is opened, in the completion or at the end of its prompt, and not closed. Its text is
then reasoning up to the end, and there is no answer after it. A field of a message does not tell this: there, a
thought without an answer after it counts as unfinished.
"""

import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .text import completion_text


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Names under which messages, and the fields of response templates, have the reasoning."""
_TAG = re.compile("</?think>")
_SPACE = re.compile(r"\s*")


class Thought(NamedTuple):
    """
    A text, cut into what its writer thought and what it answered.

    Attributes:
        reasoning (`str` or `None`): The reasoning, of all thoughts if there are several. `None` if the text has none.
        answer (`str`): What stands outside the reasoning.
        finished (`bool`): Whether the reasoning has an end.
    """

    reasoning: str | None
    answer: str
    finished: bool


class Part(NamedTuple):
    """A piece of a text. Pieces of the kind `"markup"` are tags, and the white space around them."""

    kind: Literal["reasoning", "answer", "markup"]
    text: str


def split_thinking(text: str, tokenizer: "PreTrainedTokenizerBase | None" = None, prompt: str = "") -> Thought:
    """
    Cut a completion's text into reasoning and answer.

    Args:
        text (`str`):
            The completion. For templates with sentinels that are special tokens (gpt-oss, Gemma 4), decoded with them.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer of the model that wrote the text. Without it, the reasoning is between `<think>` and
            `</think>`.
        prompt (`str`, *optional*):
            The rendered prompt, or its end. If it ends with `<think>`, the text begins inside of a thought.

    Returns:
        `Thought`. The reasoning has no white space around it, the answer none at its beginning.
    """
    parts, finished = thinking_parts(text, tokenizer, prompt)
    thoughts = [part.text for part in parts if part.kind == "reasoning"]
    answer = "".join(part.text for part in parts if part.kind == "answer")
    return Thought("".join(thoughts).strip() if thoughts else None, answer, finished)


def thinking_parts(
    text: str, tokenizer: "PreTrainedTokenizerBase | None" = None, prompt: str = ""
) -> tuple[list[Part], bool]:
    """
    The pieces of a completion's text in their order, and whether its reasoning has an end.

    With tags, the pieces put together are the text. With a response template, pieces of its markup are left out.

    The arguments are those of `split_thinking`.
    """
    template = _response_template(tokenizer)
    if template is not None:
        return _parsed(text, tokenizer, template, prompt)  # type: ignore[arg-type]
    tags = _tags(text)
    inside = prompt.rstrip().endswith("<think>") or (bool(tags) and not tags[0].opens)
    parts, end = [], 0
    if inside:
        end = len(text) - len(text.lstrip())
        parts.append(Part("markup", text[:end]))
    for tag in tags:
        if tag.opens == inside:
            continue  # "<think>" in a thought and "</think>" in an answer are words of them
        markup = Part("markup", text[tag.start : tag.end])
        parts += [Part("reasoning" if inside else "answer", text[end : tag.start]), markup]
        inside, end = not inside, tag.end
    last = text[end:]
    kept = len(last.rstrip()) if inside else len(last)
    parts += [Part("reasoning" if inside else "answer", last[:kept]), Part("markup", last[kept:])]
    return [part for part in parts if part.text or part.kind == "reasoning"], not inside


class _Tag(NamedTuple):
    """A tag with the white space after it. A closing one, and one at the beginning, also with that before it."""

    start: int
    end: int
    opens: bool


def _tags(text: str) -> list[_Tag]:
    """The tags of a text."""  # white space in the pattern makes the search a hundred times slower
    tags: list[_Tag] = []
    end = 0
    for found in _TAG.finditer(text):
        opens, before = found[0] == "<think>", text[end : found.start()].rstrip()
        start = found.start() if opens and (tags or before) else end + len(before)
        end = _SPACE.match(text, found.end()).end()  # type: ignore[union-attr]  # it always matches
        tags.append(_Tag(start, end, opens))
    return tags


def row_thinking(row: dict[str, Any]) -> Thought:
    """
    Reasoning and answer of a dataset's row.

    The row's text is `completion`, the assistant's messages in `messages`, or `text`. Its reasoning is in a field of
    the messages (`reasoning_content`, `reasoning` or `thinking`), between tags in the text, or else in the column
    `reasoning`.

    Raises:
        `ValueError`: If the row has none of these columns.
    """
    if "completion" in row:
        written = row["completion"] or ""
    elif "messages" in row:
        written = [message for message in row["messages"] or [] if message["role"] == "assistant"]
    elif "text" in row:
        written = row["text"] or ""
    else:
        raise ValueError(f"A row needs `completion`, `messages` or `text`. This one has only {', '.join(row)}.")
    prompt = row.get("prompt")
    thought = completion_thinking(written, prompt=prompt if isinstance(prompt, str) else "")
    if thought.reasoning is None and row.get("reasoning"):
        return Thought(row["reasoning"], thought.answer, bool(thought.answer))
    return thought


def completion_thinking(
    completion: str | list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase | None" = None, prompt: str = ""
) -> Thought:
    """Reasoning and answer of a TRL completion: a text, or messages with a field for the reasoning or with tags."""
    if isinstance(completion, str):
        return split_thinking(completion, tokenizer, prompt)
    thoughts = [text for message in completion if (text := message_reasoning(message))]
    answer = completion_text(completion)
    if not thoughts:
        return split_thinking(answer, tokenizer, prompt)
    called = any(message.get("tool_calls") for message in completion)
    return Thought("".join(thoughts).strip(), answer, bool(answer) or called)


def message_reasoning(message: dict[str, Any]) -> str:
    """The reasoning that a message has in a field of its own, or an empty string."""
    return next((message[field] for field in FIELDS if message.get(field)), "")


def has_special_markup(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the reasoning is marked by special tokens, which a text is usually decoded without."""
    return _response_template(tokenizer) is not None or "</think>" in tokenizer.all_special_tokens


def _response_template(tokenizer: "PreTrainedTokenizerBase | None") -> dict[str, Any] | None:
    """
    The tokenizer's response template, or TRL's for its chat template, if the reasoning is not between think tags.

    With tags, this module does it itself: the response templates of TRL read an unfinished thought as the answer where
    the prompt opens it (DeepSeek-R1-Distill, Nemotron 3), and lose the text of tool calls.
    """
    if tokenizer is None:
        return None
    template = tokenizer.response_template
    if template is None:
        from trl.chat_template_utils import add_response_schema  # takes seconds to import

        like = SimpleNamespace(chat_template=tokenizer.chat_template)  # TRL would change the tokenizer itself
        try:
            template = add_response_schema(like).response_template  # type: ignore[type-var]
        except ValueError:  # a chat template that TRL does not know
            return None
    fields = {name: field for name, field in template["fields"].items() if name in (*FIELDS, "content")}
    tagged = [field for name, field in fields.items() if name in FIELDS and "</think>" in str(field)]
    if tagged or len(fields) < 2:
        return None
    return {**template, "fields": fields}


def _parsed(
    text: str, tokenizer: "PreTrainedTokenizerBase", template: dict[str, Any], prompt: str
) -> tuple[list[Part], bool]:
    parser = tokenizer.get_response_parser(template, prefix=prompt)
    end = "\0"  # in the reasoning if nothing closes it; and a closing sentinel before it cannot grow any more
    events = parser.feed(text + end)
    events += parser.finalize()[1]
    chunks = [(event["field"], event["text"]) for event in events if event["type"] == "region_chunk"]
    finished = not any(field != "content" and end in chunk for field, chunk in chunks)
    parts = [Part("answer" if field == "content" else "reasoning", chunk.replace(end, "")) for field, chunk in chunks]
    if not parts:  # the text was decoded without its sentinels
        return [Part("answer", text)], True
    return [part for part in parts if part.text], finished
