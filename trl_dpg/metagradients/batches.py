"""Plans the student's optimizer steps: the samples of each batch, their order, and the normalisers of their losses."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ranks import ALONE, Ranks
from ..student import Batch, Student, TokenizedExample
from .config import InnerLoopConfig


class MicroBatch(NamedTuple):
    """
    The part of a step's batch that goes through one forward pass. It has n supervised tokens.

    Attributes:
        batch (`Batch`): The samples' tokens, `[B, L]`.
        samples (`torch.Tensor` of shape `[B]`): Index i of each sample in the dataset.
        rows (`torch.Tensor` of shape `[n]`): Index i of the sample in the dataset, for each supervised token.
        columns (`torch.Tensor` of shape `[n]`): Position k of each supervised token in its sample.
        coefficients (`torch.Tensor` of shape `[n]`): Normaliser c_{i,k} of each supervised token's loss.
    """

    batch: Batch
    samples: Tensor
    rows: Tensor
    columns: Tensor
    coefficients: Tensor

    def last_sample(self) -> "MicroBatch":
        """The last sample alone, with its padding and its normaliser."""
        ids, mask, labels, targets = self.batch
        first = ids.numel() - ids.size(1)
        own = targets >= first
        batch = Batch(ids[-1:], None if mask is None else mask[-1:], labels[own], targets[own] - first)
        return MicroBatch(batch, self.samples[-1:], self.rows[own], self.columns[own], self.coefficients[own])


def plan_steps(
    student: Student, examples: Sequence[TokenizedExample], config: InnerLoopConfig, ranks: Ranks = ALONE
) -> list[list[MicroBatch]]:
    """
    The micro-batches of each optimizer step. Samples without a supervised token are in no micro-batch.

    Of several ranks, each has a share of every step's samples with about the same number of tokens.
    """
    steps = []
    lengths = [len(example.input_ids) for example in examples]
    for rows in rows_of_steps(len(examples), config):
        supervised = [row for row in rows if examples[row].num_supervised]
        step_tokens = sum(examples[row].num_supervised for row in supervised)
        mine = share(supervised, lengths, ranks)
        micro_size = config.micro_batch_size or config.batch_size
        steps.append(
            [
                _micro_batch(student, examples, mine[k : k + micro_size], len(rows), step_tokens, config)
                for k in range(0, len(mine), micro_size)
            ]
        )
    return steps


def rows_of_steps(num_samples: int, config: InnerLoopConfig) -> list[list[int]]:
    """The indices of the samples in each optimizer step, in their order."""
    generator = torch.Generator().manual_seed(config.seed)
    steps: list[list[int]] = []
    for _ in range(config.num_epochs):
        order = torch.randperm(num_samples, generator=generator) if config.shuffle else torch.arange(num_samples)
        steps += [rows.tolist() for rows in order.split(config.batch_size)]
    return steps


def share(rows: list[int], lengths: Sequence[int], ranks: Ranks) -> list[int]:
    """
    This rank's rows, in their order: each row goes to the rank with the fewest tokens so far, the longest rows first.
    """
    if ranks.alone:
        return rows
    loads, owner = [0] * ranks.size, {}
    for row in sorted(rows, key=lambda row: -lengths[row]):
        owner[row] = loads.index(min(loads))
        loads[owner[row]] += lengths[row]
    return [row for row in rows if owner[row] == ranks.index]


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
        samples=torch.tensor(rows).to(student.device),
        rows=torch.tensor(rows).repeat_interleave(counts).to(student.device),
        columns=batch.targets % batch.input_ids.size(1),
        coefficients=normalizers.repeat_interleave(counts).to(student.device),
    )
