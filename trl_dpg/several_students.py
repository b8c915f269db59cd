"""Scores of several students as one: each on unit scale over the whole batch, then their mean or the lowest."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .metagradients import MetagradientOutput
from .scored_batch import ScoredDataset, figures, is_flat
from .student import Student


AGGREGATIONS = ("mean", "worst")
OF_ONE_BATCH = ("score/mean", "score/min", "score/max", "num_empty", "seconds/")
"""Figures that are not logged for each student, by the beginnings of their names."""


def check_aggregation(aggregation: str) -> None:
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"Unknown student_aggregation {aggregation!r}. Choose 'mean' or 'worst'.")


def student_names(students: Sequence[Any]) -> list[str]:
    """
    What students are called in logs and columns: the last part of a model's path, or the class of a model without one.
    A name that an earlier student has gets the student's place at the end, until no two are the same.

    Args:
        students (`list[Student]` or `list[str]`): Students, or paths of models.
    """
    names: list[str] = []
    for index, student in enumerate(students):
        path = student.model.config._name_or_path if isinstance(student, Student) else student
        name = Path(path).name or (type(student.model).__name__ if isinstance(student, Student) else "student")
        while name in names:
            name = f"{name}_{index}"
        names.append(name)
    return names


def factors(scores: Tensor) -> Tensor:
    """What puts each student's scores `[S, N]` on unit scale, `[S]`: 1 / standard deviation, or 0 if all are equal."""
    return torch.stack([own.new_zeros(()) if is_flat(own) else 1 / own.std(correction=0) for own in scores])


def aggregate(unit: Tensor, aggregation: str) -> Tensor:
    """
    One score for each sample, `[N]`.

    Args:
        unit (`torch.Tensor` of shape `[S, N]`): The scores of S students, each on unit scale.
        aggregation (`str`): `"mean"` of the students' scores, or `"worst"`: the lowest of them.
    """
    return unit.mean(dim=0) if aggregation == "mean" else unit.amin(dim=0)


def combine(
    results: list[list[ScoredDataset]], names: Sequence[str], aggregation: str, attribution: str
) -> list[ScoredDataset]:
    """
    The results of each dataset, from those of each student.

    Metric, losses and proxies are means over the students. `part_scores` are the raw scores of each student. The
    figures of each student, such as `metric_after/<name>`, are in `further` of the first dataset.

    Args:
        results (`list[list[ScoredDataset]]`): The results of each of S students, of each dataset.
        names (`list[str]`): The students' names.
        aggregation (`str`): See [`aggregate`].
        attribution (`str`): That of the inner loop.
    """
    raw = [torch.cat([dataset.output.scores for dataset in own]).double() for own in results]
    scales = factors(torch.stack(raw)).tolist()
    further = _figures(raw, results, names, attribution)
    datasets = []
    for own in zip(*results, strict=True):  # the results of one dataset by each student
        unit = torch.stack([r.output.scores.double() * scale for r, scale in zip(own, scales, strict=True)])
        worst = unit.argmin(dim=0).tolist()
        token_scores = []
        for index in range(len(own[0].token_scores)):
            tokens = [r.token_scores[index] * scale for r, scale in zip(own, scales, strict=True)]
            token_scores.append(torch.stack(tokens).mean(dim=0) if aggregation == "mean" else tokens[worst[index]])
        datasets.append(
            ScoredDataset(
                _output(aggregate(unit, aggregation), [r.output for r in own], names),
                max(r.num_empty for r in own),
                max(r.num_truncated for r in own),
                own[0].tokens,
                token_scores,
                {},
            )
        )
    datasets[0] = datasets[0]._replace(further=further)
    return datasets


def _output(scores: Tensor, outputs: list[MetagradientOutput], names: Sequence[str]) -> MetagradientOutput:
    first, number = outputs[0], len(outputs)
    return replace(
        first,
        scores=scores,
        metric_before=sum(output.metric_before for output in outputs) / number,
        metric_after=sum(output.metric_after for output in outputs) / number,
        parts_before=_means([output.parts_before for output in outputs]),
        parts_after=_means([output.parts_after for output in outputs]),
        losses=torch.stack([output.losses for output in outputs]).mean(dim=0),
        proxies=_means([output.proxies for output in outputs]),
        seconds={name: sum(output.seconds[name] for output in outputs) for name in first.seconds},
        part_scores=dict(zip(names, (output.scores for output in outputs), strict=True)),
    )


def _means(students: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(own[name] for own in students) / len(students) for name in students[0]}


def _figures(
    raw: list[Tensor], results: list[list[ScoredDataset]], names: Sequence[str], attribution: str
) -> dict[str, float]:
    """The figures of each student, and what is not the same function of the combined scores as of one student's."""
    found: dict[str, float] = {}
    for name, scores, own in zip(names, raw, results, strict=True):
        of_student = figures(scores, own, attribution)
        found |= {f"{key}/{name}": value for key, value in of_student.items() if not key.startswith(OF_ONE_BATCH)}
    found["predicted_change"] = sum(found[f"predicted_change/{name}"] for name in names) / len(names)
    for key in ("verify/pearson", "verify/spearman"):
        verified = [found[f"{key}/{name}"] for name in names if f"{key}/{name}" in found]
        if verified:
            found[key] = min(verified)  # the students agree only as well as the last of them
    return found
