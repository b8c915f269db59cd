"""What a student reads of a thinking generator's completion: its answer, its reasoning, or all of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .text import completion_text, message_text
from .thinking import (
    FIELDS,
    Part,
    Thought,
    completion_thinking,
    has_special_markup,
    message_reasoning,
    row_thinking,
    thinking_parts,
)


Text = str | list[dict[str, Any]]
READ = ("answer", "reasoning", "all")
UNFINISHED = ("empty", "as_is")


class Piece(NamedTuple):
    """A piece of a completion, and whether the student reads it."""

    text: str
    read: bool


class Reading(NamedTuple):
    """
    A completion, as a student reads it.

    Attributes:
        completion (`str` or `list[dict]`): What the student reads: a text or messages, as the completion was.
        pieces (`list[Piece]`): The whole completion in pieces. Those that are read are the text of `completion`.
        reasoning (`str` or `None`): The reasoning in the whole completion. `None` if it has none.
        finished (`bool`): Whether the reasoning has an end.
    """

    completion: Text
    pieces: list[Piece]
    reasoning: str | None
    finished: bool


@dataclass(frozen=True)
class StudentText:
    """
    What a student reads of completions.

    Args:
        student_text (`str`, *optional*, defaults to `"answer"`):
            `"answer"`: what stands outside the reasoning. `"reasoning"`: the reasoning alone. `"all"`: the whole
            completion. A completion without reasoning is all answer.
        unfinished_thoughts (`str`, *optional*, defaults to `"empty"`):
            What the student reads of a completion whose reasoning has no end: nothing (`"empty"`), or the whole
            completion (`"as_is"`).
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The generator's tokenizer, which tells how it marks its reasoning. Without it: by `<think>` tags.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Arguments of the chat template with which the prompts are rendered.

    Raises:
        `ValueError`: If a choice is unknown.
    """

    student_text: str = "answer"
    unfinished_thoughts: str = "empty"
    tokenizer: PreTrainedTokenizerBase | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def __post_init__(self):
        for name, known in (("student_text", READ), ("unfinished_thoughts", UNFINISHED)):
            if (value := vars(self)[name]) not in known:
                raise ValueError(f"Unknown {name} {value!r}. Choose one of {known}.")

    def read(
        self, prompts: Sequence[Text], completions: Sequence[Text], completion_ids: Sequence[list[int]] | None = None
    ) -> list[Reading]:
        """
        Read N completions.

        Args:
            prompts (`list`): N prompts, texts or conversations. They tell whether a completion begins in a thought.
            completions (`list`): N completions, texts or messages.
            completion_ids (`list[list[int]]`, *optional*): Their token ids. They are needed if the reasoning is marked
                by special tokens, which a decoded text does not have.
        """
        marked = self.tokenizer is not None and completion_ids is not None and has_special_markup(self.tokenizer)
        begins = self._generation_prompt(prompts)
        readings = []
        for place, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            prefilled = isinstance(prompt, str) or prompt[-1]["role"] == "assistant"
            begin = completion_text(prompt if isinstance(prompt, str) else prompt[-1:]) if prefilled else begins
            marked_text = None
            if marked and (isinstance(completion, str) or len(completion) == 1):
                marked_text = self.tokenizer.decode(completion_ids[place], skip_special_tokens=False)  # type: ignore
            readings.append(self._read(completion, begin, marked_text))
        return readings

    @property
    def needs_special_tokens(self) -> bool:
        """Whether a generator's texts must be decoded with their special tokens, to be read without token ids."""
        return self.student_text != "all" and self.tokenizer is not None and has_special_markup(self.tokenizer)

    def _generation_prompt(self, prompts: Sequence[Text]) -> str:
        """The end of a rendered conversation, where some templates open a thought."""
        if self.tokenizer is None or self.tokenizer.chat_template is None or all(isinstance(p, str) for p in prompts):
            return ""
        question = [{"role": "user", "content": "?"}]
        return self.tokenizer.apply_chat_template(  # type: ignore[return-value]
            question, add_generation_prompt=True, tokenize=False, **self.chat_template_kwargs or {}
        )

    def _read(self, completion: Text, prompt: str, marked_text: str | None) -> Reading:
        messages = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        cut, finished = [], True
        for message in messages:
            parts, ended = self._parts(message, prompt, marked_text)
            cut.append(parts)
            finished = finished and ended
        thoughts = [part.text for parts in cut for part in parts if part.kind == "reasoning"]
        reasoning = "".join(thoughts) if thoughts else None
        nothing = not finished and self.unfinished_thoughts == "empty"
        everything = not nothing and (self.student_text == "all" or not finished)
        if everything and not any(map(message_reasoning, messages)):
            pieces = [Piece(self._plain(message_text(message)), True) for message in messages]
            read = self._plain(completion) if isinstance(completion, str) else completion
            return Reading(read, pieces, reasoning, finished)

        def is_read(part: Part) -> bool:
            return everything or (not nothing and part.kind == self.student_text)

        pieces = [Piece(part.text, is_read(part)) for parts in cut for part in parts]
        texts = ["".join(part.text for part in parts if is_read(part)) for parts in cut]
        if isinstance(completion, str):
            return Reading(texts[0], pieces, reasoning, finished)
        contents = [_with_content(message, text) for message, text in zip(messages, texts, strict=True)]
        return Reading(contents, pieces, reasoning, finished)

    def _parts(self, message: dict[str, Any], prompt: str, marked_text: str | None) -> tuple[list[Part], bool]:
        """The parts of a message, and whether its reasoning has an end. They are the message put together."""
        text, reasoning = message_text(message), message_reasoning(message)
        if message["role"] != "assistant":
            return [Part("answer", text)], True
        if reasoning:
            # TRL has cut the message. Where all of it is read, it gets the tags of most templates
            parts = [Part("markup", "<think>\n"), Part("reasoning", reasoning), Part("markup", "\n</think>\n\n")]
            return [*parts, Part("answer", text)], bool(text or message.get("tool_calls"))
        parts, finished = thinking_parts(text if marked_text is None else marked_text, self.tokenizer, prompt)
        if self.tokenizer is None or not has_special_markup(self.tokenizer):
            return parts, finished
        if not any(part.kind == "reasoning" for part in parts):
            parts = [Part("answer", text)]
        return [Part(part.kind, self._plain(part.text)) for part in parts], finished

    def _plain(self, text: str) -> str:
        """A text without the special tokens of a generator that marks its reasoning by them."""
        if self.tokenizer is not None and has_special_markup(self.tokenizer):
            for token in self.tokenizer.all_special_tokens:
                text = text.replace(token, "")
        return text


def thinking_figures(readings: Sequence[Reading]) -> dict[str, float]:
    """
    Figures of N completions for logs; none if no completion has reasoning.

    Returns:
        `dict[str, float]`: `thinking/share` (share with reasoning), `thinking/unfinished` (number with an unfinished
        thought), and `thinking/mean_length` (mean characters of the reasoning, of those that have it).
    """
    thoughts = [reading.reasoning for reading in readings if reading.reasoning is not None]
    if not thoughts:
        return {}
    return {
        "thinking/share": len(thoughts) / len(readings),
        "thinking/unfinished": float(sum(not reading.finished for reading in readings)),
        "thinking/mean_length": sum(map(len, thoughts)) / len(thoughts),
    }


def thinking_line(readings: Sequence[Reading], reader: StudentText) -> str | None:
    """A line for the terminal on the thoughts in N completions. `None` if there are none."""
    thoughts = sum(reading.reasoning is not None for reading in readings)
    unfinished = sum(not reading.finished for reading in readings)
    return describe(len(readings), thoughts, unfinished, reader.student_text, reader.unfinished_thoughts)


def describe(number: int, reasoned: int, unfinished: int, student_text: str, unfinished_thoughts: str) -> str | None:
    """The line of [`thinking_line`] from counts."""
    if not reasoned:
        return None
    what = {"answer": "their answers", "reasoning": "their reasoning", "all": "all of them"}[student_text]
    line = f"{reasoned} of {number} texts have reasoning; the student reads {what}."
    if unfinished:
        how = "nothing of them" if unfinished_thoughts == "empty" else "them as they are"
        line += f" {unfinished} thoughts have no end; it reads {how}."
    return line


def read_dataset(
    dataset: Dataset, student_text: str = "answer", unfinished_thoughts: str = "empty"
) -> tuple[Dataset, int, int]:
    """
    A dataset of samples, as a student reads it.

    The rows have `text`, `messages`, or `prompt` and `completion`, and perhaps a column `reasoning`, as
    [`~trl_dpg.thinking.row_thinking`] reads them. With `"all"`, they stay as they are.

    Args:
        dataset ([`~datasets.Dataset`]): The samples.
        student_text (`str`, *optional*, defaults to `"answer"`): As in [`StudentText`].
        unfinished_thoughts (`str`, *optional*, defaults to `"empty"`): As in [`StudentText`].

    Returns:
        `tuple[Dataset, int, int]`: The samples, the number with reasoning, and the number with an unfinished thought.

    Raises:
        `ValueError`: If a choice is unknown, if the rows have none of these columns, or if a row's messages have no
            assistant's message in which the student could read something.
    """
    reader = StudentText(student_text, unfinished_thoughts)
    thoughts = [row_thinking(row) for row in dataset]
    reasoned = sum(thought.reasoning is not None for thought in thoughts)
    unfinished = sum(not thought.finished for thought in thoughts)
    if (student_text != "all" and (reasoned or student_text == "reasoning")) or unfinished:
        rows = zip(dataset, thoughts, strict=True)
        dataset = Dataset.from_list([_read_row(row, thought, reader, k) for k, (row, thought) in enumerate(rows)])
    return dataset, reasoned, unfinished


def _read_row(row: dict[str, Any], thought: Thought, reader: StudentText, number: int) -> dict[str, Any]:
    """A row in which its assistant's texts are what the student reads."""
    if thought.finished and (
        reader.student_text == "all" or (reader.student_text == "answer" and thought.reasoning is None)
    ):
        return row
    if not thought.finished and reader.unfinished_thoughts == "as_is":
        return row
    column = next(name for name in ("completion", "messages", "text") if name in row)
    written = row[column]
    if isinstance(written, str):
        return row | {column: _chosen(thought, reader)}
    places = [k for k, message in enumerate(written) if message["role"] == "assistant"]
    if not places:
        with_reasoning = " and a `reasoning`" if row.get("reasoning") else ""
        raise ValueError(
            f"Row {number} has `{column}`{with_reasoning}, but no message of the assistant, of which the "
            "student could read a part. Add the message with the answer, or leave the row out."
        )
    own = {k: completion_thinking([written[k]]) for k in places}
    if all(each.reasoning is None for each in own.values()):  # the reasoning is a column of the row
        own[places[-1]] = thought
    return row | {
        column: [
            _with_content(message, _chosen(own[k], reader)) if k in own else message
            for k, message in enumerate(written)
        ]
    }


def _chosen(thought: Thought, reader: StudentText) -> str:
    if not thought.finished and reader.unfinished_thoughts == "empty":
        return ""
    return thought.answer if reader.student_text == "answer" else thought.reasoning or ""


def _with_content(message: dict[str, Any], text: str) -> dict[str, Any]:
    """A message with another text, and without a field for its reasoning."""
    return {name: value for name, value in message.items() if name not in FIELDS} | {"content": text}
