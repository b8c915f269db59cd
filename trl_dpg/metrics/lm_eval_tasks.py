"""
Tasks of lm-eval as prompts and completions, tokenised as in lm-eval.

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
    """Index of the tasks that come with lm-eval. It has thousands of files, so reading it takes seconds."""
    return TaskManager()


def load_task(name: str, include_path: str | Path | Sequence[str | Path] | None = None) -> ConfigurableTask:
    """
    Load a task and its dataset.

    Args:
        name (`str`):
            Name of the task. If lm-eval and `include_path` both have it, that of `include_path` is used.
        include_path (`str`, `Path` or a list of them, *optional*):
            Folders with task YAML files, which can run code (`!function` imports a Python file).

    Raises:
        `ValueError`: If the task does not exist, if it is a group of tasks, a Python class, or about images or sound,
        if it scores whole documents (`loglikelihood_rolling`), or if it has no documents.
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
            f"{name!r} is a group of tasks: {parts}. Choose one, or combine their metrics by CombinedMetric."
        )
    obstacles = {
        "is a Python class that renders its own requests": "class" in entry.cfg,
        "is not about text alone": "doc_to_image" in entry.cfg or "doc_to_audio" in entry.cfg,
        "scores whole documents, without contexts": entry.cfg.get("output_type") == "loglikelihood_rolling",
    }
    for obstacle, present in obstacles.items():
        if present:
            raise ValueError(
                f"The task {name!r} {obstacle}. Pass its samples to LanguageModelingMetric yourself, as `text` or as "
                "`prompt` and `completion`."
            )
    try:
        return manager.load(name)["tasks"][name]
    except IndexError as error:  # lm-eval renders the first document while it loads the task
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
    Contexts and correct answers of a task, as rows of `prompt` and `completion`.

    `prompt` and `completion` together are the text that lm-eval scores. The delimiter between context and answer is at
    the beginning of the completion.

    Args:
        task (`ConfigurableTask`):
            A task of output type `loglikelihood`, `multiple_choice` (one row for each correct choice) or
            `generate_until` (the answer is the first reference).
        split (`str`, *optional*):
            `"test"`, `"validation"` or `"train"`. When `None`, the split that lm-eval evaluates on.
        limit (`int`, *optional*):
            Number of documents to use, from the beginning of the split.
        num_fewshot (`int`, *optional*):
            Number of few-shot examples in the context. When `None`, the task's default.
        seed (`int`, *optional*, defaults to `1234`):
            Seed of the choice of few-shot examples. The default is that of lm-eval.

    Raises:
        `ValueError`: If the split does not exist, is empty, or has no targets.
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
                f"{', '.join(present)}; or filter the documents in your own task YAML (`process_docs`)."
            )
        rows += [{"prompt": context, "completion": target} for context, target in pairs]
    if not rows:
        raise ValueError(f"The split {split!r} of the task {name!r} has no documents (limit: {limit}).")
    return rows


def _document_pairs(task: ConfigurableTask, doc: Mapping[str, Any], num_fewshot: int) -> list[tuple[str, str]]:
    """Context and target of each correct answer. Empty if the target is not text."""
    context = task.fewshot_context(doc, num_fewshot=num_fewshot, gen_prefix=task.doc_to_prefix(doc))
    target = task.doc_to_target(doc)
    if task.OUTPUT_TYPE == "multiple_choice":
        requests, choices = task.construct_requests(doc, context), task.doc_to_choice(doc)
        # With several inputs (Winogrande), the choices are contexts, and doc_to_text is the index of the correct one
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
    Token ids and labels of rows of `prompt` and `completion`, divided as in lm-eval (`TemplateLM._encode_pair`).

    - Spaces at the end of the prompt are part of the completion.
    - Prompt and completion are tokenised together. If the prompt alone has k tokens, the completion is everything
      after the first k tokens. If nothing is left because tokens merge (lm-eval fails then), it is the last token.
    - An empty prompt is replaced by the bos token, or by the eos token if there is no bos token.

    [`Student.tokenize`] divides such rows in the same way, except for tokens that span the boundary. But it cuts off
    the end of long samples, where the completion is.

    Args:
        student (`Student`):
            The student. It needs a tokenizer.
        pairs (`Sequence[dict]`):
            The rows.
        max_length (`int`):
            Longest sample, in tokens. Longer samples lose the beginning of the prompt.
        add_eos (`bool`, *optional*, defaults to `False`):
            Whether to end completions with the eos token.

    Raises:
        `ValueError`: If the student has no tokenizer, or a token is not in the student's vocabulary.
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
