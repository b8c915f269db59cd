"""Tokenisation of samples: from rows to token ids and labels, and from these to batches."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from os.path import commonprefix
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..text import message_text
from ..token_alignment import ends_from_offsets, translate


Examples: TypeAlias = Dataset | Sequence[str] | Sequence[Mapping[str, Any]]


class TokenizedExample(NamedTuple):
    """
    The L tokens of one sample.

    Attributes:
        input_ids (`list[int]`): Token ids.
        labels (`list[int]`): The label of each token; -100 for tokens without a loss.
        truncated (`bool`): Whether the sample was cut off.
        ends (`np.ndarray` of shape `[L]` or `None`): The end of each token in the sample's text or completion, see
            `trl_dpg.token_alignment`. `None` if it is not known or was not asked for.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False
    ends: np.ndarray | None = None

    @property
    def num_supervised(self) -> int:
        """Number of tokens that a causal LM learns to predict: all labels except -100 and the first one."""
        return sum(label != -100 for label in self.labels[1:])


class Batch(NamedTuple):
    """
    Right-padded samples on the student's device.

    Attributes:
        input_ids (`torch.Tensor` of shape `[B, L]`): Token ids.
        attention_mask (`torch.Tensor` of shape `[B, L]` or `None`): `None` if there is no padding.
        labels (`torch.Tensor` of shape `[n]`): Ids of the n supervised tokens, sample after sample.
        targets (`torch.Tensor` of shape `[n]`): Positions of the supervised tokens in the flattened `input_ids`.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor
    targets: Tensor


def check_row(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """
    A sample whose texts are texts or messages. `None` is an empty text.

    Raises:
        `ValueError`: If it is no sample.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"A sample is {row!r:.60}; expected a text or a row, a mapping from columns to values.")
    texts = {name: row[name] for name in ("text", "messages", "prompt", "completion") if name in row}
    for name, value in texts.items():
        kinds = {"text": str, "messages": list}.get(name, str | list)
        if value is not None and not isinstance(value, kinds):
            raise ValueError(
                f"A sample has {value!r:.60} ({type(value).__name__}) in `{name}`; expected "
                f"{'a text' if name == 'text' else 'messages' if name == 'messages' else 'a text or messages'}."
            )
        if isinstance(value, list) and not all(isinstance(message, Mapping) for message in value):
            raise ValueError(
                f"A sample has a list in `{name}` that is not of messages: {value!r:.60}. A message has `role` and "
                "`content`."
            )
    if None not in texts.values():
        pair = {type(texts[name]) for name in ("prompt", "completion") if name in texts}
        if len(pair) > 1:
            raise ValueError(
                "A sample has a text and messages in `prompt` and `completion`; both must be of one kind."
            )
        return row
    empty = [] if any(isinstance(value, list) for value in texts.values()) or "messages" in texts else ""
    return dict(row) | {name: empty for name, value in texts.items() if value is None}


def check_ids(input_ids: list[int], labels: list[int], vocab_size: int) -> None:
    """
    Refuse token ids and labels that a student cannot read. Ids that are too large are refused for all samples at once.

    Raises:
        `ValueError`: If there are any.
    """
    if len(labels) != len(input_ids):
        raise ValueError(f"A sample has {len(input_ids)} `input_ids` but {len(labels)} `labels`.")
    for name, ids in (("input_ids", input_ids), ("labels", labels))[: 1 if labels is input_ids else 2]:
        values = np.asarray(ids if len(ids) else [0])
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise ValueError(
                f"A sample has {ids!r:.60} in `{name}`; expected a list of whole numbers, the tokens' ids."
            )
        wrong = values[(values < 0) & ((values != -100) | (name == "input_ids"))]
        if name == "labels":
            wrong = np.concatenate([wrong, values[values >= vocab_size]])
        if len(wrong):
            other = ", or -100 for a token without a loss" if name == "labels" else ""
            raise ValueError(
                f"A sample has {wrong[0]} in `{name}`; the student's token ids are 0 to {vocab_size - 1}{other}."
            )


class SampleReader:
    """
    Tokenises samples with a student's tokenizer.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `None`): The tokenizer. If `None`, samples must be
            token ids.
        vocab_size (`int`): Size of the student's vocabulary.
        max_positions (`int` or `None`): Longest sample that the model can read, in tokens. `None`: no limit.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, max_positions: int | None):
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_positions = max_positions

    def read(
        self, examples: Examples, max_length: int, add_eos: bool, return_ends: bool, truncation_side: str
    ) -> list[TokenizedExample]:
        """Tokenise samples and cut them off at `max_length`; see [`Student.tokenize`]."""
        if isinstance(examples, str):
            raise ValueError("The samples are one string; pass a list of them.")
        rows = [check_row({"text": example} if isinstance(example, str) else example) for example in examples]
        if self.tokenizer is not None and all(set(row) == {"text"} for row in rows):
            tokenized = self._tokenize_texts([row["text"] for row in rows], add_eos, return_ends)
        else:
            tokenized = [self._tokenize_row(row, add_eos, return_ends) for row in rows]
        largest = max((max(example.input_ids, default=0) for example in tokenized), default=0)
        if largest >= self.vocab_size:
            raise ValueError(
                f"Token id {largest} does not exist in the student, whose vocabulary has {self.vocab_size} entries. "
                "Pass the student's own tokenizer as `processing_class`; the samples' token ids must be the student's."
            )
        max_length = max_length if self.max_positions is None else min(max_length, self.max_positions)
        kept = slice(max_length) if truncation_side == "right" else slice(-max_length, None)
        return [
            TokenizedExample(
                example.input_ids[kept],
                example.labels[kept],
                truncated=len(example.input_ids) > max_length,
                ends=None if example.ends is None else example.ends[kept],
            )
            for example in tokenized
        ]

    def _tokenize_row(self, row: Mapping[str, Any], add_eos: bool, return_ends: bool) -> TokenizedExample:
        if "input_ids" in row:
            input_ids = list(row["input_ids"])
            labels = list(row["labels"]) if row.get("labels") is not None else input_ids
            check_ids(input_ids, labels, self.vocab_size)
            return TokenizedExample(input_ids, labels)
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise ValueError(
                "The student has no tokenizer, so samples must be token ids (`input_ids`). Pass `processing_class`."
            )
        offsets = self._offsets(return_ends)
        if "messages" in row and not row["messages"]:
            return TokenizedExample([], [], ends=np.zeros(0) if offsets else None)

        def chat(messages):
            kwargs = {"tokenizer_kwargs": offsets} if offsets else {}
            return tokenizer.apply_chat_template(messages, return_dict=True, **kwargs)

        if "messages" in row:
            encoded = chat(row["messages"])
            return TokenizedExample(encoded["input_ids"], encoded["input_ids"], ends=self._ends(row, encoded))
        if "prompt" in row and "completion" in row:
            prompt, completion = row["prompt"], row["completion"]
            if isinstance(prompt, str):
                prompt_ids = tokenizer(prompt)["input_ids"]
                ended = self._ended(completion, add_eos) if completion else ""
                encoded = tokenizer(prompt + ended, **offsets)
            else:
                prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)[
                    "input_ids"
                ]
                encoded = chat(prompt + completion)
                completion = "".join(message_text(message) for message in completion)
            if not completion:
                ends = np.zeros(len(prompt_ids)) if offsets else None
                return TokenizedExample(prompt_ids, [-100] * len(prompt_ids), ends=ends)
            input_ids = encoded["input_ids"]
            # Tokens may merge across the boundary. The completion starts at the first token that differs
            pairs = zip(prompt_ids, input_ids, strict=False)
            start = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(prompt_ids), len(input_ids)))
            return TokenizedExample(input_ids, [-100] * start + input_ids[start:], ends=self._ends(row, encoded))
        if "text" in row:
            return self._tokenize_texts([row["text"]], add_eos, return_ends)[0]
        raise ValueError(
            f"A sample has the columns {sorted(row)}; expected `text`, `prompt` and `completion`, `messages`, or "
            "`input_ids`."
        )

    def _tokenize_texts(self, texts: Sequence[str], add_eos: bool, return_ends: bool) -> list[TokenizedExample]:
        """Tokenise plain texts in one call, which is much faster with fast tokenizers."""
        offsets = self._offsets(return_ends)
        empty = TokenizedExample([], [], ends=np.zeros(0) if offsets else None)
        full = [text for text in texts if text]
        if not full:
            return [empty] * len(texts)
        encoded = self.tokenizer([self._ended(text, add_eos) for text in full], **offsets)  # type: ignore
        ids = iter(encoded["input_ids"])
        ends: Iterator[np.ndarray | None] = repeat(None)
        if offsets:
            # The characters of the eos token are not part of the text
            ends = (
                np.minimum(ends_from_offsets(spans), len(text))
                for spans, text in zip(encoded["offset_mapping"], full, strict=True)
            )
        return [TokenizedExample(own := next(ids), own, ends=next(ends)) if text else empty for text in texts]

    def _ended(self, text: str, add_eos: bool) -> str:
        eos = self.tokenizer.eos_token  # type: ignore[union-attr]
        return text + eos if add_eos and eos is not None and not text.endswith(eos) else text

    def _offsets(self, return_ends: bool) -> dict[str, bool]:
        """Arguments for the tokenizer, to get the tokens' offsets. A slow tokenizer does not know them."""
        return {"return_offsets_mapping": True} if return_ends and self.tokenizer.is_fast else {}  # type: ignore

    def _ends(self, row: Mapping[str, Any], encoded: Mapping[str, Any]) -> np.ndarray | None:
        """The ends of a row's tokens in its text or completion. `None` if their offsets were not asked for."""
        if "offset_mapping" not in encoded:
            return None
        render = partial(self.tokenizer.apply_chat_template, tokenize=False)  # type: ignore[union-attr]
        start = 0
        if "messages" in row:
            text, contents = render(row["messages"]), [message_text(message) for message in row["messages"]]
        else:
            prompt, completion = row["prompt"], row["completion"]
            if isinstance(prompt, str):
                text, contents, start = prompt + completion, [completion], len(prompt)
            else:
                text, contents = render(prompt + completion), [message_text(message) for message in completion]
                start = len(commonprefix([render(prompt, add_generation_prompt=True), text]))  # noqa: RUF071
        return translate(ends_from_offsets(encoded["offset_mapping"]), text, contents, start)


def collate(examples: Sequence[TokenizedExample], pad_token_id: int, device: torch.device) -> Batch:
    """Right-pad samples to the longest and put them on a device."""
    length = max(len(example.input_ids) for example in examples)

    def padded(rows, value):
        return torch.tensor([row + [value] * (length - len(row)) for row in rows])

    input_ids = padded([example.input_ids for example in examples], pad_token_id)
    mask = padded([[1] * len(example.input_ids) for example in examples], 0)
    labels = padded([example.labels for example in examples], -100)
    labels[:, 0] = -100  # the first token cannot be predicted
    targets = (labels.flatten() != -100).nonzero().squeeze(1)
    return Batch(
        input_ids.to(device),
        None if mask.all() else mask.to(device),
        labels.flatten()[targets].to(device),
        targets.to(device),
    )


def pad_token_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The token that fills batches up. It is masked."""
    if tokenizer is None:
        return 0
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    if tokenizer.eos_token_id is not None:
        return tokenizer.eos_token_id
    raise ValueError(
        f"The student's tokenizer ({type(tokenizer).__name__}) has neither a pad nor an eos token. "
        "Set `processing_class.pad_token` to any token. Padding is masked."
    )
