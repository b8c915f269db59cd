"""The result of an attribution: scores, the reliability of their ranking, and files with the best samples."""

import json
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value

from ..files import written_whole
from ..metagradients.config import SettingsError
from .journal import Journal
from .reliability import RELIABLE, rank_correlation, reliability, repeats_needed


ROWS_PER_WRITE = 1000
QUANTILES = {"min": 0.0, "q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95, "max": 1.0}


@dataclass
class Attribution:
    """
    The result of [`attribute`]. It is the same on every process.

    Attributes:
        scores (`np.ndarray` of shape `[N]`, float32):
            The mean of a sample's metagradients over all repeats, in the dataset's order. 0 for empty samples.
        token_scores (`np.ndarray` of shape `[sum(num_tokens)]`, float32, or `None`):
            With `per_token`, the scores of all samples' tokens, one sample after the other; see `token_offsets`.
        num_tokens (`np.ndarray` of shape `[N]`): Number of each sample's tokens that the student read.
        metric_before (`float` or `None`): Φ of the student before fine-tuning. `None` if all samples are empty.
        metric_after (`float` or `None`): Φ after fine-tuning, the mean over all students.
        num_chunks (`int`), num_repeats (`int`): Number of fine-tuned students, and of random orders.
        num_empty (`int`), num_truncated (`int`): Samples without a supervised token; samples that were cut off.
        rank_correlation (`float` or `None`):
            Spearman's correlation of scores in two random orders. `None` if there is nothing to compare.
        num_compared (`int`): Number of samples in this correlation.
        seconds (`float`): Time of scoring, summed over the chunks.
    """

    scores: np.ndarray
    token_scores: np.ndarray | None
    num_tokens: np.ndarray
    metric_before: float | None
    metric_after: float | None
    num_chunks: int
    num_repeats: int
    num_empty: int
    num_truncated: int
    rank_correlation: float | None
    num_compared: int
    seconds: float

    @property
    def token_offsets(self) -> np.ndarray:
        """The position of each sample's first token in `token_scores`, and the end of the last sample, `[N + 1]`."""
        return np.concatenate([[0], self.num_tokens.cumsum()])

    @property
    def ranking(self) -> np.ndarray:
        """Rows of the dataset, `[N]`, from the highest score to the lowest."""
        return ranking(self.scores)

    def top(self, share: float) -> np.ndarray:
        """
        The rows with the highest scores, in the dataset's order.

        Args:
            share (`float`): The share of rows to keep, above 0 and at most 1. At least one row is kept.

        Raises:
            `ValueError`: If the share is out of range, or if all scores are equal.
        """
        return top_rows(self.scores, share)

    def chance(self) -> str:
        """A text that says how much of the ranking is chance, and what to change. Names of fields are in backticks."""
        if self.scores.min() == self.scores.max():
            return "All scores are equal, so there is no ranking. Does the student learn (`learning_rate`)?"
        if self.rank_correlation is None:
            return "All samples are in one batch, or too few to say how much of their ranking is chance."
        text = f"Rank correlation of {self.num_compared} scores in two random orders: {self.rank_correlation:.2f}."
        if self.num_chunks == self.num_repeats:
            text += " (There is only one chunk: both orders have the same samples.)"
        if reliability(self.rank_correlation, self.num_repeats) >= RELIABLE:
            return text
        text += "\nMuch of the ranking is chance. Raise `eps_root` or `batch_size` (docs/attribution.md)"
        enough = repeats_needed(self.rank_correlation)
        if enough is not None:
            text += f", or take the mean of more orders: `num_repeats` {enough} for {RELIABLE}"
        return text + "."

    def figures(self) -> dict[str, Any]:
        """Counts, metric and quantiles of the scores, as values that JSON can hold."""
        return {
            "num_samples": len(self.scores),
            "num_chunks": self.num_chunks,
            "num_repeats": self.num_repeats,
            "num_tokens": int(self.num_tokens.sum()),
            "num_empty": self.num_empty,
            "num_truncated": self.num_truncated,
            "seconds": self.seconds,
            "samples_per_second": len(self.scores) * self.num_repeats / self.seconds,
            "metric_before": self.metric_before,
            "metric_after": self.metric_after,
            "score": {
                **quantiles(self.scores),
                "rank_correlation": self.rank_correlation,
                "num_compared": self.num_compared,
            },
        }

    def write(
        self, dataset: Dataset, output_dir: Path, output_format: str = "parquet", rows: np.ndarray | None = None
    ) -> list[Path]:
        """
        Write the dataset with a column `dpg_score` (and `dpg_token_scores`), a thousand rows at a time.

        Args:
            dataset ([`~datasets.Dataset`]): The N rows that were scored.
            output_dir (`Path`): The folder for the file `scored` with all rows and, with `rows`, the file `top`.
            output_format (`str`, *optional*, defaults to `"parquet"`): `"parquet"` or `"jsonl"`.
            rows (`np.ndarray`, *optional*): The rows of `top`, see [`Attribution.top`].

        Returns:
            `list[Path]`: The files. A file gets its final name only when it is complete.
        """
        return write({None: self}, dataset, output_dir, output_format, rows)

    def columns(self, rows: slice) -> list[pa.Array]:
        """The new columns of some rows: scores and, if there are any, those of tokens."""
        columns = [pa.array(self.scores[rows])]
        if self.token_scores is not None:
            ends = self.token_offsets[rows.start : rows.stop + 1]
            values = pa.array(self.token_scores[ends[0] : ends[-1]])
            columns.append(pa.ListArray.from_arrays(pa.array(ends - ends[0], pa.int32()), values))
        return columns


def ranking(scores: np.ndarray) -> np.ndarray:
    """Rows `[N]` from the highest score to the lowest."""
    return np.argsort(-scores, kind="stable")


def top_rows(scores: np.ndarray, share: float) -> np.ndarray:
    """The rows with the highest scores, see [`Attribution.top`]."""
    if not 0 < share <= 1:
        raise ValueError(f"The share of samples to keep must be above 0 and at most 1, got {share}. E.g. 0.3.")
    if len(scores) > 1 and scores.min() == scores.max():
        raise SettingsError(
            f"all {len(scores)} scores are equal, so no sample is better than another. Does the student learn "
            "(`learning_rate`)?"
        )
    return np.sort(ranking(scores)[: max(1, round(share * len(scores)))])


def quantiles(scores: np.ndarray) -> dict[str, float]:
    """Mean, standard deviation and quantiles of scores."""
    values = np.quantile(scores, list(QUANTILES.values())).tolist()
    return {"mean": float(scores.mean()), "std": float(scores.std()), **dict(zip(QUANTILES, values, strict=True))}


@dataclass
class Estimates:
    """Scores of some rows that are written as those of an [`Attribution`] are. `scores` `[N]`: NaN for no score."""

    scores: np.ndarray
    token_scores: None = None

    def columns(self, rows: slice) -> list[pa.Array]:
        """The new column of some rows."""
        return [pa.array(self.scores[rows], pa.float32(), from_pandas=True)]


def score_columns(name: str | None) -> list[str]:
    """The columns for the scores of samples and tokens by the metric with this name, or by the only metric."""
    suffix = "" if name is None else f"_{name}"
    return [f"dpg_score{suffix}", f"dpg_token_scores{suffix}"]


def write(
    results: Mapping[Any, Attribution | Estimates],
    dataset: Dataset,
    output_dir: str | Path,
    output_format: str = "parquet",
    rows: np.ndarray | None = None,
    file_name: str = "scored",
) -> list[Path]:
    """
    Write the dataset with the scores by several metrics: `dpg_score_<name>` (and `dpg_token_scores_<name>`).

    Args:
        results (`dict[str, Attribution]`):
            The scores by name, as [`attribute`] returns them. Values of a metric per unit of data weight.
        dataset ([`~datasets.Dataset`]), output_dir (`str` or `Path`), output_format (`str`), rows (`np.ndarray`):
            See [`Attribution.write`].
        file_name (`str`, *optional*, defaults to `"scored"`):
            The name of the file with all rows, without its ending.

    Returns:
        `list[Path]`: The files.
    """
    output_dir = Path(output_dir)
    added: dict[str, Any] = {}
    for name, result in results.items():
        kinds = [Value("float32")] + ([] if result.token_scores is None else [List(Value("float32"))])
        added |= dict(zip(score_columns(name), kinds, strict=False))
    schema = Features(dict(dataset.features) | added).arrow_schema
    masks = {file_name: np.ones(len(dataset), dtype=bool)}
    if rows is not None:
        masks["top"] = np.isin(np.arange(len(dataset)), rows)
    files = [output_dir / f"{name}.{output_format}" for name in masks]
    writer_type = pq.ParquetWriter if output_format == "parquet" else JSONLinesWriter
    arrow = dataset.with_format("arrow")
    with ExitStack() as stack:
        parts = [stack.enter_context(written_whole(file)) for file in files]
        writers = [stack.enter_context(closing(writer_type(part, schema))) for part in parts]
        for start in range(0, len(dataset), ROWS_PER_WRITE):
            piece = slice(start, min(start + ROWS_PER_WRITE, len(dataset)))
            columns = [column for result in results.values() for column in result.columns(piece)]
            table = pa.table([*arrow[piece].columns, *columns], names=schema.names).cast(schema)
            for writer, mask in zip(writers, masks.values(), strict=True):
                writer.write_table(table.filter(pa.array(mask[piece])))
    return files


class JSONLinesWriter:
    """Writes tables as JSON Lines, with the interface of `pyarrow.parquet.ParquetWriter`."""

    def __init__(self, path: Path, schema: pa.Schema):
        self.file = path.open("w", encoding="utf-8")

    def write_table(self, table: pa.Table) -> None:
        lines = (json.dumps(row, ensure_ascii=False, default=str) for row in table.to_pylist())
        self.file.writelines(line + "\n" for line in lines)

    def close(self) -> None:
        self.file.close()


class Gathering:
    """
    What a journal's records say of one result.

    Args:
        weights (`dict[str, float]` or `None`):
            In a journal of several metrics, what the result is: a weighted sum of some of them, by their names.
        num_samples (`int`), num_orders (`int`): Rows of the dataset, and orders in which some of them are scored.
    """

    def __init__(self, weights: Mapping[str, float] | None, num_samples: int, num_orders: int):
        self.weights = weights
        self.repeats = np.full((num_orders, num_samples), np.nan, dtype=np.float32)
        self.before: list[float] = []
        self.after: list[float] = []

    def add(self, record: dict[str, Any], order: int, counts: bool) -> None:
        """Take the scores of a chunk. With `counts`, the chunk is one of the result's own."""
        self.repeats[order, record["rows"]] = _sum(record["scores"], self.weights)
        if counts and record["metric_after"] is not None:
            self.before.append(float(_sum(record["metric_before"], self.weights)))
            self.after.append(float(_sum(record["metric_after"], self.weights)))

    def result(self, num_repeats: int, **counts: Any) -> Attribution:
        """The result, without scores of tokens."""
        known = ~np.isnan(self.repeats).any(axis=0) & self.repeats.any(axis=0)  # empty samples score 0 in any order
        compared = self.repeats[:, known]
        return Attribution(
            scores=self.repeats[:num_repeats].mean(axis=0),
            token_scores=None,
            metric_before=self.before[0] if self.before else None,
            metric_after=sum(self.after) / len(self.after) if self.after else None,
            num_repeats=num_repeats,
            rank_correlation=rank_correlation(compared),
            num_compared=compared.shape[1],
            **counts,
        )


def collect(
    wanted: Mapping[Any, Mapping[str, float] | None],
    journal: Journal,
    num_samples: int,
    chunks_per_repeat: int,
    num_repeats: int,
    per_token: bool,
) -> dict[Any, Attribution]:
    """
    The results in a finished journal by name. An additional chunk is used for the rank correlation only.

    The journal is read once, and with scores of tokens a second time, when the place of each token is known. `wanted`
    has the weights of the metrics in each result, see [`Gathering`].
    """
    num_chunks = chunks_per_repeat * num_repeats
    parts = {name: Gathering(weights, num_samples, max(num_repeats, 2)) for name, weights in wanted.items()}
    num_tokens = np.zeros(num_samples, dtype=np.int64)
    num_empty, num_truncated, seconds = 0, 0, 0.0
    for record in journal.chunks(max(num_chunks, chunks_per_repeat + 1)):
        counts = record["chunk"] < num_chunks
        for part in parts.values():
            part.add(record, record["chunk"] // chunks_per_repeat, counts)
        if counts:
            num_tokens[record["rows"]] = record["num_tokens"]
            num_empty += record["num_empty"]
            num_truncated += record["num_truncated"]
            seconds += record["seconds"]
    shared = {"num_tokens": num_tokens, "num_chunks": num_chunks, "seconds": seconds}
    shared |= {"num_empty": num_empty // num_repeats, "num_truncated": num_truncated // num_repeats}
    results = {name: part.result(num_repeats, **shared) for name, part in parts.items()}
    if per_token:
        _add_token_scores(journal, results, wanted)
    return results


def _sum(entry: Any, weights: Mapping[str, float] | None) -> np.ndarray:
    """An entry of a record or, if it has one for each of several metrics, their weighted sum."""
    if weights is None:
        return np.asarray(entry)
    return sum((weight * np.asarray(entry[name]) for name, weight in weights.items()), start=np.zeros(()))


def _add_token_scores(journal: Journal, results: Mapping[Any, Attribution], wanted: Mapping[Any, Any]) -> None:
    """All tokens' scores in the dataset's order, in memory-mapped files that are deleted when the process ends."""
    first = next(iter(results.values()))
    offsets, num_repeats = first.token_offsets, first.num_repeats
    for result in results.values():
        with TemporaryFile(dir=journal.path.parent) as file:  # one for each process
            result.token_scores = np.memmap(file, dtype=np.float32, mode="w+", shape=(max(int(offsets[-1]), 1),))
    for record in journal.chunks(first.num_chunks):
        entry = record["token_scores"]
        for index, row in enumerate(record["rows"]):
            for name, weights in wanted.items():
                own = entry[index] if weights is None else {metric: entry[metric][index] for metric in weights}
                flat: Any = results[name].token_scores
                flat[offsets[row] : offsets[row + 1]] += _sum(own, weights).astype(np.float32) / num_repeats
    for result in results.values():
        result.token_scores = result.token_scores[: offsets[-1]]  # type: ignore[index]
