"""What is made of the samples: verdicts, the dataset for SFTTrainer, counts."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...metagradients.config import SettingsError
from .journal import Journal
from .run import Request
from .sft import LostError, Place, check_rendered, reasoning_place, render, sft_row
from .verifiers import Verifier


@dataclass
class Selection:
    """
    Which samples go into the dataset for SFTTrainer.

    Args:
        finish_reasons (`list[str]`, *optional*, defaults to `["stop"]`):
            Samples that ended for one of these reasons. With `"length"`, truncated ones are in it as well: without
            them, long answers are rarer in the dataset than with the teacher.
        keep_wrong (`bool`, *optional*, defaults to `False`):
            Whether wrong answers are in it. Only with a verifier.
        max_per_prompt (`int`, *optional*):
            Samples of one prompt, at most: the first ones.
    """

    finish_reasons: list[str] = field(default_factory=lambda: ["stop"])
    keep_wrong: bool = False
    max_per_prompt: int | None = None

    def reason_against(self, record: dict[str, Any], taken: int) -> str | None:
        """Why a sample is left out, if `taken` samples of its prompt are in."""
        if record["finish_reason"] not in self.finish_reasons:
            return f"finish_reason {record['finish_reason']}"
        if not record["completion"].strip() and record["finish_reason"] == "stop":
            return "empty answer"
        if record["correct"] is False and not self.keep_wrong:
            return "wrong answer"
        return "max_per_prompt" if self.max_per_prompt is not None and taken >= self.max_per_prompt else None


@dataclass
class Results:
    """
    Counts of a folder.

    Attributes:
        finish_reasons (`Counter[str]`): Samples by the reason they ended for.
        failures (`Counter[str]`): Requests that failed, by the beginning of their reason.
        correct (`int`), judged (`int`): Right samples, and those that were judged.
        solved_prompts (`int`): Prompts with a right sample.
        kept (`int`): Rows for SFTTrainer.
        left_out (`Counter[str]`): Samples that are not among them, by reason.
        place (`str` or `None`): Where these rows have the reasoning.
        with_reasoning (`int`): Samples with reasoning.
        longest (`int` or `None`): Tokens of the longest row, of the student.
    """

    finish_reasons: Counter = field(default_factory=Counter)
    failures: Counter = field(default_factory=Counter)
    correct: int = 0
    judged: int = 0
    solved_prompts: int = 0
    kept: int = 0
    left_out: Counter = field(default_factory=Counter)
    place: Place | None = None
    with_reasoning: int = 0
    longest: int | None = None


def judge(
    journal: Journal,
    wanted: dict[str, Request],
    verifier: Verifier | None,
    answers: list[Any] | None,
    results: Results,
) -> None:
    """
    Write `samples.jsonl` in the order of the prompts, with a verdict for each sample, and `failures.jsonl` without
    those that were answered later. Samples of prompts that are no longer asked for stand at the end.
    """

    def records() -> Iterator[dict[str, Any]]:
        solved = set()
        order = [key for key in wanted if key in journal.done]
        with journal.samples.open("rb") as file:
            for key in order + [key for key in journal.done if key not in wanted]:
                record = journal.read(key, file)
                if key in wanted:
                    record["row"], record["sample"] = wanted[key].row, wanted[key].sample
                    if verifier is not None and answers is not None:
                        record["correct"] = _verdict(verifier, record, answers[record["row"]])
                        results.judged += 1
                        results.correct += record["correct"]
                        solved |= {record["row"]} if record["correct"] else set()
                    results.finish_reasons[str(record["finish_reason"])] += 1
                    results.with_reasoning += record["reasoning"] is not None
                yield record
        results.solved_prompts = len(solved)

    journal.rewrite(journal.samples, records())
    failed = {record["key"]: record for _, record in journal.records(journal.failures)}
    left = [record for key, record in failed.items() if key not in journal.done]
    results.failures.update(str(record["reason"]).split(":")[0] for record in left if record["key"] in wanted)
    journal.rewrite(journal.failures, iter(left))


def _verdict(verifier: Verifier, record: dict[str, Any], answer: Any) -> bool:
    try:
        return bool(verifier(record["completion"], answer))
    except SettingsError as error:
        raise SettingsError(f"`verifier`, row {record['row']}: {error} The samples are stored.") from error
    except Exception as error:  # of a user's own function
        raise SettingsError(
            f"`verifier` failed on row {record['row']}: {error!r}. The samples are stored: mend it, and run the same "
            "command again."
        ) from error


def write_sft(
    journal: Journal,
    wanted: dict[str, Request],
    selection: Selection,
    tokenizer: PreTrainedTokenizerBase | None,
    results: Results,
) -> Path:
    """
    Write `train.jsonl`, the dataset for SFTTrainer.

    Without a tokenizer, the reasoning stands between tags in the content, which is not checked.

    Raises:
        `LostError`: If the student's chat template leaves the reasoning out, wherever it stands.
    """
    path = journal.folder / "train.jsonl"
    results.place = _place(tokenizer, results.with_reasoning)

    def rows() -> Iterator[dict[str, Any]]:
        taken: Counter[int] = Counter()
        with journal.samples.open("rb") as file:
            for key in wanted:
                if key not in journal.done:
                    continue
                record = journal.read(key, file)
                reason = selection.reason_against(record, taken[record["row"]])
                row = sft_row(record["prompt"], record["reasoning"], record["completion"], results.place)
                if reason is None:
                    reason = _measure(tokenizer, row, record, results)
                if reason is not None:
                    results.left_out[reason] += 1
                    continue
                taken[record["row"]] += 1
                results.kept += 1
                columns = {name: record[name] for name in ("correct", "row", "sample", "key")}
                yield row | columns

    journal.rewrite(path, rows())
    return path


def _place(tokenizer: PreTrainedTokenizerBase | None, with_reasoning: int) -> Place | None:
    if tokenizer is None:
        return "content"
    if tokenizer.chat_template is None:
        return None
    return reasoning_place(tokenizer) if with_reasoning else "content"


def _measure(
    tokenizer: PreTrainedTokenizerBase | None, row: dict[str, Any], record: dict[str, Any], results: Results
) -> str | None:
    """Count a row's tokens, and say why it cannot be learned from if it cannot."""
    if tokenizer is None:
        return None
    if results.place is None:
        if not isinstance(row["prompt"], str):
            raise SettingsError("The student has no chat template, but the prompts are conversations. Give it one.")
        text = row["prompt"] + row["completion"]
    else:
        try:
            check_rendered(tokenizer, row, record["reasoning"], record["completion"])
        except LostError as error:
            return str(error)
        text = render(tokenizer, row).text
    length = len(tokenizer(text, add_special_tokens=results.place is None)["input_ids"])
    results.longest = max(results.longest or 0, length)
    return None


def prompts_digest(requests: dict[str, Request]) -> str:
    """A hash of all prompts in their order."""
    sha = hashlib.sha256()
    for messages in {request.row: request.messages for request in requests.values()}.values():
        sha.update(json.dumps(messages, sort_keys=True).encode() + b"\n")
    return sha.hexdigest()
