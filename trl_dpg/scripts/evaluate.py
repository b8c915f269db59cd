"""
Test datasets with fresh students: stock SFTTrainer fine-tunes the students, and the metric is compared.

    trl-dpg evaluate --config recipes/new_language/full.yaml --datasets runs/ours.jsonl runs/theirs.jsonl

All other datasets are compared with the first one. Each seed draws the samples (with `num_samples`), their order and
the start of the adapters anew. Intervals are 95 % confidence intervals by Student's t. If the seeds change nothing
(full fine-tuning with all samples in one step), a note says so. Empty samples are left out. With `--num_processes`,
several processes share each batch. With `student_models`, there is a table for each student. With `replay_dataset`,
replayed rows are mixed into each student's data.
"""

import json
import logging
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging

from ..attribution.chunks import chunk_size
from ..evaluation import compare_datasets, interval
from ..metagradients.config import SettingsError
from ..rows import sample_columns
from .arguments import MetricArguments, ReadingArguments, ToyWorldArguments, UsageError, at_least
from .data import (
    as_the_student_reads,
    check_student,
    check_token_ids,
    load_data,
    make_folder,
    make_replay,
    process_state,
)
from .flags import in_flags
from .output import say
from .registry import make_metric
from .samples import choose_numbers, tuning_file
from .toy_world import toy_world


__all__ = ["EvaluateArguments", "interval", "main", "make_parser"]


FLAGS = {name: name for name in ("datasets", "num_samples", "max_tokens")}
"""Arguments of the library that are flags of this command."""


@dataclass
class EvaluateArguments(MetricArguments, ReadingArguments, ToyWorldArguments):
    """
    Arguments of `trl-dpg evaluate`.

    Args:
        datasets (`list[str]`):
            Datasets by file or Hub id, in any format of SFTTrainer. All others are compared with the first one.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            The split to read.
        seeds (`list[int]`, *optional*, defaults to `[0, 1, 2]`):
            Seeds. Each dataset has a student for each seed.
        num_samples (`int`, *optional*):
            Number of samples to draw from each dataset, so that all have the same size. Each seed draws them anew.
        max_tokens (`int`, *optional*):
            Number of tokens to learn from in each dataset, in the place of `num_samples`. Each seed draws as many
            samples as fit. 0: as many tokens as the smallest dataset has.
        output_dir (`str`, *optional*):
            Folder for `evaluation.json`, which has the figures. It is written after each seed.
        output_file (`str`, *optional*):
            Another file for the figures, in the place of that one.
    """

    datasets: list[str] = field(default_factory=list, metadata={"help": "Files or Hub ids."})
    dataset_split: str = field(default="train", metadata={"help": "The split to read."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "A student for each seed."})
    num_samples: int | None = field(default=None, metadata={"help": "Number of samples to draw from each dataset."})
    max_tokens: int | None = field(
        default=None, metadata={"help": "Tokens to learn from in each dataset; 0: as many as the smallest has."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder for evaluation.json."})
    output_file: str | None = field(
        default=None, metadata={"help": "File for the figures, as JSON, in the place of that in output_dir."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.datasets or not all(isinstance(name, str) for name in self.datasets):  # a recipe's mixture
            raise UsageError("--datasets is required: one or more datasets by file or Hub id.")
        if len(set(self.datasets)) != len(self.datasets):
            raise UsageError(f"--datasets must be different, got {self.datasets}.")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise UsageError(f"--seeds must be different numbers, got {self.seeds}.")
        at_least(0, seeds=min(self.seeds))
        at_least(0, max_tokens=self.max_tokens)
        at_least(1, num_samples=self.num_samples)
        if self.output_file is not None and Path(self.output_file).is_dir():
            raise UsageError(f"--output_file {self.output_file!r} is a folder. Name a file.")


def load_student(script_args: EvaluateArguments, student_args, seed: int):
    """A fresh student."""
    student = replace(student_args, seed=seed).load_student()
    script_args.set_threads(student.model)
    return student


def main(script_args: EvaluateArguments, student_args) -> dict[str, Any]:
    main_process = process_state().is_main_process
    script_args.set_threads()
    path = None if script_args.output_file is None else Path(script_args.output_file)
    if path is None and script_args.output_dir is not None:
        path = make_folder("output_dir", script_args.output_dir) / "evaluation.json"
    with toy_world(script_args, student_args.seed, student_args):
        check_student(student_args)
        metric, datasets = make_metric(script_args), load_datasets(script_args)
        replay, students = make_replay(student_args), student_args.each_student()
        check_token_ids(student_args, {str(script_args.metric): metric}, datasets, replay)
        written: dict[str, Any] = {}
        for name, own in students.items():
            found = evaluate(script_args, own, datasets, metric, replay, "" if len(students) == 1 else f"{name}, ")
            for figures in found:
                so_far = written.get("students", {}) | {name: figures}
                written = figures if len(students) == 1 else {"students": so_far}
                if path is not None and main_process:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(json.dumps(written, indent=2))
            say(("" if len(students) == 1 else f"\nStudent {name}") + render(figures))
    if path is not None:
        say(f"All figures: {path}")
    return written


def evaluate(script_args: EvaluateArguments, student_args, datasets, metric, replay, title: str) -> Iterator[dict]:
    """Compare the datasets by fresh copies of one student. Yields the figures after each seed."""
    if student_args.inner_loop_config().auto:
        choose(script_args, student_args, next(iter(datasets.values())), metric)
    try:
        comparison = compare_datasets(
            lambda seed: load_student(script_args, student_args, seed),
            datasets,
            metric,
            student_args.inner_loop_config(),
            script_args.seeds,
            script_args.num_samples,
            progress=process_state().is_main_process,
            max_tokens=script_args.max_tokens,
            replay=replay,
        )
    except SettingsError as error:
        raise UsageError(in_flags(str(error), FLAGS)) from error
    with one_bar_and_each_notice_once():
        for figures in comparison:
            for name, row in figures["datasets"].items():
                before, after = figures["before"][-1], row["metric"][-1]
                say(f"{title}seed {figures['seeds'][-1]}, {name}: metric {before:.5g} -> {after:.5g}")
            yield figures


def choose(script_args: EvaluateArguments, student_args, dataset, metric) -> None:
    """Put numbers in the place of `auto`, on as many samples of a dataset as a reward step may have."""
    most = min(script_args.num_samples or len(dataset), chunk_size(None, student_args.student_batch_size))
    first = dataset.select(range(min(most, len(dataset))))
    folder = script_args.output_dir if script_args.output_file is None else None
    path = None if folder is None else tuning_file(folder, "evaluate")
    student = load_student(script_args, student_args, student_args.seed)
    # only the search needs scores, so those that the naive baseline lacks are not missed later
    choose_numbers(script_args, student_args, student, first, metric, path, attribution="metagradient")


@contextmanager
def one_bar_and_each_notice_once() -> Iterator[None]:
    """Without the bars of models and datasets; what transformers warns of for each student is said once."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in said
        said.add(message)
        return new

    shown = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    handlers = [handler for name in ("", "transformers") for handler in logging.getLogger(name).handlers]
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    for handler in handlers:
        handler.addFilter(is_new)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_new)
        if shown[0]:
            transformers_logging.enable_progress_bar()
        if shown[1]:
            enable_progress_bars()


def load_datasets(script_args: EvaluateArguments) -> dict[str, Any]:
    """The datasets by their names. SFTTrainer can read them."""
    datasets = {}
    for name in script_args.datasets:
        datasets[name] = load_data(name, split=script_args.dataset_split, flag="datasets")
        columns = datasets[name].column_names
        if sample_columns(columns) is None:
            raise UsageError(
                f"--datasets: {name!r} has the columns {columns}; SFTTrainer reads `text`, `messages`, `prompt` and "
                "`completion`, or `input_ids`."
            )
        datasets[name] = as_the_student_reads(datasets[name], script_args, "datasets", name)
    return datasets


def plus_minus(figure: dict[str, Any]) -> str:
    """A mean and its interval."""
    half_width = figure["half_width"]
    return f"{figure['mean']:.5g}" + ("" if half_width is None else f" ± {half_width:.2g}")


def render(figures: dict[str, Any]) -> str:
    """The figures as a table for the terminal."""
    before = f"{statistics.mean(figures['before']):.5g}"
    lines = [
        "",
        f"{len(figures['seeds'])} seeds, 95 %; before: the student without any fine-tuning",
        "",
        "| dataset | samples | metric before | after | first minus this |",
        "|---|---|---|---|---|",
    ]
    for name, row in figures["datasets"].items():
        difference = row.get("first_minus_this")
        samples = str(row["samples"])
        if "tokens" in row:
            samples += f" ({statistics.mean(row['tokens']):.0f} tokens)"
        cells = [name, samples, before, plus_minus(row), plus_minus(difference) if difference else ""]
        lines.append(f"| {' | '.join(cells)} |")
    same = []
    for name, row in figures["datasets"].items():
        for part in (key.removeprefix("kept/") for key in row["proxies"] if key.startswith("kept/")):
            change, number = row["proxies"][f"change/{part}"], len(figures["seeds"])
            kept = round(row["proxies"][f"kept/{part}"] * number)
            lines.append(f"{name}: {part} changed by {change:.3g}; its limit is kept with {kept} of {number} seeds.")
        if row["empty"]:
            lines.append(f"{name}: {row['empty']} empty samples were left out.")
        if row["half_width"] is not None and row["half_width"] < 1e-5 * abs(row["mean"]):
            same.append(name)
    if same:
        lines.append(
            f"{', '.join(same)}: the seeds change nothing, because all samples are in one step. The interval is not "
            "meaningful. Set --num_samples or --max_tokens, so that each seed draws other samples."
        )
    return "\n".join(lines)


def make_parser(prog: str | None = None):
    from trl import TrlParser

    from trl_dpg.config import StudentArguments

    return TrlParser((EvaluateArguments, StudentArguments), prog=prog)


if __name__ == "__main__":
    from trl_dpg.scripts import launcher

    launcher.run("evaluate", make_parser, main, sys.argv[1:])
