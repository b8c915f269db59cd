"""`metagradient`: how much each sample of a dataset changes a metric of the student that is fine-tuned on it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from ..provenance import row_as_json
from ..ranks import ALONE, Ranks
from ..student import Examples, FinetunedStudent, Student, TokenizedExample
from .batches import rows_of_steps
from .config import InnerLoopConfig, NotFiniteError, SettingsError
from .fine_tuning import FineTuning, modes
from .goals import MetricFunction, called, check_metrics, metric_at_start, plan_goals, values_of_parts
from .gradient import check_attention
from .out_of_memory import within_memory
from .reverse import reverse_sweep
from .trajectory import Trajectory


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.get_logger(__name__)


@dataclass
class MetagradientOutput:
    """
    The result of [`metagradient`].

    Attributes:
        scores (`torch.Tensor` of shape `[N]`):
            ∂Φ/∂w_i in the order of the samples, float32 on the CPU. 0 for samples without a supervised token.
        token_scores (`torch.Tensor` of shape `[N, L]` or `None`):
            ∂Φ/∂w_{i,k}, at the position of the token that is predicted. Each row sums to the sample's score. `None`
            without `per_token=True`.
        metric_before (`float`): Φ of the student before fine-tuning.
        metric_after (`float`): Φ of the fine-tuned student.
        losses (`torch.Tensor` of shape `[T]`): Training loss of each student step, in nats, float32 on the CPU.
        samples (`list[TokenizedExample]`): The N samples as the student read them: token ids, labels, and whether they
            were cut off. With `token_scores`, also the end of each token in the text.
        proxies (`dict[str, float]`): The metric's proxies for the fine-tuned student, e.g. `pixel_accuracy`.
        readout (`dict[str, Any]`): The metric's readout of the fine-tuned student, e.g. `picture`.
        seconds (`dict[str, float]`): Seconds of `fine_tuning` (the forward sweep), `metric` (before and after it, with
            gradients and proxies) and `attribution` (the reverse sweep).
        part_scores (`dict[str, torch.Tensor]`):
            The scores `[N]` of each part of a [`CombinedMetric`], by name, without the part's weight. Otherwise empty.
        parts_before (`dict[str, float]`), parts_after (`dict[str, float]`):
            Of a [`CombinedMetric`], the value of each part before and after the fine-tuning, by name. Those before are
            empty if `metric_before` was given.
    """

    scores: Tensor
    token_scores: Tensor | None
    metric_before: float
    metric_after: float
    losses: Tensor
    samples: list[TokenizedExample]
    proxies: dict[str, float] = field(default_factory=dict)
    readout: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    part_scores: dict[str, Tensor] = field(default_factory=dict)
    parts_before: dict[str, float] = field(default_factory=dict)
    parts_after: dict[str, float] = field(default_factory=dict)

    @property
    def num_truncated(self) -> int:
        """Number of samples that were cut off at `max_length`."""
        return sum(sample.truncated for sample in self.samples)

    @property
    def num_empty(self) -> int:
        """Number of samples without a supervised token. The student learns nothing from them."""
        return sum(sample.num_supervised == 0 for sample in self.samples)

    @property
    def token_ends(self) -> list[np.ndarray | None] | None:
        """
        The ends of each sample's tokens in its text or completion, in characters; see `trl_dpg.token_alignment`.

        `None` without `token_scores`. An entry is `None` for samples that are token ids, and with a slow tokenizer.
        """
        return None if self.token_scores is None else [sample.ends for sample in self.samples]


class MetagradientOutputs(dict[str, MetagradientOutput]):
    """
    The result of [`metagradient`] for several metrics: the output of each, by its name.

    Losses, samples and seconds are those of the one fine-tuning, and the same in each output.
    """

    @property
    def scores(self) -> dict[str, Tensor]:
        """∂Φ/∂w_i of each metric, of shape `[N]`."""
        return {name: output.scores for name, output in self.items()}


@overload
def metagradient(
    student: Student,
    examples: Examples,
    metric: MetricFunction,
    config: InnerLoopConfig | None = None,
    weights: Tensor | Sequence[float] | None = None,
    metric_before: float | None = None,
    process_group: "ProcessGroup | None" = None,
) -> MetagradientOutput: ...


@overload
def metagradient(
    student: Student,
    examples: Examples,
    metric: Mapping[str, MetricFunction],
    config: InnerLoopConfig | None = None,
    weights: Tensor | Sequence[float] | None = None,
    metric_before: Mapping[str, float] | None = None,
    process_group: "ProcessGroup | None" = None,
) -> MetagradientOutputs: ...


def metagradient(student, examples, metric, config=None, weights=None, metric_before=None, process_group=None):
    """
    Fine-tune the student on a dataset, and compute the exact derivative of its metric in the weight of each sample.

    Each sample's loss has a data weight w_i. The score of sample i is the metagradient τ_i = ∂Φ(θ_T(w))/∂w_i (Thrush
    et al., arXiv 2604.08423, sec. 3): how fast the metric rises if the weight of the sample increases. The student's
    weights are read and never written.

    Args:
        student (`Student`):
            The student before fine-tuning.
        examples (`list[str]`, `list[dict]` or [`~datasets.Dataset`]):
            N samples, see [`Student.tokenize`].
        metric (`Callable` or `dict[str, Callable]`):
            Φ: maps a [`FinetunedStudent`] to a scalar tensor, higher is better. Must be a deterministic function of
            the student. Several metrics, by names that you choose, share one fine-tuning and most of the reverse
            sweep. The result is then a [`MetagradientOutputs`].
        config (`InnerLoopConfig`, *optional*):
            The inner loop.
        weights (`torch.Tensor` of shape `[N]`, *optional*):
            The data weights w at which the derivative is taken; ones if `None`.
        metric_before (`float` or `dict[str, float]`, *optional*):
            Φ of the student before fine-tuning, if it is known from an earlier call. The metric is then not evaluated
            and checked again before fine-tuning. Of several metrics, some may be known.
        process_group (`torch.distributed.ProcessGroup`, *optional*):
            Processes that share the work: all of them call this function with the same student, samples, metric and
            inner loop, and all get the same result. Each computes a part of every step's samples, and holds a part of
            the trajectory. A metric is computed on every process, or shared by [`FinetunedStudent.accumulate`].

    Raises:
        `ValueError`:
            Before any training: if the metric is not a finite, differentiable scalar that depends on the student, if
            there is none, if `weights` have another length or are not finite, if no sample has a supervised token, if
            different samples are the same tokens because they were cut off, if the student's attention has no second
            derivative, or if its 4-bit layers disagree with their dequantised weights.
        `FloatingPointError`:
            If a loss, the metric or a score is not finite. The message names the likely cause.
        `RuntimeError`:
            If another process of the group failed. The message names it and its error.
        `NotEnoughMemory`:
            If a single sample needs too much memory. Until then, micro-batches are halved, see [`within_memory`].
    """
    check_metrics(metric)
    ranks = ALONE if process_group is None else Ranks(process_group)
    fine_tuning = FineTuning(student, examples, config or InnerLoopConfig(), ranks)
    return differentiate(fine_tuning, metric, weights, metric_before, score_parts=True)


def differentiate(fine_tuning: FineTuning, metric, weights=None, metric_before=None, score_parts: bool = False) -> Any:
    """
    [`metagradient`] for samples that are tokenised already, and whose batches are planned.

    Without `score_parts`, the parts of a [`CombinedMetric`] have no scores.
    """
    if isinstance(metric, Mapping):
        before = {} if metric_before is None else metric_before
        if not isinstance(before, Mapping) or not set(before) <= set(metric):
            raise ValueError(
                f"`metric_before` must be a dictionary with names of the metrics {list(metric)}, got {before!r}."
            )
        return MetagradientOutputs(_guarded(fine_tuning, metric, weights, before, score_parts))
    if isinstance(metric_before, Mapping):
        raise ValueError(f"`metric_before` of a single metric must be a number, got {metric_before!r}.")
    known = {} if metric_before is None else {None: metric_before}
    return _guarded(fine_tuning, {None: metric}, weights, known, score_parts)[None]


def _guarded(fine_tuning: FineTuning, *arguments) -> dict[Any, MetagradientOutput]:
    """[`_differentiate`], with an error on one rank raised on all, and again if the memory does not suffice."""
    return within_memory(fine_tuning, lambda: _differentiate(fine_tuning, *arguments), "The metagradient")


def _differentiate(
    fine_tuning: FineTuning,
    metrics: Mapping[Any, MetricFunction],
    weights: Tensor | Sequence[float] | None,
    known: Mapping[Any, float],
    score_parts: bool,
) -> dict[Any, MetagradientOutput]:
    student, config, ranks = fine_tuning.student, fine_tuning.config, fine_tuning.ranks
    samples = fine_tuning.samples
    _check_student(student, config)
    check_samples(fine_tuning)
    data_weights = _check_weights(weights, len(samples)).to(student.device, student.accumulator_dtype)
    attribute = config.attribution != "dataset"
    free = not config.per_token and (len(fine_tuning.steps) == 1 or config.attribution == "first_order")
    goals = plan_goals(metrics, score_parts and attribute, free)
    with modes(student):
        student.verify_quantization()
        times = [time.perf_counter()]  # each phase ends with numbers on the CPU, so a GPU is done, too
        befores, parts_before = _at_start(metrics, known, student, ranks)
        times.append(time.perf_counter())
        trajectory = fine_tuning.sweep(data_weights, keep_states=attribute, num_metrics=goals[-1].rows.stop)
        losses = trajectory.losses.float().cpu()
        _check_losses(losses, fine_tuning)

        times.append(time.perf_counter())
        finetuned = FinetunedStudent(student, trajectory.theta.requires_grad_(), trajectory.loop.initial_theta, ranks)
        theta_bar = trajectory.theta.new_zeros(goals[-1].rows.stop, trajectory.theta.numel() if attribute else 0)
        figures = []
        for goal in goals:
            with torch.set_grad_enabled(attribute):
                goal.evaluate(finetuned, theta_bar, config)
            parts_after = values_of_parts(goal.metric, student, ranks)
            figures.append((*goal.figures(finetuned), parts_after))
        del finetuned
        trajectory.theta = trajectory.theta.new_empty(0)  # it has served
        theta_bar = ranks.shard(theta_bar)

        times.append(time.perf_counter())
        scores, token_scores = _reverse(fine_tuning, trajectory, theta_bar) if attribute else (None, None)
    before, forward, after, reverse = (end - begin for begin, end in pairwise([*times, time.perf_counter()]))
    seconds = {"fine_tuning": forward, "metric": before + after, "attribution": reverse}
    outputs = {}
    for goal, (proxies, readout, parts_after) in zip(goals, figures, strict=True):
        own = torch.full((len(samples),), goal.value) if scores is None else goal.total(scores).float()
        outputs[goal.name] = MetagradientOutput(
            own,
            None if token_scores is None else goal.total(token_scores).float(),
            befores[goal.name],
            goal.value,
            losses,
            samples,
            proxies,
            readout,
            seconds,
            {} if scores is None else dict(zip(goal.parts, scores[goal.rows].float(), strict=False)),
            parts_before.get(goal.name, {}),
            parts_after,
        )
        _check_scores(own, fine_tuning, goal.name)
    return outputs


def _at_start(
    metrics: Mapping[Any, MetricFunction], known: Mapping[Any, float], student: Student, ranks: Ranks
) -> tuple[dict[Any, float], dict[Any, dict[str, float]]]:
    """Φ(θ_0) of each metric, and the values of the parts of those that were not known."""
    values, parts = dict(known), {}
    for name, metric in metrics.items():
        if not ranks.least(name in known):
            values[name] = metric_at_start(metric, student, name, ranks)
            parts[name] = values_of_parts(metric, student, ranks)
    return values, parts


def _reverse(fine_tuning: FineTuning, trajectory: Trajectory, theta_bar: Tensor) -> tuple[Tensor, Tensor | None]:
    """The scores `[M, N]` and, with `per_token`, those of tokens `[M, N, L]`, on the CPU."""
    samples, ranks = fine_tuning.samples, fine_tuning.ranks
    length = max(len(sample.input_ids) for sample in samples)
    scores = theta_bar.new_zeros(len(theta_bar), len(samples))
    token_scores = theta_bar.new_zeros(*scores.shape, length)
    with fine_tuning.sweeping():
        reverse_sweep(trajectory, theta_bar, scores, token_scores)
    scores = ranks.sum(scores + token_scores.sum(dim=-1)).cpu()
    return scores, ranks.sum(token_scores).cpu() if fine_tuning.config.per_token else None


def check_samples(fine_tuning: FineTuning) -> None:
    """Refuse samples that have nothing to learn from, or that max_length makes the same."""
    samples, max_length = fine_tuning.samples, fine_tuning.config.max_length
    truncated = any(sample.truncated for sample in samples)
    if truncated:
        logger.warning_once(
            f"Some samples are longer than max_length = {max_length} tokens (or the model's positions) and "
            "were cut off. This warning is shown only once. `num_truncated` counts these samples."
        )
    template = ", which the chat template's own tokens fill" if _are_conversations(fine_tuning.examples) else ""
    cut = f"`max_length` = {max_length} tokens (or the model's positions){template}. Raise `max_length`."
    if not any(sample.num_supervised for sample in samples):
        if truncated:
            raise SettingsError(f"None of the {len(samples)} samples has a token to learn from within {cut}")
        raise ValueError(
            f"None of the {len(samples)} samples has a token to learn from: all are empty, or too short to have a "
            "loss. Check the generator's completions and the student's tokenizer."
        )
    if any(sample.truncated and not sample.num_supervised for sample in samples):
        logger.warning_once(
            f"Some samples have no token to learn from within {cut} This warning is shown only once. `num_empty` "
            "counts these samples."
        )
    if not fine_tuning.samples_are_identical:
        return
    if truncated and len(set(map(row_as_json, fine_tuning.examples))) > 1:
        raise SettingsError(f"All {len(samples)} samples are the same {len(samples[0].input_ids)} tokens within {cut}")
    logger.warning_once(f"All {len(samples)} samples are the same tokens, so that no sample is better than another.")


def _are_conversations(examples: Examples) -> bool:
    row = next(iter(examples), "")
    return not isinstance(row, str) and ("messages" in row or isinstance(row.get("prompt"), list))


def _check_student(student: Student, config: InnerLoopConfig) -> None:
    if config.differentiates_twice and (config.attribution != "first_order" or config.per_token):
        check_attention(student)
    if config.hvp == "finite_difference" and student.trains_half_precision:
        raise ValueError(
            "hvp='finite_difference' changes the trained parameters by amounts that are too small for half precision. "
            "Train float32 adapters, or load the student in float32."
        )


def _check_weights(weights: Tensor | Sequence[float] | None, num_samples: int) -> Tensor:
    if weights is None:
        return torch.ones(num_samples)
    weights = torch.as_tensor(weights).detach()
    if weights.shape != (num_samples,):
        raise ValueError(f"`weights` has the shape {tuple(weights.shape)}, but there are {num_samples} samples.")
    if not weights.isfinite().all():
        raise ValueError("`weights` has entries that are not finite.")
    return weights


def _check_losses(losses: Tensor, fine_tuning: FineTuning) -> None:
    if not losses.isfinite().all():
        step = int((~losses.isfinite()).nonzero()[0])
        in_step = rows_of_steps(len(fine_tuning.samples), fine_tuning.config)[step]
        rows = [row for row in in_step if fine_tuning.samples[row].num_supervised]
        cause = (
            f"the student's learning rate ({fine_tuning.config.learning_rate}) is too high."
            if step
            else "weights of the student that are not finite, or a type that is too narrow for them (float16)."
        )
        found = f"The student's training loss is {losses[step]} at step {step + 1} of {len(losses)}."
        raise NotFiniteError(f"{found} Likely cause: {cause}", rows)


def _check_scores(scores: Tensor, fine_tuning: FineTuning, name: str | None) -> None:
    if not scores.isfinite().all():
        config = fine_tuning.config
        steps = rows_of_steps(len(scores), config)
        whose = "" if name is None else f" for the metric{called(name)}"
        bad = (~scores.isfinite()).nonzero().flatten().tolist()
        first_step = min(t for t, rows in enumerate(steps) if set(rows) & set(bad))
        raise NotFiniteError(
            f"{len(bad)} of {len(scores)} scores are not finite{whose}, the first in step {first_step + 1} of "
            f"{len(steps)}. "
            f"Likely cause: eps_root ({config.eps_root}) is too small for these gradients, or the student's learning "
            f"rate ({config.learning_rate}) is too high.",
            bad,
        )
