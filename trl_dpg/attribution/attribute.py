"""Scores of a dataset of any size: one fine-tuning of the student for each chunk of it."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from tqdm import tqdm

from ..metagradients import InnerLoopConfig
from ..metagradients.config import MEMORY_ONLY, SettingsError
from ..metagradients.fine_tuning import FineTuning
from ..metagradients.goals import MetricFunction, check_metrics, metric_at_start
from ..metagradients.metagradient import differentiate
from ..metrics.base import metric_name
from ..metrics.draw import check_samples, drawn
from ..ranks import ALONE, Ranks, from_all_ranks
from ..replay import Replay, without_replay
from ..student import Examples, Student
from .chunks import Chunk, chunk_size, plan_chunks
from .journal import Journal, digest
from .path import differentiate_path
from .result import Attribution, collect


CONTRAST = "contrast"
"""What the difference of two metrics is called in the results."""


@dataclass
class _Scoring:
    """What is scored, by what, and how; see [`attribute`]."""

    student: Student
    dataset: Examples
    metric: Any
    config: InnerLoopConfig
    path_points: int | None
    metric_samples: int | None
    replay: Replay | None
    share_chunks: bool
    progress: bool


@overload
def attribute(
    student: Student,
    dataset: Examples,
    metric: MetricFunction,
    config: InnerLoopConfig | None = None,
    size: int | None = None,
    num_repeats: int = 1,
    journal: Journal | str | Path | None = None,
    progress: bool = False,
    *,
    share_chunks: bool = False,
    path_points: int | None = None,
    metric_samples: int | None = None,
    replay: Replay | None = None,
) -> Attribution: ...


@overload
def attribute(
    student: Student,
    dataset: Examples,
    metric: Mapping[str, MetricFunction],
    config: InnerLoopConfig | None = None,
    size: int | None = None,
    num_repeats: int = 1,
    journal: Journal | str | Path | None = None,
    progress: bool = False,
    contrast: Sequence[str] | None = None,
    share_chunks: bool = False,
    path_points: int | None = None,
    metric_samples: int | None = None,
    replay: Replay | None = None,
) -> dict[str, Attribution]: ...


def attribute(
    student, dataset, metric, config=None, size=None, num_repeats=1, journal=None, progress=False, contrast=None,
    share_chunks=False, path_points=None, metric_samples=None, replay=None
):  # fmt: skip
    """
    Score the samples of a dataset by their effect on a metric of the student that is fine-tuned on them.

    The dataset is shuffled by `config.seed` and cut into chunks. A fresh student is fine-tuned on each chunk, and a
    sample's score is its metagradient (Thrush et al., arXiv 2604.08423, sec. 3). Scores of different chunks are
    comparable, because all chunks have the same number of steps and of samples in a step. One chunk is scored again in
    another random order, which measures how much of the ranking is chance.

    In a distributed run, every process calls this. Each process scores a part of the chunks, or a part of each chunk.

    Args:
        student (`Student`):
            The student before fine-tuning.
        dataset (`list[str]`, `list[dict]` or [`~datasets.Dataset`]):
            N samples, see [`Student.tokenize`].
        metric (`Callable` or `dict[str, Callable]`):
            Φ: maps a [`FinetunedStudent`] to a scalar tensor, higher is better. Several metrics, by names that you
            choose, share the fine-tunings. The result is then a `dict` with an [`Attribution`] for each.
        config (`InnerLoopConfig`, *optional*):
            The inner loop. With `per_token`, tokens are scored as well.
        size (`int`, *optional*):
            Samples in a chunk, a multiple of `config.batch_size`. When `None`, the smallest multiple from 256 on.
        num_repeats (`int`, *optional*, defaults to `1`):
            Number of random orders in which all samples are scored. The score is the mean.
        journal (`Journal`, `str` or `Path`, *optional*):
            A file from which an interrupted run continues. For a path, its settings are the arguments on which scores
            depend, and Φ before fine-tuning. Pass an entered [`Journal`] to use other settings.
        progress (`bool`, *optional*, defaults to `False`):
            Show a progress bar.
        contrast (`Sequence[str]`, *optional*):
            The names of two metrics. The result then also has `"contrast"`: the scores of the first minus the second.
        share_chunks (`bool`, *optional*, defaults to `False`):
            In a distributed run, whether all processes score each chunk together, which divides the memory.
        path_points (`int`, *optional*):
            Number of random vectors of data weights over which a score is the mean, see [`differentiate_path`]. At
            least 2. When `None`, a score is the derivative at w = 1.
        metric_samples (`int`, *optional*):
            Texts of the metric that are drawn at random, by `config.seed`, once for all chunks. All when `None`.
        replay ([`~trl_dpg.replay.Replay`], *optional*):
            Rows that are mixed into every chunk and not scored. Each chunk has other rows. `size` counts the samples.

    Raises:
        `ValueError`: If `size` is not a multiple of the batch size, if the journal has other settings or another
        student, if `contrast` names no two metrics, if `path_points` is below 2, if `metric_samples` cannot be drawn,
        or in the cases of [`metagradient`]. If all samples are empty, their scores are 0 without an error.
    """
    check_metrics(metric)
    config = config or InnerLoopConfig()
    wanted, size = plan_results(metric, contrast), chunk_size(size, config.batch_size)
    check_path_points(path_points, config)
    check_samples(metric, metric_samples)
    scoring = _Scoring(student, dataset, metric, config, path_points, metric_samples, replay, share_chunks, progress)
    with drawn(metric, metric_samples, [config.seed]):
        found = _attribute(wanted, scoring, size, num_repeats, journal)
    return found if isinstance(metric, Mapping) else found[None]


def check_path_points(path_points: int | None, config: InnerLoopConfig) -> None:
    """
    Refuse a number of random data weights that is none.

    Raises:
        `ValueError`: If it is below 2, or if the scores are no derivatives.
    """
    if path_points is None:
        return
    if not isinstance(path_points, int) or path_points < 2:
        raise SettingsError(f"`path_points` must be an integer of at least 2, got {path_points!r}.")
    if config.attribution == "dataset":
        raise SettingsError(
            "`path_points` averages derivatives, but `attribution` 'dataset' has none. Use 'metagradient'."
        )


def plan_results(metric, contrast: Sequence[str] | None) -> dict[Any, Any]:
    """
    The results by name, each with the weights of metrics in it. A single metric has neither name nor weights.

    Raises:
        `ValueError`: If `contrast` does not name two metrics, or a metric has its name.
    """
    if contrast is None:
        return {name: {name: 1.0} for name in metric} if isinstance(metric, Mapping) else {None: None}
    if not isinstance(metric, Mapping):
        raise SettingsError(f"`contrast` {list(contrast)} needs several metrics. Pass them as a dictionary, by name.")
    names = list(metric)
    if len(set(contrast)) != 2 or not set(contrast) <= set(names):
        raise SettingsError(f"`contrast` needs the names of two of the metrics {names}, got {list(contrast)}.")
    if CONTRAST in names:
        raise SettingsError(f"{CONTRAST!r} is the name of the `contrast` itself. Choose another name for the metric.")
    target, control = contrast
    return {name: {name: 1.0} for name in names} | {CONTRAST: {target: 1.0, control: -1.0}}


def _attribute(wanted, scoring: _Scoring, size: int, num_repeats: int, journal) -> dict[Any, Attribution]:
    number, config = len(scoring.dataset), scoring.config
    chunks, chunks_per_repeat = _plan(number, size, num_repeats, config)
    with ExitStack() as stack:
        opened: Any = journal
        if not isinstance(journal, Journal):
            path = journal or _shared_folder(stack) / "attribution.jsonl"
            opened = stack.enter_context(Journal(path, _settings(scoring, size)))
        _score(scoring, chunks, opened)
        return _collect_together(wanted, opened, number, chunks_per_repeat, num_repeats, config.per_token)


def _plan(num_samples: int, size: int, num_repeats: int, config: InnerLoopConfig) -> tuple[list[Chunk], int]:
    """The chunks, and how many of them a repeat has."""
    if num_repeats < 1:
        raise ValueError(f"num_repeats must be at least 1, got {num_repeats}.")
    if num_samples == 0:
        raise ValueError("The dataset has no samples.")
    chunks = plan_chunks(num_samples, size, config.seed, max(num_repeats, 2))
    chunks_per_repeat = len(chunks) // max(num_repeats, 2)
    if num_repeats == 1:  # one more chunk is scored in another order, for the rank correlation
        chunks = chunks[: chunks_per_repeat + (num_samples > config.batch_size)]
    return chunks, chunks_per_repeat


def _collect_together(wanted: Mapping[Any, Any], *arguments) -> dict[Any, Attribution]:
    """[`collect`] on all processes. None goes on, and may delete the journal, before all have read it."""
    results: dict[Any, Attribution] = {}
    from_all_ranks(lambda: results.update(collect(wanted, *arguments)), "Reading the journal")
    return results


def _settings(scoring: _Scoring, size: int) -> dict[str, Any]:
    """The settings on which the scores depend."""
    replay, further = scoring.replay, {name: vars(scoring)[name] for name in ("path_points", "metric_samples")}
    if replay is not None:
        further |= {"replay_ratio": replay.ratio, "replay_seed": replay.seed, "replay_digest": digest(replay.rows)}
    return {
        **{name: value for name, value in further.items() if value is not None},
        "metric": _each(scoring.metric, lambda _, own: metric_name(own)),
        "student": scoring.student.describe(),
        "chunk_size": size,
        "num_samples": len(scoring.dataset),
        "dataset_digest": digest(scoring.dataset),
        **{name: value for name, value in asdict(scoring.config).items() if name not in MEMORY_ONLY},
    }


def _shared_folder(stack: ExitStack) -> Path:
    """A temporary folder that all processes share. They must be on one machine."""
    (folder,) = broadcast_object_list([stack.enter_context(TemporaryDirectory())])
    return Path(folder)


def _score(scoring: _Scoring, chunks: list[Chunk], journal: Journal) -> None:
    """Score the chunks that are not in the journal yet. Each one is written to the journal when it is scored."""
    state, metric, student = PartialState(), scoring.metric, scoring.student
    together = scoring.share_chunks
    ranks = Ranks.of_this_run(student.device) if together else ALONE
    num_teams, team = (1, 0) if together else (state.num_processes, state.process_index)
    todo = [k for k in range(len(chunks)) if k not in journal.done]
    sizes = [int(chunk.scored.sum()) for chunk in chunks]
    initial = sum(sizes) - sum(sizes[k] for k in todo)
    show = scoring.progress and state.is_main_process
    metric_before = None
    if any(value is not None for value in journal.done.values()):  # also if nothing is left to score
        starts = from_all_ranks(
            lambda: _each(metric, lambda name, own: metric_at_start(own, student, name)), "The metric"
        )
        metric_before = starts[0]
        journal.check_start(metric_before)  # the same on all ranks

    def score(mine: list[int], before) -> list[dict[str, Any]]:
        return [{"chunk": k, **_score_chunk(scoring, k, chunks[k], before, ranks)} for k in mine]

    with tqdm(desc="Scoring", total=sum(sizes), initial=initial, unit="sample", disable=not show, delay=0) as bar:
        for start in range(0, len(todo), num_teams):
            own = todo[start + team :][:1]  # the chunk of this process, if one is left
            if together:
                with ranks.guard("Scoring a chunk"):
                    records = score(own, metric_before)
            else:
                parts = from_all_ranks(partial(score, own, metric_before), "Scoring a chunk")
                records = [record for part in parts for record in part]
            known = [record["metric_before"] for record in records if record["metric_before"] is not None]
            metric_before = known[0] if metric_before is None and known else metric_before
            from_all_ranks(partial(_append, journal, records), "Writing the journal")
            bar.update(sum(sizes[record["chunk"]] for record in records))


def _append(journal: Journal, records: list[dict[str, Any]]) -> None:
    if PartialState().is_main_process:
        for record in records:
            journal.append(record)


def _each(metric, function: Callable[[str | None, Any], Any]) -> Any:
    """`function(name, metric)` of the metric or, by name, of each of several."""
    if isinstance(metric, Mapping):
        return {name: function(name, own) for name, own in metric.items()}
    return function(None, metric)


def _score_chunk(scoring: _Scoring, index: int, chunk: Chunk, metric_before, ranks: Ranks) -> dict[str, Any]:
    """Score a chunk and return its record for the journal. No student is trained if all samples are empty."""
    started, metric, config, replay = time.perf_counter(), scoring.metric, scoring.config, scoring.replay
    rows = _rows(scoring.dataset, chunk.rows.tolist())
    mixture = without_replay(rows) if replay is None else replay.mix(rows, config.batch_size, index)
    widened = config if replay is None else replay.widened(config)
    fine_tuning = FineTuning(scoring.student, mixture.examples, widened, ranks)
    samples = [fine_tuning.samples[place] for place in mixture.own]
    mine = [sample for sample, scored in zip(samples, chunk.scored, strict=True) if scored]
    record: dict[str, Any] = {
        "rows": chunk.rows[chunk.scored].tolist(),
        "scores": _each(metric, lambda *_: [0.0] * len(mine)),
        "num_tokens": [len(sample.input_ids) for sample in mine],
        "num_empty": sum(not sample.num_supervised for sample in mine),
        "num_truncated": sum(sample.truncated for sample in mine),
        "metric_before": None,
        "metric_after": None,
    }
    lengths = record["num_tokens"]
    token_scores = _each(metric, lambda *_: [[0.0] * length for length in lengths])
    if any(sample.num_supervised or sample.truncated for sample in samples):  # none after a cut: an error
        metrics = metric if isinstance(metric, Mapping) else {None: metric}
        before = metric_before if isinstance(metric, Mapping) else {None: metric_before}
        befores = {} if metric_before is None else before
        if scoring.path_points is None:
            every = differentiate(fine_tuning, metrics, metric_before=befores)
        else:
            every = differentiate_path(fine_tuning, metrics, befores, scoring.path_points, mixture.own)
        outputs = {name: mixture.of_the_samples(own) for name, own in every.items()}
        record["metric_before"] = _each(metric, lambda name, _: outputs[name].metric_before)
        record["metric_after"] = _each(metric, lambda name, _: outputs[name].metric_after)
        record["scores"] = _each(metric, lambda name, _: outputs[name].scores[chunk.scored].tolist())
        if config.per_token:
            token_scores = _each(metric, lambda name, _: _cut(outputs[name].token_scores[chunk.scored], lengths))  # type: ignore[index]
    if config.per_token:
        record["token_scores"] = token_scores
    return record | {"seconds": time.perf_counter() - started}


def _cut(token_scores, lengths: list[int]) -> list[list[float]]:
    """The scores `[N, L]` without those of padding."""
    return [values[:length] for values, length in zip(token_scores.tolist(), lengths, strict=True)]


def _rows(dataset: Examples, rows: list[int]) -> list:
    """Rows of a dataset. From a [`~datasets.Dataset`], all rows are read in one call."""
    if not isinstance(dataset, Dataset):
        return [dataset[row] for row in rows]
    columns = dataset[rows]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
