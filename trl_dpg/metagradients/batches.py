"""The student's optimizer steps as batches of tokens: which samples, in which order, with which loss normaliser."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..student import Batch, Student, TokenizedExample
from .config import InnerLoopConfig


class MicroBatch(NamedTuple):
    """
    The part of a step's batch that one forward pass takes, with its n supervised tokens.

    Attributes:
        batch (`Batch`): Its tokens, `[B, L]`.
        rows (`torch.Tensor` of shape `[n]`): Which sample of the dataset each supervised token is of.
        columns (`torch.Tensor` of shape `[n]`): Its position there.
        coefficients (`torch.Tensor` of shape `[n]`): The normaliser c_{i,k} of its loss.
    """

    batch: Batch
    rows: Tensor
    columns: Tensor
    coefficients: Tensor


def plan_steps(
    student: Student, examples: Sequence[TokenizedExample], config: InnerLoopConfig
) -> list[list[MicroBatch]]:
    """The micro-batches of each optimizer step. Samples without a supervised token take part in none of them."""
    generator = torch.Generator().manual_seed(config.seed)
    steps = []
    for _ in range(config.num_epochs):
        order = torch.randperm(len(examples), generator=generator) if config.shuffle else torch.arange(len(examples))
        for rows in order.split(config.batch_size):
            supervised = [row for row in rows.tolist() if examples[row].num_supervised]
            step_tokens = sum(examples[row].num_supervised for row in supervised)
            micro_size = config.micro_batch_size or config.batch_size
            steps.append(
                [
                    _micro_batch(student, examples, supervised[k : k + micro_size], len(rows), step_tokens, config)
                    for k in range(0, len(supervised), micro_size)
                ]
            )
    return steps


def _micro_batch(student, examples, rows, step_samples, step_tokens, config) -> MicroBatch:
    batch = student.collate([examples[row] for row in rows])
    counts = torch.tensor([examples[row].num_supervised for row in rows])
    if config.loss_normalization == "example_tokens":
        normalizers = 1 / (counts.to(student.accumulator_dtype) * step_samples)
    elif config.loss_normalization == "max_length":
        normalizers = torch.ones(len(rows), dtype=student.accumulator_dtype) / (config.max_length * step_samples)
    else:
        normalizers = torch.ones(len(rows), dtype=student.accumulator_dtype) / step_tokens
    return MicroBatch(
        batch,
        rows=torch.tensor(rows).repeat_interleave(counts).to(student.device),
        columns=batch.targets % batch.input_ids.size(1),
        coefficients=normalizers.repeat_interleave(counts).to(student.device),
    )
