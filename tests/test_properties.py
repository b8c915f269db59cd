"""Properties that hold for all inputs, tried on many: tokens and their places, chunks, journals, splits, settings."""

import json
import math
import os
import tempfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.test_token_alignment import byte_level_bpe, sentencepiece_bpe
from trl_dpg import InnerLoopConfig
from trl_dpg.attribution import plan_chunks
from trl_dpg.files import append_line, json_line, remove_half_line
from trl_dpg.redaction import redacted
from trl_dpg.sampling import check_sampling
from trl_dpg.scored_batch import split_prompts
from trl_dpg.scripts.config_file import is_of_kind
from trl_dpg.student.tokenization import SampleReader
from trl_dpg.token_alignment import TokenBytes, decode_with_ends, redistribute, translate


# `HYPOTHESIS_EXAMPLES=2000 pytest tests/test_properties.py` tries more
many = settings(
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "30")),
    deadline=None,
    derandomize="HYPOTHESIS_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TOKENIZERS = {"bytes": byte_level_bpe(), "trimmed": byte_level_bpe(trim_offsets=True), "pieces": sentencepiece_bpe()}
BYTES = {name: TokenBytes(tokenizer) for name, tokenizer in TOKENIZERS.items()}
PARTS = [
    *(
        "the cat",
        " ",
        "  ",
        "\n",
        "a",
        "é",
        "e\u0301",
        "ß",
        "日本語",
        "😀",
        "👩\u200d👩\u200d👧",
        "🇩🇪",
        "☃\ufe0f",
        "\u200b",
    ),
    *(
        "\u200d",
        "\ufeff",
        "\u200f",
        "שלום",
        "مرحبا",
        "\u202eabc\u202c",
        "\u0000",
        "ﷺ",
        "\U0010ffff",
        "ก็",
        "\r\n",
        "\t",
    ),
]
texts = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=20),
    st.lists(st.sampled_from(PARTS), max_size=12).map("".join),
)
names = st.sampled_from(sorted(TOKENIZERS))


def reader(name):
    return SampleReader(TOKENIZERS[name], len(TOKENIZERS[name]), None)


# -- tokens and their places -----------------------------------------------------------------------------------------


@many
@given(names, texts, st.integers(1, 40), st.booleans())
def test_every_token_has_its_place_in_the_text(name, text, max_length, add_eos):
    (whole,) = reader(name).read([text], 10**6, add_eos, True, "right")
    (cut,) = reader(name).read([text], max_length, add_eos, True, "right")
    assert cut.input_ids == whole.input_ids[:max_length] and cut.truncated == (len(whole.input_ids) > max_length)
    assert len(whole.ends) == len(whole.input_ids) == len(whole.labels)
    assert (np.diff(whole.ends) >= 0).all() and ((whole.ends >= 0) & (whole.ends <= len(text))).all()
    if text and name == "bytes":
        assert TOKENIZERS[name].decode(whole.input_ids, skip_special_tokens=True) == text and whole.ends[-1] == len(
            text
        )


@many
@given(names, texts, texts, st.booleans())
def test_the_loss_is_that_of_the_completion(name, prompt, completion, add_eos):
    row = {"prompt": prompt, "completion": completion}
    (example,) = reader(name).read([row], 10**6, add_eos, True, "right")
    supervised = [label for label in example.labels if label != -100]
    first = len(example.labels) - len(supervised)
    assert example.labels == [-100] * first + example.input_ids[first:]
    assert bool(supervised) == bool(completion)
    assert ((example.ends >= 0) & (example.ends <= len(completion))).all()
    if name == "bytes" and completion:  # which may share a token with the prompt
        written = TOKENIZERS[name].decode(supervised, skip_special_tokens=True)
        assert written.endswith(completion) or "\ufffd" in written


@many
@given(names, st.lists(st.integers(0, 10**6), max_size=30))
def test_sampled_tokens_cover_the_text_that_they_write(name, numbers):
    tokenizer = TOKENIZERS[name]
    ids = [number % len(tokenizer) for number in numbers]  # characters may be split, and bytes may be none
    text, ends = decode_with_ends(ids, BYTES[name])
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    if name == "pieces":  # its decoder drops the first space, and replaces a whole run of bytes if one is wrong
        assert text.removeprefix(" ") == decoded.removeprefix(" ") or "\ufffd" in decoded
    else:
        assert text == decoded
    assert len(ends) == len(ids) and (np.diff(ends) >= 0).all()
    assert not ids or (ends[0] >= 0 and ends[-1] == len(text) * (text != ""))


@many
@given(names, names, texts, st.integers(0, 2**32 - 1))
def test_scores_keep_their_sum_between_any_two_tokenizers(student, generator, text, seed):
    tokenizer = TOKENIZERS[generator]
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    completion = tokenizer.decode(ids, skip_special_tokens=True)
    (example,) = reader(student).read([completion], 10**6, True, True, "right")
    scores = torch.randn(len(example.ends), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    written, ends = decode_with_ends(ids, BYTES[generator])
    (received,) = redistribute([scores], [example.ends], [translate(ends, written, [completion])])
    assert received.shape == (len(ids),) and received.isfinite().all()
    assert received.sum().item() == pytest.approx(scores.sum().item(), abs=1e-9)


@many
@given(st.one_of(st.none(), st.integers(), st.floats(), st.lists(st.one_of(st.integers(), st.floats(), st.none()))))
def test_token_ids_are_read_or_refused_by_a_value_error(ids):
    try:
        (example,) = reader("bytes").read(
            [{"input_ids": ids}] if isinstance(ids, list) else [ids], 8, False, False, "right"
        )
    except ValueError:
        return
    assert all(isinstance(token, int) and 0 <= token < len(TOKENIZERS["bytes"]) for token in example.input_ids)


# -- chunks, journals, splits ----------------------------------------------------------------------------------------


@many
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_every_row_is_scored_once_in_every_order(num_samples, size, seed, num_repeats):
    chunks = plan_chunks(num_samples, size, seed, num_repeats)
    each = -(-num_samples // size)
    assert len(chunks) == each * num_repeats
    for repeat in range(num_repeats):
        own = chunks[repeat * each : (repeat + 1) * each]
        assert sorted(row for chunk in own for row in chunk.rows[chunk.scored].tolist()) == list(range(num_samples))
        assert {len(chunk.rows) for chunk in own} == {min(size, num_samples)}
        assert all(len(set(chunk.rows.tolist())) == len(chunk.rows) for chunk in own)
    earlier = plan_chunks(num_samples, size, seed, 1)
    assert all((a.rows == b.rows).all() for a, b in zip(earlier, chunks, strict=False))


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8)),  # also with halves of pairs
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)


@many
@given(st.lists(st.dictionaries(st.text(max_size=5), values, max_size=3), max_size=5), st.data())
def test_a_journal_that_is_cut_anywhere_keeps_its_whole_lines(records, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        path.touch()
        places = [append_line(path, record) for record in records]
        content = path.read_bytes()
        assert content == b"".join(map(json_line, records))
        cut = data.draw(st.integers(0, len(content)))
        path.write_bytes(content[:cut])
        remove_half_line(path)
        kept = [json.loads(line) for line in path.read_bytes().splitlines()]
        assert kept == records[: content[:cut].count(b"\n")]
        assert [json.loads(content[place:].split(b"\n")[0]) for place in places] == records


@many
@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 5))
def test_datasets_and_ranks_divide_a_batch_without_rest(num_prompts, num_generations, num_ranks):
    prompts = [f"prompt {k}" for k in range(num_prompts) for _ in range(num_generations)]
    datasets = split_prompts(prompts, num_generations)
    assert sorted(place for own in datasets for place in own) == list(range(len(prompts)))
    assert all([prompts[place] for place in own] == prompts[::num_generations] for own in datasets)
    shares = [range(rank, len(datasets), num_ranks) for rank in range(num_ranks)]  # as DPGReward divides them
    assert sorted(index for share in shares for index in share) == list(range(len(datasets)))


# -- settings --------------------------------------------------------------------------------------------------------

anything = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.floats(), st.sampled_from(["auto", "fast", ""]))
NUMBERS = (
    "learning_rate",
    "eps",
    "eps_root",
    "weight_decay",
    "momentum",
    "max_grad_norm",
    "warmup_steps",
    "batch_size",
)
NUMBERS += ("num_epochs", "max_length", "micro_batch_size", "seed")


@many
@given(st.dictionaries(st.sampled_from(NUMBERS), anything, max_size=3))
def test_an_inner_loop_has_usable_numbers_or_is_refused_by_a_value_error(changes):
    try:
        config = InnerLoopConfig(**changes)
    except ValueError as error:
        assert any(name in str(error) for name in (*changes, "AdamW"))
        return
    for field in fields(config):
        value = vars(config)[field.name]
        if isinstance(value, float):
            assert math.isfinite(value) and value >= 0
        if field.name in ("batch_size", "num_epochs", "max_length"):
            assert type(value) is int and value >= 1


@many
@given(st.floats(), st.floats(), st.integers(-3, 3), st.one_of(st.none(), st.floats()), st.floats())
def test_sampling_settings_are_in_range_or_refused(temperature, top_p, top_k, min_p, penalty):
    try:
        check_sampling(temperature, top_p, top_k, min_p, penalty)
    except ValueError:
        return
    assert 0 < temperature < math.inf and 0 < top_p <= 1 and top_k >= 0 and 0 < penalty < math.inf
    assert min_p is None or 0 <= min_p <= 1


@many
@given(values)
def test_the_type_of_any_value_of_a_config_file_is_known(value):
    for kind in (int, float, str, bool, list[str], dict, int | None, dict | str | None):
        assert isinstance(is_of_kind(value, kind), bool)
    assert not is_of_kind(value, int) or isinstance(value, int | str)


secrets = st.text(st.characters(categories=("Lu",)), min_size=8, max_size=12).map(lambda text: f"Secret{text}")


@many
@given(values, secrets, st.sampled_from(["token", "api_key", "OPENAI_API_KEY", "hf_token", "password"]))
def test_a_credential_is_hidden_wherever_it_stands(value, secret, name):
    for settings_ in (
        {name: secret, "other": value},
        {"a": [{"b": {name: secret}}, value]},
        [value, {name: [secret]}],
    ):
        assert secret not in json.dumps(redacted(settings_), ensure_ascii=False)
    assert redacted({"per_token": True, "eos_token": secret}) == {"per_token": True, "eos_token": secret}
