"""
Test whether the scores of a set-up can be trusted, with its own student, data and metric.

    trl-dpg verify --config recipes/pattern_67/mini.yaml
    trl-dpg verify --config recipe.yaml --dataset_name texts.jsonl --num_samples 128

A recipe of `trl-dpg dpg` can be used unchanged. If its dataset has prompts, its generator writes the texts. The exit
status is 0 if the set-up is trustworthy, 1 if it is not, and 2 for wrong usage. `docs/verify.md` explains the figures.
Each figure is printed as soon as it is known. With `--num_processes`, several processes share the work.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..files import write_json
from .arguments import UsageError, at_least
from .data import make_folder, process_state
from .flags import in_flags
from .output import say
from .samples import SampleArguments, choose_numbers, load_set_up, read_samples, tuning_file


__all__ = ["VerifyArguments", "main", "make_parser", "read_samples"]


@dataclass
class VerifyArguments(SampleArguments):
    """
    Arguments of `trl-dpg verify`, in addition to those of [`SampleArguments`].

    Args:
        num_directions (`int`, *optional*, defaults to `20`):
            Random reweightings of the samples, at most. The metric's change is predicted for each. 6 are enough if
            the verdict is clear.
        compare_precision (`bool`, *optional*, defaults to `True`):
            Compare scores in float32 and in bfloat16. This needs memory for a copy of the student.
        try_remedies (`bool`, *optional*, defaults to `True`):
            If predictions fail, try other values of eps_root, learning rate and batch size.
        output_dir (`str`, *optional*):
            Folder for `verify.json`. It is written anew after each figure.
    """

    num_directions: int = field(default=20, metadata={"help": "Random reweightings of the samples, at most."})
    compare_precision: bool = field(default=True, metadata={"help": "Compare scores in float32 and in bfloat16."})
    try_remedies: bool = field(default=True, metadata={"help": "If predictions fail, try other settings."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for verify.json."})

    def __post_init__(self):
        super().__post_init__()
        at_least(3, num_directions=self.num_directions)  # for a correlation


class Report:
    """Prints each check as soon as it is known, and writes the figures so far to a file."""

    def __init__(self, path: Path | None, num_samples: int):
        self.path = path
        self.num_samples = num_samples
        self._printed: list[str] = []

    def __call__(self, result) -> None:
        for check in result.checks:
            for line in map(in_flags, check.lines()):
                if line not in self._printed:  # several checks may have the same advice
                    self._printed.append(line)
                    say(line)
        if self.path is not None:
            verdict = result.trustworthy if result.complete else None
            figures = {"trustworthy": verdict, "num_samples": self.num_samples, **asdict(result)}
            figures["checks"] = [asdict(check) | {"advice": in_flags(check.advice)} for check in result.checks]
            write_json(self.path, figures)


def main(script_args: VerifyArguments, student_args) -> None:
    from trl_dpg.metagradients.config import SettingsError
    from trl_dpg.ranks import Ranks
    from trl_dpg.verification import quantization_check, verify

    state = process_state()
    script_args.set_threads()
    if student_args.attribution == "dataset":
        raise UsageError("--attribution dataset computes no scores of samples, so there is nothing to verify.")
    if script_args.output_dir is not None:
        make_folder("output_dir", script_args.output_dir)
    student, examples, metric = load_set_up("verify", script_args, student_args, script_args.output_dir)
    folder = script_args.output_dir
    path = None if folder is None else Path(folder) / "verify.json"
    chosen = None if folder is None else tuning_file(folder, "verify")
    choose_numbers(script_args, student_args, student, examples, metric, chosen)
    report = Report(path, len(examples))
    try:
        result = verify(
            student,
            examples,
            metric,
            student_args.inner_loop_config(),
            num_directions=script_args.num_directions,
            compare_precision=script_args.compare_precision,
            try_remedies=script_args.try_remedies,
            seed=student_args.seed,
            progress=state.is_main_process,
            on_figure=report if state.is_main_process else None,
            process_group=Ranks.of_this_run(student.device).group,
        )
    except SettingsError as error:
        raise UsageError(in_flags(str(error))) from error
    if not state.is_main_process:
        return
    before, after = result.metric_before, result.metric_after
    check = quantization_check(student, metric, before, after, student_args.student_model_init_kwargs)
    if check is not None:
        result.checks.append(check)
        report(result)
    say(in_flags("\n".join(result.verdict())))
    if path is not None:
        say(f"All figures: {path}")
    if not result.trustworthy:
        raise SystemExit(1)


def make_parser(prog: str | None = None):
    from trl import TrlParser

    from trl_dpg.config import StudentArguments

    return TrlParser((VerifyArguments, StudentArguments), prog=prog)


if __name__ == "__main__":
    from trl_dpg.scripts import launcher

    launcher.run("verify", make_parser, main, sys.argv[1:])
