"""Evaluates datasets with fresh students: stock SFTTrainer fine-tunes them, and the metric is computed."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PrinterCallback
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from .generation import generate_texts, load_generator, prompt_completion_pairs
from .intervals import interval as interval
from .intervals import paired_difference, summarize
from .metagradients import InnerLoopConfig
from .metagradients.config import SettingsError
from .metrics.base import Metric
from .metrics.combine import compared, part_values
from .ranks import Ranks
from .replay import Replay
from .student import FinetunedStudent, Student
from .text import completion_text


logger = logging.get_logger(__name__)

__all__ = [
    "Evaluation",
    "compare_datasets",
    "evaluate_dataset",
    "generate_texts",
    "interval",
    "load_generator",
    "prompt_completion_pairs",
    "sft_config",
    "without_empty",
]


@dataclass
class Evaluation:
    """
    The result of a fresh student.

    Attributes:
        metric (`float`): Φ after the fine-tuning.
        proxies (`dict[str, float]`): The metric's proxies.
        finetuned (`FinetunedStudent`): The student after the fine-tuning.
    """

    metric: float
    proxies: dict[str, float]
    finetuned: FinetunedStudent = field(repr=False)

    def figures(self) -> dict[str, float]:
        """Φ and the proxies by name."""
        return {"metric": self.metric, **self.proxies}

    def measure(self, metric: Callable[[FinetunedStudent], Tensor]) -> float:
        """Another metric of the fine-tuned student."""
        return _value(self.finetuned, metric)


def evaluate_dataset(
    load_student: Callable[[], Student],
    dataset: Dataset | Sequence[str],
    metric: Callable[[FinetunedStudent], Tensor],
    config: InnerLoopConfig,
    seed: int = 42,
    replay: Replay | None = None,
) -> Evaluation:
    """
    Fine-tune a fresh student on a dataset with stock [`~trl.SFTTrainer`], and compute the metric.

    This package's own inner loop is not used. The trainer's settings are those of the inner loop, with two exceptions.
    torch's AdamW has no `eps_root`, so its `eps` is raised to √eps_root. The loss is always the mean over a batch's
    tokens, whatever `loss_normalization` is. Samples are shuffled by `seed`. In a distributed run, every process calls
    this, and the trainer shares each batch between them (DDP).

    Args:
        load_student (`Callable`):
            Returns a student that is not fine-tuned. It is called twice.
        dataset ([`~datasets.Dataset`] or `list[str]`):
            A dataset for SFTTrainer, or texts. Empty texts and completions are left out, as in the inner loop.
        metric (`Callable`):
            Φ.
        config (`InnerLoopConfig`):
            The inner loop.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the samples' order.
        replay ([`~trl_dpg.replay.Replay`], *optional*):
            Rows that are mixed in, another draw for each seed. After the shuffle, batches have them at the ratio on
            average.

    Raises:
        `ValueError`: If all texts are empty, if the processes cannot share a batch equally, or if `replay` has
            another format than the dataset.
    """
    if not isinstance(dataset, Dataset):
        dataset = Dataset.from_dict({"text": list(dataset)})
    dataset = without_empty(dataset)
    if len(dataset) == 0:
        raise ValueError("All texts are empty, so a student cannot be fine-tuned on them.")
    if replay is not None:
        dataset, config = replay.add_to(dataset, config.batch_size, seed), replay.widened(config)
    check_shares(config, len(dataset))
    start, trained = load_student(), load_student()
    _fine_tune(trained, dataset, config, seed)
    ranks = Ranks.of_this_run(start.device)
    finetuned = FinetunedStudent(start, trained.initial_theta(), start.initial_theta(), ranks)
    value = _value(finetuned, metric)
    with ranks.guard("The metric's proxies"), torch.no_grad(), start.train_mode():
        proxies = metric.proxies(finetuned, value) if isinstance(metric, Metric) else {}
    return Evaluation(value, proxies, finetuned)


def _fine_tune(trained: Student, dataset: Dataset, config: InnerLoopConfig, seed: int) -> None:
    """Fine-tune a student by SFTTrainer."""
    with TemporaryDirectory() as folder:
        args = sft_config(config, folder, seed=seed, use_cpu=trained.device.type == "cpu")
        if args.n_gpu > 1:
            args._n_gpu = 1  # the student is on one GPU, so the batch must not grow with the number of GPUs
        tokenizer = trained.processing_class
        trainer = SFTTrainer(model=trained.model, args=args, train_dataset=dataset, processing_class=tokenizer)
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        for parameter in trained.model.parameters():
            if parameter.requires_grad:  # SFTTrainer casts the adapters of a quantised model to bfloat16
                parameter.data = parameter.data.float()
        trainer.train()


def without_empty(dataset: Dataset) -> Dataset:
    """The rows of a dataset whose `text` or `completion` is not empty."""
    column = next((name for name in ("text", "completion") if name in dataset.column_names), None)
    if column is None:
        return dataset
    return dataset.select([k for k, value in enumerate(dataset[column]) if completion_text(value)])


def check_shares(config: InnerLoopConfig, num_samples: int) -> None:
    """Refuse batches that processes cannot share equally, so that samples would be trained on twice."""
    number = PartialState().num_processes
    if config.batch_size % number:
        raise SettingsError(
            f"{number} processes cannot share a `batch_size` of {config.batch_size} equally. Use a divisor of it."
        )
    left = num_samples % config.batch_size
    if number > 1 and left:
        raise SettingsError(
            f"{num_samples} samples in batches of {config.batch_size} leave {left} for the last batch, which {number} "
            f"processes would fill up with others. Use one process, or `num_samples` {num_samples - left}."
        )


def sft_config(config: InnerLoopConfig, output_dir: str | Path, **overrides: Any) -> SFTConfig:
    """The settings of SFTTrainer for an inner loop, see [`evaluate_dataset`]."""
    config.check_numbers()
    if config.optimizer == "adamw":
        optimizer = {
            "optim": "adamw_torch",
            "adam_beta1": config.betas[0],
            "adam_beta2": config.betas[1],
            "adam_epsilon": max(config.eps, math.sqrt(float(config.eps_root))),
        }
    else:
        optimizer = {"optim": "sgd", "optim_args": f"momentum={config.momentum}"}
    share = config.batch_size // PartialState().num_processes
    micro_batch_size = math.gcd(share, config.micro_batch_size or share)
    settings = dict(
        output_dir=str(output_dir),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=share // micro_batch_size,
        num_train_epochs=config.num_epochs,
        max_length=config.max_length,
        max_grad_norm=config.max_grad_norm or 0.0,  # 0: not clipped
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,
        bf16=False,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    sft = SFTConfig(**settings | optimizer | overrides)
    sft.mixed_precision = "no"  # overrides accelerate's environment
    return sft


def compare_datasets(
    load_student: Callable[[int], Student],
    datasets: dict[str, Dataset],
    metric: Callable[[FinetunedStudent], Tensor],
    config: InnerLoopConfig,
    seeds: Sequence[int] = (0, 1, 2),
    num_samples: int | None = None,
    progress: bool = False,
    max_tokens: int | None = None,
    replay: Replay | None = None,
) -> Iterator[dict[str, Any]]:
    """
    Fine-tune a fresh student for each seed and dataset, see [`evaluate_dataset`], and compare the datasets.

    Args:
        load_student (`Callable`):
            Maps a seed to a student that is not fine-tuned.
        datasets (`dict[str, Dataset]`):
            Datasets by name. All others are compared with the first one.
        metric (`Callable`):
            Φ.
        config (`InnerLoopConfig`):
            The inner loop.
        seeds (`list[int]`, *optional*, defaults to `(0, 1, 2)`):
            The seeds. A seed determines the samples, their order and the initial adapters.
        num_samples (`int`, *optional*):
            Samples to draw from each dataset; all of them by default.
        progress (`bool`, *optional*, defaults to `False`):
            Show a progress bar over the students.
        max_tokens (`int`, *optional*):
            Tokens to learn from in each dataset, so that datasets with samples of other lengths can be compared. Each
            seed draws samples in its own order, as many as fit. `0`: as many tokens as the smallest dataset has.
        replay ([`~trl_dpg.replay.Replay`], *optional*):
            Rows that are mixed into each student's data, beside the samples that are counted here.

    Returns:
        `Iterator[dict[str, Any]]`:
            The figures of the seeds so far, after each seed: `seeds`, `before` (Φ before the fine-tuning, of each
            seed), and `datasets`. For each dataset: `samples` (of the last seed), with `max_tokens` also `tokens` (of
            each seed), `empty` (samples left out), `metric` (Φ of each seed),
            `mean` and `half_width` (see [`interval`]), `proxies` (means; also the change of each constrained part, and
            the share of seeds in which its limit is kept), and, except for the first dataset,
            `first_minus_this` (mean and half width of the difference to the first dataset).

    Raises:
        `ValueError`: If a dataset has no samples that are not empty, or fewer of them than `num_samples`, or fewer
            tokens than `max_tokens`; or if both are given.
    """
    if num_samples is not None and max_tokens is not None:
        raise SettingsError("`num_samples` and `max_tokens` both say how much is drawn. Give one of them.")
    kept = {name: without_empty(dataset) for name, dataset in datasets.items()}
    for name, dataset in kept.items():
        _check_size(name, len(datasets[name]), len(dataset), config, num_samples, max_tokens, replay)
    empty = {name: len(datasets[name]) - len(dataset) for name, dataset in kept.items()}
    draw: Draw = partial(_draw_samples, num_samples)
    if max_tokens is not None:
        draw = _token_budget(load_student(seeds[0]), kept, seeds, config.max_length, max_tokens)
    bar = tqdm(desc="Evaluating", total=len(seeds) * len(kept), unit="student", disable=not progress, delay=0)
    evaluate = partial(evaluate_dataset, metric=metric, config=config, replay=replay)
    return _compare_seed_by_seed(load_student, kept, empty, metric, evaluate, seeds, draw, bar)


def _check_size(name: str, whole: int, size: int, config: InnerLoopConfig, num_samples, max_tokens, replay) -> None:
    if size == 0:
        raise SettingsError(f"`datasets`: all {whole} samples of {name!r} are empty.")
    if num_samples is not None and size < num_samples:
        raise SettingsError(f"`num_samples` is {num_samples}, but {name!r} has {size} samples that are not empty.")
    if max_tokens is None:
        number = num_samples or size
        added = 0 if replay is None else replay.number(number, config.batch_size)
        check_shares(config if replay is None else replay.widened(config), number + added)


Draw = Callable[[str, Dataset, int], tuple[Dataset, int | None]]
"""Maps a dataset's name, the dataset and a seed to the samples of this seed, and their tokens if they are counted."""


def _draw_samples(num_samples: int | None, name: str, dataset: Dataset, seed: int) -> tuple[Dataset, int | None]:
    return dataset if num_samples is None else dataset.shuffle(seed=seed).select(range(num_samples)), None


def _token_budget(
    student: Student, datasets: dict[str, Dataset], seeds: Sequence[int], max_length: int, max_tokens: int
) -> Draw:
    """Draws as many samples as have at most this number of tokens to learn from."""
    tokens = {
        name: [example.num_supervised for example in student.tokenize(dataset, max_length)]
        for name, dataset in datasets.items()
    }
    smallest = min(tokens, key=lambda name: sum(tokens[name]))
    budget = max_tokens or sum(tokens[smallest])
    if budget > sum(tokens[smallest]):
        raise SettingsError(
            f"`max_tokens` is {max_tokens}, but {smallest!r} has {sum(tokens[smallest])} tokens to learn from."
        )

    def draw(name: str, dataset: Dataset, seed: int) -> tuple[Dataset, int]:
        order = np.random.default_rng(seed).permutation(len(dataset))
        total = np.cumsum(np.array(tokens[name])[order])
        number = int(np.searchsorted(total, budget, side="right"))
        if number == 0:
            raise SettingsError(
                f"`max_tokens`: a sample of {name!r} has {total[0]} tokens, but the budget is {budget}."
            )
        return dataset.select(order[:number].tolist()), int(total[number - 1])

    for (name, dataset), seed in product(datasets.items(), seeds):
        draw(name, dataset, seed)  # an error comes before any student
    return draw


def _compare_seed_by_seed(
    load_student, datasets, empty, metric, evaluate, seeds, draw: Draw, bar: tqdm
) -> Iterator[dict[str, Any]]:
    """The generator of [`compare_datasets`]. It is a function of its own so that the checks run at the call."""
    first, *_ = datasets
    before: list[float] = []
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in datasets}
    tokens: dict[str, list[int]] = {name: [] for name in datasets}
    samples: dict[str, int] = {}
    for seed in seeds:
        load = partial(load_student, seed)
        student = load()
        before.append(metric_before(student, metric))
        start = part_values(metric)
        if len(before) == 1:
            check_repeats(student, metric, before[0])
        for name, dataset in datasets.items():
            drawn, number = draw(name, dataset, seed)
            samples[name] = len(drawn)
            if number is not None:
                tokens[name].append(number)
            result = evaluate(load, drawn, seed=seed)
            runs[name].append(result.figures() | compared(metric, start))
            bar.update()
        figures = {}
        for name in datasets:
            figures[name] = {"samples": samples[name], "empty": empty[name]} | summarize(runs[name])
            if tokens[name]:
                figures[name]["tokens"] = list(tokens[name])
            if name != first:
                figures[name]["first_minus_this"] = paired_difference(runs[first], runs[name])
        yield {"seeds": list(seeds[: len(before)]), "before": list(before), "datasets": figures}
    bar.close()


def metric_before(student: Student, metric: Callable[[FinetunedStudent], Tensor]) -> float:
    """Φ of a student before any fine-tuning."""
    theta = student.initial_theta()
    return _value(FinetunedStudent(student, theta, theta, Ranks.of_this_run(student.device)), metric)


def check_repeats(student: Student, metric: Callable[[FinetunedStudent], Tensor], value: float) -> None:
    """
    Compute the metric of a student again. Warn if it is random.

    Args:
        student (`Student`): A student before any fine-tuning.
        metric (`Callable`): Φ.
        value (`float`): Φ of this student, computed before.

    Raises:
        `ValueError`: If the metric changes the student's weights.
    """

    def states() -> dict[str, tuple[float, int]]:
        """The hash is the same for other orders of the elements, and the version after a write to `.data`."""
        named = student.model.named_parameters()
        return {name: (torch.hash_tensor(own.detach()).item(), own._version) for name, own in named}

    weights, again = states(), metric_before(student, metric)
    changed = [name for name, state in states().items() if state != weights[name]]
    if changed:
        raise ValueError(
            f"The metric changes the student's weights ({changed[0]} and {len(changed) - 1} others), so that its "
            "values are of another student. Let it compute on copies: `parameter.detach().clone()`."
        )
    if not math.isclose(value, again, rel_tol=1e-4, abs_tol=1e-12):
        logger.warning(
            f"The metric of one and the same student is {value:.6g} and then {again:.6g}: it is random, so a "
            "difference between datasets may be chance. Fix its seed inside of it, e.g. with `torch.random.fork_rng`."
        )


def _value(student: FinetunedStudent, metric: Callable[[FinetunedStudent], Tensor]) -> float:
    with student.ranks.guard("The metric"), torch.no_grad(), student.student.train_mode():
        return metric(student).item()
