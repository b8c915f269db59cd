"""A control for a dataset that comes without one: texts that the student itself writes, with no goal."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..evaluation import without_empty
from ..generation import generate_texts, prompt_completion_pairs
from ..metagradients.config import SettingsError
from ..student import Examples, Student
from ..text import completion_text
from .effects import as_dataset


ROUNDS = 4
"""How often empty texts are sampled anew."""


def undirected_control(student: Student, dataset: Examples, max_length: int = 1024, seed: int = 42) -> list[Any]:
    """
    As many rows as a dataset has, written by the student before fine-tuning, at temperature 1.

    Where the dataset has prompts, the student completes the same prompts. Where it has texts only, it writes from
    nothing. A text is no longer than the longest of the dataset. Use it only if there is no dataset of the same kind:
    against it, an effect says that the data is not what the student writes.

    Args:
        student (`Student`): The student. Its tokenizer writes the texts.
        dataset (`list[str]`, `list[dict]` or [`~datasets.Dataset`]): Rows with `text`, `messages`, or `prompt` and
            `completion`.
        max_length (`int`, *optional*, defaults to `1024`): Longest sample that a student reads, in tokens.
        seed (`int`, *optional*, defaults to `42`): Seed of the sampling.

    Returns:
        `list[dict]`: Rows of `text`, or of `prompt` and `completion`.

    Raises:
        `ValueError`: If the rows are token ids, or the student writes almost only empty texts.
    """
    rows = without_empty(as_dataset(dataset, "dataset"))
    columns = rows.column_names
    if "messages" in columns:
        prompts: list[Any] = [_up_to_answer(messages) for messages in rows["messages"]]
    elif {"prompt", "completion"} <= set(columns):
        prompts = list(rows["prompt"])
    elif "text" in columns:
        tokenizer: Any = student.processing_class
        prompts = [tokenizer.bos_token or tokenizer.eos_token] * len(rows)
    else:
        raise SettingsError(
            "A `control` can be written only for `text`, `messages`, or `prompt` and `completion`, not for the "
            f"columns {columns}. Give one."
        )
    longest = max(example.num_supervised for example in student.tokenize(rows, max_length))
    texts = _sample(student, prompts, max(longest, 1), seed)
    return [{"text": text} for text in texts] if "text" in columns else prompt_completion_pairs(prompts, texts)


def _up_to_answer(messages: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages before the last one of the assistant."""
    last = max((k for k, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
    return messages[:last]


def _sample(student: Student, prompts: list[Any], max_new_tokens: int, seed: int) -> list[str]:
    """A text after each prompt. Empty ones are sampled anew some times."""
    texts = [""] * len(prompts)
    for again in range(ROUNDS):
        empty = [k for k, text in enumerate(texts) if not completion_text(text)]
        if not empty:
            return texts
        model: Any = student.model
        left = [prompts[k] for k in empty]
        written = generate_texts(model, student.processing_class, left, max_new_tokens, seed=seed + again)  # type: ignore
        for k, text in zip(empty, written, strict=True):
            texts[k] = text
    missing = np.mean([not completion_text(text) for text in texts])
    if missing > 0.1:
        raise SettingsError(f"The student writes empty texts ({missing:.0%}), so it makes no `control`. Give one.")
    return texts
