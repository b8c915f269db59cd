"""
Is this set-up trustworthy? On the user's own student, data and metric, in about a minute for small models.

    trl-dpg verify --config recipes/pattern_67/mini.yaml
    trl-dpg verify --config recipe.yaml --dataset_name texts.jsonl --num_samples 128

A recipe of `trl-dpg dpg` will do as it is. Where its dataset is of prompts, its generator writes the texts. Ends with
status 0: trustworthy; 1: not; 2: wrong usage. `docs/verify.md` says what the figures mean.
"""

import json
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .utils import WORLDS, MetricArguments, UsageError, from_json, load_data, make_metric, make_world


@dataclass
class VerifyArguments(MetricArguments):
    """
    Arguments of `trl-dpg verify`.

    Args:
        dataset_name (`str`, *optional*):
            Samples by Hub id or file, with a column `text`, `messages`, `input_ids`, or `prompt` and `completion`. Or
            prompts (a column `prompt`, or `prompt_template`), which the generator completes.
        dataset_config (`str`, *optional*):
            Configuration of a dataset of the Hub.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            The split that is read.
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
        prompt_template (`str`, *optional*):
            Makes the prompt from a row's columns.
        conversational (`bool`, *optional*, defaults to `False`):
            With `prompt_template`: the prompt is a user's message.
        max_prompt_tokens (`int`, *optional*):
            With `prompt_template`: longer columns are cut off.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Of the generator's texts, in tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Of the generator.
        train_on (`str`, *optional*, defaults to `"completion"`):
            The student is trained on the generator's `"completion"` or on `"prompt_completion"`.
        generation_batch_size (`int`, *optional*), per_device_train_batch_size (`int`, *optional*),
        gradient_accumulation_steps (`int`, *optional*, defaults to `1`):
            A recipe's, for `num_samples`.
        toy_world (`str`, *optional*), toy_world_kwargs (`dict[str, Any]` or `str`, *optional*):
            Models and data made on the spot, as in `trl-dpg dpg`.
        num_threads (`int`, *optional*):
            CPU threads of torch.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Samples, or prompts, by Hub id or file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset of the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "The split that is read."})
    num_samples: int | None = field(
        default=None, metadata={"help": "Verify on the first so many samples; by default a reward step's, or 256."}
    )
    num_directions: int = field(default=20, metadata={"help": "Random reweightings to predict."})
    compare_precision: bool = field(default=True, metadata={"help": "Compare float32's scores with bfloat16's."})
    try_remedies: bool = field(default=True, metadata={"help": "If predictions fail, try other settings."})
    output_dir: str | None = field(default=None, metadata={"help": "Where verify.json is written."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "The generator, for prompts."})
    prompt_template: str | None = field(default=None, metadata={"help": "Makes the prompt from a row's columns."})
    conversational: bool = field(default=False, metadata={"help": "The prompt template is a user's message."})
    max_prompt_tokens: int | None = field(default=None, metadata={"help": "Columns in the template are cut off here."})
    max_completion_length: int = field(default=256, metadata={"help": "Longest text of the generator, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "The generator's sampling temperature."})
    train_on: str = field(default="completion", metadata={"help": "'completion' or 'prompt_completion'."})
    generation_batch_size: int | None = field(default=None, metadata={"help": "A recipe's; see num_samples."})
    per_device_train_batch_size: int | None = field(default=None, metadata={"help": "A recipe's; see num_samples."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "A recipe's; see num_samples."})
    toy_world: str | None = field(
        default=None, metadata={"help": f"Models and data made on the spot: {', '.join(WORLDS)}."}
    )
    toy_world_kwargs: dict | str | None = field(default=None, metadata={"help": "The world's arguments, as JSON."})
    num_threads: int | None = field(default=None, metadata={"help": "CPU threads of torch."})

    def __post_init__(self):
        super().__post_init__()
        self.toy_world_kwargs = from_json("toy_world_kwargs", self.toy_world_kwargs)
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
    if script_args.dataset_name is None:
        raise UsageError("--dataset_name is required: samples, or the generator's prompts, by Hub id or file.")
    data = load_data(script_args.dataset_name, script_args.dataset_config, script_args.dataset_train_split)
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

    from accelerate import PartialState
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_dpg.evaluation import generate_texts

    from .dpg import make_prompts

    path = script_args.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    data = data.select(range(min(num_samples, len(data))))
    known = make_prompts(data, script_args, tokenizer)["prompt"]  # type: ignore[arg-type]
    prompts = [known[index % len(known)] for index in range(num_samples)]
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").to(PartialState().device)
    texts = generate_texts(
        model,
        tokenizer,
        prompts,
        script_args.max_completion_length,
        seed=seed,
        temperature=script_args.temperature,
    )
    if script_args.train_on == "completion":
        return texts
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    return [
        {"prompt": prompt, "completion": completion} for prompt, completion in zip(prompts, completions, strict=True)
    ]


def main(script_args: VerifyArguments, student_args) -> None:
    import torch

    from trl_dpg.verification import verify

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
    main(*make_parser().parse_args_and_config())
