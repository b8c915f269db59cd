"""`trl-dpg attribute --distill`: features, the choice and calibration of a regressor, and the shards of a dataset."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from filelock import FileLock
from scipy.stats import spearmanr
from sklearn.linear_model import RidgeCV

from tests.tiny import make_model, make_tokenizer, on_two_processes
from trl_dpg import Student, cli
from trl_dpg.attribution import distil
from trl_dpg.attribution.corpus import Shards
from trl_dpg.attribution.distil import ALPHAS, choose, fit
from trl_dpg.attribution.distilled import Distilled
from trl_dpg.attribution.features import FeatureReader
from trl_dpg.provenance import check_manifest
from trl_dpg.scripts.distill import check_columns
from trl_dpg.scripts.usage import UsageError


def make_texts(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 24, (n, 8), generator=generator)
    lengths = torch.randint(2, 9, (n,), generator=generator).tolist()
    return [" ".join(f"w{k}" for k in row[:m].tolist()) for row, m in zip(words, lengths, strict=True)]


# -- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_features_are_the_models_hidden_states_pooled_over_the_tokens_with_a_loss(family):
    student = Student(make_model(family), make_tokenizer())
    rows = [{"prompt": "w1 w2", "completion": f" {text}"} for text in make_texts(7)]
    rows.append({"prompt": "w1 w2", "completion": ""})
    features, counts = FeatureReader(student, 64, batch_tokens=24).read(rows, [0, 1, 2])
    samples = student.tokenize(rows, 64)
    assert counts.tolist() == [sample.num_supervised for sample in samples] and counts[-1] == 0
    for row, sample in enumerate(samples[:-1]):
        with torch.no_grad():
            output = student.model(input_ids=torch.tensor([sample.input_ids]), output_hidden_states=True)
        for number in (0, 1):
            own = output.hidden_states[number][0, torch.tensor(sample.labels) != -100].double()
            found = features[number, "mean_and_spread"][row]
            np.testing.assert_allclose(found[:-1], torch.cat([own.mean(0), own.std(0, unbiased=False)]), atol=2e-5)
            assert found[-1] == pytest.approx(np.log(counts[row]))
            np.testing.assert_array_equal(features[number, "mean"][row], np.append(found[:32], found[-1]))
    assert not features[1, "mean_and_spread"][-1].any() and features[2, "mean"].shape == (8, 33)
    output = student.model(input_ids=torch.tensor([samples[0].input_ids]))  # no hook is left
    assert output.logits.shape[-1] == student.model.config.vocab_size


def test_the_blocks_after_the_last_number_do_not_run():
    student = Student(make_model(), make_tokenizer())
    calls = []
    student.model.model.layers[1].register_forward_hook(lambda *_: calls.append("block"))
    student.model.lm_head.register_forward_hook(lambda *_: calls.append("head"))
    FeatureReader(student, 64).read(make_texts(4), [0, 1])
    assert calls == []
    FeatureReader(student, 64).read(make_texts(4), [2])
    assert calls == ["block"]


def test_a_window_reads_the_beginning_of_a_sample():
    student = Student(make_model(), make_tokenizer())
    long, short = "w1 w2 w3 w4 w5 w6", "w1 w2 w3"
    features, counts = FeatureReader(student, 64, window=3).read([long, short], [1])
    np.testing.assert_allclose(*features[1, "mean"][:, :-1], atol=1e-6)  # the same three tokens
    assert counts.tolist() == [6, 3]


# -- the regressor ----------------------------------------------------------------------------------------------------


def make_features(n, signal, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n, 12)).astype(np.float32)
    noise = rng.normal(size=n)
    features = {(2, "mean"): values, (4, "mean"): values}
    return features, np.ones(n, dtype=int), (1e-9 * (signal(values) + 0.3 * noise)).astype(np.float32)


def linear(values):
    return values @ np.linspace(-1, 1, 12)


def test_the_figures_are_those_of_samples_that_the_regressor_has_not_seen():
    features, counts, scores = make_features(400, linear)
    counts[7] = 0
    regressor = fit(features, counts, scores)
    own = regressor.described
    assert (own.num_blocks, own.pooling, own.regressor) == (2, "mean", "ridge")  # 4 blocks are no better
    assert own.num_fitted + own.num_calibrated + own.num_held_out == 399 and len(regressor.features) == own.num_fitted

    x, y = (values.astype(float) for values in (regressor.features, regressor.scores))
    ridge = RidgeCV(ALPHAS).fit((x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std())
    left = features[2, "mean"][regressor.held_out].astype(float)
    expected = ridge.predict((left - x.mean(0)) / x.std(0)) * y.std() + y.mean()
    assert own.spearman == pytest.approx(spearmanr(expected, scores[regressor.held_out]).statistic)
    seen = {tuple(row) for row in regressor.features} & {tuple(row) for row in features[2, "mean"][regressor.held_out]}
    assert not seen and own.spearman_interval[0] < own.spearman < own.spearman_interval[1]

    new, ones, truth = make_features(4000, linear, seed=1)
    predicted = regressor.predict(new, ones)
    np.testing.assert_allclose(predicted[:5], regressor.model.predict(new[2, "mean"][:5]), rtol=1e-5)
    inside = np.mean(np.abs(predicted - truth) <= own.half_width)
    assert abs(inside - 0.9) < 0.06  # two standard deviations with 60 samples to calibrate with, and more
    assert not regressor.predict(new, 0 * ones).any()


def test_boosting_is_chosen_where_a_line_does_not_fit():
    features, counts, scores = make_features(400, lambda values: 3 * np.abs(values[:, 0]) + values[:, 1])
    assert fit({(2, "mean"): features[2, "mean"]}, counts, scores).described.regressor == "boosting"


def test_the_fewest_blocks_within_a_standard_error_of_the_best_are_chosen():
    candidates = [
        {"num_blocks": number, "spearman": value, "standard_error": 0.02}
        for number, value in ((1, 0.5), (2, 0.64), (2, 0.645), (4, 0.66), (6, 0.65))
    ]
    assert choose(candidates)["spearman"] == 0.645


def test_scores_that_cannot_be_learned_are_refused():
    features, counts, scores = make_features(400, lambda values: 0 * values[:, 0])
    noise = fit(features, counts, scores).described
    with pytest.raises(ValueError, match=rf"held-out samples, .* of {noise.spearman:.2f}, below the `floor` of 0.3"):
        noise.check(0.3)
    noise.check(-1)
    with pytest.raises(ValueError, match=r"at least 60 samples .* got 59"):
        fit(*(part[:59] if isinstance(part, np.ndarray) else part for part in (features, counts, scores)))
    with pytest.raises(ValueError, match="All scores are equal"):
        fit(features, counts, 0 * scores)
    with pytest.raises(ValueError, match="at least 655 samples"):
        fit(features, counts, scores, coverage=0.99)


# -- the command ------------------------------------------------------------------------------------------------------

BENCHMARK = ["w1 w2 w3", "w5 w4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A student and 140 samples. To be quick, the command chooses among ridge regressions only, by two folds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distil, "REGRESSORS", ("ridge",))
        patch.setattr(distil, "FOLDS", 2)
        yield make_place(tmp_path_factory)


def make_place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    make_model().save_pretrained(folder / "student")
    make_tokenizer().save_pretrained(folder / "student")
    rows = [{"id": k, "text": text} for k, text in enumerate([*make_texts(139), ""])]
    Dataset.from_list(rows).to_json(folder / "samples.jsonl")
    return folder


def arguments(place, output_dir, *more):
    metric = ["--metric", "language_modeling", "--metric_kwargs", json.dumps({"texts": BENCHMARK})]
    argv = ["attribute", "--distill", "--dataset_name", str(place / "samples.jsonl"), "--output_dir", str(output_dir)]
    argv += ["--student_model_name_or_path", str(place / "student"), "--student_batch_size", "20", *metric]
    argv += ["--dataset_chunk", "20", "--student_learning_rate", "1e-2", "--student_eps_root", "1e-4"]
    argv += ["--distill_samples", "100", "--distill_blocks", "0", "1", "--distill_shard_size", "50"]
    return [*argv, "--distill_floor", "-1", *more]


def read(folder, file_format="parquet"):
    kind = {"parquet": "parquet", "jsonl": "json"}[file_format]
    files = sorted(map(str, (folder / "scored").glob(f"*.{file_format}")))
    return load_dataset(kind, data_files=files, split="train").to_list()


@pytest.fixture(scope="module")
def whole(place):
    cli.main(arguments(place, place / "whole", "--keep_top", "0.2"))
    return place / "whole"


def test_all_rows_are_scored_by_the_regressor_and_the_sample_has_its_exact_scores(place, whole):
    rows = read(whole)
    assert [row["id"] for row in rows] == list(range(140)) and len(list((whole / "scored").glob("*.parquet"))) == 3
    distilled = Distilled.load(whole / "distilled.npz")
    reader = FeatureReader(Student(str(place / "student")), 1024)
    regressor = distilled.regressors[None]
    expected = regressor.predict(*reader.read([row["text"] for row in rows], [regressor.described.num_blocks]))
    np.testing.assert_allclose([row["dpg_score"] for row in rows], expected, rtol=1e-4, atol=1e-9)
    assert rows[-1]["dpg_score"] == 0 and np.ptp(expected) > 0

    known = {row["id"]: row["dpg_score_exact"] for row in rows if row["dpg_score_exact"] is not None}
    sample = load_dataset("parquet", data_files=str(whole / "exact" / "scored.parquet"), split="train")
    assert known == dict(zip(sample["id"], sample["dpg_score"], strict=True)) and len(known) == 100
    alone = ["--dataset_name", str(place / "sample.jsonl"), "--output_dir", str(place / "alone")]
    sample.select_columns(["text"]).to_json(place / "sample.jsonl")
    cli.main([word for word in arguments(place, place, *alone) if word != "--distill"])
    exact = load_dataset("parquet", data_files=str(place / "alone" / "scored.parquet"), split="train")
    assert exact["dpg_score"] == sample["dpg_score"]

    assert check_manifest(whole) == []
    top = load_dataset("parquet", data_files=str(whole / "top.parquet"), split="train")
    order = np.argsort([-row["dpg_score"] for row in rows], kind="stable")
    assert top["id"] == sorted(order[:28].tolist())
    summary = json.loads((whole / "summary.json").read_text())
    own = summary["distilled"]["None"]
    assert own["spearman"] == regressor.described.spearman and len(own["candidates"]) == 4
    assert summary["num_samples"] == 140 and summary["num_scored"] == 100 and summary["num_kept"] == 28
    assert summary["best"][0]["row"] == order[0] and summary["times_as_fast_as_exact"] > 0


def test_only_the_missing_shards_are_scored_again(place, whole, tmp_path, capsys):
    before = read(whole)
    kept = (whole / "scored" / "00000-of-00003.parquet").stat().st_mtime_ns
    note = whole / "scored" / "notes" / "00001-of-00003.json"
    note.unlink()
    (whole / "scored" / "00001-of-00003.parquet").write_bytes(b"half")
    with FileLock(whole / "attribution.lock"):  # another process: the exact scores are not looked at
        cli.main(arguments(place, whole))
    assert read(whole) == before and note.exists() and not (whole / "top.parquet").exists()
    assert (whole / "scored" / "00000-of-00003.parquet").stat().st_mtime_ns == kept
    with pytest.raises(SystemExit):
        cli.main(arguments(place, whole, "--distill_blocks", "1"))
    message = " ".join(capsys.readouterr().err.split())
    assert "scores of other settings: distill_blocks (was [0, 1], is [1])" in message and "--overwrite" in message


def test_each_shard_is_given_to_one_process(tmp_path):
    (tmp_path / "notes").mkdir()
    shards = Shards(tmp_path, 25, 10, "parquet", "regressors")
    with shards.next() as first, shards.next() as second, shards.next() as third, shards.next() as none:
        assert (first, second, third, none) == (0, 1, 2, None)
        assert shards.rows(third) == range(20, 25)
    note = {"rows": 10, "regressors": "regressors"}
    shards.note(0).write_text(json.dumps(note))
    with shards.next() as first:
        assert first == 1 and shards.notes() == [note]
    shards.note(0).write_text(json.dumps(note | {"regressors": "others"}))
    with shards.next() as first:
        assert first == 0 and shards.notes() == []


def test_empty_samples_alone_have_no_features_and_score_zero(whole, place):
    regressor = Distilled.load(whole / "distilled.npz").regressors[None]
    reader = FeatureReader(Student(str(place / "student")), 1024)
    assert regressor.predict(*reader.read(["", ""], [regressor.described.num_blocks])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.91, 0.92, 0.93, 0.97, 0.99])
def test_a_number_of_samples_that_is_accepted_gives_a_half_width(coverage):
    accepted = []
    for number in range(1, 1200):
        try:
            distil.check_number(number, coverage)
        except ValueError:
            continue
        _, calibrating, _ = np.split(np.arange(number), [round(share * number) for share in distil.SHARES])
        assert np.ceil(coverage * (len(calibrating) + 1)) <= len(calibrating), number
        accepted.append(number)
    assert accepted and min(accepted) >= distil.LEAST


def test_shards_of_lost_regressors_are_not_taken_for_new_ones(place, whole, tmp_path, capsys):
    """Also if the folder of the shards is a link to another disk."""
    shutil.copytree(whole, tmp_path / "out")
    shutil.move(tmp_path / "out" / "scored", tmp_path / "disk")
    (tmp_path / "out" / "scored").symlink_to(tmp_path / "disk")
    (tmp_path / "out" / "distilled.npz").unlink()
    with pytest.raises(SystemExit):
        cli.main(arguments(place, tmp_path / "out"))
    assert "distilled.npz is missing" in " ".join(capsys.readouterr().err.split())
    theirs = tmp_path / "disk" / "train-00000-of-00002.parquet"
    theirs.write_bytes(b"theirs")
    stale = tmp_path / "disk" / "00000-of-00009.parquet"
    stale.write_bytes(b"")
    cli.main(arguments(place, tmp_path / "out", "--overwrite"))
    assert not stale.exists() and len(list((tmp_path / "disk").glob("*.parquet"))) == 4
    assert theirs.read_bytes() == b"theirs"


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("scored", "has a link, scored -> nowhere, whose target would be overwritten"),
        ("scored/notes", "scored' has a link, notes -> nowhere, whose target would be overwritten"),
        ("exact/scored.parquet", "exact' has a link, scored.parquet -> nowhere"),
        (None, "scored' is a file"),
    ],
)
def test_links_and_files_in_the_place_of_folders_are_refused_before_anything_is_scored(
    link, message, place, tmp_path, capsys
):
    if link is None:
        (tmp_path / "scored").write_text("mine")
    else:
        (tmp_path / link).parent.mkdir(exist_ok=True)
        (tmp_path / link).symlink_to("nowhere")
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments(place, tmp_path))
    assert raised.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "attribution.jsonl").exists()


def test_columns_of_exact_scores_are_those_of_no_other_metric():
    check_columns(["a", "b"], ["text"])
    for names, there in ((["a", "a_exact"], []), ([None], ["dpg_score_exact"])):
        with pytest.raises(UsageError, match="Rename it"):
            check_columns(names, there)


@pytest.mark.faults
def test_two_processes_score_what_one_does(place, whole, tmp_path, capsys):
    cli.main(arguments(place, tmp_path, "--distill_fit_only"))
    assert "held-out samples" in capsys.readouterr().out and not (tmp_path / "summary.json").exists()
    process = on_two_processes("trl_dpg.scripts.attribute", *arguments(place, tmp_path)[1:])
    assert process.returncode == 0, process.stderr
    assert read(tmp_path) == read(whole)
    assert json.loads((tmp_path / "summary.json").read_text())["num_shards"] == 3


def test_a_ranking_below_the_floor_is_refused_and_the_exact_scores_are_kept(place, tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments(place, tmp_path, "--distill_floor", "1", "--output_format", "jsonl"))
    message = " ".join(capsys.readouterr().err.split())
    assert raised.value.code == 2 and "below the --distill_floor of 1" in message and "--distill_samples" in message
    assert (tmp_path / "exact" / "scored.jsonl").exists() and not (tmp_path / "scored").exists()
    cli.main(arguments(place, tmp_path, "--output_format", "jsonl", "--distill_fit_only"))  # nothing is scored again
    assert "held-out samples" in capsys.readouterr().out and not (tmp_path / "summary.json").exists()
    cli.main(arguments(place, tmp_path, "--output_format", "jsonl"))
    assert len(read(tmp_path, "jsonl")) == 140


def test_each_of_several_metrics_is_distilled_and_their_contrast(place, tmp_path):
    metrics = {
        name: {"metric": "language_modeling", "metric_kwargs": {"texts": texts}}
        for name, texts in (("near", BENCHMARK), ("far", ["w9 w8"]))
    }
    argv = arguments(place, tmp_path, "--metrics", json.dumps(metrics), "--contrast", "near", "far")
    place_of_metric = argv.index("--metric")
    cli.main(argv[:place_of_metric] + argv[place_of_metric + 4 :])
    rows = read(tmp_path)
    assert {"dpg_score_near", "dpg_score_far", "dpg_score_contrast", "dpg_score_far_exact"} <= set(rows[0])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["distilled"]) == {"near", "far", "contrast"} and summary["ranked_by"] == "contrast"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--distill_coverage", "90"], "--distill_coverage is a share between 0 and 1, got 90"),
        (["--distill_floor", "2"], "--distill_floor is a correlation"),
        (["--distill_samples", "0"], "--distill_samples must be at least 1"),
        (["--distill_blocks", "-1"], "--distill_blocks must be at least 0"),
        (["--per_token"], "--per_token: distilled scores are of samples"),
        (["--distill_blocks", "3"], "--distill_blocks 3: the student has 2 blocks"),
        (["--distill_samples", "40"], "at least 60 samples"),
    ],
)
def test_wrong_input_is_named_and_ends_with_status_2(more, message, place, tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments(place, tmp_path, *more))
    assert raised.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
    journal = tmp_path / "attribution.jsonl"
    assert not journal.exists() or len(journal.read_bytes().splitlines()) == 1  # nothing was scored


def test_without_scikit_learn_the_extra_is_named_before_anything_is_scored(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.compose", None)
    with pytest.raises(SystemExit):
        cli.main(arguments(place, tmp_path))
    assert "pip install 'trl-dpg[distill]'" in capsys.readouterr().err
    assert not (tmp_path / "attribution.jsonl").exists()
