"""`trl-dpg attribute`: its scores, what it writes, and that it can be stopped anywhere."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from filelock import FileLock
from scipy.stats import spearmanr

from tests.tiny import make_model, make_tokenizer, on_two_processes
from trl_dpg import InnerLoopConfig, Student, cli, metagradient
from trl_dpg.attribution import Attribution, plan_chunks, rank_correlation
from trl_dpg.metrics import LanguageModelingMetric
from trl_dpg.provenance import check_manifest


BENCHMARK = ["w1 w2 w3", "w5 w4"]
INNER_LOOP = ["--student_batch_size", "4", "--student_learning_rate", "1e-2", "--student_eps_root", "1e-6"]
CONFIG = InnerLoopConfig(batch_size=4, learning_rate=1e-2, eps_root=1e-6)


class SlowMetric(LanguageModelingMetric):
    """Takes long enough for the process to be killed."""

    def __init__(self):
        super().__init__(BENCHMARK)

    def __call__(self, student):
        time.sleep(float(os.environ.get("SECONDS_PER_METRIC", "0")))
        return super().__call__(student)


def make_texts(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (n,), generator=generator).tolist()
    return [" ".join(f"w{k}" for k in torch.randint(0, 12, (m,), generator=generator).tolist()) for m in lengths]


@pytest.fixture(scope="module")
def student_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def arguments(student_path, dataset, output_dir, *more):
    metric = ["--metric", "language_modeling", "--metric_kwargs", json.dumps({"texts": BENCHMARK})]
    argv = ["attribute", "--dataset_name", dataset, "--student_model_name_or_path", student_path]
    return [*argv, "--output_dir", str(output_dir), *metric, *INNER_LOOP, *more]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(student_path, dataset, output_dir, *more):
    cli.main(arguments(student_path, dataset, output_dir, "--output_format", "jsonl", *more))
    return read(output_dir / "scored.jsonl")


def refuse(capsys, argv):
    with pytest.raises(SystemExit) as raised:
        cli.main(argv)
    assert raised.value.code == 2
    return capsys.readouterr().err


# -- what the scores are ---------------------------------------------------------------------------------------------


FORMATS = {
    "text": [{"text": text} for text in make_texts(10)],
    "prompt_completion": [{"prompt": "w1 w2", "completion": f" {text}"} for text in make_texts(10)],
    "messages": [{"messages": [{"role": "user", "content": text}]} for text in make_texts(10)],
    "input_ids": [{"input_ids": list(range(5, k + 7)), "labels": [-100, *range(6, k + 7)]} for k in range(10)],
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_scores_of_one_chunk_are_those_of_metagradient(name, student_path, tmp_path):
    rows = FORMATS[name]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} w9{% endfor %}"
    make_model().save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    student = Student(str(tmp_path / "student"))
    expected = metagradient(student, rows, LanguageModelingMetric(BENCHMARK), CONFIG)
    labelled = [row | {"origin": f"line {k}"} for k, row in enumerate(rows)]
    data = write(tmp_path / "samples.jsonl", labelled)
    scored = run(str(tmp_path / "student"), data, tmp_path / "out")
    assert expected.scores.abs().min() > 0
    assert torch.equal(torch.tensor([row.pop("dpg_score") for row in scored]), expected.scores)
    assert scored == labelled
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["metric_before"] == expected.metric_before and summary["metric_after"] == expected.metric_after


def test_every_chunk_is_an_inner_loop_from_the_students_start(student_path, tmp_path):
    texts = make_texts(21)
    data = write(tmp_path / "samples.jsonl", [{"text": text} for text in texts])
    scored = run(student_path, data, tmp_path / "out", "--dataset_chunk", "8", "--seed", "5", "--num_repeats", "2")
    expected = np.zeros((2, 21), dtype=np.float32)
    student, metric = Student(student_path), LanguageModelingMetric(BENCHMARK)
    for k, (rows, mine) in enumerate(plan_chunks(21, 8, seed=5, num_repeats=2)):
        scores = metagradient(student, [texts[row] for row in rows], metric, CONFIG).scores.numpy()
        expected[k // 3, rows[mine]] = scores[mine]
    assert [row["dpg_score"] for row in scored] == expected.mean(axis=0).tolist()
    correlation = json.loads((tmp_path / "out" / "summary.json").read_text())["score"]["rank_correlation"]
    assert correlation == pytest.approx(spearmanr(*expected).statistic)


@pytest.mark.parametrize(("num_samples", "size"), [(1, 8), (8, 8), (9, 8), (23, 8), (24, 8), (5, 4)])
def test_every_row_is_scored_once_in_each_repeat_in_chunks_of_one_size(num_samples, size):
    chunks = plan_chunks(num_samples, size, seed=0, num_repeats=3)
    assert len(chunks) == 3 * -(-num_samples // size)
    for repeat in np.split(np.arange(len(chunks)), 3):
        scored = np.concatenate([chunks[k][0][chunks[k][1]] for k in repeat])
        assert sorted(scored.tolist()) == list(range(num_samples))
    for rows, _ in chunks:
        assert len(set(rows.tolist())) == len(rows) == min(size, num_samples)
    for (rows, _), (again, _) in zip(chunks, plan_chunks(num_samples, size, seed=0), strict=False):
        assert rows.tolist() == again.tolist()


def test_token_scores_are_as_many_as_tokens_and_sum_to_the_score(student_path, tmp_path):
    texts = ["w1", *make_texts(9), "", "w1 w2 w3 w4 w5 w6 w7 w8 w9"]
    data = write(tmp_path / "samples.jsonl", [{"text": text} for text in texts])
    chunks = ["--dataset_chunk", "8", "--student_max_length", "8", "--num_repeats", "2"]
    scored = run(student_path, data, tmp_path / "out", "--per_token", *chunks)
    for text, row in zip(texts, scored, strict=True):
        assert len(row["dpg_token_scores"]) == (min(len(text.split()) + 1, 8) if text else 0)  # and eos
        assert sum(row["dpg_token_scores"]) == pytest.approx(row["dpg_score"], abs=1e-6)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["num_empty"] == 1 and summary["num_truncated"] == 1
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_chunk_of_empty_samples_scores_zero(student_path, tmp_path):
    data = write(tmp_path / "samples.jsonl", [{"text": text} for text in ["w1 w2", *[""] * 11]])
    scored = run(student_path, data, tmp_path / "out", "--dataset_chunk", "4")
    assert [row["dpg_score"] != 0 for row in scored] == [True] + [False] * 11


# -- what is written -------------------------------------------------------------------------------------------------


def test_keep_top_keeps_the_best_rows_in_the_datasets_order(student_path, tmp_path, capsys):
    rows = [{"id": k, "tags": ["a"] * (k % 3), "text": text} for k, text in enumerate(make_texts(20))]
    Dataset.from_list(rows).to_parquet(tmp_path / "samples.parquet")
    data = str(tmp_path / "samples.parquet")
    cli.main(arguments(student_path, data, tmp_path / "out", "--dataset_chunk", "8", "--keep_top", "0.3"))
    scored, top = (
        load_dataset("parquet", data_files=str(tmp_path / "out" / f"{name}.parquet"), split="train")
        for name in ("scored", "top")
    )
    assert scored.remove_columns("dpg_score").to_list() == rows
    best = sorted(np.argsort(-np.array(scored["dpg_score"]))[:6].tolist())
    assert top.to_list() == [scored[k] for k in best]
    printed = capsys.readouterr().out
    order = np.argsort(scored["dpg_score"])
    assert scored[int(order[-1])]["text"] in printed and scored[int(order[0])]["text"] in printed
    # once scored, another share is a matter of writing
    journal = (tmp_path / "out" / "attribution.jsonl").read_bytes()
    cli.main(arguments(student_path, data, tmp_path / "out", "--dataset_chunk", "8", "--keep_top", "0.5"))
    assert (tmp_path / "out" / "attribution.jsonl").read_bytes() == journal
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["num_kept"] == 10


def test_a_recipe_for_dpg_gives_metric_and_student_settings(student_path, tmp_path):
    recipe = Path(__file__).parents[1] / "recipes" / "pattern_67" / "mini.yaml"
    data = write(tmp_path / "samples.jsonl", [{"text": text} for text in make_texts(3)])
    own = ["--dataset_name", data, "--student_model_name_or_path", student_path, "--output_dir", str(tmp_path / "out")]
    pattern = ["--metric_kwargs", '{"pattern": "67", "offset": [6, 4], "scale": 3.0}']
    cli.main(["attribute", "--config", str(recipe), *own, *pattern])
    settings = json.loads((tmp_path / "out" / "summary.json").read_text())["settings"]
    assert settings["metric"] == "weight_pattern" and settings["student_max_length"] == 17


def test_one_chunk_is_scored_in_a_second_order_to_tell_how_much_is_chance(student_path, tmp_path, capsys):
    texts = make_texts(21)
    data = write(tmp_path / "samples.jsonl", [{"text": text} for text in texts])
    scored = run(student_path, data, tmp_path / "out", "--dataset_chunk", "8")
    (rows, mine), student = plan_chunks(21, 8, seed=42, num_repeats=2)[3], Student(student_path)
    again = metagradient(student, [texts[row] for row in rows], LanguageModelingMetric(BENCHMARK), CONFIG).scores
    first = torch.tensor([scored[row]["dpg_score"] for row in rows[mine]])
    ranks = [values.argsort().argsort() for values in (first, again[mine])]
    figures = json.loads((tmp_path / "out" / "summary.json").read_text())["score"]
    assert figures["rank_correlation"] == pytest.approx(torch.corrcoef(torch.stack(ranks).double())[0, 1].item())
    assert figures["num_compared"] == 8 and "Rank correlation of 8 scores" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("correlation", "repeats", "advice"),
    [(0.85, 1, ""), (0.2, 1, "`num_repeats` 16"), (0.2, 16, ""), (-1.0, 2, "Raise"), (-0.9, 3, "Raise")],
)
def test_a_ranking_that_is_mostly_chance_comes_with_advice(correlation, repeats, advice):
    none = dict(token_scores=None, num_tokens=np.ones(2), metric_before=0.0, metric_after=1.0, num_empty=0)
    none |= dict(num_truncated=0, num_compared=256, seconds=1.0, scores=np.array([-1.0, 1.0]))
    result = Attribution(**none, num_chunks=8 * repeats, num_repeats=repeats, rank_correlation=correlation)
    text = result.chance()
    assert f"{correlation:.2f}" in text and advice in text and ("Much of" in text) == bool(advice)


def test_empty_samples_do_not_count_as_agreement(student_path, tmp_path):
    texts = [text for text in make_texts(16) for text in (text, "")]
    data = write(tmp_path / "samples.jsonl", [{"text": text} for text in texts])
    run(student_path, data, tmp_path / "out", "--dataset_chunk", "8", "--num_repeats", "2")
    figures = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert figures["score"]["num_compared"] == 16 and figures["num_empty"] == 16
    tied = np.array([[1.0, 1, 2, 3], [1.0, 1, 3, 2]])
    assert rank_correlation(tied) == pytest.approx(spearmanr(*tied).statistic)


def test_one_batch_has_no_order_to_vary(student_path, tmp_path, capsys):
    data = write(tmp_path / "samples.jsonl", [{"text": text} for text in make_texts(4)])
    run(student_path, data, tmp_path / "out")
    assert "All samples are in one batch" in capsys.readouterr().out
    assert len(read(tmp_path / "out" / "attribution.jsonl")) == 2


def test_equal_scores_rank_nothing(student_path, tmp_path, capsys):
    data = write(tmp_path / "samples.jsonl", [{"text": text} for text in make_texts(8)])
    still = arguments(student_path, data, tmp_path / "out", "--student_learning_rate", "0")
    cli.main(still)
    assert "All scores are equal" in capsys.readouterr().out
    assert "--keep_top: all 8 scores are equal" in refuse(capsys, [*still, "--keep_top", "0.5"])


def test_results_of_an_earlier_command_do_not_stay_beside_the_new_summary(student_path, tmp_path):
    data = write(tmp_path / "samples.jsonl", [{"text": text} for text in make_texts(8)])
    run(student_path, data, tmp_path / "out", "--keep_top", "0.5")
    cli.main(arguments(student_path, data, tmp_path / "out"))
    written = {path.name for path in (tmp_path / "out").iterdir()}
    manifest = {"manifest.json", "manifest_rows.npz"}
    assert written == {"attribution.jsonl", "attribution.lock", "scored.parquet", "summary.json"} | manifest
    assert check_manifest(tmp_path / "out") == []


# -- stopped and resumed ---------------------------------------------------------------------------------------------


def test_after_sigkill_no_sample_is_lost_or_scored_twice(student_path, tmp_path):
    data = write(tmp_path / "samples.jsonl", [{"text": text} for text in make_texts(46)])
    more = ["--dataset_chunk", "4", "--metric", "tests.test_attribute.SlowMetric", "--metric_kwargs", "{}"]
    uninterrupted = run(student_path, data, tmp_path / "whole", *more)

    journal = tmp_path / "out" / "attribution.jsonl"
    command = [sys.executable, "-m", "trl_dpg.cli", *arguments(student_path, data, tmp_path / "out", *more)]
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "SECONDS_PER_METRIC": "0.5", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    process = subprocess.Popen(command, env=environment, cwd=root, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 180
    while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = journal.read_bytes()
    assert process.returncode == -signal.SIGKILL and 2 <= kept.count(b"\n") < 14
    assert not (tmp_path / "out" / "scored.parquet").exists()

    resumed = run(student_path, data, tmp_path / "out", *more)
    assert journal.read_bytes().startswith(kept)
    rows = [row for line in read(journal)[1:] if line["chunk"] < 12 for row in line["rows"]]
    assert sorted(rows) == list(range(46))
    assert resumed == uninterrupted


def test_a_torn_last_line_is_scored_again_and_more_repeats_go_on(student_path, tmp_path):
    data = write(tmp_path / "samples.jsonl", [{"text": text} for text in make_texts(12)])
    more = ["--dataset_chunk", "4", "--num_repeats", "2"]
    whole = run(student_path, data, tmp_path / "whole", *more)
    journal = tmp_path / "out" / "attribution.jsonl"
    run(student_path, data, tmp_path / "out", "--dataset_chunk", "4")
    content = journal.read_bytes()
    journal.write_bytes(content[:-40])
    assert run(student_path, data, tmp_path / "out", *more) == whole
    assert sorted(line["chunk"] for line in read(journal)[1:]) == list(range(6))
    fewer = run(student_path, data, tmp_path / "out", "--dataset_chunk", "4")
    assert fewer != whole and len(read(journal)) == 7


def test_memory_settings_may_change_when_resumed_but_no_others(student_path, tmp_path, capsys):
    data = write(tmp_path / "samples.jsonl", [{"text": text} for text in make_texts(8)])
    run(student_path, data, tmp_path / "out")
    run(student_path, data, tmp_path / "out", "--student_micro_batch_size", "2")
    other = arguments(student_path, data, tmp_path / "out", "--student_learning_rate", "0.1")
    message = refuse(capsys, other)
    assert "student_learning_rate (was 0.01, is 0.1)" in message and "--overwrite" in message
    write(tmp_path / "samples.jsonl", [{"text": text} for text in make_texts(8, seed=1)])
    assert "dataset_digest" in refuse(capsys, arguments(student_path, data, tmp_path / "out"))
    cli.main([*other, "--overwrite"])
    assert len(read(tmp_path / "out" / "attribution.jsonl")) == 3
    assert (tmp_path / "out" / "scored.parquet").exists() and not (tmp_path / "out" / "scored.jsonl").exists()


def test_another_student_at_the_same_path_is_noticed(tmp_path, capsys):
    student = tmp_path / "student"
    make_tokenizer().save_pretrained(student)
    make_model().save_pretrained(student)
    data = write(tmp_path / "samples.jsonl", [{"text": text} for text in make_texts(12)])
    run(str(student), data, tmp_path / "out", "--dataset_chunk", "8")
    journal = tmp_path / "out" / "attribution.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-2]))
    make_model(seed=1).save_pretrained(student)
    argv = arguments(str(student), data, tmp_path / "out", "--dataset_chunk", "8")
    assert "the student or the metric's data have changed" in refuse(capsys, argv)
    assert len(read(journal)) == 2


def test_two_processes_share_the_chunks_out(student_path, tmp_path):
    data = write(tmp_path / "samples.jsonl", [{"text": text} for text in make_texts(21)])
    more = ["--dataset_chunk", "8"]
    alone = run(student_path, data, tmp_path / "alone", *more)
    argv = arguments(student_path, data, tmp_path / "out", "--output_format", "jsonl", *more)
    process = on_two_processes("trl_dpg.scripts.attribute", *argv[1:])
    assert process.returncode == 0, process.stderr
    assert read(tmp_path / "out" / "scored.jsonl") == alone
    assert len(read(tmp_path / "out" / "attribution.jsonl")) == 5


# -- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dataset_name", "nowhere.jsonl"], "there is no file 'nowhere.jsonl'"),
        (["--dataset_split", "test"], "could not be read (split 'test')"),
        (["--dataset_text_field", "body"], "expected 'body'. Name the column with the text by --dataset_text_field"),
        (["--dataset_text_field", "id"], "The column 'id' holds no text but int64"),
        (["--dataset_chunk", "6"], "--dataset_chunk (6) must be a multiple of --student_batch_size (4)"),
        (["--keep_top", "30"], "--keep_top is a share"),
        (["--num_repeats", "0"], "--num_repeats must be at least 1"),
        (["--path_points", "1"], "--path_points must be at least 2"),
        (["--num_shown", "-1"], "--num_shown must be at least 0"),
        (["--num_threads", "0"], "--num_threads must be at least 1"),
        (["--seed", "-1"], "seed must not be negative"),
        (["--student_batch_size", "0"], "(arguments `student_...`): batch_size must be at least 1"),
        (["--student_model_init_kwargs", "{a"], "student_model_init_kwargs must be JSON"),
        (["--metric_kwargs", '{"datset": "x"}'], "unexpected keyword argument 'datset'"),
        (["--num_processes", "2", "junk"], "unrecognized arguments: junk"),
        (["--output_format", "csv"], "--output_format must be 'parquet' or 'jsonl'"),
        (["--per_token", "--attribution", "dataset"], "--per_token: the naive baseline"),
        (["--metric", "qr_code", "--metric_kwargs", "{}"], "--metric_kwargs does not fit 'qr_code'"),
        (["--metric", "language_modelling"], "Did you mean 'language_modeling'"),
        (
            ["--student_model_name_or_path", "./nowhere"],
            "--student_model_name_or_path './nowhere' could not be loaded",
        ),
        (["--learning_rate", "1e-3"], "unrecognized arguments: --learning_rate"),
    ],
)
def test_wrong_input_is_named_and_ends_with_status_2(more, message, student_path, tmp_path, capsys):
    data = write(tmp_path / "samples.jsonl", [{"id": 0, "text": "w1 w2"}])
    error = refuse(capsys, arguments(student_path, data, tmp_path / "out", *more))
    assert message in " ".join(error.split())


def test_a_dataset_without_samples_to_read_is_refused(student_path, tmp_path, capsys):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "w1 w2"}])
    assert "has the columns ['prompt']" in refuse(capsys, arguments(student_path, prompts, tmp_path / "out"))
    empty = write(tmp_path / "empty.jsonl", [{"text": ""}] * 3)
    message = refuse(capsys, arguments(student_path, empty, tmp_path / "out"))
    assert "None of the 3 samples" in message and "--dataset_text_field" in message


def test_an_empty_dataset_is_refused(student_path, tmp_path, capsys):
    Dataset.from_dict({"text": []}).to_parquet(tmp_path / "samples.parquet")
    message = refuse(capsys, arguments(student_path, str(tmp_path / "samples.parquet"), tmp_path / "out"))
    assert "(split 'train')" in message and "corresponds to no data" in message


def test_another_commands_folder_is_left_alone(student_path, tmp_path, capsys):
    data = write(tmp_path / "samples.jsonl", [{"text": "w1 w2"}])
    (tmp_path / "summary.json").write_text("{}")
    message = refuse(capsys, arguments(student_path, data, tmp_path, "--overwrite"))
    assert "--output_dir" in message and (tmp_path / "summary.json").read_text() == "{}"


def test_help_lists_every_argument_under_a_heading(capsys):
    with pytest.raises(SystemExit):
        cli.main(["attribute", "--help", "all"])
    shown = capsys.readouterr().out
    headings = ["metric, data and output:", "student and its fine-tuning:"]
    own, student = (shown.index(heading) for heading in headings)
    assert own < shown.index("--keep_top VALUE", own) < student < shown.index("--student_eps_root", student)


def test_two_commands_do_not_write_one_journal(student_path, tmp_path, capsys):
    data = write(tmp_path / "samples.jsonl", [{"text": "w1 w2"}])
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / "attribution.lock"):
        assert "--output_dir: Another attribution is at work" in refuse(
            capsys, arguments(student_path, data, tmp_path / "out")
        )
    run(student_path, data, tmp_path / "out")


@pytest.mark.parametrize("name", ["dpg_config.json", "dpg_log.jsonl", "checkpoint-20", "model.safetensors"])
def test_the_folder_of_a_training_is_refused(name, student_path, tmp_path, capsys):
    data = write(tmp_path / "samples.jsonl", [{"text": text} for text in make_texts(4)])
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / name).write_text("{}")
    assert f"holds a training run or a model ({name})" in refuse(capsys, arguments(student_path, data, run_dir))
    assert [path.name for path in run_dir.iterdir()] == [name]


# -- several metrics --------------------------------------------------------------------------------------------------


METRICS = {
    "target": {"metric": "language_modeling", "metric_kwargs": {"texts": BENCHMARK}},
    "control": {"metric": "language_modeling", "metric_kwargs": {"texts": ["w9 w8"]}},
}


def several(student_path, dataset, output_dir, metrics, *more):
    argv = ["attribute", "--dataset_name", dataset, "--student_model_name_or_path", student_path]
    argv += ["--output_dir", str(output_dir), "--output_format", "jsonl", "--metrics", json.dumps(metrics)]
    return [*argv, *INNER_LOOP, *more]


def test_several_metrics_have_a_column_each_and_a_contrast(student_path, tmp_path, capsys):
    data = write(tmp_path / "samples.jsonl", [{"text": text} for text in make_texts(10)])
    options = ["--contrast", "target", "control", "--keep_top", "0.3", "--per_token"]
    cli.main(several(student_path, data, tmp_path / "out", METRICS, *options))
    scored, top = read(tmp_path / "out" / "scored.jsonl"), read(tmp_path / "out" / "top.jsonl")
    alone = run(student_path, data, tmp_path / "alone", "--per_token")
    for row, own in zip(scored, alone, strict=True):
        assert row["dpg_score_target"] == pytest.approx(own["dpg_score"], rel=1e-3, abs=1e-6)
        assert row["dpg_token_scores_target"] == pytest.approx(own["dpg_token_scores"], rel=1e-3, abs=1e-5)
        difference = row["dpg_score_target"] - row["dpg_score_control"]
        assert row["dpg_score_contrast"] == pytest.approx(difference, abs=1e-6)
    best = sorted(range(10), key=lambda k: -scored[k]["dpg_score_contrast"])[:3]
    assert top == [scored[k] for k in sorted(best)]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary["metrics"]) == ["target", "control", "contrast"] and summary["ranked_by"] == "contrast"
    assert summary["best"][0]["row"] == best[0] and summary["settings"]["metrics"] == METRICS
    printed = capsys.readouterr().out
    assert "Samples are ranked by 'contrast'." in printed and "control: " in printed

    cli.main(several(student_path, data, tmp_path / "out", METRICS, "--per_token"))  # only writes the files again
    assert "dpg_score_contrast" not in read(tmp_path / "out" / "scored.jsonl")[0]
    other = METRICS | {"control": METRICS["target"]}
    assert "settings: metrics (was" in refuse(
        capsys, several(student_path, data, tmp_path / "out", other, "--per_token")
    )


@pytest.mark.parametrize(
    ("metrics", "options", "message"),
    [
        ({}, [], "--metrics is empty"),
        ({"": {"metric": "language_modeling"}}, [], "--metrics: the names must be texts, got ''"),
        ({"target": {"name": "language_modeling"}}, [], "--metrics: 'target' must have `metric`"),
        (METRICS, ["--contrast", "target"], "--contrast needs the names of two of the metrics"),
        (METRICS, ["--contrast", "target", "other"], "--contrast needs the names of two of the metrics"),
        ({"target": {"metric": "langage_modeling"}}, [], "--metrics: 'target': --metric: unknown name"),
    ],
)
def test_wrong_metrics_are_refused_before_anything_is_loaded(
    metrics, options, message, student_path, tmp_path, capsys
):
    nowhere = str(tmp_path / "samples.jsonl")
    assert message in refuse(capsys, several(student_path, nowhere, tmp_path / "out", metrics, *options))


def test_a_contrast_without_metrics_is_refused(tmp_path, capsys):
    argv = arguments("nowhere", "nothing.jsonl", tmp_path / "out", "--contrast", "a", "b")
    assert "--contrast needs --metrics" in refuse(capsys, argv)
