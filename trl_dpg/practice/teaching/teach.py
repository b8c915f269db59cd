"""From prompts to samples of a teacher."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...metagradients.config import SettingsError
from .card import dataset_card
from .client import Client, Messages, Teacher
from .display import Display
from .journal import Journal, sample_key
from .presets import PRESETS
from .results import Results, Selection, judge, prompts_digest, write_sft
from .run import Limits, Request, Run, now_utc
from .tally import Tally
from .verifiers import VERIFIERS, Verifier


COLUMNS: tuple[str, ...] = ("prompt", "completion", "reasoning", "finish_reason", "usage")
COLUMNS += ("correct", "row", "sample", "model", "seconds", "created", "key")
"""Columns of `samples.jsonl`. Those of the dataset come after them."""


@dataclass
class Taught:
    """
    What came of a call of [`teach`].

    Attributes:
        wanted (`int`): Samples that were asked for, those of earlier calls included.
        there (`int`): Samples that are there.
        accepted (`int`): Samples of this call.
        seconds (`float`): What the requests of this call took.
        stopped (`str` or `None`): Why it stopped before all was there. The same call goes on.
        broken (`bool`): Whether it stopped because the server is away, refuses everything, or fails too often.
        results ([`Results`]): Counts.
        tally ([`Tally`]): Tokens and cost of all samples in the folder.
        files (`list[Path]`): The files that were written.
    """

    wanted: int
    there: int
    accepted: int
    seconds: float
    stopped: str | None
    broken: bool
    results: Results
    tally: Tally
    files: list[Path]


def teach(
    teacher: Teacher,
    rows: Sequence[dict[str, Any]],
    output_dir: str | Path,
    num_samples: int = 1,
    limits: Limits | None = None,
    selection: Selection | None = None,
    verifier: str | Verifier | None = None,
    answer_column: str = "solution",
    student: PreTrainedTokenizerBase | None = None,
    source: str | None = None,
    progress: bool = False,
) -> Taught:
    """
    Ask a teacher for samples, and write them as datasets.

    A call that was stopped, or killed, is continued by the same call: no sample that is stored is asked for again.
    More rows or a larger `num_samples` only ask for what is missing.

    Args:
        teacher ([`Teacher`]): The teacher.
        rows (`Sequence[dict]`): Rows with `prompt`, a text or a conversation. Their further columns are kept.
        output_dir (`str` or `Path`): Folder for the samples, the failures, the rows for SFTTrainer and the card.
        num_samples (`int`, *optional*, defaults to `1`): Samples of each prompt. Each is a request of its own.
        limits ([`Limits`], *optional*): How much is asked, and how fast.
        selection ([`Selection`], *optional*): Which samples go into `train.jsonl`.
        verifier (`str` or `Callable`, *optional*): `"math"`, `"exact"`, or a function of an answer and the right one.
            Wrong answers are not in `train.jsonl`.
        answer_column (`str`, *optional*, defaults to `"solution"`): The column with the right answers.
        student ([`~transformers.PreTrainedTokenizerBase`], *optional*): The student's tokenizer, whose chat template
            says where the reasoning goes.
        source (`str`, *optional*): Name of the dataset, for the card.
        progress (`bool`, *optional*, defaults to `False`): Whether to show the progress.

    Raises:
        `ValueError`: If a setting or a prompt cannot be right, or if the teacher cannot be used as it is
            (`TeacherError`). Samples that are there are kept.
        `ImportError`: If openai, or math-verify for `"math"`, is not installed.
    """
    check = _verifier(verifier, rows, answer_column)
    wanted = {request.key: request for request in plan(teacher, rows, num_samples)}
    settings = {"model": teacher.model, "parameters": teacher.parameters}
    client = Client(teacher)
    with Journal(output_dir, settings, teacher.base_url, now_utc(), Tally(teacher)) as journal:
        began = time.monotonic()
        run = asyncio.run(_run(client, journal, wanted, limits or Limits(), progress))
        seconds, results = time.monotonic() - began, Results()
        judge(journal, wanted, check, None if check is None else [row[answer_column] for row in rows], results)
        name = verifier if verifier is None or isinstance(verifier, str) else verifier.__name__
        prompts = {"prompts": f"{len(rows)}" + (f" of `{source}`" if source else "")}
        prompts |= {"samples of a prompt": str(num_samples), "hash of the prompts": f"`{prompts_digest(wanted)}`"}
        files = _write(journal, wanted, selection or Selection(), student, results, prompts, name)
        if run.error is not None:
            raise run.error
        there = sum(key in journal.done for key in wanted)
        ended = (there, run.accepted, seconds, run.stopped, run.broken)
        return Taught(len(wanted), *ended, results, journal.tally, files)


def _write(
    journal: Journal,
    wanted: dict[str, Request],
    selection: Selection,
    student: PreTrainedTokenizerBase | None,
    results: Results,
    prompts: dict[str, str],
    verifier: str | None,
) -> list[Path]:
    """Write the rows for SFTTrainer, if there are samples, and the card. Returns all files."""
    files = [journal.folder / "README.md", journal.samples, journal.failures]
    if journal.done:
        files.append(write_sft(journal, wanted, selection, student, results))
    name = student.name_or_path if student is not None else None
    dataset_card(journal.tally.teacher, journal, results, selection, prompts, verifier, name).save(files[0])
    return files


async def _run(client: Client, journal: Journal, wanted: dict[str, Request], limits: Limits, progress: bool) -> Run:
    asked = journal.done.keys() | journal.rejected.keys()
    missing = [request for key, request in wanted.items() if key not in asked]
    with Display(len(wanted) - len(missing), len(wanted), progress and bool(missing)) as display:
        async with client:
            run = Run(client, journal, iter(missing), limits, display)
            await run.go()
    return run


def served_models(teacher: Teacher) -> list[str]:
    """The ids of a server's models. Empty if it does not say."""

    async def ask() -> list[str]:
        async with Client(teacher) as client:
            return await client.model_ids()

    return asyncio.run(ask())


def plan(teacher: Teacher, rows: Sequence[dict[str, Any]], num_samples: int) -> Iterator[Request]:
    """
    All requests, in the order of the rows. If a prompt comes several times, its samples have further numbers.

    Raises:
        `ValueError`: If a prompt is empty, or no text or conversation that ends with a user's message, or if several
            samples of a prompt would be the same.
    """
    if num_samples < 1:
        raise SettingsError(f"`num_samples` must be at least 1, got {num_samples}.")
    if num_samples > 1 and teacher.parameters.get("temperature") == 0:
        raise SettingsError(
            f"With `temperature` 0, the {num_samples} samples of a prompt would be the same. Raise it, or ask for one."
        )
    before: Counter[str] = Counter()
    for number, row in enumerate(rows):
        messages = _messages(row["prompt"], number)
        columns = {
            f"source_{name}" if name in COLUMNS else name: value for name, value in row.items() if name != "prompt"
        }
        text = json.dumps(messages, sort_keys=True)
        for sample in range(num_samples):
            key = sample_key(messages, teacher.model, teacher.parameters, before[text] + sample)
            yield Request(row["prompt"], messages, number, before[text] + sample, key, columns)
        before[text] += num_samples


def _messages(prompt: Any, number: int) -> Messages:
    if isinstance(prompt, str) and prompt.strip():
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise SettingsError(f"The prompt of row {number} must be a text or a conversation, got {prompt!r}.")
    if any(not isinstance(message, dict) or "role" not in message for message in prompt):
        raise SettingsError(f"The prompt of row {number} has a message without `role`: {prompt!r}.")
    if prompt[-1]["role"] == "assistant" or not prompt[-1].get("content"):
        raise SettingsError(f"The prompt of row {number} does not end with a user's message: {prompt[-1]!r}.")
    return [{key: value for key, value in message.items() if value is not None} for message in prompt]


def _verifier(verifier: str | Verifier | None, rows: Sequence[dict[str, Any]], answer_column: str) -> Verifier | None:
    """The function, after a try on the first row's right answer."""
    if verifier is None:
        return None
    if isinstance(verifier, str) and verifier not in VERIFIERS:
        raise SettingsError(f"`verifier` must be one of {', '.join(VERIFIERS)} or a function, got {verifier!r}.")
    if answer_column not in rows[0]:
        raise SettingsError(
            f"`answer_column` {answer_column!r} is none of the dataset's columns: {', '.join(rows[0])}. A `verifier` "
            "needs the right answers."
        )
    missing = next((number for number, row in enumerate(rows) if row[answer_column] is None), None)
    if missing is not None:
        raise SettingsError(f"`answer_column` {answer_column!r} has no value in row {missing}.")
    if not isinstance(verifier, str):
        return verifier
    VERIFIERS[verifier]("", rows[0][answer_column])  # a package that is missing is missed now
    return VERIFIERS[verifier]


def from_preset(name: str, **changes: Any) -> Teacher:
    """
    A teacher by the name of a preset.

    Args:
        name (`str`): One of `PRESETS`.
        changes: Arguments of [`Teacher`] in the place of the preset's. `parameters` are merged with the preset's; a
            value of `None` removes one.

    Raises:
        `ValueError`: If the name is unknown, or if the preset has no model and none is given.
    """
    if name not in PRESETS:
        raise SettingsError(f"`preset` must be one of {', '.join(PRESETS)}, got {name!r}.")
    settings = {key: value for key, value in PRESETS[name]._asdict().items() if value is not None}
    merged = settings["parameters"] | changes.pop("parameters", {})
    settings |= {key: value for key, value in changes.items() if value is not None}
    settings["parameters"] = {key: value for key, value in merged.items() if value is not None}
    if "model" not in settings:
        raise SettingsError(f"The preset {name!r} has no model. Give its id as `model`.")
    return Teacher(**settings)
