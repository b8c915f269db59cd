"""
The honest test: fresh students, fine-tuned by stock SFTTrainer on a dataset, and what that did for the metric.

    trl-dpg evaluate --config recipes/new_language/full.yaml --datasets runs/ours.jsonl runs/theirs.jsonl

Datasets are compared with the first one. Each seed draws the order of the samples (and the start of the adapters)
anew; intervals are Student's t, 95 %. They say nothing of the chance by which the samples themselves were drawn.
"""

import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import t

from .utils import MetricArguments, UsageError, load_data, make_metric, one_process


@dataclass
class EvaluateArguments(MetricArguments):
    """
    Arguments of `trl-dpg evaluate`.

    Args:
        datasets (`list[str]`):
            Datasets by file or Hub id, in any format of SFTTrainer; the first is compared with the others.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            The split that is read.
        seeds (`list[int]`, *optional*, defaults to `[0, 1, 2]`):
            A student for each.
        num_samples (`int`, *optional*):
            Use the first so many samples of each dataset, so that all are of one size.
        output_file (`str`, *optional*):
            Where the figures are written as JSON.
    """

    datasets: list[str] = field(default_factory=list, metadata={"help": "Files or Hub ids; the first is compared."})
    dataset_train_split: str = field(default="train", metadata={"help": "The split that is read."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "A student for each."})
    num_samples: int | None = field(default=None, metadata={"help": "Use the first so many samples of each dataset."})
    output_file: str | None = field(default=None, metadata={"help": "Where the figures are written as JSON."})

    def __post_init__(self):
        super().__post_init__()
        if not self.datasets or not all(isinstance(name, str) for name in self.datasets):  # a recipe's mixture
            raise UsageError("--datasets is required: one or more datasets by file or Hub id.")
        if len(set(self.datasets)) != len(self.datasets):
            raise UsageError(f"--datasets must be different ones, got {self.datasets}.")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise UsageError(f"--seeds must be different numbers, got {self.seeds}.")


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % confidence interval (Student's t); `None` for a single value."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return mean, None
    return mean, t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5


def main(script_args: EvaluateArguments, student_args) -> dict[str, Any]:
    import torch

    from trl_dpg.evaluation import evaluate_dataset
    from trl_dpg.student import FinetunedStudent

    one_process("evaluate", "Start it without accelerate, or with --num_processes 1.")
    if student_args.student_model_name_or_path is None:
        raise UsageError("--student_model_name_or_path is required: the student's path or Hub id.")
    metric = make_metric(script_args)
    datasets = {}
    for name in script_args.datasets:
        dataset = load_data(name, split=script_args.dataset_train_split)
        if script_args.num_samples is not None:
            if len(dataset) < script_args.num_samples:
                raise UsageError(f"--num_samples is {script_args.num_samples}, but {name!r} has {len(dataset)}.")
            dataset = dataset.select(range(script_args.num_samples))
        datasets[name] = dataset

    runs: dict[str, list[dict]] = {name: [] for name in datasets}
    before = []
    for seed in script_args.seeds:
        student_args.seed = seed
        student = student_args.load_student()
        theta = student.initial_theta()
        with torch.no_grad(), student.train_mode():
            before.append(metric(FinetunedStudent(student, theta, theta)).item())
        for name, dataset in datasets.items():
            result = evaluate_dataset(
                student_args.load_student, dataset, metric, student_args.inner_loop_config(), seed=seed
            )
            runs[name].append(result.figures())
            print(f"seed {seed}, {name}: metric {before[-1]:.5g} -> {result.metric:.5g}", flush=True)

    first, *_ = datasets
    figures: dict[str, Any] = {"seeds": script_args.seeds, "before": before, "datasets": {}}
    for name in datasets:
        values = [run["metric"] for run in runs[name]]
        mean, half = interval(values)
        figures["datasets"][name] = {
            "samples": len(datasets[name]),
            "metric": values,
            "mean": mean,
            "half_width": half,
            "proxies": {key: statistics.mean(run[key] for run in runs[name]) for key in runs[name][0]},
        }
        if name != first:  # paired: the same seeds
            advantage = [run["metric"] - value for run, value in zip(runs[first], values, strict=True)]
            figures["datasets"][name]["first_minus_this"] = dict(
                zip(("mean", "half_width"), interval(advantage), strict=True)
            )
    print(render(figures))
    if script_args.output_file is not None:
        Path(script_args.output_file).parent.mkdir(parents=True, exist_ok=True)
        Path(script_args.output_file).write_text(json.dumps(figures, indent=2))
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
    return "\n".join(lines)


def make_parser(prog: str | None = None):
    from trl import TrlParser

    from trl_dpg.config import StudentArguments

    return TrlParser((EvaluateArguments, StudentArguments), prog=prog)


if __name__ == "__main__":
    from trl_dpg import cli

    cli.run("evaluate", sys.argv[1:])
