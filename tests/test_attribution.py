"""`trl_dpg.attribute`: the library side of `trl-dpg attribute`."""

import datetime
import importlib
import itertools
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from accelerate import PartialState
from datasets import Dataset, load_dataset

from tests.tiny import make_model, make_tokenizer, on_two_processes
from trl_dpg import InnerLoopConfig, Student, attribute, metagradient
from trl_dpg.attribution import Journal, plan_chunks
from trl_dpg.attribution.path import path_weights
from trl_dpg.metrics import LanguageModelingMetric, WeightNormMetric


attribute_module = importlib.import_module("trl_dpg.attribution.attribute")  # the package has the function
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


def counted(function, calls):
    def call(*args):
        calls.append(1)
        return function(*args)

    return call


def test_a_journal_is_continued_and_other_settings_are_refused(student, tmp_path, monkeypatch):
    path = tmp_path / "attribution.jsonl"
    whole = attribute(student, TEXTS, METRIC, CONFIG, size=8, journal=path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]) + lines[-1][:20])
    calls = []
    monkeypatch.setattr(LanguageModelingMetric, "__call__", counted(LanguageModelingMetric.__call__, calls))
    again = attribute(student, TEXTS, METRIC, CONFIG, size=8, journal=path)
    assert again.scores.tolist() == whole.scores.tolist() and again.rank_correlation == whole.rank_correlation
    assert len(calls) == 3  # at the start, and after each of two chunks
    other = InnerLoopConfig(batch_size=4, learning_rate=1e-3, eps_root=1e-6)
    with pytest.raises(ValueError, match=r"learning_rate \(was 0.01, is 0.001\)"):
        attribute(student, TEXTS, METRIC, other, size=8, journal=path)
    memory = replace(CONFIG, micro_batch_size=1, memory_budget=0)
    assert attribute(student, TEXTS, METRIC, memory, size=8, journal=path).scores.tolist() == whole.scores.tolist()


def test_a_finished_journal_is_refused_with_other_texts_metric_or_student(student, tmp_path):
    path = tmp_path / "attribution.jsonl"
    attribute(student, TEXTS[:8], METRIC, CONFIG, size=4, journal=path)
    other_metric, other_student = LanguageModelingMetric(["w9 w8"]), Student(make_model(seed=1), make_tokenizer())
    for arguments, message in (
        ((student, TEXTS[8:16], METRIC), "dataset_digest"),
        ((student, TEXTS[:8], WeightNormMetric()), "metric .was 'LanguageModelingMetric'"),
        ((student, TEXTS[:8], other_metric), "the student or the metric's data have changed"),
        ((other_student, TEXTS[:8], METRIC), "the student or the metric's data have changed"),
    ):
        with pytest.raises(ValueError, match=message):
            attribute(*arguments, CONFIG, size=4, journal=path)


@pytest.mark.parametrize("content", ['{"text": "one line"}\n', '{"text": "a"}\n{"text": "b"}', "a,b\n1,2"])
def test_a_file_that_is_no_journal_is_left_as_it_is(content, student, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="is not a journal of an attribution"):
        attribute(student, TEXTS[:4], METRIC, CONFIG, journal=path)
    assert path.read_text() == content


@pytest.mark.faults
def test_two_processes_wait_for_each_other_and_an_error_on_one_is_raised_on_both(tmp_path):
    process = on_two_processes("tests.test_attribution", str(tmp_path))
    assert process.returncode == 0, process.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["scores"] == second["scores"] and len(first["scores"]) == 21
    assert first["token_scores"] == second["token_scores"]
    assert "failed on rank 1" in first["error"] and second["error"] == "no benchmark"
    assert "has scores of other settings" in first["mismatch"] and "failed on rank 0" in second["mismatch"]
    assert max(first["seconds"], second["seconds"]) < 10


def on_a_rank(folder):
    """With the accidents that a distributed run can have: one process is slow to read, or fails."""
    state = PartialState(cpu=True, timeout=datetime.timedelta(seconds=30))
    student = Student(make_model(), make_tokenizer())
    rank, results, collect = state.process_index, {}, attribute_module.collect
    attribute_module.collect = lambda *arguments: (time.sleep(rank), collect(*arguments))[1]
    result = attribute(student, TEXTS, METRIC, replace(CONFIG, per_token=True), size=8)
    results |= {"scores": result.scores.tolist(), "token_scores": result.token_scores.tolist()}

    def failing(finetuned):
        if rank == 1:
            raise RuntimeError("no benchmark")
        return METRIC(finetuned)

    started = time.perf_counter()
    path = folder / "attribution.jsonl"
    for name, metric, config in (("error", failing, CONFIG), ("mismatch", METRIC, replace(CONFIG, learning_rate=1.0))):
        try:
            if name == "mismatch":
                attribute(student, TEXTS, METRIC, CONFIG, size=8, journal=path)
            attribute(student, TEXTS, metric, config, size=8, journal=None if name == "error" else path)
        except (RuntimeError, ValueError) as error:
            results[name] = str(error)
    results["seconds"] = time.perf_counter() - started
    (folder / f"{rank}.json").write_text(json.dumps(results))


def test_a_journal_is_open_once(student, tmp_path):
    with Journal(tmp_path / "attribution.jsonl", {"mine": 1}) as journal:
        assert attribute(student, TEXTS[:4], METRIC, CONFIG, journal=journal).scores.shape == (4,)
        with pytest.raises(ValueError, match="Another attribution is at work"):
            attribute(student, TEXTS[:4], METRIC, CONFIG, journal=tmp_path / "attribution.jsonl")


def test_token_scores_sum_to_the_scores_and_are_written_through_no_link(student, tmp_path):
    dataset = Dataset.from_dict({"text": [*TEXTS, ""]})
    config = InnerLoopConfig(batch_size=4, learning_rate=1e-2, eps_root=1e-6, per_token=True)
    result = attribute(student, dataset, METRIC, config, size=8)
    offsets = result.token_offsets
    sums = [result.token_scores[a:b].sum() for a, b in itertools.pairwise(offsets)]
    np.testing.assert_allclose(sums, result.scores, atol=1e-6)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "scored.parquet.tmp").symlink_to(tmp_path / "mine")
    files = result.write(dataset, tmp_path, rows=result.top(0.5))
    assert [file.name for file in files] == ["scored.parquet", "top.parquet"]
    assert (tmp_path / "mine").read_text() == "mine" and not files[0].is_symlink()
    scored = load_dataset("parquet", data_files=str(files[0]), split="train")
    assert scored["dpg_score"] == result.scores.tolist() and scored["dpg_token_scores"][-1] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(size=6), r"`chunk_size` \(6\) must be a multiple of `batch_size` \(4\)"),
        (dict(num_repeats=0), "num_repeats must be at least 1, got 0"),
        (dict(dataset=[]), "The dataset has no samples"),
        (dict(path_points=1), "`path_points` must be an integer of at least 2, got 1"),
        (dict(path_points=2, config=replace(CONFIG, attribution="dataset")), "averages derivatives"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, student):
    with pytest.raises(ValueError, match=message):
        attribute(**dict(student=student, dataset=TEXTS, metric=METRIC, config=CONFIG) | arguments)


def test_path_points_are_the_mean_of_metagradients_at_random_data_weights(student):
    config, texts = replace(CONFIG, per_token=True), TEXTS[:8]
    weights = path_weights(3, 8, CONFIG.seed)
    thirds = (weights * 3).floor().sort(dim=0).values
    assert thirds.tolist() == [[0] * 8, [1] * 8, [2] * 8]  # one weight of each sample in each third of [0, 1]
    points = [metagradient(student, texts, METRIC, config, w) for w in weights]
    metrics = {"text": METRIC, "norm": WeightNormMetric("model.embed_tokens.weight")}
    result = attribute(student, texts, metrics, config, path_points=3)["text"]
    np.testing.assert_allclose(result.scores, sum(p.scores for p in points) / 3, rtol=1e-4, atol=1e-9)
    of_tokens = sum(p.token_scores for p in points) / 3
    np.testing.assert_allclose(result.token_scores, of_tokens.flatten(), rtol=1e-4, atol=1e-9)
    whole = metagradient(student, texts, METRIC, config)
    assert result.metric_after == pytest.approx(whole.metric_after) and result.metric_before == whole.metric_before


def test_empty_samples_score_zero_and_rank_nothing(student):
    result = attribute(student, [""] * 5, METRIC, CONFIG)
    assert result.scores.tolist() == [0.0] * 5 and result.num_empty == 5 and result.metric_after is None
    with pytest.raises(ValueError, match="all 5 scores are equal"):
        result.top(0.5)
    with pytest.raises(ValueError, match="must be above 0 and at most 1, got 2"):
        result.top(2)


METRICS = {"near": METRIC, "far": LanguageModelingMetric(["w9 w8 w7"])}


def test_each_of_several_metrics_has_the_scores_of_its_own_run(student):
    config = replace(CONFIG, per_token=True)
    results = attribute(student, [*TEXTS, ""], METRICS, config, size=8, contrast=("near", "far"))
    assert list(results) == ["near", "far", "contrast"]
    for name, metric in METRICS.items():
        alone, found = attribute(student, [*TEXTS, ""], metric, config, size=8), results[name]
        np.testing.assert_allclose(found.scores, alone.scores, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(found.token_scores, alone.token_scores, rtol=1e-3, atol=1e-6)
        assert (found.metric_before, found.metric_after) == (alone.metric_before, alone.metric_after)
        assert found.rank_correlation == pytest.approx(alone.rank_correlation, abs=0.05)
    near, far, contrast = results.values()
    np.testing.assert_allclose(contrast.scores, near.scores - far.scores, atol=1e-6)
    np.testing.assert_allclose(contrast.token_scores, near.token_scores - far.token_scores, atol=1e-6)
    assert contrast.metric_before == pytest.approx(near.metric_before - far.metric_before)
    assert contrast.num_compared == near.num_compared and contrast.rank_correlation != near.rank_correlation


def test_a_journal_of_several_metrics_is_continued_and_others_are_refused(student, tmp_path):
    path = tmp_path / "attribution.jsonl"
    whole = attribute(student, TEXTS, METRICS, CONFIG, size=8, journal=path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]) + lines[-1][:20])
    again = attribute(student, TEXTS, METRICS, CONFIG, size=8, journal=path, contrast=["far", "near"])
    for name in METRICS:
        assert again[name].scores.tolist() == whole[name].scores.tolist()
    np.testing.assert_allclose(again["contrast"].scores, whole["far"].scores - whole["near"].scores, atol=1e-6)
    for metric in (METRIC, {"near": METRIC}, METRICS | {"norm": WeightNormMetric()}):
        with pytest.raises(ValueError, match="has scores of other settings: metric "):
            attribute(student, TEXTS, metric, CONFIG, size=8, journal=path)
    changed = METRICS | {"far": LanguageModelingMetric(["w1 w8 w7"])}
    with pytest.raises(ValueError, match=r"The metric 'far' of the student before fine-tuning is .* but was"):
        attribute(student, TEXTS, changed, CONFIG, size=8, journal=path)


@pytest.mark.parametrize(
    ("metric", "contrast", "message"),
    [
        (METRIC, ["near", "far"], r"\[.near., .far.\] needs several metrics. Pass them as a dictionary"),
        (METRICS, ["near", "there"], r"two of the metrics \['near', 'far'\], got \['near', 'there'\]"),
        (METRICS, ["near", "near"], "two of the metrics"),
        (METRICS, ["near"], "two of the metrics"),
        (METRICS | {"contrast": METRIC}, ["near", "far"], "Choose another name"),
        ({}, None, "mapping of metrics is empty"),
        (METRICS | {"wrong": 1}, None, "'wrong' must be a callable"),
    ],
)
def test_a_contrast_needs_two_metrics(metric, contrast, message, student):
    with pytest.raises(ValueError, match=message):
        attribute(student, TEXTS, metric, CONFIG, contrast=contrast)


def test_empty_samples_score_zero_by_every_metric(student):
    results = attribute(student, [""] * 5, METRICS, replace(CONFIG, per_token=True), contrast=["near", "far"])
    assert all(result.scores.tolist() == [0.0] * 5 and result.metric_after is None for result in results.values())


if __name__ == "__main__":
    on_a_rank(Path(sys.argv[1]))
