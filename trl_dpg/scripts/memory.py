"""
Predict the memory of a training, before anything is loaded.

    trl-dpg memory --config recipes/new_language/qlora.yaml --memory 24GB
    trl-dpg memory --config recipes/new_language/full.yaml --num_processes 8 --accelerate_config fsdp2 --memory 80GB

It takes a recipe of `trl-dpg dpg`, and all its arguments. Only configurations, tokenizers and data are read, and no
weights. The table has the peak of each phase of a training step on one device, by part. If it does not fit, it is said
which settings to change, and the exit status is 1. `docs/memory.md` has the arithmetic.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trl import DatasetMixtureConfig, ModelConfig, TrlParser

from trl_dpg.config import DPGConfig
from trl_dpg.files import write_json
from trl_dpg.memory.estimate import STUDENT_PHASES

from .arguments import DPGScriptArguments, UsageError, at_least
from .data import check_model, check_student, the_student
from .dpg import hub_kwargs, load_prompts, make_toy_world
from .output import say
from .planned_processes import accelerate_settings, batches_of, number_of_processes
from .registry import make_metric


PROMPT_TOKENS = 256
NUM_PROMPTS = 256
OF_ONE = (
    "Of several students, one works at a time, so the peak is that of the largest one. Without --student_offload, the "
    "weights of the others come in addition. Predict each of them."
)
"""Prompts that are read."""


@dataclass
class MemoryArguments(DPGScriptArguments):
    """
    Arguments of `trl-dpg memory`, in addition to those of `trl-dpg dpg`.

    Args:
        memory (`str`, *optional*):
            Memory of one device, e.g. `24GB`. By default that of this machine's GPU or, without one, of the machine.
        device_type (`str`, *optional*):
            `"cpu"` or `"cuda"`: kernels process larger blocks on a GPU. By default `"cuda"` if `memory` is given or
            if this machine has a GPU.
        prompt_tokens (`int`, *optional*):
            Tokens of a prompt. By default `max_prompt_tokens`. Without it, the longest of the first prompts in a local
            file, or 256.
        json_file (`str`, *optional*):
            A file for the figures, in bytes.
    """

    memory: str | None = field(
        default=None, metadata={"help": "Memory of one device, e.g. 24GB. By default what this machine has."}
    )
    device_type: str | None = field(
        default=None, metadata={"help": "'cpu' or 'cuda'; by default 'cuda' with --memory or if there is a GPU."}
    )
    prompt_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens of a prompt. By default max_prompt_tokens, or those of the data if it is a file."},
    )
    json_file: str | None = field(default=None, metadata={"help": "A file for the figures, in bytes."})

    def __post_init__(self):
        super().__post_init__()
        at_least(1, prompt_tokens=self.prompt_tokens)
        if self.device_type not in (None, "cpu", "cuda"):
            raise UsageError(f"--device_type must be 'cpu' or 'cuda', got {self.device_type!r}.")
        self.device_bytes  # noqa: B018  # raises if it is no size

    @property
    def on_cpu(self) -> bool:
        import torch

        if self.device_type is not None:
            return self.device_type == "cpu"
        return self.memory is None and not torch.accelerator.is_available()

    @property
    def device_bytes(self) -> int:
        """Bytes of one device."""
        import psutil
        import torch
        from accelerate.utils import convert_file_size_to_int

        if self.memory is not None:
            try:
                return convert_file_size_to_int(self.memory.replace(" ", ""))
            except ValueError as error:
                raise UsageError(f"--memory must be a size such as 24GB or 80GiB, got {self.memory!r}.") from error
        if not self.on_cpu and torch.cuda.is_available():
            return torch.cuda.get_device_properties(0).total_memory
        return psutil.virtual_memory().total


@dataclass
class PlannedConfig(DPGConfig):
    """
    The settings of a training that a number of processes is planned for; they are not started.

    Args:
        num_processes (`int`, *optional*):
            Number of processes, one for each device. By default that of `accelerate_config`, or 1.
        accelerate_config (`str`, *optional*):
            How the generator is sharded: a name of TRL's (`multi_gpu`, `zero1`, `zero2`, `zero3`, `fsdp1`, `fsdp2`),
            or a file of `accelerate config`.
    """

    num_processes: int | None = field(
        default=None, metadata={"help": "Planned number of processes, one for each device."}
    )
    accelerate_config: str | None = field(
        default=None, metadata={"help": "Planned sharding: multi_gpu, zero1, zero2, zero3, fsdp1, fsdp2, or a file."}
    )

    def __post_init__(self):
        at_least(1, num_processes=self.num_processes)
        self.num_processes = number_of_processes(self.num_processes, self.accelerate_config)
        with batches_of(self.num_processes):
            super().__post_init__()

    def sharding(self):
        """What the processes share, a [`Sharding`](trl_dpg.memory.generator_memory.Sharding)."""
        from trl_dpg.memory import Sharding

        launch = accelerate_settings(self.accelerate_config)
        kind = launch.get("distributed_type")
        stage = launch.get("deepspeed_config", {}).get("zero_stage", 0) if kind == "DEEPSPEED" else 0
        stage = 3 if kind == "FSDP" else stage
        deepspeed = kind == "DEEPSPEED"
        return Sharding(self.num_processes or 1, stage >= 1, stage >= 2, stage >= 3, master_weights=deepspeed)


def main(script_args: MemoryArguments, training_args: PlannedConfig, model_args, dataset_args) -> None:
    from trl_dpg.memory import estimate

    if training_args.student_models:
        say(OF_ONE)
    the_student("memory", training_args)
    with TemporaryDirectory() as folder:
        training_args.output_dir = str(Path(folder, "run"))
        if script_args.toy_world is not None:
            make_toy_world(script_args, training_args, model_args)
        check_model("model_name_or_path", model_args.model_name_or_path, **hub_kwargs(training_args, model_args))
        check_student(training_args)
        prompt = prompt_tokens(script_args, training_args, model_args, dataset_args)
        found = estimate(make_setup(script_args, training_args, model_args, prompt))
    say(f"One device of {training_args.num_processes}. Prompts of {prompt} tokens, completions at full length.")
    say(found.render())
    if script_args.on_cpu:
        say("On a CPU, gaps in the heap can double this, unless MALLOC_MMAP_THRESHOLD_=65536 is in the environment.")
    peak, size = found.peak, found.size
    if script_args.json_file is not None:
        write_json(Path(script_args.json_file), found.figures())
    if found.fits:
        say(f"It fits: {size(peak.total)} of {size(found.memory)} in the phase {peak.name!r}.")
        return
    say(f"It does not fit: {size(peak.total)} in the phase {peak.name!r}, but there are {size(found.memory)}.")
    for change in found.changes:
        also = " (and --gradient_accumulation_steps up by the same factor)" * change.setting.startswith("per_device")
        end = "then it fits" if change.fits else "not enough yet"
        say(f"  --{change.setting} {str(change.value).lower()}{also}: {size(change.peak)}, {end}")
    if not any(change.fits for change in found.changes):
        say(f"  {further(training_args, model_args, found.changes[-1].phase if found.changes else peak.name)}")
    sys.exit(1)


def further(training_args: PlannedConfig, model_args, phase: str) -> str:
    """What changes the training, too."""
    mine = "student_" if phase in STUDENT_PHASES else ""
    ways = [] if vars(training_args if mine else model_args)[f"{mine}load_in_4bit"] else [f"--{mine}load_in_4bit"]
    ways += [] if vars(training_args if mine else model_args)[f"{mine}use_peft"] else [f"--{mine}use_peft"]
    ways += ["a smaller batch_size or max_length in --metric_kwargs"] if phase == "metric" else []
    ways += [] if mine else ["--accelerate_config fsdp2 with more processes"]
    ways += [f"shorter texts (--{'student_max_length' if mine else 'max_completion_length'})", "a smaller model"]
    return f"What is left changes the training or the metric: {', '.join(ways)}. The phase {phase!r} needs the most."


def prompt_tokens(script_args: MemoryArguments, training_args: PlannedConfig, model_args, dataset_args) -> int:
    """Tokens of a prompt, see [`MemoryArguments`]."""
    from transformers import AutoTokenizer

    given = script_args.prompt_tokens or script_args.max_prompt_tokens
    if given is not None:
        return given
    if script_args.dataset_name is None or not Path(script_args.dataset_name).is_file():
        return PROMPT_TOKENS
    tokenizer: Any = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    prompts = load_prompts(script_args, training_args, dataset_args, tokenizer)["train"]
    first = [row["prompt"] for row in islice(prompts, NUM_PROMPTS)]
    chat = partial(tokenizer.apply_chat_template, add_generation_prompt=True, return_dict=True)
    encoded = (tokenizer(prompt) if isinstance(prompt, str) else chat(prompt) for prompt in first)
    return max(len(row["input_ids"]) for row in encoded)


def with_replay(training_args: PlannedConfig, number: int):
    """The inner loop and its samples, with replayed rows. They are assumed to be as long as the other samples."""
    from trl_dpg.replay import Replay

    config = training_args.inner_loop_config()
    if training_args.replay_dataset is None:
        return config, number
    replay = Replay([""], training_args.replay_ratio)
    return replay.widened(config), number + replay.number(number, config.batch_size)


def make_setup(script_args: MemoryArguments, training_args: PlannedConfig, model_args, prompt: int):
    """The training as a [`Setup`](trl_dpg.memory.estimate.Setup), from configurations alone."""
    import torch
    from trl import get_peft_config, get_quantization_config

    from trl_dpg import Student
    from trl_dpg.memory import GeneratorMemory, Setup, StudentMemory, StudentTraces, empty_model, weight_bytes

    kwargs: dict[str, Any] = dict(training_args.student_model_init_kwargs or {})  # type: ignore[arg-type]
    student = Student(
        empty_model(
            str(training_args.student_model_name_or_path),
            kwargs.pop("dtype", torch.float32),
            training_args.student_peft_config(),
            training_args.student_quantization_config(),
            **kwargs,
        ),
        disable_dropout=True,
    )
    positions = getattr(student.model.config.get_text_config(), "max_position_embeddings", None)
    length = training_args.max_completion_length + 1 + prompt * (training_args.train_on == "prompt_completion")
    length = min(length, training_args.student_max_length, positions or length)
    number, num_ranks = training_args.generation_batch_size, training_args.num_processes or 1
    if not training_args.cross_group_batching:  # every dataset is scored by one rank
        number, num_ranks = number // training_args.num_generations, 1
    config, number = with_replay(training_args, number)
    device_bytes = script_args.device_bytes
    if script_args.on_cpu and script_args.memory is None:  # of which the processes have equal shares
        device_bytes //= training_args.num_processes or 1
    traces = StudentTraces(student, length, accelerator=not script_args.on_cpu)
    metric = make_metric(script_args)
    generator = GeneratorMemory(
        empty_model(
            model_args.model_name_or_path,
            model_args.dtype,
            get_peft_config(model_args),
            get_quantization_config(model_args),
            attn_implementation=model_args.attn_implementation,
            **hub_kwargs(training_args, model_args),
        ),
        training_args,
        prompt,
        training_args.sharding(),
        accelerator=not script_args.on_cpu,
        device_bytes=device_bytes,
    )
    return Setup(
        weight_bytes(student.model),
        lambda config, free: StudentMemory(traces, config, number, metric, free, num_ranks),
        config,
        generator,
        device_bytes,
        training_args.student_offload and not script_args.on_cpu,
    )


def make_parser(prog: str | None = None) -> TrlParser:
    return TrlParser((MemoryArguments, PlannedConfig, ModelConfig, DatasetMixtureConfig), prog=prog)


if __name__ == "__main__":
    from trl_dpg.scripts import launcher

    launcher.run("memory", make_parser, main, sys.argv[1:])
