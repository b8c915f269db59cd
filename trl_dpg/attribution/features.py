"""Features of samples: hidden states of the student's first blocks, before it is fine-tuned."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ..metagradients.config import SettingsError
from ..student import Examples, Student, TokenizedExample


BATCH_TOKENS = 4096
SAMPLES_PER_READ = 10_000
POOLINGS = ("mean", "mean_and_spread")


class _Enough(Exception):
    """Ends a forward pass after the last block that is needed."""


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """
    The model's blocks, in their order: its longest list of modules of one type.

    Raises:
        `ValueError`: If the model has no such list.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    lists = [blocks for blocks in lists if len({type(block) for block in blocks}) == 1]
    if not lists:
        raise SettingsError(
            f"The blocks of {type(model).__name__} were not found, so it has no hidden states to read."
        )
    return max(lists, key=lambda blocks: (len(blocks), sum(p.numel() for p in blocks.parameters())))


@contextmanager
def first_blocks(model: nn.Module, numbers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """
    Context in which a forward pass ends, with [`_Enough`], after the largest number of blocks.

    Args:
        model (`torch.nn.Module`): The model.
        numbers (`Sequence[int]`): Numbers of blocks. 0: the embeddings.

    Yields:
        `dict[int, torch.Tensor]`: The hidden states `[B, L, H]` after each number of blocks, of the last forward pass.
    """
    blocks, found = blocks_of(model), dict[int, Tensor]()

    def keep(number: int, hidden: Tensor) -> None:
        found[number] = hidden
        if number == max(numbers):
            raise _Enough

    def at_start(block, args, kwargs):
        keep(0, args[0] if args else kwargs["hidden_states"])

    def after(number):
        return lambda block, args, output: keep(number, output if isinstance(output, Tensor) else output[0])

    handles = [blocks[number - 1].register_forward_hook(after(number)) for number in numbers if number]
    if 0 in numbers:
        handles.append(blocks[0].register_forward_pre_hook(at_start, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def low_padding(lengths: Sequence[int], batch_tokens: int) -> list[np.ndarray]:
    """Batches of the samples that have tokens: of similar lengths, and of at most `batch_tokens` with padding."""
    order = np.argsort(lengths, kind="stable")
    batches: list[list[int]] = [[]]
    for row in order[np.asarray(lengths)[order] > 0]:
        if batches[-1] and lengths[row] * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(row)
    return [np.array(batch) for batch in batches if batch]


class FeatureReader:
    """
    Reads the features of samples from a student.

    A sample's features are its hidden states after some of the student's blocks, pooled over the tokens that it is
    fine-tuned on, and the logarithm of their number. Later blocks and the head are not computed.

    Args:
        student (`Student`): The student before fine-tuning.
        max_length (`int`): Longest sample, in tokens. Longer samples are cut off, as in the fine-tuning.
        window (`int`, *optional*): The hidden states are those of this number of tokens at a sample's beginning.
        batch_tokens (`int`, *optional*, defaults to `4096`): Tokens in a forward pass, for memory and speed.
    """

    def __init__(self, student: Student, max_length: int, window: int | None = None, batch_tokens: int = BATCH_TOKENS):
        self.student = student
        self.max_length = max_length
        self.window = window
        self.batch_tokens = batch_tokens

    def read(self, examples: Examples, numbers: Sequence[int]) -> tuple[dict[tuple[int, str], np.ndarray], np.ndarray]:
        """
        The features of samples.

        Args:
            examples (`list[str]`, `list[dict]` or [`~datasets.Dataset`]): N samples, see [`Student.tokenize`].
            numbers (`Sequence[int]`): Numbers of blocks. 0: the embeddings.

        Returns:
            `tuple[dict[tuple[int, str], np.ndarray], np.ndarray]`: By number of blocks and pooling, features `[N, F]`
            in float32: F is H + 1 with the pooling `"mean"`, and 2H + 1 with `"mean_and_spread"`. And the number of
            each sample's tokens with a loss, `[N]`. A sample without any has zeros as features.
        """
        samples = self.student.tokenize(examples, self.max_length)
        counts = np.array([sample.num_supervised for sample in samples], dtype=np.int64)
        cut = [self._cut(sample) for sample in samples]
        lengths = [len(sample.input_ids) if count else 0 for sample, count in zip(cut, counts, strict=True)]
        pooled: dict[int, np.ndarray] = {}
        with torch.no_grad(), self.student.train_mode(), first_blocks(self.student.model, numbers) as hidden:
            for rows in low_padding(lengths, self.batch_tokens):
                self._forward([cut[row] for row in rows])
                for number in numbers:
                    part = pool(hidden[number], [cut[row] for row in rows])
                    pooled.setdefault(number, np.zeros((len(samples), part.shape[1]), np.float32))[rows] = part
        size = np.log(np.maximum(counts, 1), dtype=np.float32)[:, None]
        features = {}
        for number, values in pooled.items():
            features[number, "mean"] = np.hstack([values[:, : values.shape[1] // 2], size])
            features[number, "mean_and_spread"] = np.hstack([values, size])
        return features, counts

    def _cut(self, sample: TokenizedExample) -> TokenizedExample:
        return sample._replace(input_ids=sample.input_ids[: self.window], labels=sample.labels[: self.window])

    def _forward(self, samples: list[TokenizedExample]) -> None:
        batch = self.student.collate(samples)
        try:
            self.student.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        except _Enough:
            pass


def pool(hidden: Tensor, samples: Sequence[TokenizedExample]) -> np.ndarray:
    """
    Mean and standard deviation of hidden states over the tokens of a sample that have a loss, or all if none has.

    Args:
        hidden (`torch.Tensor` of shape `[B, L, H]`): The hidden states of right-padded samples.
        samples (`Sequence[TokenizedExample]`): The B samples.

    Returns:
        `np.ndarray` of shape `[B, 2H]`, float32.
    """
    mask = torch.zeros(hidden.shape[:2])
    for row, sample in zip(mask, samples, strict=True):
        supervised = torch.tensor(sample.labels) != -100
        row[: len(supervised)] = supervised if supervised.any() else torch.ones(len(supervised))
    weights = (mask / mask.sum(dim=1, keepdim=True)).to(hidden.device)[:, None]
    hidden = hidden.float()
    mean = (weights @ hidden).squeeze(1)
    spread = ((weights @ hidden.square()).squeeze(1) - mean.square()).clamp(min=0).sqrt()
    return torch.cat([mean, spread], dim=1).cpu().numpy()
