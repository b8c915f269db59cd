"""
The honest test: fresh students, fine-tuned by stock SFTTrainer on a dataset, and what that did for the metric.

    trl-dpg evaluate --config recipes/new_language/full.yaml --datasets runs/ours.jsonl runs/theirs.jsonl

Datasets are compared with the first one. Each seed draws the samples (with `num_samples`), their order and the start
of the adapters anew; intervals are Student's t, 95 %. Where a seed changes nothing (all samples in one step of full
fine-tuning), that is said. Empty samples are left out.
"""

import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import t

from .utils import (
    FORMATS,
    MetricArguments,
    ToyWorldArguments,
    UsageError,
    at_least,
    check_student,
    load_data,
    make_metric,
    one_process,
    toy_world,
)


@dataclass
class EvaluateArguments(MetricArguments, ToyWorldArguments):
    """
    Arguments of `trl-dpg evaluate`.

    Args:
        datasets (`list[str]`):
            Datasets by file or Hub id, in any format of SFTTrainer; the first is compared with the others.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            The split that is read.
        seeds (`list[int]`, *optional*, defaults to `[0, 1, 2]`):
            A student for each.
        num_samples (`int`, *optional*):
            Use so many samples of each dataset, so that all are of one size; each seed draws them anew.
        output_file (`str`, *optional*):
            Where the figures are written as JSON.
    """

    datasets: list[str] = field(default_factory=list, metadata={"help": "Files or Hub ids; the first is compared."})
    dataset_split: str = field(default="train", metadata={"help": "The split that is read."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "A student for each."})
    num_samples: int | None = field(
        default=None, metadata={"help": "Draw so many samples of each dataset, for each seed."}
    )
    output_file: str | None = field(default=None, metadata={"help": "Where the figures are written as JSON."})

    def __post_init__(self):
        super().__post_init__()
        if not self.datasets or not all(isinstance(name, str) for name in self.datasets):  # a recipe's mixture
            raise UsageError("--datasets is required: one or more datasets by file or Hub id.")
        if len(set(self.datasets)) != len(self.datasets):
            raise UsageError(f"--datasets must be different ones, got {self.datasets}.")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise UsageError(f"--seeds must be different numbers, got {self.seeds}.")
        at_least(0, seeds=min(self.seeds))
        at_least(1, num_samples=self.num_samples)
        if self.output_file is not None and Path(self.output_file).is_dir():
            raise UsageError(f"--output_file {self.output_file!r} is a folder. Name a file.")


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % confidence interval (Student's t); `None` for a single value."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return mean, None
    return mean, t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5


def main(script_args: EvaluateArguments, student_args) -> dict[str, Any]:
    one_process("evaluate", "Start it without accelerate, or with --num_processes 1.")
    script_args.set_threads()
    with toy_world(script_args, student_args.seed, student_args):
        check_student(student_args)
        return compare(script_args, student_args)


def compare(script_args: EvaluateArguments, student_args) -> dict[str, Any]:
    """A student for each seed and dataset. The figures are written after each seed."""
    import torch

    from trl_dpg.evaluation import evaluate_dataset, without_empty
    from trl_dpg.student import FinetunedStudent

    metric = make_metric(script_args)
    datasets, empty = {}, {}
    for name in script_args.datasets:
        dataset = load_data(name, split=script_args.dataset_split, flag="datasets")
        if not any(set(columns) <= set(dataset.column_names) for columns in FORMATS):
            raise UsageError(
                f"--datasets: {name!r} has the columns {dataset.column_names}; SFTTrainer reads `text`, `messages`, "
                "`prompt` and `completion`, or `input_ids`."
            )
        datasets[name] = without_empty(dataset)
        empty[name] = len(dataset) - len(datasets[name])
        size = len(datasets[name])
        if size == 0:
            raise UsageError(f"--datasets: all {len(dataset)} samples of {name!r} are empty.")
        if script_args.num_samples is not None and size < script_args.num_samples:
            raise UsageError(
                f"--num_samples is {script_args.num_samples}, but {name!r} has {size} samples that are not empty."
            )

    runs: dict[str, list[dict]] = {name: [] for name in datasets}
    before: list[float] = []
    figures: dict[str, Any] = {}
    for seed in script_args.seeds:
        student_args.seed = seed
        student = student_args.load_student()
        theta = student.initial_theta()
        with torch.no_grad(), student.train_mode():
            before.append(metric(FinetunedStudent(student, theta, theta)).item())
        for name, dataset in datasets.items():
            if script_args.num_samples is not None:
                dataset = dataset.shuffle(seed=seed).select(range(script_args.num_samples))
            config = student_args.inner_loop_config()
            result = evaluate_dataset(student_args.load_student, dataset, metric, config, seed=seed)
            runs[name].append(result.figures())
            print(f"seed {seed}, {name}: metric {before[-1]:.5g} -> {result.metric:.5g}", flush=True)
        figures = {"seeds": script_args.seeds[: len(before)], "before": before}
        sizes = {name: script_args.num_samples or len(dataset) for name, dataset in datasets.items()}
        figures["datasets"] = summarize(runs, sizes, empty)
        if script_args.output_file is not None:
            Path(script_args.output_file).parent.mkdir(parents=True, exist_ok=True)
            Path(script_args.output_file).write_text(json.dumps(figures, indent=2))
    print(render(figures))
    return figures


def summarize(runs: dict[str, list[dict]], sizes: dict[str, int], empty: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Means and intervals of each dataset's students, and of what the first dataset is ahead."""
    first, *_ = runs
    figures: dict[str, dict[str, Any]] = {}
    for name, students in runs.items():
        values = [run["metric"] for run in students]
        mean, half = interval(values)
        figures[name] = {
            "samples": sizes[name],
            "empty": empty[name],
            "metric": values,
            "mean": mean,
            "half_width": half,
            "proxies": {key: statistics.mean(run[key] for run in students) for key in students[0]},
        }
        if name != first:  # paired: the same seeds
            advantage = [run["metric"] - value for run, value in zip(runs[first], values, strict=True)]
            figures[name]["first_minus_this"] = dict(zip(("mean", "half_width"), interval(advantage), strict=True))
    return figures


def plus_minus(figure: dict[str, Any]) -> str:
    half_width = figure["half_width"]
    return f"{figure['mean']:.5g}" + ("" if half_width is None else f" ± {half_width:.2g}")


def render(figures: dict[str, Any]) -> str:
    lines = [
        "",
        f"metric before: {statistics.mean(figures['before']):.5g}; after, {len(figures['seeds'])} seeds, 95 %:",
        "",
        "| dataset | samples | metric | first minus this |",
        "|---|---|---|---|",
    ]
    for name, row in figures["datasets"].items():
        difference = row.get("first_minus_this")
        cells = [name, str(row["samples"]), plus_minus(row), plus_minus(difference) if difference else ""]
        lines.append(f"| {' | '.join(cells)} |")
    for name, row in figures["datasets"].items():
        if row["empty"]:
            lines.append(f"{name}: {row['empty']} empty samples were left out.")
        if row["half_width"] is not None and row["half_width"] < 1e-5 * abs(row["mean"]):
            lines.append(
                f"{name}: the seeds change nothing (one step takes all samples, whatever their order), so that the "
                "interval says nothing. With --num_samples each seed draws its own."
            )
    return "\n".join(lines)


def make_parser(prog: str | None = None):
    from trl import TrlParser

    from trl_dpg.config import StudentArguments

    return TrlParser((EvaluateArguments, StudentArguments), prog=prog)


if __name__ == "__main__":
    from trl_dpg import cli

    cli.run("evaluate", sys.argv[1:])
