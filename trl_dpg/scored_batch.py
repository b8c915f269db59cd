"""What a reward step sends from rank to rank: its samples, their scores, and the whole batch for logs."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .metagradients import MetagradientOutput
from .student_text import Reading, Text


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
