"""Samples that repeat others, or contain a benchmark."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm import tqdm

from ...text import completion_text
from ..lengths.rows import DataError, pieces


NGRAM = 13
MIN_WORDS = 5
"""Texts of a benchmark with fewer words are not looked for: they are in too many texts by chance."""
NUM_PERMUTATIONS = 128
SHINGLE = 5
WORD = re.compile(r"\w+")
TEXT_COLUMNS = ("prompt", "question", "problem", "completion", "answer", "text", "messages", "reasoning")


def row_text(row: dict[str, Any]) -> str:
    """All that a row says: the texts of its prompt, its messages, its reasoning and its completion."""
    parts = []
    for name in TEXT_COLUMNS:
        value = row.get(name)
        if isinstance(value, str):
            parts.append(value)
        elif isinstance(value, list):
            parts.append(completion_text(value))
            parts += [m[key] for m in value for key in ("reasoning_content", "thinking") if m.get(key)]
    return "\n".join(parts)


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return WORD.findall(text.lower())


@dataclass
class Contamination:
    """
    Where samples contain a benchmark.

    Attributes:
        rows (`np.ndarray` of shape `[N]`): Which samples do.
        num_hit (`int`): Texts of the benchmark of which a sample has a part.
        num_too_short (`int`): Texts of the benchmark with fewer than `MIN_WORDS` words, which are not looked for.
    """

    rows: np.ndarray
    num_hit: int
    num_too_short: int


def contaminated(
    texts: Sequence[str], benchmark: Sequence[str], ngram: int = NGRAM, progress: bool = False
) -> Contamination:
    """
    Find samples that share a run of words with a benchmark.

    Texts are compared in lower case and without punctuation. A text of the benchmark with fewer than `ngram` words
    counts as one run.

    Args:
        texts (`Sequence[str]`): N samples.
        benchmark (`Sequence[str]`): The texts of the benchmark.
        ngram (`int`, *optional*, defaults to `13`): Words of a run.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress display.
    """
    vocabulary: dict[str, int] = {}
    runs: dict[int, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))  # words → hash → texts
    too_short = 0
    for number, text in enumerate(benchmark):
        ids = np.array([vocabulary.setdefault(word, len(vocabulary) + 1) for word in words(text)], dtype=np.uint64)
        if len(ids) < MIN_WORDS:
            too_short += 1
            continue
        length = min(ngram, len(ids))
        for value in _hashes(ids, length).tolist():
            runs[length][value].add(number)
    rows, hit = np.zeros(len(texts), dtype=bool), set()
    for row, text in enumerate(tqdm(texts, desc="decontamination", disable=not progress, dynamic_ncols=True)):
        ids = np.array([vocabulary.get(word, 0) for word in words(text)], dtype=np.uint64)
        for length, known in runs.items():
            if len(ids) < length:
                continue
            strangers = np.concatenate([[0], np.cumsum(ids == 0)])
            whole = strangers[length:] == strangers[:-length]  # all words of the run are words of the benchmark
            if whole.any():
                for value in set(_hashes(ids, length)[whole].tolist()) & known.keys():
                    rows[row] = True
                    hit |= known[value]
    return Contamination(rows, len(hit), too_short)


def _hashes(ids: np.ndarray, length: int) -> np.ndarray:
    """A hash of each run of `length` words, uint64 modulo 2^64. Two different runs share one by chance in 2^-64."""
    scrambled = (ids + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    scrambled ^= scrambled >> np.uint64(31)
    total = np.zeros(len(ids) - length + 1, dtype=np.uint64)
    for place in range(length):
        total = total * np.uint64(0x100000001B3) + scrambled[place : place + len(total)]
    return total


def exact_duplicates(texts: Sequence[str]) -> np.ndarray:
    """Which texts `[N]` occurred before, but for case and white space."""
    seen: set[str] = set()
    repeated = np.zeros(len(texts), dtype=bool)
    for row, text in enumerate(texts):
        key = " ".join(text.lower().split())
        repeated[row] = key in seen
        seen.add(key)
    return repeated


def near_duplicates(texts: Sequence[str], threshold: float = 0.8, progress: bool = False) -> np.ndarray:
    """
    Which texts `[N]` are very similar to an earlier one that stays.

    The similarity is the share of runs of five words that two texts have in common (Jaccard), estimated by MinHash
    (Broder, On the Resemblance and Containment of Documents, 1997). Candidates come from locality-sensitive hashing.

    Args:
        texts (`Sequence[str]`): N texts.
        threshold (`float`, *optional*, defaults to `0.8`): Similarity from which a text counts as a duplicate.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress display.

    Raises:
        `ImportError`: If datasketch is not installed.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError as error:
        raise ImportError("Near duplicates are found by datasketch: pip install 'trl-dpg[mix]'") from error
    if not 0 < threshold < 1:
        raise DataError(f"`near_duplicates` is a similarity between 0 and 1, got {threshold}.")
    index = MinHashLSH(threshold=threshold, num_perm=NUM_PERMUTATIONS)
    empty = MinHash(num_perm=NUM_PERMUTATIONS, seed=1)
    kept: dict[int, MinHash] = {}
    repeated = np.zeros(len(texts), dtype=bool)
    for row, text in enumerate(tqdm(texts, desc="near duplicates", disable=not progress, dynamic_ncols=True)):
        found = words(text)
        runs = {" ".join(found[k : k + SHINGLE]).encode() for k in range(max(len(found) - SHINGLE + 1, 1))}
        sketch = empty.copy()
        sketch.update_batch(list(runs))
        repeated[row] = any(sketch.jaccard(kept[other]) >= threshold for other in index.query(sketch))
        if not repeated[row]:
            index.insert(row, sketch)
            kept[row] = sketch
    return repeated


def texts_of(dataset: Dataset) -> list[str]:
    """
    All that each row says.

    Raises:
        `ValueError`: If there is no column with text.
    """
    columns = [name for name in TEXT_COLUMNS if name in dataset.column_names]
    if not columns:
        raise DataError(f"None of {dataset.column_names} is a column with text that could be compared.")
    return [row_text(row) for rows in pieces(dataset.select_columns(columns)) for row in rows]
