"""The dataset card: where the samples come from."""

import json
from collections import Counter
from collections.abc import Mapping

from huggingface_hub import DatasetCard, DatasetCardData

from ...redaction import redacted
from .client import Teacher
from .journal import Journal
from .results import Results, Selection


def dataset_card(
    teacher: Teacher,
    journal: Journal,
    results: Results,
    selection: Selection,
    prompts: Mapping[str, object],
    verifier: str | None,
    student: str | None,
) -> DatasetCard:
    """The card of a folder. `prompts` are lines of its first table; `verifier` and `student` are names."""
    # No `configs`: with them, `datasets` would give a folder of the same name the rows that it has cached for another
    data = DatasetCardData(task_categories=["text-generation"], tags=["trl", "synthetic", "distillation"])
    tally = journal.tally
    there, failed = sum(results.finish_reasons.values()), sum(results.failures.values())
    lines: dict[str, object] = {
        "teacher": f"`{teacher.model}`",
        "API": ", ".join(f"`{url}`" for url in journal.base_urls),
        "parameters": f"`{json.dumps(redacted(teacher.parameters))}`",
        **prompts,
        "date": f"{journal.created}, first run",
        "samples": f"{there}, {results.with_reasoning} of them with reasoning",
        "failed": f"{failed} ({failed / max(there + failed, 1):.1%}){listed(results.failures)}",
        "ended": listed(results.finish_reasons).strip(" ()") or "-",
        "tokens": f"{tally.prompt_tokens:,} of prompts, {tally.completion_tokens:,} of answers",
    }
    if teacher.prices is not None:
        lines["cost"] = f"${tally.cost:.2f} at {json.dumps(teacher.prices)} per million tokens"
    if verifier is not None:
        lines["right"] = (
            f"{results.correct} of {results.judged} by `{verifier}`; {results.solved_prompts} prompts have a right one"
        )
    rows = kept_rows(results, selection, verifier, student)
    return DatasetCard(f"""---
{data.to_yaml()}
---

# Samples of {teacher.model}

Made by `trl-dpg teach`. `train.jsonl` is for `trl sft`. `samples.jsonl` has all samples as they came, `failures.jsonl`
the requests that failed.

## Provenance

{table(lines)}

## The rows of train.jsonl

{table(rows)}
""")


def kept_rows(results: Results, selection: Selection, verifier: str | None, student: str | None) -> dict[str, object]:
    """What the card says of the rows for SFTTrainer."""
    place = {None: "between tags, after a prompt without a chat template", "content": "between tags in the content"}
    where = place.get(results.place, f"in the field `{results.place}`")
    rows: dict[str, object] = {
        "rows": f"{results.kept}, left out {sum(results.left_out.values())}{listed(results.left_out)}",
        "kept": f"finish reasons {', '.join(selection.finish_reasons)}"
        + ("; right answers only" if verifier is not None and not selection.keep_wrong else "")
        + (f"; at most {selection.max_per_prompt} of a prompt" if selection.max_per_prompt else ""),
        "reasoning": where if results.with_reasoning else "none",
        "student": f"`{student}`, whose chat template was rendered" if student else "not given, so not checked",
    }
    if results.longest is not None:
        rows["longest row"] = f"{results.longest} tokens of the student"
    return rows


def table(lines: Mapping[str, object]) -> str:
    """A Markdown table of two columns."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in lines.items())])


def listed(counts: Counter) -> str:
    """Counts as text in brackets, the largest first; empty if there are none."""
    return f" ({', '.join(f'{name}: {number}' for name, number in counts.most_common())})" if counts else ""
