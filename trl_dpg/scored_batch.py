"""What a reward step sends from rank to rank, or from a server: samples, scores, and the whole batch for logs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor

from .metagradients import InnerLoopConfig, MetagradientOutput
from .metagradients.config import NotFiniteError
from .student_text import Piece, Reading, Text
from .text import completion_text, message_text


T = TypeVar("T")


@dataclass
class ScoredBatch:
    """
    A batch of N scored samples, from all ranks, for logs.

    Attributes:
        prompts (`list[str]`): Texts of the prompts.
        completions (`list[str]`): Texts of the completions.
        scores (`torch.Tensor` of shape `[N]`): Raw metagradients, float64 on the CPU.
        readout (`dict[str, Any]`):
            The metric's readout of the fine-tuned student. Without `cross_group_batching`, of the first student.
        tokens (`list[list[str]]` or `None`): With `per_token=True`, the texts of each completion's tokens.
        token_scores (`list[torch.Tensor]` or `None`): With `per_token=True`, the raw scores of these tokens.
    """

    prompts: list[str]
    completions: list[str]
    scores: Tensor
    readout: dict[str, Any]
    tokens: list[list[str]] | None = None
    token_scores: list[Tensor] | None = None


class Sample(NamedTuple):
    """
    A completion, as it is sent to the rank that scores it.

    Attributes:
        prompt (`str` or `list[dict]`): The prompt.
        reading (`Reading`): What the student reads of the completion.
        example (`str` or `dict`): The sample on which the student is fine-tuned.
        ids (`list[int]`): With `per_token=True`, the token ids that the generator sampled.
    """

    prompt: Text
    reading: Reading
    example: Any
    ids: list[int]


class ScoredDataset(NamedTuple):
    """
    The results of a dataset, as they are sent to all ranks: scores and figures, without the samples.

    With `per_token=True`, also the generator's tokens and their scores. `further` are figures that not every step has.
    """

    output: MetagradientOutput
    num_empty: int
    num_truncated: int
    tokens: list[list[str]]
    token_scores: list[Tensor]
    further: dict[str, float]


def split_prompts(prompts: list[Text], num_generations: int | None) -> list[list[int]]:
    """The indices of the samples in each dataset: one of all samples, or `num_generations` of one for each prompt."""
    if num_generations is None:
        return [list(range(len(prompts)))]
    firsts = range(0, len(prompts), num_generations)
    groups = [prompts[first : first + num_generations] for first in firsts]
    if len(prompts) % num_generations or any(prompt != group[0] for group in groups for prompt in group):
        raise ValueError(
            f"A batch of {len(prompts)} completions cannot be split into num_generations = {num_generations} datasets "
            "of one completion per prompt. Pass the trainer's num_generations to DPGReward (and use the same "
            "num_generations_eval in evaluation)."
        )
    return [list(range(k, len(prompts), num_generations)) for k in range(num_generations)]


def as_samples(examples: Sequence[Any]) -> list[Sample]:
    """Samples that a student reads as they are: texts, or prompts with completions."""

    def reading(example: Any) -> Reading:
        completion = example if isinstance(example, str) else example["completion"]
        return Reading(completion, [Piece(completion_text(completion), True)], None, True)

    return [Sample("", reading(example), example, []) for example in examples]


def as_batch(
    samples: list[Sample], places: list[list[int]], scored: list[ScoredDataset], config: InnerLoopConfig
) -> ScoredBatch:
    """The results of all datasets as one batch. `places` are those of the samples of each dataset."""
    scores = torch.zeros(len(samples), dtype=torch.float64)
    for own, dataset in zip(places, scored, strict=True):
        scores[own] = dataset.output.scores.double()
        if config.attribution == "dataset":
            scores[own] -= dataset.output.metric_before
    batch = ScoredBatch(
        prompts=[_text(sample.prompt) for sample in samples],
        completions=["".join(piece.text for piece in sample.reading.pieces) for sample in samples],
        scores=scores,
        readout=scored[0].output.readout,
    )
    if config.per_token:
        batch.tokens = _in_order(places, [dataset.tokens for dataset in scored])
        batch.token_scores = _in_order(places, [dataset.token_scores for dataset in scored])
    return batch


def unit_scale(scores: Tensor) -> Tensor:
    """Scores `[N]` divided by their standard deviation; zeros if they differ by rounding errors only."""
    return torch.zeros_like(scores) if is_flat(scores) else scores / scores.std(correction=0)


def is_flat(scores: Tensor) -> bool:
    """Whether scores `[N]` differ by rounding errors only."""
    return bool(scores.std(correction=0) <= 1e-6 * scores.abs().max())


def to_json(scored: ScoredDataset, places: list[int]) -> dict[str, Any]:
    """The results of a dataset, as values that JSON can hold, with the scores of the samples at these places."""
    output = scored.output
    return {
        "scores": output.scores[places].tolist(),
        "rewards": unit_scale(output.scores.double())[places].tolist(),
        "metric_before": output.metric_before,
        "metric_after": output.metric_after,
        "losses": output.losses.tolist(),
        "num_empty": scored.num_empty,
        "num_truncated": scored.num_truncated,
        "part_scores": {name: own[places].tolist() for name, own in output.part_scores.items()},
        "proxies": output.proxies,
        "readout": output.readout,
        "seconds": output.seconds,
    }


def from_json(answer: dict[str, Any]) -> ScoredDataset:
    """The results of a dataset of which [`to_json`] wrote the scores of all samples, in their order."""
    output = MetagradientOutput(
        torch.tensor(answer["scores"]),
        None,
        answer["metric_before"],
        answer["metric_after"],
        torch.tensor(answer["losses"]),
        [],
        {name: math.nan if value is None else value for name, value in answer["proxies"].items()},
        answer["readout"],
        answer["seconds"],
        {name: torch.tensor(own) for name, own in answer["part_scores"].items()},
    )
    return ScoredDataset(output, answer["num_empty"], answer["num_truncated"], [], [], {})


def figures(raw: Tensor, scored: list[ScoredDataset], attribution: str) -> dict[str, float]:
    """The figures of a batch to log, by names. Those of several datasets are averaged. `raw` `[N]` are its scores."""
    outputs = [dataset.output for dataset in scored]

    def mean(values):
        return sum(values) / len(outputs)

    found = {
        "score/mean": raw.mean().item(),
        "score/std": raw.std(correction=0).item(),
        "score/min": raw.min().item(),
        "score/max": raw.max().item(),
        "metric_before": mean(output.metric_before for output in outputs),
        "metric_after": mean(output.metric_after for output in outputs),
        "metric_change": mean(output.metric_after - output.metric_before for output in outputs),
        "student_loss/first": mean(output.losses[0].item() for output in outputs),
        "student_loss/last": mean(output.losses[-1].item() for output in outputs),
        "num_empty": float(sum(dataset.num_empty for dataset in scored)),
        "num_truncated": float(sum(dataset.num_truncated for dataset in scored)),
    }
    for name in outputs[0].part_scores:
        parts = torch.cat([output.part_scores[name] for output in outputs]).double()
        found[f"score/std/{name}"] = parts.std(correction=0).item()
    for name in outputs[0].parts_before:
        found[f"metric_change/{name}"] = mean(
            output.parts_after[name] - output.parts_before[name] for output in outputs
        )
    if attribution != "dataset":
        found["predicted_change"] = mean(output.scores.sum().item() for output in outputs)
    for name in outputs[0].proxies:
        found[name] = mean(output.proxies[name] for output in outputs)
    mine = outputs[:: PartialState().num_processes]  # the datasets that the main process scores
    for name in outputs[0].seconds:
        found[f"seconds/{name}"] = sum(output.seconds[name] for output in mine)
    return found | scored[0].further


def _text(prompt: Text) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(message_text(message) for message in prompt)


def _in_order(places: list[list[int]], datasets: list[list[T]]) -> list[T]:
    """One list with the values of all datasets' samples, in the order of the batch."""
    by_place = dict(zip(chain(*places), chain(*datasets), strict=True))
    return [by_place[place] for place in range(len(by_place))]


def place(step: int | None) -> str:
    """Where a reward was computed: at the trainer's step, and on this rank."""
    before = "" if step is None else f"step {step} of the generator, "
    return f"reward of {before}rank {PartialState().process_index}"


def located(error: FloatingPointError, samples: list[Sample], step: int | None) -> str:
    """The message of an error in a dataset, with the trainer's step, the rank and the first sample."""
    message = f"{place(step).capitalize()}: {error}"
    if isinstance(error, NotFiniteError) and error.rows:
        row = error.rows[0]
        text = "".join(piece.text for piece in samples[row].reading.pieces)
        message += f" Found at {len(error.rows)} samples, the first is completion {row}: {text!r:.80}"
    return message
