"""Samples like those of a reward step: rows of a dataset, or texts of a generator. For `verify` and `tune`."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .arguments import GeneratorArguments, MetricArguments, ToyWorldArguments, UsageError, at_least
from .data import (
    check_student,
    check_texts,
    complete_prompts,
    completion_reader,
    fits,
    make_replay,
    read_dataset,
    read_prompts,
    the_student,
)
from .flags import in_flags
from .output import say
from .registry import make_metric
from .toy_world import toy_world


@dataclass
class SampleArguments(MetricArguments, GeneratorArguments, ToyWorldArguments):
    """
    Arguments for a reward step's samples.

    The dataset has samples (`text`, `messages`, `input_ids`, or `prompt` and `completion`), or it has prompts (a
    column `prompt`, or the columns of `prompt_template`), which the generator completes.

    Args:
        num_samples (`int`, *optional*):
            Number of samples, from the start of the dataset. By default as many as a recipe's reward step has
            (`generation_batch_size`, or `per_device_train_batch_size` times `gradient_accumulation_steps`), or 256.
            Without `cross_group_batching`, it is divided by `num_generations`.
        generation_batch_size (`int`, *optional*), per_device_train_batch_size (`int`, *optional*),
        gradient_accumulation_steps (`int`, *optional*, defaults to `1`),
        cross_group_batching (`bool`, *optional*, defaults to `True`), num_generations (`int`, *optional*, defaults to
        `8`):
            Settings of a recipe, for `num_samples`.
    """

    num_samples: int | None = field(
        default=None, metadata={"help": "Number of samples; by default as many as a reward step has, or 256."}
    )
    generation_batch_size: int | None = field(default=None, metadata={"help": "A recipe's setting, for num_samples."})
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "A recipe's setting, for num_samples."}
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "A recipe's setting, for num_samples."})
    cross_group_batching: bool = field(default=True, metadata={"help": "A recipe's setting, for num_samples."})
    num_generations: int = field(default=8, metadata={"help": "A recipe's setting, for num_samples."})

    def __post_init__(self):
        super().__post_init__()
        if self.num_samples is None:
            self.num_samples = self.generation_batch_size or (
                self.per_device_train_batch_size * self.gradient_accumulation_steps
                if self.per_device_train_batch_size
                else 256
            )
            if not self.cross_group_batching:
                self.num_samples //= self.num_generations
        at_least(2, num_samples=self.num_samples)


def read_samples(script_args: SampleArguments, seed: int) -> list[Any]:
    """The dataset's samples or, if it has prompts, the generator's texts after them."""
    num_samples: int = script_args.num_samples  # type: ignore[assignment]  # set by __post_init__
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
        check_texts(data, "dataset_name", str(script_args.dataset_name))
        return list(data.select(range(min(num_samples, len(data)))))
    from trl_dpg.generation import prompt_completion_pairs
    from trl_dpg.student_text import thinking_line

    prompts = read_prompts(script_args, num_samples, data)
    reader = completion_reader(script_args)
    readings = reader.read(prompts, complete_prompts(script_args, prompts, seed))
    texts = [reading.completion for reading in readings]
    if (line := thinking_line(readings, reader)) is not None:
        say(line)
    return texts if script_args.train_on == "completion" else prompt_completion_pairs(prompts, texts)


def load_set_up(command: str, script_args: SampleArguments, student_args, output_dir: str | None):
    """
    The student, the samples and the metric. A toy world is kept beside `output_dir`.

    Replayed rows are among the samples, and `student_args` has the size of the batches with them.
    """
    the_student(command, student_args)
    with toy_world(script_args, student_args.seed, student_args, output_dir=output_dir):
        check_student(student_args)
        metric = make_metric(script_args)
        examples = read_samples(script_args, student_args.seed)
        replay = make_replay(student_args)
        student = student_args.load_student()
        script_args.set_threads(student.model)
    number, replayed = len(examples), ""
    if replay is not None:
        examples = replay.mix(examples, student_args.student_batch_size, index=1).examples
        student_args.student_batch_size = replay.widened(student_args.inner_loop_config()).batch_size
        replayed = f" and {len(examples) - number} replayed rows, which are treated alike"
    say(f"Student: {student.describe()}; {number} samples{replayed}.")
    return student, examples, metric


def tuning_file(output_dir: str | Path, command: str) -> Path:
    """Where a command writes its choice of numbers: not into the `tune.json` of a training in the same folder."""
    return Path(output_dir) / f"{command}_tune.json"


def choice_data(script_args: MetricArguments, examples) -> dict[str, Any]:
    """What a choice of numbers depends on, beside student and inner loop, as values that JSON can hold."""
    from trl_dpg.attribution.journal import digest

    metric = {"metric": script_args.metric, "metric_kwargs": script_args.metric_kwargs}
    return json.loads(json.dumps(metric, default=str)) | {"samples": digest(examples)}


def choose_numbers(
    script_args: MetricArguments, student_args, student, examples, metric, path: Path | None, **changes
) -> None:
    """
    Put numbers in the place of the student's arguments that are `auto`, as the first batch of a training does.

    Of several processes, the first one chooses.

    Args:
        script_args ([`MetricArguments`]), student_args ([`StudentArguments`]), student ([`Student`]), metric
            (`Callable`):
            The set-up.
        examples (`list` or [`~datasets.Dataset`]):
            The samples on which the numbers are chosen.
        path (`Path`, *optional*):
            The choice is written to this file, or taken from it if it was made for the same set-up and samples.
        changes:
            Fields of the inner loop that are other ones while numbers are chosen.
    """
    from trl_dpg.metagradients.config import SettingsError
    from trl_dpg.tuning import tune_together

    config = student_args.inner_loop_config()
    if not config.auto:
        return
    data = None if path is None else choice_data(script_args, examples)
    try:
        chosen = tune_together(student, examples, metric, replace(config, **changes), path, data)
    except SettingsError as error:
        raise UsageError(in_flags(str(error))) from error
    student_args.set_numbers(chosen.apply(config))
