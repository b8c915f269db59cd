"""Scores carried from one tokenizer's tokens to another's: against figures worked out by hand."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from tests.tiny import make_model, make_tokenizer
from trl_dpg import InnerLoopConfig, Student, metagradient, token_alignment
from trl_dpg.metrics import WeightNormMetric
from trl_dpg.student.tokenization import SampleReader
from trl_dpg.token_alignment import TokenBytes, decode_with_ends, ends_from_offsets, translate


CORPUS = ["the naïve café on the hill, déjà vu and the résumé of a façade  with  two spaces\n\nand lines"] * 4
TEXTS = [
    "the café on the hill",
    "  naïve\n\nlines  ",
    "emoji 😀 twice 😀😀, é, ü and 日本語 ☃",
    "e\u0301 composed and 👩‍👩‍👧 joined",
    "",
]


def byte_level_bpe(trim_offsets=False):
    """GPT-2's kind: what it was not trained on is spelled in bytes, so emoji are split over tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<eos>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def sentencepiece_bpe():
    """Llama 2's kind: spaces are "▁", what is not in the vocabulary is spelled in tokens like "<0xE2>"."""
    words = ["▁", "▁the", "▁caf", "é", "▁on", "▁hill", "▁em", "oji", "▁and", "t", "w", "i", "c", "e", ",", "▁two"]
    tokens = ["<pad>", "<eos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {token: k for k, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def characters():
    """A token for every character."""
    alphabet = sorted(set("".join(CORPUS + TEXTS)))
    vocab = {token: k for k, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Fuse()  # no spaces between tokens
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


BYTE_LEVEL = byte_level_bpe()


def student(tokenizer, **kwargs):
    return Student(make_model(vocab_size=len(tokenizer), **kwargs), tokenizer)


def student_ends(tokenizer, row):
    (example,) = student(tokenizer).tokenize([row], 64, return_ends=True)
    return example.ends.tolist()


def decoded(tokenizer, token_ids):
    text, ends = decode_with_ends(token_ids, TokenBytes(tokenizer))
    return text, ends.tolist()


# -- where tokens lie -----------------------------------------------------------------------------------------------


def test_a_characters_tokens_share_it_equally():
    # "x🤖y" with three tokens for the robot, the first of which holds the x too
    assert ends_from_offsets([(0, 2), (1, 2), (1, 2), (2, 3)]) == pytest.approx([4 / 3, 5 / 3, 2, 3])


def test_two_characters_in_a_row_are_divided_each_among_its_own_tokens():
    # "éü" in three tokens, the second of which holds the end of é and the beginning of ü
    assert ends_from_offsets([(0, 1), (0, 2), (1, 2)]).tolist() == [0.5, 1.5, 2]


def test_special_tokens_without_a_place_have_no_width():
    assert ends_from_offsets([(0, 0), (0, 2), (3, 5), (0, 0)]).tolist() == [0, 2, 5, 5]


def test_there_may_be_no_tokens():
    assert ends_from_offsets([]).tolist() == []
    assert decoded(BYTE_LEVEL, []) == ("", [])


def test_the_students_eos_has_no_width_at_the_end_of_the_text():
    assert student_ends(make_tokenizer(), "w1 w2 w3") == [2, 5, 8, 8]


def test_a_completions_tokens_are_placed_in_the_completion():
    row = {"prompt": "w1 w2 ", "completion": "w3 w4"}
    assert student_ends(make_tokenizer(), row) == [0, 0, 2, 5, 5]
    assert student_ends(make_tokenizer(), row | {"completion": ""}) == [0, 0]


CHAT = "{% for m in messages %}{{ m.role[:1] == 'u' and 'w50 ' or 'w51 ' }}{{ m.content | trim }} w9 {% endfor %}"


def test_a_conversations_tokens_are_placed_in_its_contents():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT + "{% if add_generation_prompt %}w51 {% endif %}"
    prompt, answer = [{"role": "user", "content": "w1"}], [{"role": "assistant", "content": "w2 w51"}]
    # w50 w1 w9 w51 | w2 w51 w9: of the completion "w2 w51", the space goes to the token after it
    row = {"prompt": prompt, "completion": answer}
    assert student_ends(tokenizer, row) == [0, 0, 0, 0, 2, 6, 6]
    assert student_ends(tokenizer, {"messages": prompt + answer}) == [0, 2, 2, 2, 4, 8, 8]
    # What the template strips goes to the tokens beside it
    row["completion"] = [{"role": "assistant", "content": "\nw2 w51\n"}]
    assert student_ends(tokenizer, row)[-2:] == [8, 8]


def test_token_ids_and_slow_tokenizers_have_no_places():
    config = InnerLoopConfig(per_token=True)
    out = metagradient(student(BYTE_LEVEL), [{"input_ids": [5, 6, 7]}, {"text": "the"}], METRIC, config)
    assert out.token_ends[0] is None and out.token_ends[1].tolist() == student_ends(BYTE_LEVEL, "the")
    out = metagradient(student(ByT5Tokenizer()), ["the"], METRIC, config)
    assert out.token_ends == [None] and out.token_scores.sum() != 0
    assert student(BYTE_LEVEL).tokenize(["the"], 64)[0].ends is None  # not asked for


def test_sampled_ids_are_placed_without_reading_the_text_again():
    ids = [BYTE_LEVEL.convert_tokens_to_ids(token) for token in "t h e Ġ c a f Ã ©".split()]  # not how it would read
    assert ids != BYTE_LEVEL("the café")["input_ids"]
    assert decoded(BYTE_LEVEL, ids) == ("the café", [1, 2, 3, 4, 5, 6, 7, 7.5, 8])


def test_special_tokens_among_sampled_ids_have_no_width():
    the = BYTE_LEVEL.convert_tokens_to_ids("t")
    assert decoded(BYTE_LEVEL, [the, 1, the, 1, 0]) == ("tt", [1, 1, 2, 2, 2])


def test_bytes_that_make_no_character_are_replaced_as_the_tokenizer_does():
    robot = BYTE_LEVEL("🤖")["input_ids"]
    assert len(robot) > 2
    t = BYTE_LEVEL.convert_tokens_to_ids("t")
    for ids in (robot[:-1], [t, *robot[:1], t, 1], [robot[-1], t], [*robot[:2], *robot], [*robot[:1], 1, *robot[1:]]):
        text, ends = decoded(BYTE_LEVEL, ids)
        assert text == BYTE_LEVEL.decode(ids, skip_special_tokens=True)
        assert ends == sorted(ends) and ends[-1] == len(text)


@pytest.mark.parametrize("make", [byte_level_bpe, sentencepiece_bpe, characters, make_tokenizer])
@pytest.mark.parametrize("text", TEXTS)
def test_decoding_in_one_pass_gives_the_tokenizers_text(make, text):
    tokenizer = make()
    ids = tokenizer(text)["input_ids"]
    text, ends = decode_with_ends(ids, TokenBytes(tokenizer))
    # Decoders drop the space before the first token; `translate` matches what is left.
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert text in (expected, " " + expected)
    assert translate(ends, text, [expected])[-1:].tolist() == [len(expected)] * (len(ids) > 0)
    # Every prefix that ends with a whole character has its length
    for k in range(1, len(ids)):
        prefix, _ = decode_with_ends(ids[:k], TokenBytes(tokenizer))
        if not prefix.endswith("\ufffd"):
            assert ends[k - 1] == len(prefix)


def test_byte_fallback_tokens_share_their_character():
    tokenizer = sentencepiece_bpe()
    ids = tokenizer.convert_tokens_to_ids(["▁the", "<0xE2>", "<0x98>", "<0x83>", "e"])
    assert decoded(tokenizer, ids)[0] == " the☃e"
    assert decoded(tokenizer, ids)[1] == pytest.approx([4, 4 + 1 / 3, 4 + 2 / 3, 5, 6])


def test_rewritten_contents_are_matched_as_far_as_they_go():
    # "[ab--cd]" was rendered from "abcd": the dashes have no width
    assert translate(np.arange(9.0), "[ab--cd]", ["abcd"]).tolist() == [0, 0, 1, 2, 2, 2, 3, 4, 4]
    assert translate(np.arange(4.0), "xyz", ["ab"]).tolist() == [2, 2, 2, 2]  # nothing to match
    assert translate(np.arange(6.0), "a|b|a", ["a", "", "a"]).tolist() == [0, 1, 1, 1, 1, 2]


# -- scores ---------------------------------------------------------------------------------------------------------


def redistribute(scores, ends, target_ends):
    """Between two other texts, which must not notice."""
    other = torch.tensor([1.0, 2.0], dtype=scores.dtype), np.array([1.0, 3]), np.array([2.0, 3])
    columns = zip(other, (scores, ends, target_ends), other, strict=True)
    before, received, after = token_alignment.redistribute(*columns)
    assert before.tolist() == pytest.approx([2, 1]) and after.tolist() == pytest.approx([2, 1])
    return received


def test_a_words_token_receives_the_scores_of_its_characters():
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])  # "ab cd", and eos
    assert redistribute(scores, np.array([1.0, 2, 3, 4, 5, 5]), np.array([2.0, 5, 5])).tolist() == [3, 12, 6]


def test_a_words_score_is_divided_equally_among_its_characters():
    scores = torch.tensor([6.0, 9.0, 1.0])  # "ab cd": two words, the second with its space, and eos
    received = redistribute(scores, np.array([2.0, 5, 5]), np.array([1.0, 2, 3, 4, 5, 5]))
    torch.testing.assert_close(received, torch.tensor([3.0, 3, 3, 3, 3, 1]))


def test_tokens_that_overlap_share_by_their_common_characters():
    # "abcdef": abcd|ef to ab|cdef
    assert redistribute(torch.tensor([8.0, 2.0]), np.array([4.0, 6]), np.array([2.0, 6])).tolist() == [4, 6]


def test_eos_goes_to_the_last_token_if_none_was_written():
    scores = torch.tensor([1.0, 2.0, 7.0])
    assert redistribute(scores, np.array([1.0, 2, 2]), np.array([1.0, 2])).tolist() == [1, 9]
    assert redistribute(scores, np.array([1.0, 2, 2]), np.array([1.0, 2, 2, 2])).tolist() == [1, 2, 0, 7]


def test_tokens_without_characters_give_to_the_token_at_their_place():
    scores = torch.tensor([5.0, 1.0, 3.0, 1.0])  # no characters at 0 and at 1
    assert redistribute(scores, np.array([0.0, 1, 1, 2]), np.array([1.0, 2, 2])).tolist() == [9, 1, 0]


def test_tokens_past_what_the_student_read_receive_exactly_zero():
    scores = torch.rand(7, generator=torch.Generator().manual_seed(0))
    received = redistribute(scores, np.arange(7) + 1.0, np.array([2.0, 7, 9, 11, 12, 12]))
    assert received[2:].tolist() == [0, 0, 0, 0] and (received[:2] > 0).all()


def test_no_tokens_receive_nothing():
    assert redistribute(torch.zeros(0), np.zeros(0), np.zeros(2)).tolist() == [0, 0]
    assert redistribute(torch.zeros(2), np.zeros(2), np.zeros(0)).tolist() == []


TOKENIZERS = {"bytes": byte_level_bpe, "sentencepiece": sentencepiece_bpe, "characters": characters}
METRIC = WeightNormMetric()


@pytest.mark.parametrize("generator", TOKENIZERS)
@pytest.mark.parametrize("reader", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS[:4])
def test_sums_are_preserved_between_any_two_tokenizers(reader, generator, text):
    tokenizer = TOKENIZERS[generator]()
    ids = [*tokenizer(text)["input_ids"], 1]
    completion = tokenizer.decode(ids, skip_special_tokens=True)
    (example,) = student(TOKENIZERS[reader]()).tokenize([completion], 512, return_ends=True)
    scores = torch.randn(len(example.ends), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    read, ends = decode_with_ends(ids, TokenBytes(tokenizer))
    received = redistribute(scores, example.ends, translate(ends, read, [completion]))
    assert received.shape == (len(ids),)
    assert received.sum().item() == pytest.approx(scores.sum().item(), abs=1e-12)
    if not example.truncated:  # eos goes to eos
        assert received[-1] == pytest.approx(scores[-1].item(), abs=1e-12)


@pytest.mark.parametrize(
    ("make", "texts"),
    [
        (byte_level_bpe, TEXTS[:4]),
        (lambda: byte_level_bpe(trim_offsets=True), TEXTS[:4]),
        (sentencepiece_bpe, TEXTS[:4]),
        (characters, TEXTS[:4]),
        (make_tokenizer, ["w1 w2 w3"]),
    ],
    ids=["bytes", "bytes-trimmed", "sentencepiece", "characters", "words"],
)
def test_the_same_tokenizer_gives_the_same_scores(make, texts):
    tokenizer = make()
    for text in texts:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        completion = tokenizer.decode(ids, skip_special_tokens=True)
        example = SampleReader(tokenizer, len(tokenizer), None).read([completion], 10**4, True, True, "right")[0]
        assert example.input_ids == ids
        scores = torch.randn(len(ids), generator=torch.Generator().manual_seed(1))
        read, ends = decode_with_ends(ids, TokenBytes(tokenizer))
        received = redistribute(scores, example.ends, translate(ends, read, [completion]))
        if make is sentencepiece_bpe:  # the space it puts first has, by its offsets, half of the first character
            assert received[:2].sum().item() == pytest.approx(scores[:2].sum().item(), abs=1e-6)
            received, scores = received[2:], scores[2:]
        torch.testing.assert_close(received, scores)
