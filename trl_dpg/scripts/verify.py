"""
Is this set-up trustworthy? On the user's own student, data and metric, in about a minute for small models.

    trl-dpg verify --config recipes/pattern_67/mini.yaml
    trl-dpg verify --config recipe.yaml --dataset_name texts.jsonl --num_samples 128

A recipe of `trl-dpg dpg` will do as it is. Where its dataset is of prompts, its generator writes the texts. Ends with
status 0: trustworthy; 1: not; 2: wrong usage. `docs/verify.md` says what the figures mean.
"""

import json
import math
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .utils import (
    DatasetArguments,
    MetricArguments,
    PromptArguments,
    ToyWorldArguments,
    UsageError,
    make_metric,
    make_prompts,
    make_world,
    one_process,
)


@dataclass
class VerifyArguments(MetricArguments, PromptArguments, ToyWorldArguments, DatasetArguments):
    """
    Arguments of `trl-dpg verify`.

    The dataset is of samples, with a column `text`, `messages`, `input_ids`, or `prompt` and `completion`. Or it is of
    prompts (a column `prompt`, or `prompt_template`), which the generator completes.

    Args:
        num_samples (`int`, *optional*):
            Samples to verify on, the first ones. By default as many as a reward step has: `generation_batch_size`, or
            `per_device_train_batch_size` times `gradient_accumulation_steps`, as a recipe says, or 256.
        num_directions (`int`, *optional*, defaults to `20`):
            Random reweightings of which the metric's change is predicted.
        compare_precision (`bool`, *optional*, defaults to `True`):
            Compare float32's scores with bfloat16's; needs memory for a copy of the student.
        try_remedies (`bool`, *optional*, defaults to `True`):
            If predictions fail, try other values of eps_root, learning rate and batch size.
        output_dir (`str`, *optional*):
            Where `verify.json` is written.
        model_name_or_path (`str`, *optional*):
            The generator, for prompts.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Of the generator's texts, in tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Of the generator.
        train_on (`str`, *optional*, defaults to `"completion"`):
            The student is trained on the generator's `"completion"` or on `"prompt_completion"`.
        generation_batch_size (`int`, *optional*), per_device_train_batch_size (`int`, *optional*),
        gradient_accumulation_steps (`int`, *optional*, defaults to `1`):
            A recipe's, for `num_samples`.
        num_threads (`int`, *optional*):
            CPU threads of torch.
    """

    num_samples: int | None = field(
        default=None, metadata={"help": "Verify on the first so many samples; by default a reward step's, or 256."}
    )
    num_directions: int = field(default=20, metadata={"help": "Random reweightings to predict."})
    compare_precision: bool = field(default=True, metadata={"help": "Compare float32's scores with bfloat16's."})
    try_remedies: bool = field(default=True, metadata={"help": "If predictions fail, try other settings."})
    output_dir: str | None = field(default=None, metadata={"help": "Where verify.json is written."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "The generator, for prompts."})
    max_completion_length: int = field(default=256, metadata={"help": "Longest text of the generator, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "The generator's sampling temperature."})
    train_on: str = field(default="completion", metadata={"help": "'completion' or 'prompt_completion'."})
    generation_batch_size: int | None = field(default=None, metadata={"help": "A recipe's; see num_samples."})
    per_device_train_batch_size: int | None = field(default=None, metadata={"help": "A recipe's; see num_samples."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "A recipe's; see num_samples."})
    num_threads: int | None = field(default=None, metadata={"help": "CPU threads of torch."})

    def __post_init__(self):
        MetricArguments.__post_init__(self)
        ToyWorldArguments.__post_init__(self)
        if self.num_samples is None:
            self.num_samples = self.generation_batch_size or (
                self.per_device_train_batch_size * self.gradient_accumulation_steps
                if self.per_device_train_batch_size
                else 256
            )
        if self.num_samples < 2:
            raise UsageError(f"--num_samples must be at least 2, got {self.num_samples}.")
        if self.num_directions < 3:
            raise UsageError(f"--num_directions must be at least 3 for a correlation, got {self.num_directions}.")
        if self.train_on not in ("completion", "prompt_completion"):
            raise UsageError(f"--train_on must be 'completion' or 'prompt_completion', got {self.train_on!r}.")


def read_samples(script_args: VerifyArguments, num_samples: int, seed: int) -> list[Any]:
    """What the student is fine-tuned on: the dataset's samples, or the generator's texts after its prompts."""
    data = script_args.load()
    columns = set(data.column_names)
    of_prompts = script_args.prompt_template is not None or ("prompt" in columns and "completion" not in columns)
    if not of_prompts:
        if not columns & {"text", "messages", "input_ids", "completion"}:
            raise UsageError(
                f"--dataset_name: {script_args.dataset_name!r} has the columns {sorted(columns)}; samples have "
                "`text`, `messages`, `input_ids`, or `prompt` and `completion`."
            )
        return list(data.select(range(min(num_samples, len(data)))))
    if script_args.model_name_or_path is None:
        raise UsageError("--model_name_or_path is required: the dataset is of prompts, which a generator completes.")

    from trl_dpg.evaluation import generate_texts, load_generator, prompt_completion_pairs

    model, tokenizer = load_generator(script_args.model_name_or_path)
    data = data.select(range(min(num_samples, len(data))))
    known = make_prompts(data, script_args, tokenizer)["prompt"]
    prompts = [known[index % len(known)] for index in range(num_samples)]
    texts = generate_texts(
        model,
        tokenizer,
        prompts,
        script_args.max_completion_length,
        seed=seed,
        temperature=script_args.temperature,
    )
    return texts if script_args.train_on == "completion" else prompt_completion_pairs(prompts, texts)


def main(script_args: VerifyArguments, student_args) -> None:
    import torch

    from trl_dpg.verification import verify

    one_process("verify", "Start it without accelerate, or with --num_processes 1.")
    if script_args.num_threads is not None:
        torch.set_num_threads(script_args.num_threads)
    if student_args.attribution != "metagradient":
        raise UsageError("--attribution dataset computes no scores of samples, so there is nothing to verify.")
    temporary = script_args.toy_world is not None and script_args.output_dir is None
    with TemporaryDirectory() if temporary else nullcontext(script_args.output_dir) as folder:
        if script_args.toy_world is not None:
            make_world(Path(str(folder)) / "world", script_args, student_args, script_args)
        if student_args.student_model_name_or_path is None:
            raise UsageError("--student_model_name_or_path is required: the student's path or Hub id.")
        metric = make_metric(script_args)
        examples = read_samples(script_args, script_args.num_samples, student_args.seed)  # type: ignore[arg-type]
        student = student_args.load_student()
    print(f"Student: {student.describe()}; {len(examples)} samples.", flush=True)
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
    print(result.render())
    if script_args.output_dir is not None:
        path = Path(script_args.output_dir) / "verify.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        figures = {"trustworthy": result.trustworthy, "num_samples": len(examples), **asdict(result)}
        path.write_text(json.dumps(_finite(figures), indent=2))
        print(f"All figures: {path}")
    if not result.trustworthy:
        raise SystemExit(1)


def _finite(value: Any) -> Any:
    """JSON knows no `nan` and no `inf`: they become `null`."""
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
    from trl_dpg import cli

    cli.run("verify", sys.argv[1:])
