"""Loads the datasets and models that arguments name, and checks that they exist."""

import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from string import Formatter
from typing import Any

from trl_dpg.files import check_links
from trl_dpg.rows import read_rows

from .arguments import GeneratorArguments, PromptArguments, UsageError
from .flags import in_flags


WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say the number of processes."""


def load_data(
    name: str,
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    flag: str = "dataset_name",
):
    """A split of a dataset. The name is a Hub id, or the path or pattern of local files (`data/*.jsonl`)."""
    try:
        return read_rows(name, config, split, streaming)
    except ValueError as error:
        raise UsageError(f"--{flag}: {error}") from error


def fits(template: str, columns: Collection[str]) -> bool:
    """Whether a prompt's template takes all its fields from columns of this dataset."""
    try:
        fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise UsageError(f"--prompt_template cannot be read ({error}). Double the braces of the text.") from error
    return {re.split(r"[.\[]", field)[0] for field in fields} <= set(columns)


def make_prompts(dataset, arguments: PromptArguments, tokenizer):
    """A dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]) with a column `prompt`, made from another."""
    from accelerate import PartialState

    template, limit = arguments.prompt_template, arguments.max_prompt_tokens
    row = next(iter(dataset))
    if arguments.conversational and tokenizer is not None and tokenizer.chat_template is None:
        raise UsageError("--conversational: the generator's tokenizer has no chat template. Use no --conversational.")
    if template is None:
        check_prompts(dataset, row)
        if "prompt" not in row:
            raise UsageError(
                f"The dataset has the columns {list(row)}, but no `prompt`. Set --prompt_template, e.g. "
                f"'Rephrase this text.\\n\\n{{{next(iter(row))}}}'."
            )
        return dataset

    def prompt(row):
        if limit is not None:
            cut = {}
            for name, value in row.items():
                if isinstance(value, str) and f"{{{name}}}" in template:
                    ids = tokenizer(value, add_special_tokens=False, truncation=True, max_length=limit)["input_ids"]
                    cut[name] = tokenizer.decode(ids)
            row = row | cut
        text = template.format(**row)
        return {"prompt": [{"role": "user", "content": text}] if arguments.conversational else text}

    try:
        template.format(**row)
    except (KeyError, IndexError, ValueError) as error:
        raise UsageError(
            f"--prompt_template cannot be filled in ({error!r}); the dataset has the columns {list(row)}, "
            "and braces that belong to the text must be doubled."
        ) from error
    with PartialState().main_process_first():
        return dataset.map(prompt, remove_columns=list(row))


def check_prompts(dataset, row: dict[str, Any]) -> None:
    """Refuse a column `prompt` that has something else than texts or conversations. `row` is the first one."""
    from datasets import Dataset

    prompt = row.get("prompt", "")
    messages = isinstance(prompt, list) and prompt and all(isinstance(message, dict) for message in prompt)
    if prompt is not None and not messages and not isinstance(prompt, str):
        raise UsageError(
            f"--dataset_name: the column `prompt` must hold texts or conversations (lists of messages with `role` and "
            f"`content`), got e.g. {prompt!r}."
        )
    missing = int(prompt is None)
    if "prompt" in row and isinstance(dataset, Dataset):
        missing = dataset.select_columns("prompt").with_format("arrow")[:]["prompt"].null_count
    if missing:
        raise UsageError(f"--dataset_name: {missing} rows have no prompt (null in `prompt`). Remove these rows.")


SAMPLE_COLUMNS = {"text": ("texts",), "messages": ("messages",)} | dict.fromkeys(
    ("prompt", "completion"), ("texts", "messages")
)
"""What the columns of samples hold."""


def held_by(feature) -> str:
    """What a column of a dataset holds, in words."""
    from datasets import LargeList, List

    if isinstance(feature, List | LargeList):
        return "messages" if isinstance(feature.feature, dict) else "lists"
    return {"string": "texts", "large_string": "texts"}.get(feature.dtype, feature.dtype)


def check_texts(dataset, flag: str, name: str) -> None:
    """Refuse a dataset of samples with numbers or lists in the place of texts or messages."""
    for column, kinds in SAMPLE_COLUMNS.items():
        if column in dataset.column_names and (held := held_by(dataset.features[column])) not in (*kinds, "null"):
            raise UsageError(f"--{flag} {name!r}: the column {column!r} holds {held}, expected {' or '.join(kinds)}.")


def read_dataset(arguments: GeneratorArguments):
    """The split of the dataset that the arguments name."""
    if arguments.dataset_name is None:
        raise UsageError("--dataset_name is required: a Hub id, or a file (json, jsonl, parquet, csv, txt).")
    return load_data(arguments.dataset_name, arguments.dataset_config, arguments.dataset_train_split)


def read_prompts(arguments: GeneratorArguments, number: int, dataset=None) -> list:
    """
    Prompts for the generator.

    Args:
        arguments ([`GeneratorArguments`]):
            The dataset and the generator.
        number (`int`):
            Number of prompts. If the dataset has fewer, they are repeated. 0: one of each row.
        dataset ([`~datasets.Dataset`], *optional*):
            The dataset, if it is loaded already.
    """
    from transformers import AutoTokenizer

    check_model("model_name_or_path", arguments.model_name_or_path, **arguments.hub_kwargs())
    dataset = read_dataset(arguments) if dataset is None else dataset
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path, **arguments.hub_kwargs())
    if number:
        dataset = dataset.select(range(min(number, len(dataset))))
    prompts = make_prompts(dataset, arguments, tokenizer)["prompt"]
    return [prompts[index % len(prompts)] for index in range(number or len(prompts))]


def completion_reader(arguments: GeneratorArguments):
    """The [`~trl_dpg.student_text.StudentText`] of a generator's texts."""
    from transformers import AutoTokenizer

    from trl_dpg.student_text import StudentText

    return StudentText(
        arguments.student_text,
        arguments.unfinished_thoughts,
        AutoTokenizer.from_pretrained(str(arguments.model_name_or_path), **arguments.hub_kwargs()),
        arguments.chat_template_kwargs,  # type: ignore[arg-type]  # a dict once parsed
    )


def as_the_student_reads(dataset, arguments, flag: str, name: str):
    """A dataset's samples as a student reads them. What is said of their reasoning is printed."""
    from trl_dpg.student_text import describe, read_dataset

    if "input_ids" in dataset.column_names:
        if arguments.student_text != "all":
            raise UsageError(f"--student_text {arguments.student_text}: --{flag} {name!r} has token ids. Use 'all'.")
        return dataset
    check_texts(dataset, flag, name)
    try:
        read, reasoned, unfinished = read_dataset(dataset, arguments.student_text, arguments.unfinished_thoughts)
    except ValueError as error:
        raise UsageError(f"--{flag} {name!r}: {error}") from error
    line = describe(len(dataset), reasoned, unfinished, arguments.student_text, arguments.unfinished_thoughts)
    if line is not None and process_state().is_main_process:
        print(f"{name}: {line}", flush=True)
    return read


def complete_prompts(arguments: GeneratorArguments, prompts: list, seed: int) -> list[str]:
    """The generator's texts after prompts. A [`completion_reader`] says what of them a student reads."""
    return make_completer(arguments)(prompts, seed)


def make_completer(arguments: GeneratorArguments) -> Callable[[list, int], list[str]]:
    """Load the generator. Returns a function from prompts and a seed to its texts."""
    from trl_dpg.generation import generate_texts, load_generator

    path = str(arguments.model_name_or_path)
    model, tokenizer = load_generator(
        path, arguments.dtype or "auto", arguments.model_revision, arguments.trust_remote_code
    )
    arguments.set_threads(model)
    return lambda prompts, seed: generate_texts(
        model,
        tokenizer,
        prompts,
        arguments.max_completion_length,
        seed=seed,
        chat_template_kwargs=arguments.chat_template_kwargs,  # type: ignore[arg-type]  # a dict once parsed
        generation_kwargs=arguments.generation_kwargs,  # type: ignore[arg-type]
        skip_special_tokens=not completion_reader(arguments).needs_special_tokens,
        **arguments.sampling(),
    )


def process_state():
    """[`~accelerate.PartialState`]. On a machine without accelerators it must be told to count processes."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def one_process(command: str, instead: str) -> None:
    """Refuse to run on several processes. It needs no torch, which some commands do without."""
    name, number = next(((name, os.environ[name]) for name in WORLD_SIZES if name in os.environ), ("", "1"))
    if not number.isdecimal():
        raise UsageError(f"The environment variable {name} must be the number of processes, got {number!r}.")
    if int(number) > 1:
        raise UsageError(f"trl-dpg {command} runs on one process, not {number}. {instead}")


def check_model(flag: str, path: str | None, **kwargs: Any) -> None:
    """Refuse a model that does not exist, before any work is done."""
    from peft import PeftConfig
    from transformers import AutoConfig

    from trl_dpg.student.loading import check_weights

    if path is None:
        raise UsageError(f"--{flag} is required: a model's path or Hub id.")
    try:
        AutoConfig.from_pretrained(path, **kwargs)
    except (OSError, ValueError) as error:
        try:
            PeftConfig.from_pretrained(path)
        except (OSError, ValueError):
            raise UsageError(f"--{flag} {path!r} could not be loaded: {error}") from error
    try:
        check_weights(path)
    except ValueError as error:
        raise UsageError(f"--{flag} {path!r}: {error}") from error


def check_student(student_args) -> None:
    """Refuse students that do not exist, before any work is done."""
    kwargs = student_args.student_model_init_kwargs or {}
    hub_kwargs = {name: kwargs[name] for name in ("revision", "trust_remote_code", "token") if name in kwargs}
    if student_args.student_models and student_args.student_model_name_or_path is not None:
        raise UsageError("--student_models and --student_model_name_or_path both name students. Give one of them.")
    flag = "student_models" if student_args.student_models else "student_model_name_or_path"
    for own in student_args.each_student().values():
        check_model(flag, own.student_model_name_or_path, **hub_kwargs)


def the_student(command: str, student_args) -> None:
    """Refuse several students in a command that takes one. If one is named beside those of a recipe, it is taken."""
    if student_args.student_models and student_args.student_model_name_or_path is None:
        raise UsageError(
            f"trl-dpg {command} takes one student, but --student_models has {len(student_args.student_models)}. Name "
            f"one of them, e.g. --student_model_name_or_path {student_args.student_models[0]}."
        )
    student_args.student_models = None


def check_token_ids(student_args, metrics: Mapping[str, Any], examples: Mapping[str, Any] = {}, replay=None) -> None:
    """Refuse token ids that several students would read by other vocabularies, before one of them is loaded."""
    from transformers import AutoTokenizer

    from trl_dpg.reward_checks import check_token_ids
    from trl_dpg.student.loading import load_pretrained

    students = student_args.each_student()
    if len(students) == 1:
        return
    paths = {name: own.student_model_name_or_path for name, own in students.items()}
    tokenizers = {name: load_pretrained(AutoTokenizer, own, "the student's tokenizer") for name, own in paths.items()}
    rows = {} if replay is None else {"replay_dataset": replay.rows}
    try:
        check_token_ids(tokenizers, metrics, {**examples, **rows})
    except ValueError as error:
        flags = {name: name for name in ("dataset_name", "replay_dataset")}
        raise UsageError(in_flags(str(error), flags)) from error


def make_replay(student_args):
    """The replayed rows that the arguments name, or `None`."""
    from trl_dpg.metagradients.config import SettingsError

    try:
        return student_args.replay()
    except SettingsError as error:
        raise UsageError(in_flags(str(error))) from error


def make_folder(flag: str, path: str | Path) -> Path:
    """Make the folder of an argument."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"--{flag} {str(path)!r} is a file or is inside a file. Name a folder.") from error
    except OSError as error:
        raise UsageError(
            f"--{flag} {str(path)!r} cannot be made ({error.strerror}). Choose another folder."
        ) from error
    if not os.access(path, os.W_OK):
        raise UsageError(f"--{flag} {str(path)!r} cannot be written to. Choose another folder, or its permissions.")
    try:
        check_links(path)
    except ValueError as error:
        raise UsageError(f"--{flag}: {error}") from error
    return Path(path)


OF_A_TRAINING = ("dpg_config.json", "dpg_log.jsonl", "checkpoint-*")
OF_A_MODEL = ("config.json", "adapter_config.json", "*.safetensors", "*.bin")


def check_no_training(output_dir: Path) -> None:
    """Refuse the folder of a training or of a model, whose files must stay as they are."""
    found = sorted(path.name for pattern in OF_A_TRAINING + OF_A_MODEL for path in output_dir.glob(pattern))
    if found:
        raise UsageError(
            f"--output_dir {str(output_dir)!r} holds a training run or a model ({found[0]}). A recipe's `output_dir` "
            "is that of its training. Choose another folder."
        )
