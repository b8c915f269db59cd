"""
Sample a dataset from a strong model behind an OpenAI-compatible API.

    trl-dpg teach --base_url http://localhost:8000/v1 --model Qwen/Qwen3-8B --dataset_name questions.jsonl \
        --prompt_template '{question}' --num_samples 4 --student_model_name_or_path gpt2 --output_dir data
    trl sft --dataset_name data --model_name_or_path <student> --output_dir runs/student

The library side is [`trl_dpg.practice.teaching.teach`]. The key is read from `OPENAI_API_KEY`, or from the variable
that `--api_key_env` names. It is in no file and in no message.

Files in `output_dir`:

- `samples.jsonl`: a line for each sample, written as soon as the answer is there. If the command was stopped, the same
  command continues; nothing that is stored is asked for again.
- `failures.jsonl`: the requests that failed, with their reasons.
- `train.jsonl`: the dataset for `trl sft`, with the reasoning where the student's chat template reads it.
- `README.md`: the dataset card: teacher, parameters, prompts, failures, filters.
- `teach.json`: the settings that the samples belong to. `teach.lock` prevents two commands from writing at once.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from trl_dpg.practice.teaching import (
    PRESETS,
    VERIFIERS,
    Limits,
    Selection,
    Taught,
    Teacher,
    TeacherError,
    from_preset,
    served_models,
    teach,
)
from trl_dpg.practice.teaching.card import listed
from trl_dpg.practice.teaching.display import count, duration

from .arguments import PromptArguments, UsageError, at_least, from_json
from .data import check_no_training, fits, load_data, make_folder, make_prompts, one_process
from .flags import in_flags
from .manifest import leave_manifest
from .registry import resolve


FLAGS = {
    name: name
    for name in (
        "base_url",
        "model",
        "prices",
        "timeout",
        "preset",
        "api_key_env",
        "request_parameters",
        "num_samples",
        "temperature",
        "max_concurrency",
        "max_requests_per_minute",
        "max_tokens_per_minute",
        "max_cost",
        "max_wait",
        "max_retries",
        "max_failed_share",
        "output_dir",
        "verifier",
        "answer_column",
    )
}


@dataclass
class TeachArguments(PromptArguments):
    """
    Arguments of `trl-dpg teach`.

    Args:
        dataset_name (`str`):
            The prompts: a Hub id, or a file (json, jsonl, parquet, csv, txt).
        dataset_config (`str`, *optional*):
            Configuration of a dataset of the Hub.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            The split to read, e.g. `"train[:1000]"`.
        num_samples (`int`, *optional*, defaults to `1`):
            Samples of each prompt. Each is a request of its own.
        output_dir (`str`, *optional*, defaults to `"trl-dpg-teacher"`):
            Folder for the samples.
        preset (`str`, *optional*):
            A teacher whose address, id, parameters and prices are known. All further arguments override it.
        base_url (`str`, *optional*):
            Address of the API, e.g. `"http://localhost:8000/v1"`.
        model (`str`, *optional*):
            The teacher's id. By default the preset's, or the one model that the server has.
        api_key_env (`str`, *optional*):
            The environment variable with the key. By default the preset's, or `OPENAI_API_KEY`.
        max_completion_length (`int`, *optional*):
            Longest answer, in tokens of the teacher, with its reasoning. Sent as `max_tokens`.
        temperature (`float`, *optional*), top_p (`float`, *optional*):
            Sampling. By default the preset's, or the server's.
        request_parameters (`dict[str, Any]` or `str`, *optional*):
            Further fields of each request, e.g. `{"reasoning_effort": "low"}`. `null` removes one of the preset. JSON
            on the command line.
        stream (`bool`, *optional*):
            Receive answers in parts, which keeps the connections of long ones alive. By default as the preset has it.
        timeout (`float`, *optional*, defaults to `600.0`):
            Seconds for one answer, at most.
        max_concurrency (`int`, *optional*, defaults to `64`):
            Requests at once, at most. A lower limit of the server is found.
        max_requests_per_minute (`float`, *optional*), max_tokens_per_minute (`float`, *optional*):
            Budgets of the account.
        max_cost (`float`, *optional*):
            Dollars, of all samples in the folder. The command stops before it spends more.
        prices (`dict[str, float]` or `str`, *optional*):
            `input`, `output` and perhaps `cached`, in dollars per million tokens. By default the preset's. JSON on the
            command line.
        max_wait (`float`, *optional*, defaults to `300.0`):
            Seconds that the server may be away, or refuse everything. After them, the command stops.
        max_retries (`int`, *optional*, defaults to `6`):
            How often a request is sent again after a server's error, a broken connection or half an answer.
        max_failed_share (`float`, *optional*, defaults to `0.5`):
            The command stops if this share of its requests has failed, and at least 10.
        student_model_name_or_path (`str`, *optional*):
            The student's path or Hub id. Its chat template says where the reasoning goes.
        verifier (`str`, *optional*):
            `"math"`, `"exact"`, or the dotted import path of a function of an answer and the right one. Wrong answers
            are not in `train.jsonl`.
        answer_column (`str`, *optional*, defaults to `"solution"`):
            Column with the right answers.
        keep_wrong (`bool`, *optional*, defaults to `False`):
            Keep wrong answers in `train.jsonl`.
        sft_finish_reasons (`list[str]`, *optional*, defaults to `["stop"]`):
            Samples that ended for one of these reasons are in `train.jsonl`. The others are counted. With `length`,
            truncated ones are in it.
        sft_samples_per_prompt (`int`, *optional*):
            Samples of a prompt in `train.jsonl`, at most.
    """

    _argument_group_name: ClassVar[str] = "teacher, prompts and output"

    dataset_name: str | None = field(
        default=None, metadata={"help": "The prompts: a Hub id, or a file (json, jsonl, parquet, csv, txt)."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset of the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "The split to read, e.g. 'train[:1000]'."})
    num_samples: int = field(default=1, metadata={"help": "Samples of each prompt; each is a request."})
    output_dir: str = field(default="trl-dpg-teacher", metadata={"help": "Folder for the samples."})
    preset: str | None = field(
        default=None,
        metadata={"help": f"A known teacher, which all further arguments override: {', '.join(PRESETS)}."},
    )
    base_url: str | None = field(default=None, metadata={"help": "Address of the API, e.g. http://localhost:8000/v1."})
    model: str | None = field(
        default=None, metadata={"help": "The teacher's id; by default the preset's, or the server's only model."}
    )
    api_key_env: str | None = field(
        default=None,
        metadata={"help": "Environment variable with the key; by default the preset's, or OPENAI_API_KEY."},
    )
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Longest answer with its reasoning, in tokens of the teacher."}
    )
    temperature: float | None = field(default=None, metadata={"help": "Sampling temperature."})
    top_p: float | None = field(default=None, metadata={"help": "Total probability of the tokens that are used."})
    request_parameters: dict | str | None = field(
        default=None,
        metadata={"help": 'Further fields of each request, as JSON, e.g. \'{"reasoning_effort": "low"}\'.'},
    )
    stream: bool | None = field(default=None, metadata={"help": "Receive answers in parts."})
    timeout: float = field(default=600.0, metadata={"help": "Seconds for one answer, at most."})
    max_concurrency: int = field(
        default=64, metadata={"help": "Requests at once, at most. A lower limit of the server is found."}
    )
    max_requests_per_minute: float | None = field(default=None, metadata={"help": "Requests started in a minute."})
    max_tokens_per_minute: float | None = field(
        default=None, metadata={"help": "Tokens of prompts and answers in a minute."}
    )
    max_cost: float | None = field(default=None, metadata={"help": "Dollars, of all samples in the folder."})
    prices: dict | str | None = field(
        default=None,
        metadata={"help": 'Dollars per million tokens, as JSON: \'{"input": 0.6, "cached": 0.1, "output": 3}\'.'},
    )
    max_wait: float = field(
        default=300.0, metadata={"help": "Seconds that the server may be away, or refuse everything."}
    )
    max_retries: int = field(default=6, metadata={"help": "Further attempts after an error of the server."})
    max_failed_share: float = field(default=0.5, metadata={"help": "Stop if this share of the requests has failed."})
    student_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The student, whose chat template says where the reasoning goes."}
    )
    verifier: str | None = field(
        default=None,
        metadata={"help": f"Keep right answers only: {', '.join(VERIFIERS)}, or a function's dotted import path."},
    )
    answer_column: str = field(default="solution", metadata={"help": "Column with the right answers."})
    keep_wrong: bool = field(default=False, metadata={"help": "Keep wrong answers in train.jsonl."})
    sft_finish_reasons: list[str] = field(
        default_factory=lambda: ["stop"],
        metadata={"help": "How samples in train.jsonl ended; with 'length', truncated ones are in it."},
    )
    sft_samples_per_prompt: int | None = field(
        default=None, metadata={"help": "Samples of a prompt in train.jsonl, at most."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.request_parameters = from_json("request_parameters", self.request_parameters)
        self.prices = from_json("prices", self.prices)
        if self.dataset_name is None:
            raise UsageError("--dataset_name is required: a Hub id, or a file (json, jsonl, parquet, csv, txt).")
        at_least(
            1,
            num_samples=self.num_samples,
            max_completion_length=self.max_completion_length,
            sft_samples_per_prompt=self.sft_samples_per_prompt,
        )
        if self.temperature is not None and self.temperature < 0:
            raise UsageError(f"--temperature must be at least 0, got {self.temperature}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"--top_p must be above 0 and at most 1, got {self.top_p}.")
        if self.preset is None and self.base_url is None:
            raise UsageError("--base_url or --preset is required: the address of the API, or a known teacher.")
        if self.max_prompt_tokens is not None and self.student_model_name_or_path is None:
            raise UsageError("--max_prompt_tokens counts the student's tokens. Set --student_model_name_or_path.")

    def parameters(self) -> dict[str, Any]:
        """Fields of each request that the arguments set."""
        named = {"max_tokens": self.max_completion_length, "temperature": self.temperature, "top_p": self.top_p}
        given = {name: value for name, value in named.items() if value is not None}
        twice = [name for name in given if name in (self.request_parameters or {})]
        if twice:
            raise UsageError(
                f"--request_parameters has {', '.join(twice)}, which another argument sets. Give it once."
            )
        return given | (self.request_parameters or {})  # type: ignore[operator]  # a dict once parsed


def make_teacher(script_args: TeachArguments) -> Teacher:
    """The teacher that the arguments name. Without an id, it is the server's only model."""
    import os

    changes = {name: vars(script_args)[name] for name in ("base_url", "model", "api_key_env", "prices", "stream")}
    changes |= {"parameters": script_args.parameters(), "timeout": script_args.timeout}
    preset = PRESETS.get(script_args.preset or "")
    needs_key = script_args.api_key_env or (preset and not script_args.base_url and preset.api_key_env)
    if script_args.preset is not None and preset is None:
        from_preset(script_args.preset)  # raises, with the names that there are
    model = script_args.model or (preset and preset.model) or ""

    def build(model: str) -> Teacher:
        if script_args.preset is not None:
            return from_preset(script_args.preset, **(changes | {"model": model}))
        parameters = {name: value for name, value in changes["parameters"].items() if value is not None}
        given = {name: value for name, value in changes.items() if value is not None}
        return Teacher(**(given | {"model": model, "parameters": parameters}))

    teacher = build(model or "?")
    if needs_key and not os.environ.get(teacher.api_key_env, "").strip():
        raise UsageError(f"The environment variable {teacher.api_key_env} has no key. Set it, or name another one.")
    if script_args.max_cost is not None and teacher.prices is None:
        raise UsageError('--max_cost needs --prices, e.g. \'{"input": 0.6, "output": 3}\' per million tokens.')
    if not model:
        ids = served_models(teacher)
        if len(ids) != 1:
            there = f"The server has {', '.join(map(repr, ids))}." if ids else "The server does not say which it has."
            raise UsageError(f"--model is required: the teacher's id. {there}")
        return build(ids[0])
    return teacher


def load_rows(script_args: TeachArguments, tokenizer) -> list[dict[str, Any]]:
    """The dataset's rows, each with its prompt."""
    dataset = load_data(str(script_args.dataset_name), script_args.dataset_config, script_args.dataset_train_split)
    if script_args.prompt_template is not None and not fits(script_args.prompt_template, dataset.column_names):
        raise UsageError(
            f"--prompt_template needs columns that the dataset does not have ({', '.join(dataset.column_names)}); "
            "braces that belong to the text must be doubled."
        )
    prompts = make_prompts(dataset, script_args, tokenizer)["prompt"]
    return [row | {"prompt": prompt} for row, prompt in zip(dataset, prompts, strict=True)]


def load_tokenizer(path: str | None):
    """The student's tokenizer."""
    from transformers import AutoTokenizer

    if path is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--student_model_name_or_path {path!r} has no tokenizer that can be loaded: {error}"
        ) from error


def make_verifier(name: str | None) -> str | Callable | None:
    """A verifier by its name or dotted import path."""
    return name if name is None or name in VERIFIERS else resolve(name, {key: key for key in VERIFIERS}, "verifier")


def main(script_args: TeachArguments) -> None:
    one_process("teach", "It waits for a server, and sends many requests at once.")
    try:
        limits = Limits(
            script_args.max_concurrency,
            script_args.max_requests_per_minute,
            script_args.max_tokens_per_minute,
            script_args.max_cost,
            script_args.max_wait,
            script_args.max_retries,
            script_args.max_failed_share,
        )
        tokenizer = load_tokenizer(script_args.student_model_name_or_path)
        rows = load_rows(script_args, tokenizer)
        verifier = make_verifier(script_args.verifier)
        teacher = make_teacher(script_args)
        output_dir = make_folder("output_dir", script_args.output_dir)
        check_no_training(output_dir)
        taught = teach(
            teacher,
            rows,
            output_dir,
            script_args.num_samples,
            limits,
            Selection(script_args.sft_finish_reasons, script_args.keep_wrong, script_args.sft_samples_per_prompt),
            verifier,
            script_args.answer_column,
            tokenizer,
            script_args.dataset_name,
            progress=True,
        )
    except TeacherError as error:
        raise UsageError(in_flags(str(error), FLAGS)) from None
    except (ValueError, ImportError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(in_flags(str(error), FLAGS)) from error
    settings = vars(script_args) | {"model": teacher.model}
    leave_manifest(output_dir, "teach", settings, prompts=[{"prompt": row["prompt"]} for row in rows])
    print(render(taught, script_args))
    if taught.stopped is not None:
        line = f"Stopped: {taught.stopped}. The {taught.there} samples are kept, and the same command goes on."
        if taught.broken:
            sys.exit(line)  # with the status 1
        print(line)


def render(taught: Taught, script_args: TeachArguments) -> str:
    """A few lines for the terminal."""
    results, tally = taught.results, taught.tally
    tokens = f"{count(tally.prompt_tokens)} tokens of prompts, {count(tally.completion_tokens)} of answers"
    cost = f", ${tally.cost:.4g}" if tally.teacher.prices is not None else ""
    lines = [
        f"{taught.there} of {taught.wanted} samples; {taught.accepted} new ones in {duration(taught.seconds)}; "
        f"{tokens}{cost}",
        f"ended: {listed(results.finish_reasons).strip(' ()') or '-'}",
    ]
    if results.failures:
        lines.append(f"failed: {sum(results.failures.values())}{listed(results.failures)}")
    if results.judged:
        lines.append(
            f"right: {results.correct} of {results.judged}; {results.solved_prompts} prompts have a right one"
        )
    if taught.there:
        where = {None: "before the answer, between tags", "content": "between tags in the content"}
        place = where.get(results.place, f"in `{results.place}`") if results.with_reasoning else "none"
        checked = "" if script_args.student_model_name_or_path else ", not checked: no --student_model_name_or_path"
        lines.append(f"for trl sft: {results.kept} rows; reasoning: {place}{checked}")
        if results.left_out:
            lines.append(f"left out: {sum(results.left_out.values())}{listed(results.left_out)}")
    if results.longest is not None and results.longest > 1024:
        lines.append(
            f"The longest row has {results.longest} tokens. `trl sft` cuts off at its `max_length` (1024 by default)."
        )
    return "\n".join([*lines, f"Written: {', '.join(map(str, taught.files))}"])


def make_parser(prog: str | None = None):
    from trl import TrlParser

    return TrlParser(TeachArguments, prog=prog)


if __name__ == "__main__":
    from trl_dpg.scripts import launcher

    launcher.run("teach", make_parser, main, sys.argv[1:])
