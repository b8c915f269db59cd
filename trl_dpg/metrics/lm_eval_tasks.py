"""
Tasks of lm-eval as prompts and completions, read by a student as lm-eval would read them.

lm-eval is Gao et al.'s language model evaluation harness, https://github.com/EleutherAI/lm-evaluation-harness.
"""

import difflib
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from ..student import Student, TokenizedExample


@cache
def built_in_tasks() -> TaskManager:
    """Index of the tasks that come with lm-eval. Reading its thousands of files takes seconds."""
    return TaskManager()


def load_task(name: str, include_path: str | Path | Sequence[str | Path] | None = None) -> ConfigurableTask:
    """
    A task with its dataset.

    Args:
        name (`str`):
            A task's name; those in `include_path` come first.
        include_path (`str`, `Path` or a list of them, *optional*):
            Folders of task YAML files.

    Raises:
        `ValueError`: If there is no such task, it is a group of several, a Python class, about images or sound, or of
        whole documents (`loglikelihood_rolling`), or it has no documents.
    """
    custom = TaskManager(include_path=include_path, include_defaults=False)
    manager = custom if name in custom.task_index else built_in_tasks()
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, custom.all_tasks + manager.all_tasks)
        raise ValueError(
            f"There is no task {name!r} in lm-eval{'' if include_path is None else f' or {include_path}'}. "
            f"{'Near names: ' + ', '.join(near) if near else '`lm-eval ls tasks` lists them'}."
        )
    entry = manager.task_index[name]
    if name not in manager.all_subtasks:
        parts = sorted(entry.tags) if name in manager.all_tags else entry.cfg["task"]
        raise ValueError(
            f"{name!r} is a group of tasks: {parts}. Choose one, or join a metric of each in a CombinedMetric."
        )
    obstacles = {
        "is a Python class that renders its own requests": "class" in entry.cfg,
        "is not about text alone": "doc_to_image" in entry.cfg or "doc_to_audio" in entry.cfg,
        "scores whole documents, without contexts": entry.cfg.get("output_type") == "loglikelihood_rolling",
    }
    for obstacle, present in obstacles.items():
        if present:
            raise ValueError(
                f"The task {name!r} {obstacle}. Give a LanguageModelingMetric its samples yourself, as `text` or as "
                "`prompt` and `completion`."
            )
    try:
        return manager.load(name)["tasks"][name]
    except IndexError as error:  # lm-eval renders the first document at once
        raise ValueError(
            f"The task {name!r} has no first document: its evaluation split is empty, or one of the choices is."
        ) from error


def task_pairs(
    task: ConfigurableTask,
    split: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    seed: int = 1234,
) -> list[dict[str, str]]:
    """
    Contexts and right targets of a task: rows of `prompt` and `completion` whose concatenation is what lm-eval
    scores, the delimiter at the start of the completion.

    Args:
        task (`ConfigurableTask`):
            Of output type `loglikelihood`, `multiple_choice` (a row for each right choice), or `generate_until` (the
            first reference).
        split (`str`, *optional*):
            `"test"`, `"validation"` or `"train"`; when `None`, the one lm-eval evaluates on.
        limit (`int`, *optional*):
            Only the first documents, as many.
        num_fewshot (`int`, *optional*):
            Solved examples in the context; the task's own number when `None`.
        seed (`int`, *optional*, defaults to `1234`):
            Of the choice of these examples; lm-eval's default.

    Raises:
        `ValueError`: If the split is missing, empty, or without targets.
    """
    name = task.config.task
    splits = {
        "test": (task.has_test_docs(), task.test_docs),
        "validation": (task.has_validation_docs(), task.validation_docs),
        "train": (task.has_training_docs(), task.training_docs),
    }
    present = [key for key, (exists, _) in splits.items() if exists]
    split = present[0] if split is None else split
    if split not in present:
        raise ValueError(f"The task {name!r} has no split {split!r}; it has {', '.join(present)}.")
    task.set_fewshot_seed(seed)
    num_fewshot = (task.config.num_fewshot or 0) if num_fewshot is None else num_fewshot
    rows = []
    for index, doc in enumerate(islice(splits[split][1](), limit)):
        pairs = _document_pairs(task, doc, num_fewshot)
        if not pairs:
            raise ValueError(
                f"Document {index} of the task {name!r}, split {split!r}, has no target. Choose a split with answers: "
                f"{', '.join(present)}; or filter the documents in a task YAML of your own (`process_docs`)."
            )
        rows += [{"prompt": context, "completion": target} for context, target in pairs]
    if not rows:
        raise ValueError(f"The split {split!r} of the task {name!r} has no documents (limit: {limit}).")
    return rows


def _document_pairs(task: ConfigurableTask, doc: Mapping[str, Any], num_fewshot: int) -> list[tuple[str, str]]:
    """Context and target of each right answer; none if it is not text."""
    context = task.fewshot_context(doc, num_fewshot=num_fewshot, gen_prefix=task.doc_to_prefix(doc))
    target = task.doc_to_target(doc)
    if task.OUTPUT_TYPE == "multiple_choice":
        requests, choices = task.construct_requests(doc, context), task.doc_to_choice(doc)
        # Of several inputs (Winogrande), the choices are contexts and doc_to_text points to the right one.
        right = task.doc_to_text(doc) if task.multiple_input else target
        right = right if isinstance(right, list) else [right]
        right = [choices.index(choice) if choice in choices else choice for choice in right]
        return [requests[k].args for k in right if k in range(len(choices))]
    delimiter = ""
    if task.OUTPUT_TYPE == "generate_until":
        delimiter = task.config.target_delimiter
        if task.config.doc_to_choice is not None:
            target = task.doc_to_choice(doc)[target]
        elif isinstance(target, list):
            target = target[0] if target else None
    return [(context, delimiter + target)] if isinstance(target, str) and target else []


def tokenize_pairs(
    student: Student, pairs: Sequence[Mapping[str, str]], max_length: int, add_eos: bool = False
) -> list[TokenizedExample]:
    """
    Token ids and labels of rows of `prompt` and `completion`, divided as lm-eval divides them.

    Spaces at the end of the prompt go to the completion; its tokens are those of both together from the number of the
    prompt's tokens on (`TemplateLM._encode_pair`); if tokens merge so that none is left, where lm-eval fails, the last
    one. An empty prompt is the bos token, or eos where there is none. Apart from tokens that span the boundary this is
    what [`Student.tokenize`] does with such rows; but it cuts off long ones at the end, where the completion is.

    Args:
        student (`Student`):
            The reader; it needs a tokenizer.
        pairs (`Sequence[dict]`):
            The rows.
        max_length (`int`):
            In tokens; longer samples lose the beginning of the prompt.
        add_eos (`bool`, *optional*, defaults to `False`):
            Ends completions with the eos token.

    Raises:
        `ValueError`: If the student has no tokenizer, or a token does not exist in it.
    """
    tokenizer = student.processing_class
    if tokenizer is None:
        raise ValueError("The student has no tokenizer, and tasks of lm-eval are text. Pass `processing_class`.")
    eos = (tokenizer.eos_token or "") if add_eos else ""
    start_token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    rows = []
    for pair in pairs:
        prompt, whole = pair["prompt"].rstrip(), pair["prompt"] + pair["completion"] + eos
        if prompt:
            context, ids = tokenizer(prompt)["input_ids"], tokenizer(whole)["input_ids"]
            target = ids[len(context) :]
            if not target:
                context, target = ids[:-1], ids[-1:]
        else:
            context, target = [start_token], tokenizer(whole, add_special_tokens=False)["input_ids"]
        rows.append({"input_ids": context + target, "labels": [-100] * len(context) + target})
    return student.tokenize(rows, max_length, truncation_side="left")
