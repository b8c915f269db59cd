"""Replay: rows of a dataset of one's own that are mixed into a student's data, and are never scored."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from .metagradients import InnerLoopConfig, MetagradientOutput
from .metagradients.config import SettingsError
from .rows import read_rows, sample_columns
from .student import Examples, TokenizedExample


class Mixture(NamedTuple):
    """
    Samples and replayed rows, in the order in which a student is fine-tuned on them.

    Attributes:
        examples (`list`): All of them.
        own (`list[int]`): The places of the N samples among them, in the order of the samples.
    """

    examples: Sequence[Any]
    own: list[int]

    @property
    def has_replay(self) -> bool:
        return len(self.own) < len(self.examples)

    def check(self, tokenized: Sequence[TokenizedExample]) -> None:
        """Refuse samples that have nothing to learn from, whatever the replayed rows have."""
        if self.has_replay and not any(tokenized[place].num_supervised for place in self.own):
            raise ValueError(
                f"None of the {len(self.own)} samples has a token to learn from: all are empty, or cut off before "
                "one. Only replayed rows have some. Check the generator's completions and the student's tokenizer."
            )

    def of_the_samples(self, output: MetagradientOutput) -> MetagradientOutput:
        """The output without the scores of replayed rows."""
        if not self.has_replay:
            return output
        return replace(
            output,
            scores=output.scores[self.own],
            token_scores=None if output.token_scores is None else output.token_scores[self.own],
            samples=[output.samples[place] for place in self.own],
            part_scores={name: scores[self.own] for name, scores in output.part_scores.items()},
        )


class Replay:
    """
    Rows of a dataset that are mixed into a student's data at a ratio, and are never scored.

    The student keeps what these rows teach, while other samples raise its metric (rehearsal, as in Ibrahim et al.,
    arXiv 2403.08763). The rows are ordinary samples of the fine-tuning. So the scores of the others are the exact
    metagradients of a student that has seen both, and those of the rows are dropped.

    After the samples of each batch come `round(ratio · batch_size)` rows. The number of optimizer steps does not
    change: `batch_size` counts the samples alone. A last batch with fewer samples has fewer rows.

    Args:
        rows (`list` or [`~datasets.Dataset`]):
            The rows, in any format of [`Student.tokenize`].
        ratio (`float`, *optional*, defaults to `0.25`):
            Replayed rows for each sample.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the draws.

    Raises:
        `ValueError`: If there are no rows, if their columns are no samples, or if the ratio is not above 0.
    """

    def __init__(self, rows: Examples, ratio: float = 0.25, seed: int = 42):
        if isinstance(rows, str) or not hasattr(rows, "__getitem__"):
            raise ValueError(f"The replayed rows must be a list or a Dataset, got {type(rows).__name__}.")
        if len(rows) == 0:
            raise ValueError("The dataset of replayed rows is empty.")
        check_ratio(ratio)
        if isinstance(rows, Dataset):
            columns = sample_columns(rows.column_names)
            if columns is None:
                raise SettingsError(
                    f"`replay_dataset` has the columns {rows.column_names}; expected `text`, `messages`, `prompt` and "
                    "`completion`, or `input_ids`."
                )
            rows = rows.select_columns(list(columns))
        else:
            rows = list(rows)
        self.rows, self.ratio, self.seed = rows, ratio, seed

    def number(self, num_samples: int, batch_size: int) -> int:
        """Replayed rows beside this number of samples."""
        whole, left = divmod(num_samples, batch_size)
        return whole * round(self.ratio * batch_size) + round(self.ratio * left)

    def widened(self, config: InnerLoopConfig) -> InnerLoopConfig:
        """
        The inner loop whose batches have room for the replayed rows.

        Raises:
            `ValueError`: If a batch has so few samples that no row comes to it.
        """
        number = round(self.ratio * config.batch_size)
        if number == 0:
            raise SettingsError(
                f"`replay_ratio` {self.ratio:g} gives no row to a batch of {config.batch_size} samples "
                f"(`batch_size`). Use more than {0.5 / config.batch_size:g}, or a larger batch."
            )
        return replace(config, batch_size=config.batch_size + number)

    def draw(self, number: int, index: int) -> list[Any]:
        """
        Rows without repetition, as long as there are enough.

        Args:
            number (`int`): How many.
            index (`int`): Which draw it is. Each has other rows, which depend on it and the seed alone.
        """
        rng = np.random.default_rng([self.seed, index])
        size = len(self.rows)
        rounds = [size] * (number // size) + [number % size] * (number % size > 0)
        places = [int(place) for own in rounds for place in rng.choice(size, own, replace=False)]
        if isinstance(self.rows, Dataset):
            return self.rows.select(places).to_list()
        return [self.rows[place] for place in places]

    def mix(self, samples: Sequence[Any], batch_size: int, index: int) -> Mixture:
        """Samples and rows of a draw, batch by batch. `batch_size` is that of the samples alone."""
        rows = iter(self.draw(self.number(len(samples), batch_size), index))
        examples: list[Any] = []
        own: list[int] = []
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            own += range(len(examples), len(examples) + len(batch))
            examples += batch
            examples += [next(rows) for _ in range(self.number(len(batch), batch_size))]
        return Mixture(examples, own)

    def add_to(self, dataset: Dataset, batch_size: int, index: int) -> Dataset:
        """
        A dataset for [`~trl.SFTTrainer`] with the rows of a draw at its end. Texts become completions if one of the
        two has prompts.

        Raises:
            `ValueError`: If the two have different formats.
        """
        drawn = self.draw(self.number(len(dataset), batch_size), index)
        rows = [{"text": row} if isinstance(row, str) else dict(row) for row in drawn]
        samples = dataset.to_list()
        kinds = [_columns(part[0]) for part in (samples, rows)]
        if set(kinds) == {("text",), ("prompt", "completion")}:
            samples, rows = ([_as_pair(row) for row in part] for part in (samples, rows))
        elif kinds[0] != kinds[1]:
            raise SettingsError(
                f"`replay_dataset` has the columns {list(kinds[1])} and the samples have {list(kinds[0])}. A fresh "
                "student is trained by SFTTrainer, which reads one format: give both the same columns."
            )
        columns = _columns(samples[0])
        return Dataset.from_list([{name: row[name] for name in columns} for row in [*samples, *rows]])


def without_replay(samples: Sequence[Any]) -> Mixture:
    return Mixture(samples, list(range(len(samples))))


def check_ratio(ratio: Any) -> None:
    """
    Raises:
        `ValueError`: If it is no number above 0.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < math.inf:
        raise SettingsError(f"`replay_ratio` must be a number above 0, got {ratio!r}. E.g. 0.25: 2 rows to 8 samples.")


def load_rows(name: str, split: str = "train") -> Dataset:
    """
    Rows by Hub id, or from files, see [`~trl_dpg.rows.read_rows`].

    Raises:
        `ValueError`: If they cannot be read.
    """
    try:
        return read_rows(name, split=split)
    except ValueError as error:
        raise SettingsError(f"`replay_dataset`: {error}") from error


def _columns(row: dict[str, Any]) -> tuple[str, ...]:
    return sample_columns(row) or tuple(row)


def _as_pair(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": "", "completion": row["text"]} if "completion" not in row else row
