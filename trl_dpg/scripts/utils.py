"""What the commands share: metrics and rewards by name, datasets by Hub id or file."""

import difflib
import importlib
import inspect
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar


METRICS = {
    "language_modeling": "trl_dpg.scripts.utils.language_modeling",
    "lm_eval": "trl_dpg.scripts.utils.lm_eval",
    "weight_pattern": "trl_dpg.metrics.WeightPatternMetric",
    "qr_code": "trl_dpg.metrics.QRCodeMetric",
    "weight_norm": "trl_dpg.metrics.WeightNormMetric",
}
REWARDS = {
    "contains": "trl_dpg.rewards.ContainsReward",
    "word_share": "trl_dpg.rewards.WordShareReward",
    "levenshtein": "trl_dpg.rewards.LevenshteinReward",
    "embedding_similarity": "trl_dpg.rewards.EmbeddingSimilarityReward",
    "language_id": "trl_dpg.rewards.LanguageIDReward",
}
WORLDS = {
    "characters": "trl_dpg.toy.characters_world",
    "languages": "trl_dpg.toy.languages_world",
    "strings": "trl_dpg.toy.strings_world",
}
FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


class UsageError(ValueError):
    """An argument that cannot be right; the message names the flag and the remedy."""


@dataclass
class MetricArguments:
    """
    The target metric, as arguments of a command.

    Args:
        metric (`str`, *optional*):
            What the data should do to the student: `"language_modeling"`, `"lm_eval"`, `"weight_pattern"`,
            `"qr_code"`, `"weight_norm"`, or a dotted import path of a callable that maps the fine-tuned student to a
            scalar tensor (or, with `metric_kwargs`, of what makes one).
        metric_kwargs (`dict[str, Any]` or `str`, *optional*):
            The metric's arguments; JSON on the command line.
    """

    _argument_group_name: ClassVar[str] = "metric, data and output"

    metric: str | None = field(
        default=None,
        metadata={
            "help": f"The target metric: {', '.join(METRICS)}, or a dotted import path.",
        },
    )
    metric_kwargs: dict | str | None = field(default=None, metadata={"help": "The metric's arguments, as JSON."})

    def __post_init__(self):
        self.metric_kwargs = from_json("metric_kwargs", self.metric_kwargs)
        if self.metric is None:
            raise UsageError(f"--metric is required: {', '.join(METRICS)}, or a dotted import path.")


@dataclass
class DatasetArguments:
    """
    The dataset a command reads.

    Args:
        dataset_name (`str`):
            A Hub id, or a file (json, jsonl, parquet, csv, txt).
        dataset_config (`str`, *optional*):
            Configuration of a dataset of the Hub.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            The split that is read, e.g. `"train[:10000]"`.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "A Hub id, or a file (json, jsonl, parquet, csv, txt)."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset of the Hub."})
    dataset_train_split: str = field(
        default="train", metadata={"help": "The split that is read, e.g. 'train[:10000]'."}
    )

    def load(self):
        """The split as [`~datasets.Dataset`]."""
        if self.dataset_name is None:
            raise UsageError("--dataset_name is required: a Hub id, or a file (json, jsonl, parquet, csv, txt).")
        return load_data(self.dataset_name, self.dataset_config, self.dataset_train_split)


@dataclass
class PromptArguments:
    """
    How the generator's prompts are made.

    Args:
        prompt_template (`str`, *optional*):
            Makes the prompt from a row's columns, e.g. `"Rephrase this article.\n\n{text}"`. Without it, the dataset
            needs a column `prompt`.
        conversational (`bool`, *optional*, defaults to `False`):
            With `prompt_template`: the prompt is a user's message.
        max_prompt_tokens (`int`, *optional*):
            With `prompt_template`: longer columns are cut off, in the generator's tokens.
    """

    prompt_template: str | None = field(
        default=None, metadata={"help": "Makes the prompt from a row's columns, e.g. 'Rephrase: {text}'."}
    )
    conversational: bool = field(default=False, metadata={"help": "The prompt template is a user's message."})
    max_prompt_tokens: int | None = field(
        default=None, metadata={"help": "Columns in the prompt template are cut off at this many tokens."}
    )


@dataclass
class ToyWorldArguments:
    """
    Models and data made on the spot.

    Args:
        toy_world (`str`, *optional*):
            `"characters"`, `"languages"` or `"strings"`, see `trl_dpg.toy`. They stand in for generator, student,
            dataset and the metric's dataset, where those are not given.
        toy_world_kwargs (`dict[str, Any]` or `str`, *optional*):
            The world's arguments; JSON on the command line.
    """

    toy_world: str | None = field(
        default=None, metadata={"help": f"Models and data made on the spot: {', '.join(WORLDS)}."}
    )
    toy_world_kwargs: dict | str | None = field(default=None, metadata={"help": "The world's arguments, as JSON."})

    def __post_init__(self):
        self.toy_world_kwargs = from_json("toy_world_kwargs", self.toy_world_kwargs)


def from_json(flag: str, value: dict | str | None) -> dict | None:
    """An argument that is a mapping in YAML and JSON on the command line."""
    if not isinstance(value, str):
        return value
    try:
        mapping = json.loads(value)
    except json.JSONDecodeError as error:
        raise UsageError(f"--{flag} must be JSON, got {value!r} ({error}).") from error
    if not isinstance(mapping, dict):
        raise UsageError(f"--{flag} must be a mapping, got {value!r}.")
    return mapping


def resolve(name: str, known: dict[str, str], flag: str) -> Any:
    """What a name, or a dotted import path, stands for."""
    path = known.get(name, name)
    module, _, attribute = path.rpartition(".")
    if not module:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"--{flag}: unknown name {name!r}.{hint} Choose of {', '.join(known)}, or a dotted path.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # the user's own modules, as in TRL's scripts
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise UsageError(f"--{flag}: could not import {path!r} ({error}).") from error


def load_data(name: str, config: str | None = None, split: str = "train", streaming: bool = False):
    """A split of a dataset by its Hub id, or of a local file by its path."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    suffix = Path(name).suffix
    if suffix in FILE_FORMATS and not Path(name).is_file():
        raise UsageError(f"There is no file {name!r}.")
    try:
        if suffix in FILE_FORMATS:
            return load_dataset(FILE_FORMATS[suffix], data_files=name, split=split, streaming=streaming)
        return load_dataset(name, name=config, split=split, streaming=streaming)
    except (FileNotFoundError, ValueError, DatasetGenerationError) as error:
        raise UsageError(
            f"The dataset {name!r} could not be read (split {split!r}): {error} Give a Hub id, or a file "
            "(json, jsonl, parquet, csv, txt)."
        ) from error


def make_prompts(dataset, arguments: PromptArguments, tokenizer):
    """The dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]) with a column `prompt`."""
    from accelerate import PartialState

    template, limit = arguments.prompt_template, arguments.max_prompt_tokens
    row = next(iter(dataset))
    if template is None:
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
            "and braces of the text itself are doubled."
        ) from error
    with PartialState().main_process_first():
        return dataset.map(prompt, remove_columns=list(row))


def process_state():
    """[`~accelerate.PartialState`], which by itself knows of several processes on accelerators only."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def one_process(command: str, instead: str) -> None:
    """Refuse to run on several processes."""
    number = process_state().num_processes
    if number > 1:
        raise UsageError(f"trl-dpg {command} runs on one process, not {number}. {instead}")


def language_modeling(dataset: str | None = None, config: str | None = None, split: str = "train", **kwargs):
    """[`LanguageModelingMetric`] of a file, a dataset of the Hub, or `texts`."""
    from trl_dpg.metrics import LanguageModelingMetric

    if (dataset is None) == ("texts" not in kwargs):
        raise UsageError("--metric_kwargs: language_modeling needs one of `dataset` (a file or Hub id) and `texts`.")
    data = kwargs.pop("texts") if dataset is None else load_data(dataset, config, split)
    return LanguageModelingMetric(data, **kwargs)


def lm_eval(**kwargs):
    """[`LanguageModelingMetric.from_lm_eval`]"""
    from trl_dpg.metrics import LanguageModelingMetric

    return LanguageModelingMetric.from_lm_eval(**kwargs)


def make_metric(arguments: MetricArguments):
    """The target metric: a callable that maps a fine-tuned student to a scalar tensor."""
    name, kwargs = str(arguments.metric), from_json("metric_kwargs", arguments.metric_kwargs)
    metric = resolve(name, METRICS, "metric")
    if kwargs or name in METRICS or isinstance(metric, type):
        return call_with(metric, kwargs or {}, "metric_kwargs", name)
    return metric


def make_rewards(names: list[str] | None, kwargs: dict | None) -> list:
    kwargs = kwargs or {}
    strangers = set(kwargs) - set(names or [])
    if strangers:
        raise UsageError(f"--reward_kwargs has arguments for {sorted(strangers)}, which are not in --reward_funcs.")
    rewards = []
    for name in names or []:
        reward = resolve(name, REWARDS, "reward_funcs")
        made = name in kwargs or isinstance(reward, type)
        rewards.append(call_with(reward, kwargs.get(name, {}), "reward_kwargs", name) if made else reward)
    return rewards


def call_with(function: Any, kwargs: dict[str, Any], flag: str, name: str) -> Any:
    """`function(**kwargs)`, after checking that it takes them."""
    try:
        inspect.signature(function).bind(**kwargs)
    except TypeError as error:
        raise UsageError(f"--{flag} does not fit {name!r}: {error}.") from error
    return function(**kwargs)


def make_world(world: Path, script_args, student_args, model_args) -> None:
    """Write a toy world; it stands in for generator, student, prompts and metric's dataset, where not given."""
    from accelerate import PartialState

    make = resolve(script_args.toy_world, WORLDS, "toy_world")
    if PartialState().is_main_process:
        world.mkdir(parents=True, exist_ok=True)
        make(world, **{"seed": student_args.seed} | (script_args.toy_world_kwargs or {}))
    PartialState().wait_for_everyone()
    model_args.model_name_or_path = model_args.model_name_or_path or str(world / "generator")
    student_args.student_model_name_or_path = student_args.student_model_name_or_path or str(world / "student")
    script_args.dataset_name = script_args.dataset_name or str(world / "prompts.jsonl")
    if script_args.metric == "language_modeling" and not {"dataset", "texts"} & set(script_args.metric_kwargs or ()):
        benchmark = {"dataset": str(world / "benchmark.jsonl")}
        script_args.metric_kwargs = (script_args.metric_kwargs or {}) | benchmark
