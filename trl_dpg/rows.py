"""Rows of samples: the columns that make them, their text, and how they are read by Hub id or from files."""

import glob
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .text import message_text


if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = (("input_ids", "labels"), ("input_ids",), ("messages",), ("prompt", "completion"), ("text",))
FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


def sample_columns(there: Collection[str]) -> tuple[str, ...] | None:
    """The columns that make samples, of those that are there: the first of `FORMATS`. `None` if there are none."""
    return next((own for own in FORMATS if set(own) <= set(there)), None)


def row_text(row: Mapping[str, Any]) -> str:
    """A sample in one text, for a person: texts and messages one after the other, or the token ids."""
    parts = [row[name] for name in ("messages", "prompt", "completion", "text") if name in row]
    if not parts:
        return str(row.get("input_ids", row))
    messages = [part if isinstance(part, list) else [{"content": part}] for part in parts]
    return " | ".join(message_text(message) for part in messages for message in part)


def read_rows(name: str, config: str | None = None, split: str = "train", streaming: bool = False) -> "Dataset":
    """
    A split of a dataset by its Hub id, or by the path or pattern of local files (`data/*.jsonl`).

    Raises:
        `ValueError`: If it cannot be read, or has no rows.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix in FILE_FORMATS and not any(Path(file).is_file() for file in glob.glob(name)):
        raise ValueError(f"there is no file {name!r}.")
    try:
        if suffix in FILE_FORMATS:
            data = load_dataset(FILE_FORMATS[suffix], data_files=name, split=split, streaming=streaming)
        else:
            data = load_dataset(name, name=config, split=split, streaming=streaming)
    except (OSError, ValueError, StopIteration, DatasetGenerationError) as error:
        reason = ": ".join(str(part) for part in (error, error.__cause__) if part and str(part)) or repr(error)
        raise ValueError(
            f"{name!r} could not be read (split {split!r}). {reason} -- Give a Hub id, or a file (json, jsonl, "
            "parquet, csv, txt)."
        ) from error
    if not streaming and len(data) == 0:
        raise ValueError(f"{name!r} has no rows (split {split!r}).")
    return data
