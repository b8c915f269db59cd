"""Scores a dataset by one student after the other, each with a journal of its own. For `trl-dpg attribute`."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trl_dpg.attribution import Attribution, Journal, attribute
from trl_dpg.attribution.journal import JournalError, digest
from trl_dpg.metagradients import InnerLoopConfig
from trl_dpg.metagradients.config import AUTO
from trl_dpg.metagradients.config import MEMORY_ONLY as MEMORY_ONLY_FIELDS
from trl_dpg.replay import Replay
from trl_dpg.student import Student

from .arguments import UsageError
from .data import process_state
from .distill import FLAGS as DISTILL_FLAGS
from .samples import choose_numbers, tuning_file


MEMORY_ONLY = tuple(f"student_{name}" for name in MEMORY_ONLY_FIELDS)  # may change when a run is resumed
OF_SEVERAL = ("student_models", "student_model_name_or_path", "student_aggregation")
NOT_OF_ONE = ("student_models", "student_aggregation", "replay_dataset", "replay_split", "replay_ratio")
"""Arguments that do not change what one student finds, or that are described apart."""
RESULTS = ("scored.parquet", "scored.jsonl", "top.parquet", "top.jsonl")
FLAGS = {n: n for n in ("overwrite", "num_repeats", "contrast", "path_points")} | {"chunk_size": "dataset_chunk"}
FLAGS |= DISTILL_FLAGS
"""What the library's arguments are called here, beside those of the student."""
OPTIONAL = ("metrics", "metric_samples", "path_points")
"""Settings on which the scores depend, if they are given."""


def check_several(script_args, student_args) -> dict[str, Any]:
    """The arguments of each student by its name. What several students do not have is refused."""
    students = student_args.each_student()
    if len(students) == 1:
        return students
    if script_args.distill:
        raise UsageError("--distill learns the scores of one student, but --student_models has several. Give one.")
    if script_args.metrics is not None:
        raise UsageError("--metrics scores by one student, but --student_models has several. Give --metric alone.")
    if student_args.per_token:
        raise UsageError("--per_token: the students of --student_models have tokens of their own. Give one student.")
    if student_args.inner_loop_config().auto:
        raise UsageError(
            "--student_models: auto would be chosen for one of the students. Find numbers for each with `trl-dpg "
            "tune`, and give numbers that fit all."
        )
    script_args.names = [None, *students]
    return students


def journal_name(name: str, student_args) -> str:
    """The file for the scores of a student."""
    return f"attribution_{name}.jsonl" if student_args.student_models else "attribution.jsonl"


class Scored:
    """
    Samples to be scored.

    Args:
        script_args (`AttributeArguments`): The arguments of the command.
        samples ([`~datasets.Dataset`]): The samples.
        metric (`Callable` or `dict[str, Callable]`): Φ, or several by name.
        size (`int`): Samples of a chunk.
        replay ([`~trl_dpg.replay.Replay`], *optional*): Rows that are mixed in.

    Attributes:
        student (`Student`): The last student.
        settings (`dict[str, Any]`): What its scores depend on.
    """

    def __init__(self, script_args, samples, metric, size: int, replay: Replay | None):
        self.script_args, self.samples, self.metric = script_args, samples, metric
        self.size, self.replay = size, replay
        self.student: Any = None
        self.settings: dict[str, Any] = {}

    @contextmanager
    def by(
        self, student_args, file: str, check: Callable[[Student], Any] | None = None
    ) -> Iterator[dict[Any, Attribution]]:
        """
        The results of [`attribute`] for a student by the names of the metrics, `None` for a single one, while its
        journal is locked. Scores in the journal are not computed again. `check` may refuse the student.
        """
        state, script_args = process_state(), self.script_args
        output_dir, samples, size = Path(script_args.output_dir), self.samples, self.size
        self.settings = self.run_settings(student_args)
        with Journal(output_dir / file, self.settings, script_args.overwrite) as journal:
            check_choice(student_args.inner_loop_config(), output_dir, journal)
            if state.is_main_process and journal.is_new:
                for name in (*RESULTS, "summary.json"):  # of other settings
                    (output_dir / name).unlink(missing_ok=True)
            if state.is_main_process and journal.done:
                print(f"{len(journal.done)} chunks are there already.", file=sys.stderr)
            self.student = student_args.load_student()
            script_args.set_threads(self.student.model)
            if check is not None:
                check(self.student)
            first = samples.select(range(min(size, len(samples))))
            leader = next(iter(self.metric.values())) if isinstance(self.metric, Mapping) else self.metric
            path = tuning_file(output_dir, "attribute")
            choose_numbers(script_args, student_args, self.student, first, leader, path)
            config = student_args.inner_loop_config()
            self.settings |= {f"student_{name}": vars(config)[name] for name in AUTO}
            further: Any = {name: vars(script_args)[name] for name in ("contrast", "share_chunks", *OPTIONAL[1:])}
            further |= {"progress": True, "replay": self.replay}
            what: Any = self.student, samples, self.metric, config, size, script_args.num_repeats, journal
            found: Any = attribute(*what, **further)
            yield found if isinstance(self.metric, Mapping) else {None: found}

    def run_settings(self, student_args) -> dict[str, Any]:
        """What the scores depend on."""
        script_args, samples, replay = self.script_args, self.samples, self.replay
        settings = {
            "metric": script_args.metric,
            "metric_kwargs": script_args.metric_kwargs,
            **{name: vars(script_args)[name] for name in OPTIONAL if vars(script_args)[name] is not None},
            "dataset_chunk": self.size,
            **{name: value for name, value in asdict(student_args).items() if name not in MEMORY_ONLY + NOT_OF_ONE},
            "dataset_columns": samples.column_names,
            "dataset_rows": len(samples),
            "dataset_digest": digest(samples),
        }
        return settings if replay is None else settings | {"replay": [replay.ratio, digest(replay.rows)]}


def check_choice(config: InnerLoopConfig, output_dir: Path, journal: Journal) -> None:
    """Refuse to go on with scores if the numbers are lost that were chosen for them."""
    if config.auto and journal.done and not tuning_file(output_dir, "attribute").exists():
        raise JournalError(
            f"{str(output_dir)!r} has scores, but no longer the file with the numbers that were chosen for them in "
            "the place of auto. Choose another folder, or delete the scores with `overwrite`."
        )
