"""Short rewrites of long samples by a teacher, whose answers are checked."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from datasets import Dataset

from ...text import message_text
from ..lengths.measurement import thoughts_of
from ..lengths.rows import DataError


MARK = "FINAL ANSWER:"
REQUEST = """Here is a problem, and a long solution of it.

<problem>
{problem}
</problem>

<solution>
{solution}
</solution>

Rewrite the solution so that it is much shorter. Keep its structure, the order of its steps, and every step without \
which the answer does not follow. Leave out repetitions, detours, doubts, and checks that change nothing. Solve \
nothing anew and add nothing. Then write a last line that begins with "{mark}" and has the answer to which the \
shortened solution comes. Write nothing else."""
Ask = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
"""From rows with `prompt` to samples with `row` (the index of its row), `completion` and `finish_reason`."""
SameAnswer = Callable[[str, str], bool]
"""Whether a text has the answer that another text, or a row's `solution`, has."""


def rewrite(part: Dataset, ask: Ask, same_answer: SameAnswer) -> tuple[Dataset, dict[str, Any]]:
    """
    Let a teacher shorten samples. What is longer than before, or comes to another answer, is left out.

    Only the reasoning is replaced, and the answer after it stays. In a sample without reasoning, all its text is
    replaced. The answer to which the short version comes is compared with the row's `solution`, if there is one, and
    otherwise with the sample's own answer.

    Args:
        part ([`~datasets.Dataset`]): The samples, with prompts.
        ask (`Callable`): Asks the teacher.
        same_answer (`Callable`): Compares answers. It may raise `ValueError` if it cannot.

    Returns:
        `tuple[Dataset, dict]`: The short samples, in the order of the long ones; and counts: `asked`, `written`, and
        `dropped` by reason.

    Raises:
        `ValueError`: If the samples have no prompts.
    """
    rows = list(part)
    thoughts = thoughts_of(rows, 0)
    requests = []
    for row, thought in zip(rows, thoughts, strict=True):
        solution = thought.reasoning or thought.answer
        requests.append({"prompt": REQUEST.format(problem=problem_of(row), solution=solution, mark=MARK)})
    short: dict[int, dict[str, Any]] = {}
    dropped: Counter[str] = Counter()
    for sample in ask(requests):
        row, thought = rows[sample["row"]], thoughts[sample["row"]]
        old = thought.reasoning or thought.answer
        brief, mark, answer = sample["completion"].rpartition(MARK)
        right = row.get("solution")
        if sample["finish_reason"] == "length":
            dropped["cut off"] += 1
        elif not mark or not brief.strip() or not answer.strip():
            dropped["without an answer"] += 1
        elif len(brief.split()) >= len(old.split()):
            dropped["not shorter"] += 1
        elif not _agree(same_answer, answer.strip(), str(right) if right is not None else thought.answer):
            dropped["another answer"] += 1
        else:
            new = brief.strip() if thought.reasoning else f"{brief.strip()}\n\n{answer.strip()}"
            changed = replaced(row, old, new)
            if changed == row:
                dropped["several thoughts"] += 1
            else:
                short[sample["row"]] = changed
    figures = {"asked": len(rows), "written": len(short), "dropped": dict(dropped)}
    figures["unanswered"] = len(rows) - len(short) - sum(dropped.values())
    return Dataset.from_list([short[k] for k in sorted(short)], features=part.features), figures


def _agree(same_answer: SameAnswer, answer: str, right: str) -> bool:
    try:
        return same_answer(answer, right)
    except ValueError:  # the right answer is not of the kind that can be compared
        return False


def problem_of(row: dict[str, Any]) -> str:
    """The text of a row's prompt."""
    prompt = row.get("prompt")
    if prompt is None:
        prompt = [m for m in row.get("messages", []) if m["role"] != "assistant"]
    text = prompt if isinstance(prompt, str) else "\n\n".join(message_text(message) for message in prompt)
    if not text.strip():
        raise DataError(f"Samples without prompts cannot be rewritten: {json.dumps(row, default=str)[:200]}")
    return text


def replaced(row: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """The row with another text in what the assistant wrote: completion, messages, text and reasoning."""
    changed = dict(row)
    for name in ("reasoning", "completion", "text", "messages"):
        value = row.get(name)
        if isinstance(value, str):
            changed[name] = value.replace(old, new, 1)
        elif isinstance(value, list):
            changed[name] = [
                {key: part.replace(old, new, 1) if isinstance(part, str) else part for key, part in message.items()}
                if message["role"] == "assistant"
                else message
                for message in value
            ]
    return changed
