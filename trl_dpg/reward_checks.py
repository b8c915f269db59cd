"""Refuses arguments of a reward that are missing, or that cannot be combined."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .metagradients import InnerLoopConfig
from .metagradients.config import SettingsError
from .metrics import CombinedMetric, LanguageModelingMetric
from .metrics.base import metric_name
from .replay import Replay
from .several_students import check_aggregation, student_names
from .student import Student


def check_given(students: Sequence[Student], metric: Callable | None) -> None:
    if not students:
        raise ValueError("A student is required: pass `student`, or the address of a score server as `server`.")
    if not callable(metric):
        raise ValueError(
            f"The metric must be a callable from the fine-tuned student to a scalar tensor, got {metric!r}."
        )
    if any(student.processing_class is None for student in students):
        raise ValueError("The student has no tokenizer to read completions with. Pass `processing_class` to Student.")


def check_several(
    students: Sequence[Student], metric: Any, config: InnerLoopConfig, aggregation: str, replay: Replay | None
) -> None:
    """Refuse what several students cannot share."""
    check_aggregation(aggregation)
    if len(students) < 2:
        return
    if len({id(student.model) for student in students}) < len(students):
        raise ValueError(f"{len(students)} students share a model. Give each its own, or leave out the repetition.")
    if config.auto:
        raise SettingsError(
            f"`{config.auto[0]}` 'auto' would be chosen for one of the {len(students)} students. Find numbers for "
            "each with `trl-dpg tune`, and give numbers that fit all."
        )
    if config.attribution == "dataset":
        raise ValueError(
            "attribution='dataset' rewards whole datasets by the metric of one student. With several, use scores of "
            "samples (attribution='metagradient')."
        )
    names = student_names(students)
    same = [name for name in names if isinstance(metric, CombinedMetric) and name in metric.names]
    if same:
        raise ValueError(
            f"{same[0]!r} is the name of a student and of a part of the metric, so their figures in the logs would "
            "have one name. Give the part another one (`names` of CombinedMetric)."
        )
    tokenizers: Any = dict(zip(names, (student.processing_class for student in students), strict=True))
    rows = {} if replay is None else {"replay_dataset": replay.rows}
    check_token_ids(tokenizers, {metric_name(metric): metric}, rows)


def check_token_ids(
    tokenizers: Mapping[str, PreTrainedTokenizerBase], metrics: Mapping[str, Any], examples: Mapping[str, Any]
) -> None:
    """
    Refuse token ids that several students would read by other vocabularies.

    Args:
        tokenizers (`dict[str, PreTrainedTokenizerBase]`): The tokenizers of the students, by the students' names.
        metrics (`dict[str, Callable]`): Metrics by name.
        examples (`dict[str, Examples]`): Samples, by the names of their arguments.

    Raises:
        `ValueError`: If there are any.
    """
    with_ids = [f"`{name}`" for name, rows in examples.items() if _are_token_ids(rows)]
    with_ids += [f"The metric {part!r}" for name, metric in metrics.items() for part in _read_ids(name, metric)]
    first, *others = [own.get_vocab() for own in tokenizers.values()] if with_ids else [{}]
    if any(own != first for own in others):
        raise SettingsError(
            f"{with_ids[0]} has token ids (`input_ids`), which are those of one tokenizer, but the "
            f"{len(tokenizers)} students ({', '.join(tokenizers)}) have different ones. Give texts, or students with "
            "the same tokenizer."
        )


def _read_ids(name: str, metric: Any) -> Iterator[str]:
    """The names of a metric, or of the parts of a combined one, whose texts are token ids."""
    if isinstance(metric, CombinedMetric):
        for part, own in zip(metric.names, metric.metrics, strict=True):
            yield from _read_ids(part, own)
    elif isinstance(metric, LanguageModelingMetric) and _are_token_ids(metric.dataset):
        yield name


def _are_token_ids(examples: Any) -> bool:
    if isinstance(examples, Dataset):
        return "input_ids" in examples.column_names
    return any(isinstance(row, Mapping) and "input_ids" in row for row in examples)


def check_not_given(**arguments: Any) -> None:
    """Refuse what lives in the server."""
    given = [f"`{name}`" for name, value in arguments.items() if value is not None]
    if given:
        raise ValueError(
            f"With `server`, student, metric and inner loop are those of the server, so {', '.join(given)} would have "
            "no effect. Leave out `server`, or give them to `trl-dpg serve`."
        )


def check_train_on(train_on: str) -> None:
    if train_on not in ("completion", "prompt_completion"):
        raise ValueError(f"Unknown train_on {train_on!r}. Choose 'completion' or 'prompt_completion'.")


def check_combination(
    students: Sequence[Student],
    config: InnerLoopConfig,
    cross_group_batching: bool,
    num_generations: int | None,
    verify_steps: int,
) -> None:
    """Refuse settings of a reward that cannot be combined."""
    if cross_group_batching and config.attribution == "dataset":
        raise ValueError(
            "attribution='dataset' rewards every completion of a dataset alike, so the generator learns nothing "
            "from one dataset of all completions. Set cross_group_batching=False."
        )
    if not cross_group_batching and num_generations is None:
        raise ValueError("cross_group_batching=False needs num_generations, the trainer's completions per prompt.")
    if config.per_token:
        if config.attribution == "dataset":
            raise ValueError("attribution='dataset' rewards whole datasets, so it has no scores per_token.")
        for student in students:
            if not student.processing_class.is_fast:  # type: ignore[union-attr]  # `check_given` looked
                raise ValueError(
                    f"The student's tokenizer ({type(student.processing_class).__name__}) is slow: it does not know "
                    "the positions of its tokens in the text, so their scores cannot be assigned to the generator's "
                    "tokens. Use a fast tokenizer, or per_token=False."
                )
    if verify_steps < 0:
        raise ValueError(f"verify_steps must be 0 (never) or positive, got {verify_steps}.")
    if verify_steps and config.attribution == "dataset":
        raise ValueError("attribution='dataset' computes no scores of samples to verify. Set verify_steps=0.")
