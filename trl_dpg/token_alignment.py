"""
Positions of tokens in a text, and the transfer of scores from the tokens of one tokenizer to those of another.

A tokenisation is described by the *ends* of its tokens: an array of shape `[n]`, in characters from the beginning of
the text, never decreasing. A token covers the characters between the end of the token before it and its own end. So
spaces that a tokenizer leaves out belong to the token after them. A token without characters (eos) has width 0. If
several tokens have some bytes of one character, they share it equally, and their ends are fractions.
"""

import codecs
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode


_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}  # of byte-level BPE's token names


def ends_from_offsets(offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """
    Ends of tokens from the offsets of a fast tokenizer (`return_offsets_mapping=True`).

    Tokens that are parts of one character all have the span of this character. It is divided equally among them.

    Args:
        offsets (`list[tuple[int, int]]`): Each token's first character, and the character after its last one.

    Returns:
        `np.ndarray` of shape `[n]`.
    """
    starts, ends = np.array(offsets, dtype=np.float64).reshape(-1, 2).T
    split = (starts[1:] < ends[:-1]) & (ends[:-1] <= ends[1:])  # the next token begins before this one ends
    tokens = np.flatnonzero(split)
    return np.maximum.accumulate(_share(ends, tokens, starts[tokens + 1], ends[tokens]))


def _share(ends: np.ndarray, tokens: np.ndarray, begins: np.ndarray, finishes: np.ndarray) -> np.ndarray:
    """`ends` with spans divided equally. `tokens[k]` ends inside the span from `begins[k]` to `finishes[k]`."""
    if len(tokens) == 0:
        return ends
    ends = ends.copy()
    split = zip(tokens.tolist(), begins.tolist(), finishes.tolist(), strict=True)
    for (begin, finish), group in groupby(split, key=lambda token: token[1:]):
        inside = [token for token, *_ in group]
        # The token that completes the character has a share, too
        ends[inside] = np.linspace(begin, finish, len(inside) + 2)[1:-1]
    return ends


class TokenBytes(dict[int, bytes]):
    """
    The UTF-8 bytes that each token id of a tokenizer adds to a text. Special tokens add no bytes.

    An entry is computed when it is read for the first time.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Any tokenizer, fast or slow.

    Attributes:
        special (`dict[int, str]`): Names of the special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.tokenizer = tokenizer
        self.special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))

    def __missing__(self, token_id: int) -> bytes:
        # Decode the token after itself, because decoders drop the space before the first token of a text
        once, twice = (
            self.tokenizer.decode([token_id] * n, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for n in (1, 2)
        )
        self[token_id] = twice[len(once) :].encode()
        if "\ufffd" in twice:  # a part of a character. The token's name has its bytes: "<0xE2>" or, bytewise, "âĺ"
            name = self.tokenizer.convert_ids_to_tokens(token_id)
            if re.fullmatch("<0x[0-9A-F]{2}>", name):
                self[token_id] = bytes.fromhex(name[3:5])
            elif all(character in _BYTE_OF for character in name):
                self[token_id] = bytes(_BYTE_OF[character] for character in name)
        return self[token_id]


def decode_with_ends(token_ids: Sequence[int], token_bytes: TokenBytes) -> tuple[str, np.ndarray]:
    """
    Decode token ids without the special tokens, and compute the tokens' ends in the text.

    The tokens' bytes are decoded in one pass. To tokenise the text again might give other tokens, and to decode every
    prefix would take quadratic time.

    Args:
        token_ids (`list[int]`): Ids of n tokens.
        token_bytes (`TokenBytes`): The token bytes of their tokenizer.

    Returns:
        `tuple[str, np.ndarray]`: The text, and the ends of shape `[n]`. Bytes that are not valid UTF-8 become U+FFFD.
    """
    data = [token_bytes[token_id] for token_id in token_ids]
    whole = b"".join(data)
    if whole.isascii():
        return whole.decode(), np.cumsum([len(piece) for piece in data], dtype=np.float64)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces, unfinished, pending = [], [], False
    for piece in data:
        if pending or not piece.isascii():
            pieces.append(decoder.decode(piece))
            pending = decoder.getstate()[0] != b""
        else:
            pieces.append(piece.decode())
        unfinished.append(pending)
    ends = np.cumsum([len(characters) for characters in pieces], dtype=np.float64)
    text = "".join(pieces) + decoder.decode(b"", final=True)
    tokens = np.flatnonzero(unfinished[:-1])
    ends[-1:] = len(text)
    return text, _share(ends, tokens, ends[tokens], ends[tokens] + 1)


def translate(ends: np.ndarray, text: str, contents: Sequence[str], start: int = 0) -> np.ndarray:
    """
    Convert ends in a rendered text to ends in the texts from which it was rendered.

    Args:
        ends (`np.ndarray` of shape `[n]`):
            Positions in `text`.
        text (`str`):
            The rendered text, e.g. a conversation in a chat template.
        contents (`list[str]`):
            The texts from which it was rendered, in order. If a text was stripped or changed, its matching parts are
            used.
        start (`int`, *optional*, defaults to `0`):
            The position in `text` at which the contents begin.

    Returns:
        `np.ndarray` of shape `[n]`:
            Positions in the concatenated contents. Other parts of `text` have width 0.
    """
    if start == 0 and len(contents) == 1 and text == contents[0]:
        return np.minimum(ends, len(text))
    here, there, length = [start], [0], 0
    for content in contents:
        stripped = content.strip()
        if (found := text.find(content, start)) >= 0:
            blocks = [(found, 0, len(content))]
        elif (found := text.find(stripped, start)) >= 0:
            blocks = [(found, content.find(stripped), len(stripped))]
        else:
            matcher = SequenceMatcher(None, text[start:], content, autojunk=False)
            blocks = [(start + a, b, size) for a, b, size in matcher.get_matching_blocks() if size]
        for a, b, size in blocks:
            here += [a, a + size]
            there += [length + b, length + b + size]
        start = here[-1]
        length += len(content)
    return np.interp(ends, [*here, here[-1]], [*there, length])


def redistribute(
    scores: Sequence[Tensor], ends: Sequence[np.ndarray], target_ends: Sequence[np.ndarray]
) -> list[Tensor]:
    """
    Transfer the scores of one tokenisation's tokens to the tokens of another tokenisation, for N texts.

    A token's score is divided among the tokens that share characters with it, in proportion to the number of shared
    characters. The score of a token without characters goes to the token at its position, or to the last token if it
    is at the end of the text (eos). The sum of the scores does not change.

    Args:
        scores (`list[torch.Tensor]`, N of shape `[n]`): On the CPU.
        ends (`list[np.ndarray]`, N of shape `[n]`): Ends of the tokens that have the scores.
        target_ends (`list[np.ndarray]`, N of shape `[m]`): Ends of the tokens that receive them.

    Returns:
        `list[torch.Tensor]`, N of shape `[m]`, in the type of `scores`.
    """
    texts = [k for k, tokens in enumerate(target_ends) if len(tokens)]  # the others have no receiving tokens
    if not texts:
        return [theirs.new_zeros(0) for theirs in scores]
    # All texts are put on one line, with one character between them
    lengths = [max([target_ends[k][-1], *ends[k][-1:]]) for k in texts]
    begins = np.cumsum([0.0, *(length + 1 for length in lengths)])
    targets = np.concatenate([target_ends[k] + begin for k, begin in zip(texts, begins, strict=False)])
    edge_parts: list[np.ndarray] = []
    value_parts: list[np.ndarray] = []
    for k, begin in zip(texts, begins, strict=False):
        edge_parts += [np.array([begin]), ends[k] + begin]
        value_parts += [np.zeros(1), scores[k].double().numpy()]
    edges, values = np.concatenate(edge_parts), np.concatenate(value_parts)
    counts = [len(target_ends[k]) for k in texts]
    lasts = np.cumsum(counts) - 1
    firsts = np.concatenate([[0], lasts[:-1] + 1])

    # The cumulative score rises linearly within each token. A receiving token gets the difference between its two ends
    bare = np.concatenate([[False], edges[1:] == edges[:-1]])
    risen = np.where(bare, 0.0, values).cumsum()
    stops = targets.copy()
    stops[lasts] = begins[1:] - 1  # the last token gets the rest
    shares = np.interp(stops, edges, risen)
    before = np.concatenate([[0.0], shares[:-1]])
    before[firsts] = np.interp(begins[:-1], edges, risen)
    shares -= before
    places, text = edges[bare], np.searchsorted(begins, edges[bare], side="right") - 1
    receivers = np.where(places < targets[lasts[text]], np.searchsorted(targets, places), lasts[text])
    np.add.at(shares, receivers, values[bare])
    received = [theirs.new_zeros(0) for theirs in scores]
    for k, share in zip(texts, torch.from_numpy(shares).to(scores[0].dtype).split(counts), strict=True):
        received[k] = share
    return received


def hand_over(
    scores: Tensor,
    ends: Sequence[np.ndarray],
    completions: Sequence[tuple[Sequence[int], Sequence[tuple[str, bool]]]],
    token_bytes: TokenBytes,
) -> tuple[list[list[str]], list[Tensor]]:
    """
    Transfer the scores of the student's tokens to the tokens that the generator sampled, for N completions.

    Args:
        scores (`torch.Tensor` of shape `[N, L]`): Scores of the student's tokens, padded, on the CPU.
        ends (`list[np.ndarray]`, N of shape `[n]`): Ends of the student's tokens.
        completions (`list[tuple[list[int], list[tuple[str, bool]]]]`): For each completion, the ids of the C tokens
            that the generator sampled, and its text in pieces, each with whether the student read it. The tokens of
            other pieces (e.g. of the reasoning) receive exactly 0.
        token_bytes (`TokenBytes`): The token bytes of the generator's tokenizer.

    Returns:
        `tuple[list[list[str]], list[torch.Tensor]]`: Texts of the generator's tokens and their scores `[C]`. The text
        of a special token is its name. The text of any other token is what it adds to the completion. If several
        tokens share a character, it is in the text of the last one.
    """
    special = token_bytes.special
    tokens, target_ends, receiving = [], [], []
    for ids, pieces in completions:
        text, ends_in_text = decode_with_ends(ids, token_bytes)
        last = ends_in_text.astype(int).tolist()
        spans = zip(ids, [0, *last], last, strict=False)
        tokens.append([special[token] if token in special else text[first:end] for token, first, end in spans])
        places = translate(ends_in_text, text, [piece for piece, _ in pieces])
        places, receives = _read_places(places, pieces)
        target_ends.append(places[receives])
        receiving.append(torch.from_numpy(receives))
    own = [padded[: len(places)] for padded, places in zip(scores, ends, strict=True)]
    received = redistribute(own, ends, target_ends)
    # New tensors, because of a part of one, the whole storage would be sent to other ranks
    rows = [shares.new_zeros(len(mask)) for shares, mask in zip(received, receiving, strict=True)]
    for row, mask, shares in zip(rows, receiving, received, strict=True):
        row[mask] = shares
    return tokens, rows


def _read_places(ends: np.ndarray, pieces: Sequence[tuple[str, bool]]) -> tuple[np.ndarray, np.ndarray]:
    """
    Ends of a completion's tokens in what the student read of it, and which of the tokens receive scores.

    These are the tokens with characters that were read, and those without characters after the last of them (eos).
    If all was read, all tokens receive scores.

    Args:
        ends (`np.ndarray` of shape `[C]`): Ends in the whole completion.
        pieces (`list[tuple[str, bool]]`): The completion in pieces, each with whether it was read.
    """
    if all(read for _, read in pieces):
        return ends, np.ones(len(ends), dtype=bool)
    edges = np.cumsum([0, *(len(piece) for piece, _ in pieces)])
    read_edges = np.cumsum([0, *(len(piece) * read for piece, read in pieces)])
    places = np.interp(ends, edges, read_edges)
    receives = np.diff(places, prepend=0.0) > 0
    if receives.any():
        after = int(receives.nonzero()[0][-1]) + 1
        receives[after:] = np.diff(ends, prepend=0.0)[after:] == 0
    return places, receives
