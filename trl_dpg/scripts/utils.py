"""What the commands share: metrics and rewards by name, datasets by Hub id or file."""

import difflib
import glob
import importlib
import inspect
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
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
FORMATS = (("input_ids",), ("messages",), ("prompt", "completion"), ("text",))  # of samples
DTYPES = ("auto", "float32", "bfloat16", "float16")
FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


class UsageError(ValueError):
    """An argument that cannot be right; the message names the flag and the remedy."""


def at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise UsageError(f"--{name} must be at least {least}, got {value}.")


@dataclass
class CommandArguments:
    """
    What all commands take.

    Args:
        num_threads (`int`, *optional*):
            CPU threads of torch. Small models run best with 1; on a busy machine more can be many times slower.
    """

    num_threads: int | None = field(default=None, metadata={"help": "CPU threads of torch; 1 for small models."})

    def __post_init__(self):
        at_least(1, num_threads=self.num_threads)

    def set_threads(self) -> None:
        import torch

        if self.num_threads is not None:
            torch.set_num_threads(self.num_threads)


@dataclass
class MetricArguments(CommandArguments):
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
        super().__post_init__()
        self.metric_kwargs = from_json("metric_kwargs", self.metric_kwargs)
        if self.metric is None:
            raise UsageError(f"--metric is required: {', '.join(METRICS)}, or a dotted import path.")


@dataclass
class PromptArguments(CommandArguments):
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

    def __post_init__(self):
        super().__post_init__()
        at_least(1, max_prompt_tokens=self.max_prompt_tokens)


@dataclass
class GeneratorArguments(PromptArguments):
    """
    A generator, its dataset and its sampling, by the names that they have in `trl-dpg dpg`.

    Args:
        dataset_name (`str`):
            A Hub id, or a file (json, jsonl, parquet, csv, txt).
        dataset_config (`str`, *optional*):
            Configuration of a dataset of the Hub.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            The split that is read, e.g. `"train[:10000]"`.
        model_name_or_path (`str`):
            The generator's path or Hub id, or those of its adapters.
        model_revision (`str`, *optional*, defaults to `"main"`):
            Of a model on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Run the code that comes with the model.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of its weights.
        max_completion_length (`int`, *optional*, defaults to `256`):
            In tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature.
        top_p (`float`, *optional*, defaults to `1.0`):
            Nucleus sampling.
        top_k (`int`, *optional*, defaults to `0`):
            The most probable tokens only; 0: all.
        min_p (`float`, *optional*):
            Only tokens at least so probable, relative to the most probable one.
        repetition_penalty (`float`, *optional*, defaults to `1.0`):
            Above 1, tokens that were there before become less probable.
        generation_kwargs (`dict[str, Any]` or `str`, *optional*):
            Further arguments of `generate`, or of vLLM's `SamplingParams`; JSON on the command line. They override the
            other arguments.
        chat_template_kwargs (`dict[str, Any]` or `str`, *optional*):
            Of the chat template, for conversations; JSON on the command line.
        train_on (`str`, *optional*, defaults to `"completion"`):
            What a student is trained on: `"completion"` or `"prompt_completion"`.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "A Hub id, or a file (json, jsonl, parquet, csv, txt)."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset of the Hub."})
    dataset_train_split: str = field(
        default="train", metadata={"help": "The split that is read, e.g. 'train[:10000]'."}
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "The generator's path or Hub id."})
    model_revision: str = field(default="main", metadata={"help": "Revision of a model on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with the model."})
    dtype: str | None = field(default="auto", metadata={"help": f"Type of the generator's weights: {DTYPES}."})
    max_completion_length: int = field(default=256, metadata={"help": "Longest text, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling."})
    top_k: int = field(default=0, metadata={"help": "The most probable tokens only; 0: all."})
    min_p: float | None = field(default=None, metadata={"help": "Smallest probability, relative to the largest."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "Above 1, repetition becomes less probable."})
    generation_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Further arguments of `generate`, which override the others, as JSON."}
    )
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Arguments of the chat template, as JSON."}
    )
    train_on: str = field(default="completion", metadata={"help": "'completion' or 'prompt_completion'."})

    def __post_init__(self):
        super().__post_init__()
        self.generation_kwargs = from_json("generation_kwargs", self.generation_kwargs)
        self.chat_template_kwargs = from_json("chat_template_kwargs", self.chat_template_kwargs)
        if self.train_on not in ("completion", "prompt_completion"):
            raise UsageError(f"--train_on must be 'completion' or 'prompt_completion', got {self.train_on!r}.")
        if self.dtype not in (None, *DTYPES):
            raise UsageError(f"--dtype must be one of {DTYPES}, got {self.dtype!r}.")
        if self.temperature <= 0:
            raise UsageError(f"--temperature must be positive, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top_p must be above 0 and at most 1, got {self.top_p}.")
        at_least(1, max_completion_length=self.max_completion_length)
        at_least(0, top_k=self.top_k)

    def load(self):
        """The split as [`~datasets.Dataset`]."""
        if self.dataset_name is None:
            raise UsageError("--dataset_name is required: a Hub id, or a file (json, jsonl, parquet, csv, txt).")
        return load_data(self.dataset_name, self.dataset_config, self.dataset_train_split)

    def sampling(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}

    def complete(self, prompts: list, seed: int, batch_size: int = 256) -> list[str]:
        """The generator's texts after prompts."""
        from trl_dpg.generation import generate_texts, load_generator

        path = str(self.model_name_or_path)
        model, tokenizer = load_generator(path, self.dtype or "auto", self.model_revision, self.trust_remote_code)
        return generate_texts(
            model,
            tokenizer,
            prompts,
            self.max_completion_length,
            batch_size=batch_size,
            seed=seed,
            chat_template_kwargs=self.chat_template_kwargs,  # type: ignore[arg-type]  # a dict once parsed
            generation_kwargs=self.generation_kwargs,  # type: ignore[arg-type]
            **self.sampling(),
        )

    def prompts(self, number: int, dataset=None) -> list:
        """
        As many prompts of the dataset (loaded, unless it is given), which is gone through again as often as it takes;
        0: one of each row.
        """
        from transformers import AutoTokenizer

        check_model("model_name_or_path", self.model_name_or_path, **self.hub_kwargs())
        dataset = self.load() if dataset is None else dataset
        tokenizer = AutoTokenizer.from_pretrained(self.model_name_or_path, **self.hub_kwargs())
        if number:
            dataset = dataset.select(range(min(number, len(dataset))))
        prompts = make_prompts(dataset, self, tokenizer)["prompt"]
        return [prompts[index % len(prompts)] for index in range(number or len(prompts))]

    def hub_kwargs(self) -> dict[str, Any]:
        return {"revision": self.model_revision, "trust_remote_code": self.trust_remote_code}


@dataclass
class ToyWorldArguments(CommandArguments):
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
        super().__post_init__()
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


def load_data(
    name: str,
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    flag: str = "dataset_name",
):
    """A split of a dataset by its Hub id, or of local files by their path or pattern (`data/*.jsonl`)."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix in FILE_FORMATS and not any(Path(file).is_file() for file in glob.glob(name)):
        raise UsageError(f"--{flag}: there is no file {name!r}.")
    try:
        if suffix in FILE_FORMATS:
            data = load_dataset(FILE_FORMATS[suffix], data_files=name, split=split, streaming=streaming)
        else:
            data = load_dataset(name, name=config, split=split, streaming=streaming)
    except (OSError, ValueError, StopIteration, DatasetGenerationError) as error:
        reason = ": ".join(str(part) for part in (error, error.__cause__) if part and str(part)) or repr(error)
        raise UsageError(
            f"--{flag}: {name!r} could not be read (split {split!r}). {reason} -- Give a Hub id, or a file (json, "
            "jsonl, parquet, csv, txt)."
        ) from error
    if not streaming and len(data) == 0:
        raise UsageError(f"--{flag}: {name!r} has no rows (split {split!r}).")
    return data


def make_prompts(dataset, arguments: PromptArguments, tokenizer):
    """The dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]) with a column `prompt`."""
    from accelerate import PartialState

    template, limit = arguments.prompt_template, arguments.max_prompt_tokens
    row = next(iter(dataset))
    if arguments.conversational and tokenizer.chat_template is None:
        raise UsageError("--conversational: the generator's tokenizer has no chat template. Leave it out, or set one.")
    if template is None:
        if not isinstance(row.get("prompt", ""), str | list):
            raise UsageError(f"The column `prompt` holds no texts or conversations, but e.g. {row['prompt']!r}.")
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


def check_model(flag: str, path: str | None, **kwargs: Any) -> None:
    """Fail before anything is done if there is no such model."""
    from peft import PeftConfig
    from transformers import AutoConfig

    if path is None:
        raise UsageError(f"--{flag} is required: a model's path or Hub id.")
    try:
        AutoConfig.from_pretrained(path, **kwargs)
    except (OSError, ValueError) as error:
        try:
            PeftConfig.from_pretrained(path)
        except (OSError, ValueError):
            raise UsageError(f"--{flag} {path!r} could not be loaded: {error}") from error


def check_student(student_args) -> None:
    """Fail before anything is done if there is no such student."""
    kwargs = student_args.student_model_init_kwargs or {}
    hub_kwargs = {name: kwargs[name] for name in ("revision", "trust_remote_code", "token") if name in kwargs}
    check_model("student_model_name_or_path", student_args.student_model_name_or_path, **hub_kwargs)


def make_folder(flag: str, path: str | Path) -> Path:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"--{flag} {str(path)!r} is, or lies in, a file. Name a folder.") from error
    return Path(path)


def language_modeling(dataset: str | None = None, config: str | None = None, split: str = "train", **kwargs):
    """[`LanguageModelingMetric`] of a file, a dataset of the Hub, or `texts`."""
    from trl_dpg.metrics import LanguageModelingMetric

    texts = kwargs.pop("texts", None)
    inspect.signature(LanguageModelingMetric).bind_partial(None, **kwargs)  # before anything is loaded
    if (dataset is None) == (texts is None):
        raise UsageError("--metric_kwargs: language_modeling needs one of `dataset` (a file or Hub id) and `texts`.")
    if dataset is not None:
        texts = load_data(dataset, config, split, flag="metric_kwargs")
    return LanguageModelingMetric(texts, **kwargs)


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
    found = {name: resolve(name, REWARDS, "reward_funcs") for name in names or []}
    strangers = set(kwargs) - set(found)
    if strangers:
        raise UsageError(f"--reward_kwargs has arguments for {sorted(strangers)}, which are not in --reward_funcs.")
    return [
        call_with(reward, kwargs.get(name, {}), "reward_kwargs", name)
        if name in kwargs or isinstance(reward, type)
        else reward
        for name, reward in found.items()
    ]


def call_with(function: Any, kwargs: dict[str, Any], flag: str, name: str) -> Any:
    """`function(**kwargs)`; what it does not take, or not like, is a usage error."""
    try:
        inspect.signature(function).bind(**kwargs)
    except TypeError as error:
        raise UsageError(f"--{flag} does not fit {name!r}: {error}.") from error
    try:
        return function(**kwargs)
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"--{flag} of {name!r}: {error}") from error


def world_folder(output_dir: str) -> Path:
    """Where a toy world is written: beside what is pushed."""
    return Path(f"{output_dir.rstrip('/')}_world")


@contextmanager
def toy_world(
    script_args: ToyWorldArguments, seed: int, *others: Any, output_dir: str | None = None
) -> Iterator[None]:
    """The toy world, if one is asked for: beside `output_dir`, or for as long as the command runs."""
    from accelerate.utils import broadcast_object_list

    if script_args.toy_world is None:
        yield
        return
    state = process_state()
    with TemporaryDirectory() if output_dir is None else nullcontext(str(world_folder(output_dir))) as folder:
        (folder,) = broadcast_object_list([folder])  # the first process writes it
        make_world(Path(folder), script_args, seed, *others)
        yield
        state.wait_for_everyone()


def make_world(world: Path, script_args: ToyWorldArguments, seed: int, *others: Any) -> None:
    """Write a toy world; it stands in for generator, student, dataset and metric's dataset, where not given."""
    from accelerate import PartialState

    make = resolve(str(script_args.toy_world), WORLDS, "toy_world")
    if PartialState().is_main_process:
        make_folder("output_dir", world)
        kwargs = {"folder": world, "seed": seed} | (script_args.toy_world_kwargs or {})  # type: ignore[operator]
        call_with(make, kwargs, "toy_world_kwargs", str(script_args.toy_world))
    PartialState().wait_for_everyone()
    stand_ins = {"model_name_or_path": "generator", "student_model_name_or_path": "student"}
    stand_ins |= {"dataset_name": "prompts.jsonl"}
    for arguments in (script_args, *others):
        for name, file in stand_ins.items():
            if vars(arguments).get(name, "") is None:
                setattr(arguments, name, str(world / file))
    if vars(script_args).get("metric") == "language_modeling":
        kwargs = vars(script_args)["metric_kwargs"] or {}
        if not {"dataset", "texts"} & set(kwargs):
            script_args.metric_kwargs = kwargs | {"dataset": str(world / "benchmark.jsonl")}  # type: ignore
