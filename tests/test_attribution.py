"""`trl_dpg.attribute`: the library side of `trl-dpg attribute`."""

import itertools

import numpy as np
import pytest
from datasets import Dataset, load_dataset

from tests.tiny import make_model, make_tokenizer
from trl_dpg import InnerLoopConfig, Student, attribute, metagradient
from trl_dpg.attribution import Journal, plan_chunks
from trl_dpg.metrics import LanguageModelingMetric


TEXTS = [f"w{k} w{(7 * k) % 12} w{(3 * k) % 5}" for k in range(21)]
METRIC = LanguageModelingMetric(["w1 w2 w3", "w5 w4"])
CONFIG = InnerLoopConfig(batch_size=4, learning_rate=1e-2, eps_root=1e-6)


@pytest.fixture(scope="module")
def student():
    return Student(make_model(), make_tokenizer())


def test_scores_are_the_metagradients_of_the_chunks_whatever_the_dataset_is(student):
    expected = np.zeros(21, dtype=np.float32)
    for rows, scored in plan_chunks(21, 8, CONFIG.seed):
        scores = metagradient(student, [TEXTS[row] for row in rows], METRIC, CONFIG).scores.numpy()
        expected[rows[scored]] = scores[scored]
    rows = [{"text": text} for text in TEXTS]
    for dataset in (TEXTS, rows, Dataset.from_list(rows)):
        result = attribute(student, dataset, METRIC, CONFIG, size=8)
        assert result.scores.tolist() == expected.tolist()
        assert result.num_compared == 8 and -1 <= result.rank_correlation <= 1
    assert result.num_tokens.tolist() == [4] * 21  # with eos
    assert result.top(0.3).tolist() == sorted(np.argsort(-expected)[:6].tolist())


def test_a_journal_is_continued_and_other_settings_are_refused(student, tmp_path):
    path = tmp_path / "attribution.jsonl"
    whole = attribute(student, TEXTS, METRIC, CONFIG, size=8, journal=path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]) + lines[-1][:20])
    calls = []

    def counted(finetuned):
        calls.append(1)
        return METRIC(finetuned)

    again = attribute(student, TEXTS, counted, CONFIG, size=8, journal=path)
    assert again.scores.tolist() == whole.scores.tolist() and again.rank_correlation == whole.rank_correlation
    assert len(calls) == 3  # at the start, and after each of two chunks
    other = InnerLoopConfig(batch_size=4, learning_rate=1e-3, eps_root=1e-6)
    with pytest.raises(ValueError, match=r"learning_rate \(was 0.01, is 0.001\)"):
        attribute(student, TEXTS, METRIC, other, size=8, journal=path)


def test_a_journal_is_open_once(student, tmp_path):
    with Journal(tmp_path / "attribution.jsonl", {"mine": 1}) as journal:
        assert attribute(student, TEXTS[:4], METRIC, CONFIG, journal=journal).scores.shape == (4,)
        with pytest.raises(ValueError, match="Another attribution is at work"):
            attribute(student, TEXTS[:4], METRIC, CONFIG, journal=tmp_path / "attribution.jsonl")


def test_token_scores_sum_to_the_scores_and_are_written(student, tmp_path):
    dataset = Dataset.from_dict({"text": [*TEXTS, ""]})
    config = InnerLoopConfig(batch_size=4, learning_rate=1e-2, eps_root=1e-6, per_token=True)
    result = attribute(student, dataset, METRIC, config, size=8)
    offsets = result.token_offsets
    sums = [result.token_scores[a:b].sum() for a, b in itertools.pairwise(offsets)]
    np.testing.assert_allclose(sums, result.scores, atol=1e-6)
    files = result.write(dataset, tmp_path, rows=result.top(0.5))
    assert [file.name for file in files] == ["scored.parquet", "top.parquet"]
    scored = load_dataset("parquet", data_files=str(files[0]), split="train")
    assert scored["dpg_score"] == result.scores.tolist() and scored["dpg_token_scores"][-1] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(size=6), r"`chunk_size` \(6\) must be a multiple of `batch_size` \(4\)"),
        (dict(num_repeats=0), "num_repeats must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, student):
    with pytest.raises(ValueError, match=message):
        attribute(student, TEXTS, METRIC, CONFIG, **arguments)


def test_empty_samples_score_zero_and_rank_nothing(student):
    result = attribute(student, [""] * 5, METRIC, CONFIG)
    assert result.scores.tolist() == [0.0] * 5 and result.num_empty == 5 and result.metric_after is None
    with pytest.raises(ValueError, match="all 5 scores are equal"):
        result.top(0.5)
    with pytest.raises(ValueError, match="must be above 0 and at most 1, got 2"):
        result.top(2)
