"""One dataset of several, with the lengths of a target."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from ...length_target import ALL, LengthTargets
from ..lengths.distances import distances, effective_sample_size
from ..lengths.measurement import Measured, prompt_keys
from ..lengths.rows import DataError, column
from .cleaning import NGRAM, contaminated, exact_duplicates, near_duplicates, texts_of
from .resampling import Hole, choose, random_rows, round_shares, shares_of
from .styles import LONG_PROMPT, PROMPT_FOR_USE, SHORT_PROMPT, with_instruction


LAYOUT = "trl-dpg mix 1"
SAMPLE_COLUMNS = ("prompt", "completion", "messages", "text", "reasoning")
ADDED = ("length", "difficulty", "source")
"""Columns of the mixture that the datasets need not have."""


@dataclass
class MixConfig:
    """
    How datasets are mixed.

    Args:
        num_samples (`int`):
            Samples of the mixture.
        bin_width (`float`, *optional*, defaults to `0.1`):
            Width of the bins in log-length; 0.1 is about 10 %.
        difficulty_shares (`dict[str, float]`, *optional*):
            Shares of the difficulties, which need not sum to 1. By default as in the dataset.
        fill (`bool`, *optional*, defaults to `True`):
            Whether the nearest other lengths take the place of missing ones. If `False`, the mixture is smaller.
        keep_truncated (`bool`, *optional*, defaults to `False`), keep_wrong (`bool`, *optional*, defaults to `False`):
            Whether samples that were cut off, or are known to be wrong, may be chosen.
        score_column (`str`, *optional*):
            A column with scores, such as the `dpg_score` of `trl-dpg attribute`. Inside a bin, a sample whose score
            is larger by a standard deviation is e times as likely.
        deduplicate (`str`, *optional*, defaults to `"exact"`):
            `"exact"`: without samples that repeat others but for case and white space. `"near"`: also without very
            similar ones. `"none"`: all.
        near_duplicates (`float`, *optional*, defaults to `0.8`):
            Similarity from which samples count as near duplicates.
        ngram (`int`, *optional*, defaults to `13`):
            Words of a run that a sample must not share with a benchmark.
        short_ratio (`float`, *optional*, defaults to `0.0`):
            Share of short samples among long and short ones.
        long_prompt (`str`, *optional*), short_prompt (`str`, *optional*):
            What is added to the prompts of long and short samples if both are mixed; `""`: nothing.
        replay_ratio (`float`, *optional*, defaults to `0.0`):
            Share of other data in the mixture.
        seed (`int`, *optional*, defaults to `42`):
            Seed of all choices and of the order.

    Raises:
        `ValueError`: If a value is out of its range.
    """

    num_samples: int
    bin_width: float = 0.1
    difficulty_shares: dict[str, float] | None = None
    fill: bool = True
    keep_truncated: bool = False
    keep_wrong: bool = False
    score_column: str | None = None
    deduplicate: str = "exact"
    near_duplicates: float = 0.8
    ngram: int = NGRAM
    short_ratio: float = 0.0
    long_prompt: str = LONG_PROMPT
    short_prompt: str = SHORT_PROMPT
    replay_ratio: float = 0.0
    seed: int = 42

    def __post_init__(self):
        for name in ("num_samples", "ngram"):
            if vars(self)[name] < 1:
                raise DataError(f"`{name}` must be at least 1, got {vars(self)[name]}.")
        if not 0.01 <= self.bin_width <= 2:
            raise DataError(f"`bin_width` is a width in log-length from 0.01 to 2, got {self.bin_width}. E.g. 0.1.")
        for name in ("short_ratio", "replay_ratio"):
            if not 0 <= vars(self)[name] < 1:
                raise DataError(f"`{name}` is a share from 0 to below 1, got {vars(self)[name]}.")
        if not 0 < self.near_duplicates < 1:
            raise DataError(f"`near_duplicates` is a similarity between 0 and 1, got {self.near_duplicates}.")
        if self.deduplicate not in ("exact", "near", "none"):
            raise DataError(f"`deduplicate` must be 'exact', 'near' or 'none', got {self.deduplicate!r}.")
        shares = self.difficulty_shares
        if shares is not None and (not shares or min(shares.values()) < 0 or not sum(shares.values()) > 0):
            raise DataError(f"`difficulty_shares` must map difficulties to shares of 0 or more, got {shares}.")


@dataclass
class Sources:
    """
    What is mixed.

    Attributes:
        dataset ([`~datasets.Dataset`]), measured ([`Measured`]): The samples, and their lengths.
        short ([`~datasets.Dataset`] or `None`), short_measured ([`Measured`] or `None`): Short samples.
        replay ([`~datasets.Dataset`] or `None`): Other data.
        benchmark (`Sequence[str]`): Texts that the mixture must not contain.
        rewrite (`Callable` or `None`):
            Makes short samples of the longest of the chosen ones, in the place of `short`: from these to short ones,
            their lengths, and counts.
    """

    dataset: Dataset
    measured: Measured
    short: Dataset | None = None
    short_measured: Measured | None = None
    replay: Dataset | None = None
    benchmark: Sequence[str] = field(default_factory=list)
    rewrite: Callable[[Dataset], tuple[Dataset, Measured, dict[str, Any]]] | None = None


@dataclass
class Mixture:
    """
    The result.

    Attributes:
        dataset ([`~datasets.Dataset`]): The mixture, shuffled, with the columns `length`, `difficulty` and `source`.
        figures (`dict[str, Any]`): Counts, distances before and after, and what could not be filled, as JSON has them.
    """

    dataset: Dataset
    figures: dict[str, Any]


def mix(sources: Sources, target: LengthTargets | None, config: MixConfig, progress: bool = False) -> Mixture:
    """
    Clean, choose by length and difficulty, and mix.

    Args:
        sources ([`Sources`]): The datasets.
        target ([`LengthTargets`], *optional*): The lengths. Without it, samples are chosen at random.
        config ([`MixConfig`]): How.
        progress (`bool`, *optional*, defaults to `False`): Whether to show progress displays.

    Raises:
        `ValueError`: If there are too few samples, a target lacks a difficulty, or the datasets do not fit together.
    """
    rng = np.random.default_rng(config.seed)
    counts = sizes(sources, config)
    rows, dropped = clean(sources.dataset, sources.measured, sources.benchmark, config, progress)
    if len(rows) < counts["data"]:
        raise DataError(
            f"`num_samples`: {counts['data']} samples are to come from the dataset, which has {len(rows)} that can be "
            f"used (of {len(sources.dataset)}; left out: {_listed(dropped)}). Choose fewer, or give more data."
        )
    usable = sources.measured.select(rows)
    picked, holes, elsewhere = _choose_all(
        usable, _log_weights(sources.dataset, rows, config), target, counts, config, rng
    )
    chosen = usable.select(picked)
    figures: dict[str, Any] = {"layout": LAYOUT, "num_samples": config.num_samples, "unit": usable.unit}
    figures |= {"measure": usable.measure, "difficulty": usable.difficulty_from, "dropped": dropped}
    parts = [_with_columns(sources.dataset.select(rows[picked]), chosen, "data")]
    if counts["short"]:
        if sources.rewrite is not None:
            longest = np.sort(np.argsort(-chosen.lengths, kind="stable")[: counts["short"]])
            short, measured, figures["short"] = sources.rewrite(parts[0].select(longest).remove_columns("source"))
            part = _with_columns(short, measured, "short")
        else:
            part, figures["short"] = _short_part(sources, parts[0], counts["short"], config, rng, progress)
        parts = [_instructed(parts[0], config.long_prompt), _instructed(part, config.short_prompt)]
        figures["prompt_for_use"] = PROMPT_FOR_USE
    if sources.replay is not None:
        part, figures["replay"] = _replay_part(sources, counts["replay"], config, rng, progress)
        parts.append(part)
    dataset = _together(parts).shuffle(seed=config.seed)
    found = Counter(column(dataset, "source"))
    figures |= {"num_written": len(dataset), "sources": {name: found[name] for name in counts if counts[name]}}
    if target is not None:
        figures |= _before_and_after(sources.measured, chosen, target, config)
        figures |= {
            "num_from_other_lengths": elsewhere,
            "holes": {k: [asdict(h) for h in v] for k, v in holes.items()},
        }
    return Mixture(dataset, figures)


def sizes(sources: Sources, config: MixConfig) -> dict[str, int]:
    """Samples from each source: `data`, `short` and `replay`."""
    short_ones = sources.short if sources.rewrite is None else sources.rewrite
    for name, there in (("short_ratio", short_ones), ("replay_ratio", sources.replay)):
        if (getattr(config, name) > 0) != (there is not None):
            other = name.replace("ratio", "dataset")
            raise DataError(f"`{name}` and `{other}` belong together. Give both, or neither.")
    replay = round(config.num_samples * config.replay_ratio)
    short = round((config.num_samples - replay) * config.short_ratio)
    if sources.rewrite is not None and config.short_ratio > 0.5:
        raise DataError(
            f"`short_ratio`: rewrites are made of the long samples, so at most 0.5, got {config.short_ratio}."
        )
    return {"data": config.num_samples - replay - short, "short": short, "replay": replay}


def clean(
    dataset: Dataset, measured: Measured, benchmark: Sequence[str], config: MixConfig, progress: bool
) -> tuple[np.ndarray, dict[str, int]]:
    """Indices of the samples that may be chosen, and how many were left out for which reason."""
    bad = {
        "empty": measured.lengths == 0,
        "truncated": measured.truncated & (not config.keep_truncated),
        "wrong": (measured.correct == 0.0) & (not config.keep_wrong),
    }
    left = np.arange(len(dataset))
    dropped = {}
    for name, mask in bad.items():
        dropped[name] = int(mask[left].sum())
        left = left[~mask[left]]
    if benchmark or config.deduplicate != "none":
        texts = texts_of(dataset.select(left))
    if benchmark:
        found = contaminated(texts, benchmark, config.ngram, progress)
        dropped |= {"contaminated": int(found.rows.sum())}
        left, texts = left[~found.rows], [text for text, hit in zip(texts, found.rows, strict=True) if not hit]
    if config.deduplicate != "none":
        repeated = exact_duplicates(texts)
        dropped["exact_duplicates"] = int(repeated.sum())
        left, texts = left[~repeated], [text for text, again in zip(texts, repeated, strict=True) if not again]
    if config.deduplicate == "near":
        repeated = near_duplicates(texts, config.near_duplicates, progress)
        dropped["near_duplicates"] = int(repeated.sum())
        left = left[~repeated]
    return left, dropped


def _log_weights(dataset: Dataset, rows: np.ndarray, config: MixConfig) -> np.ndarray | None:
    """Standardised scores of the rows, or none."""
    if config.score_column is None:
        return None
    if config.score_column not in dataset.column_names:
        raise DataError(f"`score_column`: there is no column {config.score_column!r} among {dataset.column_names}.")
    try:
        scores = np.array(column(dataset, config.score_column), dtype=float)[rows]
    except (TypeError, ValueError) as error:
        raise DataError(f"`score_column`: {config.score_column!r} must hold numbers ({error}).") from error
    if not np.isfinite(scores).all():
        raise DataError(f"`score_column`: {config.score_column!r} has values that are not finite numbers.")
    return (scores - scores.mean()) / max(scores.std(), 1e-300)


def _choose_all(
    usable: Measured,
    log_weights: np.ndarray | None,
    target: LengthTargets | None,
    counts: dict[str, int],
    config: MixConfig,
    rng: np.random.Generator,
) -> tuple[np.ndarray, dict[str, list[Hole]], int]:
    """The chosen ones among the usable samples, the holes by difficulty, and samples taken from other lengths."""
    shares = shares_of(usable.difficulty, config.difficulty_shares)
    unknown = [name for name in shares if name not in usable.names]
    if unknown:
        raise DataError(
            f"`difficulty_shares` has {', '.join(map(repr, unknown))}, but the difficulties of the samples are "
            f"{', '.join(map(repr, usable.names))}."
        )
    picked, holes, elsewhere = [], {}, 0
    for name, number in round_shares(shares, counts["data"]).items():
        places = np.flatnonzero(usable.difficulty == name)
        if target is None:
            picked.append(places[random_rows(number, len(places), rng)])
            continue
        weights = None if log_weights is None else log_weights[places]
        found = choose(usable.lengths[places], target.of(name), number, rng, config.bin_width, weights, config.fill)
        picked.append(places[found.rows])
        elsewhere += found.num_elsewhere
        if found.holes:
            holes[name] = found.holes
    return np.concatenate(picked), holes, elsewhere


def _before_and_after(before: Measured, after: Measured, target: LengthTargets, config: MixConfig) -> dict[str, Any]:
    """
    Distances to the target and effective sample sizes by difficulty, of the whole dataset and of what was chosen.

    The overall distances are means over the difficulties, weighted by the chosen samples.
    """
    figures: dict[str, Any] = {}
    for when, part in (("before", before), ("after", after)):
        by_difficulty = {}
        for name in after.names:
            lengths = part.lengths[(part.difficulty == name) & (part.lengths > 0)]
            by_difficulty[name] = {"num_samples": len(lengths)} | distances(lengths, target.of(name))
            size = effective_sample_size(lengths, target.of(name), config.bin_width)
            by_difficulty[name]["effective_sample_size"] = size
        weights = [(after.difficulty == name).sum() / len(after.difficulty) for name in after.names]
        figures[when] = {
            key: float(np.dot(weights, [by_difficulty[name][key] for name in after.names]))
            for key in ("wasserstein", "ks")
        }
        for key in ("num_samples", "effective_sample_size"):
            figures[when][key] = sum(by_difficulty[name][key] for name in after.names)
        figures[when]["by_difficulty"] = by_difficulty
    return figures


def _short_part(
    sources: Sources, long: Dataset, number: int, config: MixConfig, rng: np.random.Generator, progress: bool
) -> tuple[Dataset, dict[str, Any]]:
    """Short samples. Those with the prompts of the long ones come first."""
    short, measured = sources.short, sources.short_measured
    assert short is not None and measured is not None
    rows, dropped = clean(short, measured, sources.benchmark, config, progress)
    if len(rows) < number:
        raise DataError(
            f"`short_ratio`: {number} short samples are needed, but `short_dataset` has {len(rows)} that can be used "
            f"(left out: {_listed(dropped)}). Choose a smaller ratio, or give more."
        )
    own, others = prompt_keys(short), set(prompt_keys(long) or [])
    paired = np.array([own is not None and own[row] in others for row in rows.tolist()])
    order = np.lexsort((rng.random(len(rows)), ~paired))[:number]
    figures = {"dropped": dropped, "num_paired": int(paired[order].sum())}
    return _with_columns(short.select(rows[order]), measured.select(rows[order]), "short"), figures


def _replay_part(
    sources: Sources, number: int, config: MixConfig, rng: np.random.Generator, progress: bool
) -> tuple[Dataset, dict[str, Any]]:
    """Random samples of the other data, without the benchmark's."""
    replay = sources.replay
    assert replay is not None
    left, dropped = np.arange(len(replay)), {}
    if sources.benchmark:
        found = contaminated(texts_of(replay), sources.benchmark, config.ngram, progress)
        left, dropped = np.flatnonzero(~found.rows), {"contaminated": int(found.rows.sum())}
    if len(left) < number:
        raise DataError(
            f"`replay_ratio`: {number} samples of other data are needed, but `replay_dataset` has {len(left)}. "
            "Choose a smaller ratio, or give more."
        )
    part = replay.select(left[random_rows(number, len(left), rng)])
    return part.remove_columns([name for name in ADDED if name in part.column_names]).add_column(
        "source", ["replay"] * number
    ), {"dropped": dropped}


def _with_columns(part: Dataset, measured: Measured, source: str) -> Dataset:
    """The samples with their length, difficulty and source."""
    columns: dict[str, Any] = {"length": measured.lengths.tolist(), "source": [source] * len(part)}
    if not (measured.difficulty == ALL).all():
        columns["difficulty"] = measured.difficulty.tolist()
    part = part.remove_columns([name for name in columns if name in part.column_names])
    for name, values in columns.items():
        part = part.add_column(name, values)
    return part


def _instructed(part: Dataset, instruction: str) -> Dataset:
    if not instruction or not len(part):
        return part
    return part.map(lambda row: with_instruction(row, instruction), load_from_cache_file=False)


def _together(parts: list[Dataset]) -> Dataset:
    """One dataset. Parts must have their samples in the same columns, and other columns are empty where they lack."""
    first, *others = ([name for name in SAMPLE_COLUMNS[:4] if name in part.column_names] for part in parts)
    for other in others:
        if other != first:
            raise DataError(
                f"The datasets have their samples in different columns, {first} and {other}. Convert one of them."
            )
    try:
        return concatenate_datasets(parts)
    except ValueError as error:
        raise DataError(f"The datasets do not fit together: {error}") from error


def _listed(dropped: dict[str, int]) -> str:
    return ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in dropped.items() if number) or "none"
