"""Length, difficulty, correctness and end of each sample of a dataset."""

import json
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from tqdm import tqdm

from ...length_target import ALL
from ...thinking import Thought, row_thinking
from .rows import ROWS_PER_READ, DataError, column, pieces


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MAX_DIFFICULTIES = 20
MEASURES = ("reasoning", "answer", "all")
SOLVED = "solved"
SOLVED_NAMES = ("hard", "medium", "easy")


@dataclass
class Measured:
    """
    What was measured on N samples.

    Attributes:
        lengths (`np.ndarray` of shape `[N]`): Lengths; 0 where a sample has nothing of what is measured.
        difficulty (`np.ndarray` of shape `[N]`): Names; all `"all"` if there is no difficulty.
        correct (`np.ndarray` of shape `[N]`): 1.0, 0.0, or `nan` where it is not known.
        truncated (`np.ndarray` of shape `[N]`): Whether the sample was cut off, so that its true length is greater.
        measure (`str`): `"reasoning"`, `"answer"` or `"all"`; `"column"` for a column of lengths.
        unit (`str`): What is counted, in words.
        difficulty_from (`str`): Where the difficulty comes from, in words.
    """

    lengths: np.ndarray
    difficulty: np.ndarray
    correct: np.ndarray
    truncated: np.ndarray
    measure: str
    unit: str
    difficulty_from: str

    @property
    def names(self) -> list[str]:
        """The difficulties; `hard`, `medium` and `easy` in this order, otherwise sorted."""
        found = set(self.difficulty.tolist())
        known = [name for name in ("easy", "medium", "hard") if name in found]
        return known if found <= set(known) else sorted(found)

    def select(self, rows: np.ndarray) -> "Measured":
        """Some of the samples, by their indices or a mask."""
        parts = {name: vars(self)[name][rows] for name in ("lengths", "difficulty", "correct", "truncated")}
        return Measured(**(vars(self) | parts))


def measure(
    dataset: Dataset,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    measure: str | None = None,
    length_column: str | None = None,
    difficulty: str | None = None,
    difficulty_edges: list[float] | None = None,
    correct_column: str | None = None,
    progress: bool = False,
) -> Measured:
    """
    Measure the samples of a dataset.

    Args:
        dataset ([`~datasets.Dataset`]):
            N samples: `text`, `messages`, or `prompt` and `completion`. `finish_reason`, if it is there, says by
            `"length"` that a sample was cut off. A thought without an end counts as cut off, too.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Counts tokens, without special ones. Without it, words are counted: runs of characters that are not white
            space.
        measure (`str`, *optional*):
            What is counted: `"reasoning"`, `"answer"`, or `"all"` for both. By default the reasoning, if any of the
            first 1000 samples has one, otherwise all.
        length_column (`str`, *optional*):
            A column with lengths. The texts are then not read.
        difficulty (`str`, *optional*):
            A column with the difficulty; `"solved"`: the share of the correct samples of a prompt; `"none"`. By
            default the column `difficulty` if there is one, else `"solved"` if correctness is known and the prompts
            have several samples, else none.
        difficulty_edges (`list[float]`, *optional*):
            Where numbers of the difficulty are cut. By default 1/3 and 2/3 for `"solved"`.
        correct_column (`str`, *optional*):
            A column with true and false, or numbers of which those above 0.5 mean correct. By default `correct`, if
            there is one.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress display.

    Raises:
        `ValueError`: If a column is missing or holds something else, or a name is unknown.
    """
    if measure not in (None, *MEASURES):
        raise DataError(f"Unknown `measure` {measure!r}. Choose one of {', '.join(MEASURES)}.")
    for argument, name in (("length_column", length_column), ("correct_column", correct_column)):
        if name is not None and name not in dataset.column_names:
            raise DataError(f"`{argument}`: there is no column {name!r} among {dataset.column_names}.")
    correct = _correct(dataset, correct_column)
    names, source = _difficulty(dataset, difficulty, difficulty_edges, correct)
    if length_column is not None:
        lengths, unit, measure = _column_of_lengths(dataset, length_column), f"the column {length_column}", "column"
        truncated = np.zeros(len(dataset), dtype=bool)
    else:
        measure = measure or _default_measure(dataset)
        lengths, truncated = _read(dataset, tokenizer, measure, progress)
        unit = "words" if tokenizer is None else f"tokens of {tokenizer.name_or_path or 'the tokenizer'}"
    if "finish_reason" in dataset.column_names:
        truncated |= np.array([reason == "length" for reason in column(dataset, "finish_reason")], dtype=bool)
    return Measured(lengths, names, correct, truncated, measure, unit, source)


def thoughts_of(rows: list[dict[str, Any]], first: int) -> list[Thought]:
    """The thoughts of rows. An error names the row, counted from `first`."""
    found = []
    for number, row in enumerate(rows, start=first):
        try:
            found.append(row_thinking(row))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"Row {number} of the dataset is not a sample ({error!r}). A sample has a text in `text`, `messages`, "
                "or `prompt` and `completion`."
            ) from error
    return found


def prompt_keys(dataset: Dataset) -> list[str] | None:
    """A key of each sample's prompt, equal for equal prompts. `None` if the dataset has no prompts."""
    columns = dataset.column_names
    if "prompt" in columns:
        return [json.dumps(prompt, sort_keys=True, default=str) for prompt in column(dataset, "prompt")]
    if "messages" in columns:
        return [
            json.dumps([m for m in messages if m.get("role") != "assistant"], sort_keys=True, default=str)
            for messages in column(dataset, "messages")
        ]
    return None


def _default_measure(dataset: Dataset) -> str:
    start = next(pieces(_with_text(dataset)), [])
    return "reasoning" if any(thought.reasoning for thought in thoughts_of(start, 0)) else "all"


def _with_text(dataset: Dataset) -> Dataset:
    """The columns that `row_thinking` reads, or all if the samples are in none of them, for its error."""
    names = [
        name for name in ("prompt", "completion", "messages", "text", "reasoning") if name in dataset.column_names
    ]
    return dataset.select_columns(names) if set(names) - {"prompt", "reasoning"} else dataset


def _read(
    dataset: Dataset, tokenizer: "PreTrainedTokenizerBase | None", measure: str, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and unfinished thoughts, both `[N]`."""
    lengths = np.zeros(len(dataset), dtype=np.int64)
    unfinished = np.zeros(len(dataset), dtype=bool)
    display = tqdm(desc="lengths", total=len(dataset), unit="row", disable=not progress, dynamic_ncols=True)
    for number, rows in enumerate(pieces(_with_text(dataset))):
        start = number * ROWS_PER_READ
        thoughts = thoughts_of(rows, start)
        parts = {
            "reasoning": [thought.reasoning or "" for thought in thoughts],
            "answer": [thought.answer for thought in thoughts],
        }
        for part in ("reasoning", "answer") if measure == "all" else (measure,):
            lengths[start : start + len(rows)] += _count(parts[part], tokenizer)
        unfinished[start : start + len(rows)] = [not thought.finished for thought in thoughts]
        display.update(len(rows))
    display.close()
    return lengths, unfinished


def _count(texts: list[str], tokenizer: "PreTrainedTokenizerBase | None") -> list[int]:
    if tokenizer is None:
        return [len(text.split()) for text in texts]
    if tokenizer.is_fast:  # without the positions of tokens, which take a quarter of the time
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        return [
            len(tokens) for tokens in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def _column_of_lengths(dataset: Dataset, name: str) -> np.ndarray:
    values = column(dataset, name)
    try:
        lengths = np.array(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise DataError(f"`length_column`: {name!r} holds no numbers but e.g. {values[0]!r}.") from error
    bad = ~(np.isfinite(lengths) & (lengths >= 0))
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(f"`length_column`: {name!r} has {lengths[row]} in row {row}. Lengths are 0 or more.")
    return lengths


def _correct(dataset: Dataset, name: str | None) -> np.ndarray:
    """Correctness `[N]`, `nan` where it is not known."""
    if name is None and "correct" not in dataset.column_names:
        return np.full(len(dataset), np.nan)
    name = name or "correct"
    values = column(dataset, name)
    strange = next((value for value in values if not isinstance(value, bool | int | float | None)), None)
    if strange is not None:
        raise DataError(f"`correct_column`: {name!r} must hold true and false, or numbers, got e.g. {strange!r}.")
    return np.array([np.nan if value is None or value != value else float(value > 0.5) for value in values])


def _difficulty(
    dataset: Dataset, difficulty: str | None, edges: list[float] | None, correct: np.ndarray
) -> tuple[np.ndarray, str]:
    """Names of the difficulties `[N]`, and where they come from."""
    if edges is not None and (not edges or any(low >= high for low, high in pairwise(edges))):
        raise DataError(f"`difficulty_edges` must be increasing numbers, got {edges}.")
    nothing = np.full(len(dataset), ALL), "none"
    if difficulty == "none":
        return nothing
    if difficulty is None and "difficulty" in dataset.column_names:
        difficulty = "difficulty"
    if difficulty in (None, SOLVED):
        keys = prompt_keys(dataset)
        known = keys is not None and not np.isnan(correct).all()
        if difficulty is None and not (known and len(set(keys or [])) <= len(dataset) / 2):
            return nothing
        if not known:
            raise DataError(
                "`difficulty`: 'solved' needs the prompts of the samples, and a column that says which are correct "
                "(`correct_column`)."
            )
        return _solved(keys or [], correct, edges)
    if difficulty not in dataset.column_names:
        raise DataError(
            f"`difficulty`: there is no column {difficulty!r} among {dataset.column_names}. Name one, "
            "'solved' or 'none'."
        )
    values = column(dataset, difficulty)
    if edges is not None:
        return _cut(values, edges, difficulty), f"the column {difficulty}"
    names = np.array(["unknown" if value is None else str(value) for value in values])
    if len(set(names.tolist())) > MAX_DIFFICULTIES:
        raise DataError(
            f"`difficulty`: the column {difficulty!r} has {len(set(names.tolist()))} different values, more than "
            f"{MAX_DIFFICULTIES}. Cut its numbers by `difficulty_edges`, e.g. 0.33 0.67."
        )
    return names, f"the column {difficulty}"


def _solved(keys: list[str], correct: np.ndarray, edges: list[float] | None) -> tuple[np.ndarray, str]:
    """The difficulty by the share of correct samples of the same prompt."""
    values: dict[str, list[float]] = defaultdict(list)
    for key, value in zip(keys, correct.tolist(), strict=True):
        if value == value:
            values[key].append(value)
    shares = [sum(values[key]) / len(values[key]) if values[key] else None for key in keys]
    if edges is not None:
        return _cut(shares, edges, SOLVED), "the share of correct samples of a prompt"
    names = ["unknown" if s is None else SOLVED_NAMES[(s >= 1 / 3) + (s >= 2 / 3)] for s in shares]
    return np.array(names), "the share of correct samples of a prompt: hard below 1/3, easy from 2/3"


def _cut(values: list[Any], edges: list[float], what: str) -> np.ndarray:
    if any(isinstance(value, str | bool | list | dict) for value in values):
        raise DataError(f"`difficulty_edges` cut numbers, but {what!r} holds e.g. {values[0]!r}.")
    marks = [f"{edge:g}" for edge in edges]
    names = [f"below {marks[0]}", *(f"{low} to {high}" for low, high in pairwise(marks)), f"from {marks[-1]}"]
    places = np.searchsorted(edges, [np.nan if value is None else value for value in values], side="right")
    return np.array(["unknown" if v is None else names[k] for v, k in zip(values, places.tolist(), strict=True)])
