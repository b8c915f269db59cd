"""
Test whether the scores of a set-up can be trusted, with its own student, data and metric.

    trl-dpg verify --config recipes/pattern_67/mini.yaml
    trl-dpg verify --config recipe.yaml --dataset_name texts.jsonl --num_samples 128

A recipe of `trl-dpg dpg` can be used unchanged. If its dataset has prompts, its generator writes the texts. The exit
status is 0 if the set-up is trustworthy, 1 if it is not, and 2 for wrong usage. `docs/verify.md` explains the figures.
Small models take about a minute.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .arguments import GeneratorArguments, MetricArguments, ToyWorldArguments, UsageError, at_least
from .data import check_student, complete_prompts, fits, make_folder, one_process, read_dataset, read_prompts
from .flags import in_flags
from .registry import make_metric
from .toy_world import toy_world


@dataclass
class VerifyArguments(MetricArguments, GeneratorArguments, ToyWorldArguments):
    """
    Arguments of `trl-dpg verify`.

    The dataset has samples (`text`, `messages`, `input_ids`, or `prompt` and `completion`), or it has prompts (a
    column `prompt`, or the columns of `prompt_template`), which the generator completes.

    Args:
        num_samples (`int`, *optional*):
            Number of samples, from the start of the dataset. By default as many as a recipe's reward step has
            (`generation_batch_size`, or `per_device_train_batch_size` times `gradient_accumulation_steps`), or 256.
        num_directions (`int`, *optional*, defaults to `20`):
            Random reweightings of the samples. The metric's change is predicted for each.
        compare_precision (`bool`, *optional*, defaults to `True`):
            Compare scores in float32 and in bfloat16. This needs memory for a copy of the student.
        try_remedies (`bool`, *optional*, defaults to `True`):
            If predictions fail, try other values of eps_root, learning rate and batch size.
        output_dir (`str`, *optional*):
            Folder for `verify.json`.
        generation_batch_size (`int`, *optional*), per_device_train_batch_size (`int`, *optional*),
        gradient_accumulation_steps (`int`, *optional*, defaults to `1`):
            Settings of a recipe, for `num_samples`.
    """

    num_samples: int | None = field(
        default=None, metadata={"help": "Number of samples; by default as many as a reward step has, or 256."}
    )
    num_directions: int = field(default=20, metadata={"help": "Random reweightings of the samples."})
    compare_precision: bool = field(default=True, metadata={"help": "Compare scores in float32 and in bfloat16."})
    try_remedies: bool = field(default=True, metadata={"help": "If predictions fail, try other settings."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for verify.json."})
    generation_batch_size: int | None = field(default=None, metadata={"help": "A recipe's setting, for num_samples."})
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "A recipe's setting, for num_samples."}
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "A recipe's setting, for num_samples."})

    def __post_init__(self):
        super().__post_init__()
        if self.num_samples is None:
            self.num_samples = self.generation_batch_size or (
                self.per_device_train_batch_size * self.gradient_accumulation_steps
                if self.per_device_train_batch_size
                else 256
            )
        at_least(2, num_samples=self.num_samples)
        at_least(3, num_directions=self.num_directions)  # for a correlation


def read_samples(script_args: VerifyArguments, num_samples: int, seed: int) -> list[Any]:
    """The dataset's samples or, if it has prompts, the generator's texts after them."""
    data = read_dataset(script_args)
    columns, template = set(data.column_names), script_args.prompt_template
    samples = columns & {"text", "messages", "input_ids", "completion"}
    makes_prompts = template is not None and (not samples or fits(template, columns))
    if not makes_prompts and ("prompt" not in columns or "completion" in columns):
        if not samples:
            raise UsageError(
                f"--dataset_name: {script_args.dataset_name!r} has the columns {sorted(columns)}; samples have "
                "`text`, `messages`, `input_ids`, or `prompt` and `completion`."
            )
        if template is not None:
            print(f"The samples are taken as they are: they have no columns for {template!r}.", flush=True)
        return list(data.select(range(min(num_samples, len(data)))))
    from trl_dpg.generation import prompt_completion_pairs

    prompts = read_prompts(script_args, num_samples, data)
    texts = complete_prompts(script_args, prompts, seed)
    return texts if script_args.train_on == "completion" else prompt_completion_pairs(prompts, texts)


def main(script_args: VerifyArguments, student_args) -> None:
    from trl_dpg.metagradients.config import SettingsError
    from trl_dpg.verification import quantization_check, verify

    one_process("verify", "Start it without accelerate, or with --num_processes 1.")
    script_args.set_threads()
    if student_args.attribution != "metagradient":
        raise UsageError("--attribution dataset computes no scores of samples, so there is nothing to verify.")
    if script_args.output_dir is not None:
        make_folder("output_dir", script_args.output_dir)
    with toy_world(script_args, student_args.seed, student_args, output_dir=script_args.output_dir):
        check_student(student_args)
        metric = make_metric(script_args)
        examples = read_samples(script_args, script_args.num_samples, student_args.seed)  # type: ignore[arg-type]
        student = student_args.load_student()
        script_args.set_threads(student.model)
    print(f"Student: {student.describe()}; {len(examples)} samples.", flush=True)
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
        )
    except SettingsError as error:
        raise UsageError(in_flags(str(error))) from error
    before, after = result.metric_before, result.metric_after
    check = quantization_check(student, metric, before, after, student_args.student_model_init_kwargs)
    result.checks += [check] if check is not None else []
    print(in_flags(result.render()))
    if script_args.output_dir is not None:
        path = Path(script_args.output_dir) / "verify.json"
        figures = {"trustworthy": result.trustworthy, "num_samples": len(examples), **asdict(result)}
        figures["checks"] = [asdict(check) | {"advice": in_flags(check.advice)} for check in result.checks]
        path.write_text(json.dumps(_finite(figures), indent=2))
        print(f"All figures: {path}")
    if not result.trustworthy:
        raise SystemExit(1)


def _finite(value: Any) -> Any:
    """The value with `None` in the place of `nan` and `inf`, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def make_parser(prog: str | None = None):
    from trl import TrlParser

    from trl_dpg.config import StudentArguments

    return TrlParser((VerifyArguments, StudentArguments), prog=prog)


if __name__ == "__main__":
    from trl_dpg.scripts import launcher

    launcher.run("verify", make_parser, main, sys.argv[1:])
