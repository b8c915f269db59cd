"""Scores of one dataset by several students, as one score."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from ..several_students import aggregate, check_aggregation, factors
from .result import Attribution


def combine_attributions(results: Mapping[str, Attribution], aggregation: str = "mean") -> Attribution:
    """
    The results of [`attribute`] for several students as one.

    Each student's scores are divided by their standard deviation over the dataset. A sample's score is the mean of
    them, or the lowest.

    Args:
        results (`dict[str, Attribution]`): The result of each student, by name, for the same samples.
        aggregation (`str`, *optional*, defaults to `"mean"`): `"mean"` or `"worst"`.

    Returns:
        [`Attribution`]:
            `metric_before` and `metric_after` are means over the students, and `seconds` a sum. `rank_correlation` is
            the lowest of the students'. `num_tokens` and `num_truncated` are the most that a student has. There are no
            scores of tokens.

    Raises:
        `ValueError`: If `aggregation` is unknown.
    """
    check_aggregation(aggregation)
    own = list(results.values())
    scores = torch.stack([torch.from_numpy(result.scores).double() for result in own])
    known = [result.rank_correlation for result in own if result.rank_correlation is not None]

    def mean(values: list[float | None]) -> float | None:
        return None if None in values else sum(values) / len(values)  # type: ignore[arg-type]

    return replace(
        own[0],
        scores=aggregate(scores * factors(scores)[:, None], aggregation).float().numpy(),
        token_scores=None,
        num_tokens=np.max([result.num_tokens for result in own], axis=0),
        metric_before=mean([result.metric_before for result in own]),
        metric_after=mean([result.metric_after for result in own]),
        num_chunks=sum(result.num_chunks for result in own),
        num_repeats=own[0].num_repeats,
        num_truncated=max(result.num_truncated for result in own),
        rank_correlation=min(known) if known else None,
        seconds=sum(result.seconds for result in own),
    )
