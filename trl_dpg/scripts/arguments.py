"""Arguments that several commands share, and the names of metrics, rewards and toy worlds on the command line."""

import os
import sys
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from trl_dpg.sampling import check_sampling

from .usage import UsageError as UsageError
from .usage import at_least as at_least
from .usage import from_json as from_json
from .usage import metric_entries


METRICS = {
    "language_modeling": "trl_dpg.scripts.registry.language_modeling",
    "lm_eval": "trl_dpg.scripts.registry.lm_eval",
    "weight_pattern": "trl_dpg.metrics.WeightPatternMetric",
    "qr_code": "trl_dpg.metrics.QRCodeMetric",
    "weight_norm": "trl_dpg.metrics.WeightNormMetric",
    "combined": "trl_dpg.scripts.registry.combined",
}
REWARDS = {
    "contains": "trl_dpg.rewards.ContainsReward",
    "word_share": "trl_dpg.rewards.WordShareReward",
    "levenshtein": "trl_dpg.rewards.LevenshteinReward",
    "embedding_similarity": "trl_dpg.rewards.EmbeddingSimilarityReward",
    "language_id": "trl_dpg.rewards.LanguageIDReward",
    "target_language": "trl_dpg.rewards.TargetLanguageReward",
    "length_distribution": "trl_dpg.rewards.LengthDistributionReward",
    "length_budget": "trl_dpg.rewards.LengthBudgetReward",
    "shorter_better": "trl_dpg.rewards.ShorterBetterReward",
    "adaptive_length_penalty": "trl_dpg.rewards.AdaptiveLengthPenaltyReward",
}
WORLDS = {
    "characters": "trl_dpg.toy.characters_world",
    "languages": "trl_dpg.toy.languages_world",
    "strings": "trl_dpg.toy.strings_world",
    "planted": "trl_dpg.toy.planted_world",
    "families": "trl_dpg.toy.families_world",
    "declaration": "trl_dpg.declaration.declaration_world",
}
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Arguments of `generate` that are fields of [`~trl.GRPOConfig`], too."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
TINY = 5_000_000
"""Models with fewer parameters run fastest on one thread."""


@cache
def num_cores() -> int:
    """Physical cores that torch may use. It is found once, before a number of threads is set."""
    import psutil
    import torch

    allowed = torch.get_num_threads()
    return min(psutil.cpu_count(logical=False) or allowed, allowed)


@cache
def say_once(line: str) -> None:
    """Print a line on the main process."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(line, file=sys.stderr)


@dataclass
class CommandArguments:
    """
    Arguments that almost all commands have.

    Args:
        num_threads (`int`, *optional*):
            CPU threads of torch. By default as many as the environment variable `OMP_NUM_THREADS` says. If it is not
            set, 1 for models below 5 million parameters, which are slower with more, and otherwise one for each core.
            On a busy machine, more threads than free cores can be much slower.
    """

    num_threads: int | None = field(
        default=None,
        metadata={"help": "CPU threads of torch. By default OMP_NUM_THREADS, or 1 for tiny models, or one per core."},
    )

    def __post_init__(self):
        at_least(1, num_threads=self.num_threads)

    def set_threads(self, *models) -> None:
        """
        Set torch's number of threads, and say it.

        Args:
            models ([`~transformers.PreTrainedModel`]):
                The loaded models, to whose size the default fits. Without them, only a number that is given is set.
        """
        import torch

        cores = num_cores()
        if self.num_threads is not None:
            torch.set_num_threads(self.num_threads)
        elif models and "OMP_NUM_THREADS" not in os.environ:
            size = max(sum(parameter.numel() for parameter in model.parameters()) for model in models)
            torch.set_num_threads(1 if size < TINY else cores)
        if models:
            say_once(f"CPU threads: {torch.get_num_threads()}")


@dataclass
class ReadingArguments(CommandArguments):
    """
    Arguments for what a student reads of samples with reasoning.

    Args:
        student_text (`str`, *optional*, defaults to `"all"`):
            What the student reads of samples with reasoning: `"all"`, `"answer"` or `"reasoning"`.
        unfinished_thoughts (`str`, *optional*, defaults to `"as_is"`):
            What it reads of a sample whose reasoning has no end: all of it, or nothing (`"empty"`).
    """

    student_text: str = field(
        default="all",
        metadata={"help": "What the student reads of samples with reasoning: 'all', 'answer' or 'reasoning'."},
    )
    unfinished_thoughts: str = field(
        default="as_is",
        metadata={"help": "What it reads of a sample whose reasoning has no end: 'empty' (nothing) or 'as_is'."},
    )

    def __post_init__(self):
        from trl_dpg.student_text import StudentText

        super().__post_init__()
        try:
            StudentText(self.student_text, self.unfinished_thoughts)
        except ValueError as error:
            raise UsageError(f"--{str(error).removeprefix('Unknown ')}") from error


@dataclass
class MetricArguments(CommandArguments):
    """
    Arguments for the target metric.

    Args:
        metric (`str`):
            The target metric: `"language_modeling"`, `"lm_eval"`, `"weight_pattern"`, `"qr_code"`, `"weight_norm"`,
            `"combined"` (of `metrics`: a list of entries with `metric`, `metric_kwargs`, `weight` and `name`), or a
            dotted import path. The path names a callable that maps the fine-tuned student to a scalar tensor. With
            `metric_kwargs`, or if it names a class, the path names a callable that makes the metric.
        metric_kwargs (`dict[str, Any]` or `str`, *optional*):
            Arguments of the metric. JSON on the command line.
    """

    _argument_group_name: ClassVar[str] = "metric, data and output"

    metric: str | None = field(
        default=None,
        metadata={
            "help": f"The target metric: {', '.join(METRICS)}, or a dotted import path. `trl-dpg metrics` explains "
            "them."
        },
    )
    metric_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Arguments of the metric, as JSON. `trl-dpg metrics` lists them."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.metric_kwargs = from_json("metric_kwargs", self.metric_kwargs)
        if self.metric is None:
            raise UsageError(f"--metric is required: {', '.join(METRICS)}, or a dotted import path.")


@dataclass
class PromptArguments(CommandArguments):
    """
    Arguments for the generator's prompts.

    Args:
        prompt_template (`str`, *optional*):
            Template that makes the prompt from a row's columns, e.g. `"Rephrase this article.\n\n{text}"`. Without it,
            the dataset must have a column `prompt`.
        conversational (`bool`, *optional*, defaults to `False`):
            Whether a prompt made by `prompt_template` is a user's message.
        max_prompt_tokens (`int`, *optional*):
            Columns in `prompt_template` are cut off at this number of the generator's tokens.
    """

    prompt_template: str | None = field(
        default=None, metadata={"help": "Template of the prompt, e.g. 'Rephrase: {text}' with a column `text`."}
    )
    conversational: bool = field(default=False, metadata={"help": "Whether the prompt is a user's message."})
    max_prompt_tokens: int | None = field(
        default=None, metadata={"help": "Columns in the prompt template are cut off at this many tokens."}
    )

    def __post_init__(self):
        super().__post_init__()
        at_least(1, max_prompt_tokens=self.max_prompt_tokens)
        if self.prompt_template == "":
            raise UsageError("--prompt_template is empty. Leave it out, or give a text such as 'Rephrase: {text}'.")


@dataclass
class GeneratorArguments(PromptArguments, ReadingArguments):
    """
    Arguments for a generator, its dataset and its sampling. Their names are those of `trl-dpg dpg`.

    Args:
        dataset_name (`str`):
            A Hub id, or a file (json, jsonl, parquet, csv, txt).
        dataset_config (`str`, *optional*):
            Configuration of a dataset of the Hub.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            The split to read, e.g. `"train[:10000]"`.
        model_name_or_path (`str`):
            Path or Hub id of the generator or of its adapters.
        model_revision (`str`, *optional*, defaults to `"main"`):
            Revision of a model on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Run the code that comes with the model.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the generator's weights.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Length of the longest text, in tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature.
        top_p (`float`, *optional*, defaults to `1.0`):
            Only the most probable tokens are used, up to this total probability.
        top_k (`int`, *optional*, defaults to `0`):
            Only this number of the most probable tokens is used. 0: all.
        min_p (`float`, *optional*):
            Smallest probability of a token, relative to that of the most probable one.
        repetition_penalty (`float`, *optional*, defaults to `1.0`):
            Above 1, tokens that are in the text already become less probable.
        generation_kwargs (`dict[str, Any]` or `str`, *optional*):
            Further arguments of `generate`, or of vLLM's `SamplingParams`. They override the other arguments. JSON on
            the command line.
        chat_template_kwargs (`dict[str, Any]` or `str`, *optional*):
            Arguments of the chat template, for conversations. JSON on the command line.
        train_on (`str`, *optional*, defaults to `"completion"`):
            What a student is fine-tuned on: `"completion"` or `"prompt_completion"`.
        student_text (`str`, *optional*, defaults to `"answer"`), unfinished_thoughts (`str`, *optional*, defaults to
            `"empty"`):
            What a student reads of a thinking generator's texts, see [`~trl_dpg.student_text.StudentText`].
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "A Hub id, or a file (json, jsonl, parquet, csv, txt)."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset of the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "The split to read, e.g. 'train[:10000]'."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "The generator's path or Hub id."})
    model_revision: str = field(default="main", metadata={"help": "Revision of a model on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with the model."})
    dtype: str | None = field(default="auto", metadata={"help": f"Type of the generator's weights: {DTYPES}."})
    max_completion_length: int = field(default=256, metadata={"help": "Longest text, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    top_p: float = field(default=1.0, metadata={"help": "Total probability of the tokens that are used."})
    top_k: int = field(default=0, metadata={"help": "Number of the most probable tokens that are used; 0: all."})
    min_p: float | None = field(default=None, metadata={"help": "Smallest probability, relative to the largest."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "Above 1, repetition becomes less probable."})
    generation_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Further arguments of `generate`, as JSON. They override the others."}
    )
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Arguments of the chat template, as JSON."}
    )
    train_on: str = field(
        default="completion",
        metadata={"help": "What a student is fine-tuned on: 'completion' or 'prompt_completion'."},
    )
    student_text: str = field(
        default="answer",
        metadata={"help": "What it reads of a thinking generator's text: 'answer', 'reasoning' or 'all'."},
    )
    unfinished_thoughts: str = field(
        default="empty",
        metadata={"help": "What it reads of a text whose reasoning has no end: 'empty' (nothing) or 'as_is'."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.generation_kwargs = from_json("generation_kwargs", self.generation_kwargs)
        self.chat_template_kwargs = from_json("chat_template_kwargs", self.chat_template_kwargs)
        if self.train_on not in ("completion", "prompt_completion"):
            raise UsageError(f"--train_on must be 'completion' or 'prompt_completion', got {self.train_on!r}.")
        if self.dtype not in (None, *DTYPES):
            raise UsageError(f"--dtype must be one of {DTYPES}, got {self.dtype!r}.")
        try:
            check_sampling(**self.sampling())
        except ValueError as error:
            raise UsageError(f"--{error}") from error
        at_least(1, max_completion_length=self.max_completion_length)

    def sampling(self) -> dict[str, Any]:
        """Arguments of `generate`."""
        return {name: vars(self)[name] for name in SAMPLING}

    def hub_kwargs(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` for the generator's files."""
        return {"revision": self.model_revision, "trust_remote_code": self.trust_remote_code}


@dataclass
class ToyWorldArguments(CommandArguments):
    """
    Arguments for small models and data that the command itself makes.

    Args:
        toy_world (`str`, *optional*):
            `"characters"`, `"languages"`, `"strings"`, `"planted"` or `"families"`, see `trl_dpg.toy`; or
            `"declaration"`, a real model and real texts, see `trl_dpg.declaration`. Its models and data are used for
            the generator, the student, the dataset and the metric's dataset, if these are not given. Names in
            `student_models`, `student_model_name_or_path` and `replay_dataset` may be those of its folders and files.
        toy_world_kwargs (`dict[str, Any]` or `str`, *optional*):
            Arguments of the toy world. JSON on the command line.
    """

    toy_world: str | None = field(
        default=None, metadata={"help": f"Small models and data that the command makes: {', '.join(WORLDS)}."}
    )
    toy_world_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Arguments of the toy world, as JSON."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.toy_world_kwargs = from_json("toy_world_kwargs", self.toy_world_kwargs)


@dataclass
class DPGScriptArguments(MetricArguments, PromptArguments, ToyWorldArguments, ScriptArguments):
    """
    Script arguments of `trl-dpg dpg`.

    Args:
        reward_funcs (`list[str]`, *optional*):
            Further rewards beside DPG's: `"contains"`, `"word_share"`, `"levenshtein"`, `"embedding_similarity"`,
            `"language_id"`, `"target_language"`, or dotted import paths. `reward_weights` starts with DPG's weight. A
            reward with weight 0 is only logged.
        reward_kwargs (`dict[str, dict[str, Any]]` or `str`, *optional*):
            Arguments of rewards, by their names in `reward_funcs`. JSON on the command line.
        evaluate (`bool`, *optional*, defaults to `True`):
            Test fresh students after the training. Only on one process.
        num_fresh_students (`int`, *optional*, defaults to `1`):
            Number of fresh students, for the trained generator and for the untrained one. Each has newly sampled texts
            and a seed of its own. With several, intervals are given.
        held_out_metrics (`dict[str, dict[str, Any]]` or `str`, *optional*):
            Further metrics of the fresh students by names that you choose. Each entry has `metric` and perhaps
            `metric_kwargs`. JSON on the command line.
        greedy_prompt (`str`, *optional*):
            A prompt that the fresh students complete greedily. It may be empty.
    """

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Further rewards beside DPG's: {', '.join(REWARDS)}, or dotted import paths. `trl-dpg rewards` "
            "explains them."
        },
    )
    reward_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Arguments of rewards by their names, as JSON. `trl-dpg rewards` lists them."},
    )
    evaluate: bool = field(default=True, metadata={"help": "Test fresh students after the training."})
    num_fresh_students: int = field(
        default=1, metadata={"help": "Fresh students for each of the trained and the untrained generator."}
    )
    held_out_metrics: dict | str | None = field(
        default=None, metadata={"help": "Further metrics of the fresh students, by your names for them, as JSON."}
    )
    greedy_prompt: str | None = field(
        default=None, metadata={"help": "A prompt that the fresh students complete greedily."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.reward_kwargs = from_json("reward_kwargs", self.reward_kwargs)
        self.held_out_metrics = metric_entries("held_out_metrics", self.held_out_metrics)
        for name in self.held_out_metrics or ():
            if name in ("metric", "samples", "greedy", *(self.reward_funcs or ())):
                raise UsageError(f"--held_out_metrics: {name!r} is the name of another figure. Choose another name.")
        at_least(1, num_fresh_students=self.num_fresh_students)


def make_recipe_parser(prog: str | None = None) -> TrlParser:
    """The parser of `trl-dpg dpg`. Its arguments are the keys of a recipe."""
    from trl_dpg import DPGConfig

    return TrlParser((DPGScriptArguments, DPGConfig, ModelConfig, DatasetMixtureConfig), prog=prog)
