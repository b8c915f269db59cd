"""The teacher of `trl-dpg mix`, which shortens long samples."""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .arguments import UsageError, from_json
from .lengths import LengthArguments


@dataclass
class RewriteArguments(LengthArguments):
    """
    Arguments for a teacher, beside those of [`LengthArguments`]. They are named as those of `trl-dpg teach`.

    Args:
        teacher (`str`, *optional*):
            Id of a model behind an OpenAI-compatible API, which shortens the longest of the chosen samples.
        base_url (`str`, *optional*):
            Address of the API.
        api_key_env (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            The environment variable with the key.
        request_parameters (`dict[str, Any]` or `str`, *optional*):
            Fields of each request, such as `max_tokens`. JSON on the command line.
        max_concurrency (`int`, *optional*, defaults to `64`):
            Requests at once, at most.
        verifier (`str`, *optional*, defaults to `"math"`):
            How the answers of a sample and of its rewrite are compared: `"math"` or `"exact"`.
    """

    teacher: str | None = field(
        default=None, metadata={"help": "Id of a model that shortens long samples, in the place of --short_dataset."}
    )
    base_url: str | None = field(default=None, metadata={"help": "Address of its API, e.g. http://localhost:8000/v1."})
    api_key_env: str = field(default="OPENAI_API_KEY", metadata={"help": "The environment variable with its key."})
    request_parameters: str | None = field(
        default=None, metadata={"help": "JSON: fields of each request, e.g. max_tokens."}
    )
    max_concurrency: int = field(default=64, metadata={"help": "Requests at once, at most."})
    verifier: str = field(
        default="math", metadata={"help": "How answers of rewrites are compared: 'math' or 'exact'."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.request_parameters = from_json("request_parameters", self.request_parameters)  # type: ignore[assignment]
        if (self.teacher is None) != (self.base_url is None):
            raise UsageError(
                "--teacher is a model's id, and --base_url the address of its API. Give both, or neither."
            )
        if self.teacher is not None and self.length_column is not None:
            raise UsageError("--teacher writes new texts, which --length_column does not have. Use --tokenizer.")
        if self.verifier not in ("math", "exact"):
            raise UsageError(f"--verifier must be 'math' or 'exact', got {self.verifier!r}.")


def make_rewriter(script_args: RewriteArguments, tokenizer, folder: Path):
    """
    A function that has samples shortened by the teacher, or `None` without one.

    The teacher's answers stay in the folder. The same command does not ask for them again.
    """
    if script_args.teacher is None:
        return None
    from trl_dpg.practice.lengths import measure
    from trl_dpg.practice.mixing import rewrite
    from trl_dpg.practice.teaching import VERIFIERS, Limits, Teacher, teach

    parameters: Any = script_args.request_parameters or {}
    teacher = Teacher(str(script_args.base_url), script_args.teacher, parameters, script_args.api_key_env)
    limits = Limits(max_concurrency=script_args.max_concurrency)

    def ask(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        taught = teach(teacher, requests, folder, limits=limits, progress=True)
        if taught.stopped is not None:
            raise UsageError(
                f"The rewriting stopped: {taught.stopped}. {taught.there} of {taught.wanted} answers are in "
                f"{str(folder)!r}, and the same command goes on."
            )
        rows = defaultdict(list)
        for row, request in enumerate(requests):
            rows[request["prompt"]].append(row)
        lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        samples = [json.loads(line) for line in lines]  # perhaps also of earlier commands with other samples
        return [s | {"row": rows[s["prompt"]].pop(0)} for s in samples if rows[s["prompt"]]]

    def rewriter(part):
        short, figures = rewrite(part, ask, VERIFIERS[script_args.verifier])
        difficulty = "difficulty" if "difficulty" in part.column_names else "none"
        return short, measure(short, tokenizer, script_args.measure, difficulty=difficulty), figures

    return rewriter
