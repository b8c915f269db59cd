"""Refuses arguments of a reward that are missing, or that cannot be combined."""

from collections.abc import Callable, Sequence
from typing import Any

from .metagradients import InnerLoopConfig
from .metagradients.config import SettingsError
from .replay import Replay
from .several_students import check_aggregation
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
    students: Sequence[Student], config: InnerLoopConfig, aggregation: str, replay: Replay | None
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
    check_token_ids(len(students), replay_dataset=None if replay is None else replay.rows)


def check_token_ids(number: int, **examples: Any) -> None:
    """
    Refuse token ids, by their argument, which several students would read by their own tokenizers.

    Raises:
        `ValueError`: If there are several students and the first row of some examples has `input_ids`.
    """
    for name, rows in examples.items():
        first = rows[0] if number > 1 and rows is not None and len(rows) else ""
        if not isinstance(first, str) and "input_ids" in first:
            raise SettingsError(
                f"`{name}` has token ids (`input_ids`), which are those of one tokenizer, but there are {number} "
                "students. Give texts."
            )


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
