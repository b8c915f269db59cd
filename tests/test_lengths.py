"""`trl-dpg lengths`: what is measured, what is fitted, the report, and what is refused."""

import json
import random

import numpy as np
import pytest
from datasets import Dataset
from scipy.stats import ks_2samp, norm, wasserstein_distance

from tests.tiny import make_tokenizer
from trl_dpg import cli
from trl_dpg.length_target import Empirical, LengthTargets, LogNormal, Quantiles
from trl_dpg.practice.lengths import distances, effective_sample_size, fit, measure, summarize
from trl_dpg.practice.lengths.rows import DataError


RNG = np.random.default_rng(0)


def words(number):
    return " ".join(f"w{k % 7}" for k in range(number))


def sample(reasoning, answer="w1 w2", **columns):
    return {"prompt": "w3", "completion": answer, "reasoning": words(reasoning)} | columns


# -- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "median"),
    [("lognormal:200,0.5", 200), ("quantiles:0=50,0.5=120,1=900", 120), ("empirical:3,9,4", 4)],
)
def test_a_target_is_read_from_its_form_and_from_its_own_json(text, median, tmp_path):
    targets = LengthTargets.read(text)
    assert targets["all"].quantile(np.array([0.5])) == pytest.approx([median])
    (tmp_path / "target.json").write_text(json.dumps(targets.as_json(unit="words")))
    assert LengthTargets.read(str(tmp_path / "target.json")) == targets
    by_difficulty = LengthTargets.read(json.dumps({"easy": text, "hard": "lognormal:900,0.1"}))
    assert by_difficulty.of("easy") == targets["all"] and by_difficulty.of("hard").median == 900


def test_the_quantiles_of_an_empirical_target_are_its_lengths_as_often_as_their_weights():
    target = Empirical([10.0, 20.0, 40.0], [1.0, 2.0, 1.0])
    assert target.spread(4).tolist() == [10, 20, 20, 40]
    assert target.spread(8).tolist() == [10, 10, 20, 20, 20, 20, 40, 40]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("normal:3,4", "'normal:3,4' is neither a file nor a target"),
        ("nowhere.json", "'nowhere.json' is neither a file nor a target"),
        ("lognormal:300", "needs two numbers, the median and the sigma"),
        ("lognormal:-3,0.5", "a median and a sigma above 0, got -3 and 0.5"),
        ("lognormal:a,b", "cannot be read .*'a'"),
        ("quantiles:0=5,0.5=4", "do not decrease"),
        ("quantiles:0=5,2=9", "levels from 0 to 1"),
        ("quantiles:5,6", "cannot be read"),
        ("empirical:", "increasing lengths above 0"),
        ("{broken", "not valid JSON"),
        ("{}", "a mapping from difficulties"),
        ('{"easy": {"hard": "lognormal:3,1"}}', "'easy' is itself by difficulty"),
        ('{"form": "gamma"}', "Unknown form 'gamma'"),
        ('{"form": "lognormal", "mean": 3}', "does not fit"),
    ],
)
def test_a_target_that_cannot_be_read_is_refused_with_the_forms(text, message):
    with pytest.raises(ValueError, match=message):
        LengthTargets.read(text)


def test_a_file_that_is_no_target_and_a_difficulty_without_one_are_refused(tmp_path):
    (tmp_path / "other.json").write_text('{"layout": "something"}')
    with pytest.raises(ValueError, match="has no layout 'trl-dpg length target 1'"):
        LengthTargets.read(str(tmp_path / "other.json"))
    with pytest.raises(ValueError, match="no lengths for the difficulty 'hard'; it has 'easy'"):
        LengthTargets.read({"easy": "lognormal:3,1"}).of("hard")
    with pytest.raises(ValueError, match="lengths for 'easy', but the samples have no difficulty"):
        LengthTargets.read({"easy": "lognormal:3,1"}).of("all")


# -- distances and fits -----------------------------------------------------------------------------------------------


def test_the_distance_of_two_lognormals_of_one_sigma_is_the_difference_of_their_log_medians():
    lengths = LogNormal(300.0, 0.4).spread(5000)
    found = distances(lengths, LogNormal(200.0, 0.4))
    assert found["wasserstein"] == pytest.approx(np.log(1.5), abs=1e-3)
    # The largest difference of two normal distributions is half way between their means
    assert found["ks"] == pytest.approx(2 * norm.cdf(np.log(1.5) / 0.8) - 1, abs=1e-3)


def test_distances_are_those_of_scipy():
    rng = np.random.default_rng(0)
    for number, others in ((1, 1), (7, 30), (6667, 10_000)):
        lengths, more = (np.ceil(rng.lognormal(5, 0.7, size=size)) for size in (number, others))
        found = distances(lengths, more)
        assert found["wasserstein"] == pytest.approx(wasserstein_distance(np.log(lengths), np.log(more)), rel=1e-9)
        assert found["ks"] == pytest.approx(ks_2samp(lengths, more, method="asymp").statistic, rel=1e-9)


def test_the_effective_sample_size_is_all_samples_at_the_target_and_few_far_from_it():
    target = LogNormal(100.0, 0.3)
    assert effective_sample_size(target.spread(4000), target) == pytest.approx(4000, rel=0.02)
    shifted = effective_sample_size(LogNormal(150.0, 0.3).spread(4000), target)
    # E[w²] of two normals that differ by d standard deviations is exp(d²)
    assert shifted == pytest.approx(4000 / np.exp((np.log(1.5) / 0.3) ** 2), rel=0.25)
    assert effective_sample_size(np.array([9000.0]), LogNormal(10.0, 0.01)) == 0


def test_samples_that_were_cut_off_do_not_make_a_fit_shorter():
    true = LogNormal(400.0, 0.7)
    lengths = np.exp(RNG.normal(np.log(true.median), true.sigma, 4000))
    cut = lengths > 700
    seen = np.minimum(lengths, 700)
    fitted = fit("lognormal", seen, cut)
    assert fitted.median == pytest.approx(400, rel=0.05) and fitted.sigma == pytest.approx(0.7, rel=0.05)
    assert fit("lognormal", seen[~cut]).median < 330  # without them
    middle = np.array([0.25, 0.5])
    for form in ("empirical", "quantiles"):
        target = fit(form, seen, cut)
        assert target.quantile(middle) == pytest.approx(np.quantile(lengths, middle), rel=0.05)


def test_a_fit_of_whole_samples_is_close_to_them_in_every_form():
    lengths = np.round(LogNormal(300.0, 0.5).spread(999))
    for form in ("empirical", "lognormal", "quantiles"):
        assert distances(lengths, fit(form, lengths))["wasserstein"] < 0.03
    assert distances(lengths, fit("empirical", lengths))["ks"] < 1e-3


def test_a_fit_needs_samples_and_a_form():
    with pytest.raises(DataError, match="at least 2 samples that were not cut off, got 1"):
        fit("lognormal", np.array([3.0, 4.0]), np.array([True, False]))
    with pytest.raises(DataError, match="Unknown form 'gamma'"):
        fit("gamma", np.array([3.0, 4.0]))


# -- measurements -----------------------------------------------------------------------------------------------------


def test_lengths_are_tokens_of_the_reasoning_of_the_answer_or_of_both():
    dataset = Dataset.from_list([sample(5), sample(12, answer="w1 w2 w3")])
    for what, expected in (("reasoning", [5, 12]), ("answer", [2, 3]), ("all", [7, 15]), (None, [5, 12])):
        measured = measure(dataset, make_tokenizer(), what)
        assert measured.lengths.tolist() == expected, what
    assert measure(dataset).unit == "words" and measure(dataset).lengths.tolist() == [5, 12]


def test_lengths_of_a_tokenizer_that_cuts_and_pads_are_whole():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    assert measure(Dataset.from_list([sample(2), sample(50)]), tokenizer).lengths.tolist() == [2, 50]


def test_reasoning_in_tags_counts_and_a_thought_without_end_was_cut_off():
    texts = ["<think>w1 w2 w3</think> w4", "<think>w1 w2", "w1 w2 w3 w4"]
    measured = measure(Dataset.from_dict({"prompt": ["w0"] * 3, "completion": texts}))
    assert measured.measure == "reasoning" and measured.lengths.tolist() == [3, 2, 0]
    assert measured.truncated.tolist() == [False, True, False]


def test_finish_reason_and_length_column_are_read():
    dataset = Dataset.from_dict({"n": [3, 8], "finish_reason": ["length", "stop"]})
    measured = measure(dataset, length_column="n")
    assert measured.lengths.tolist() == [3, 8] and measured.truncated.tolist() == [True, False]


def test_the_difficulty_is_the_share_of_correct_samples_of_a_prompt():
    rows = []
    for prompt, right in (("a", 4), ("b", 2), ("c", 1)):
        rows += [sample(3, correct=k < right) | {"prompt": prompt} for k in range(4)]
    measured = measure(Dataset.from_list(rows))
    assert measured.difficulty.tolist() == ["easy"] * 4 + ["medium"] * 4 + ["hard"] * 4
    assert measured.names == ["easy", "medium", "hard"]
    cut = measure(Dataset.from_list(rows), difficulty="solved", difficulty_edges=[0.5])
    assert cut.difficulty.tolist() == ["from 0.5"] * 8 + ["below 0.5"] * 4
    assert measure(Dataset.from_list(rows), difficulty="none").names == ["all"]


def test_numbers_of_a_column_are_cut_at_the_edges():
    dataset = Dataset.from_list([sample(3, level=level) for level in (0.1, 0.5, 0.9, None)])
    measured = measure(dataset, difficulty="level", difficulty_edges=[0.33, 0.67])
    assert measured.difficulty.tolist() == ["below 0.33", "0.33 to 0.67", "from 0.67", "unknown"]


# -- the summary and the command --------------------------------------------------------------------------------------


def rows_of_two_difficulties(number=400, seed=0):
    rng = random.Random(seed)
    rows = []
    for k in range(number):
        hard = k % 2
        length = max(round(rng.lognormvariate(4.0 if hard else 3.0, 0.4)), 1)
        rows.append(
            sample(
                length,
                difficulty="hard" if hard else "easy",
                correct=length < 80,
                finish_reason="length" if length > 100 else "stop",
            )
        )
    return rows


def test_the_summary_keeps_right_and_wrong_samples_and_the_difficulties_apart():
    rows = rows_of_two_difficulties()
    lengths = np.array([len(row["reasoning"].split()) for row in rows])
    figures, targets = summarize(measure(Dataset.from_list(rows)))
    hard = figures["by_difficulty"]["hard"]
    assert hard["num_samples"] == 200 and hard["quantiles"]["0.5"] == np.median(lengths[1::2])
    assert hard["correct"]["num_samples"] == (lengths[1::2] < 80).sum()
    assert hard["correct"]["quantiles"]["0.99"] < 80 <= hard["wrong"]["quantiles"]["0.01"]
    assert figures["overall"]["share_truncated"] == (lengths > 100).mean()
    assert sum(figures["overall"]["histogram"]) == 400
    bins = figures["overall"]["share_correct_by_length"]
    assert bins[0]["share_correct"] == 1 and bins[-1]["share_correct"] < 0.5
    assert all(b["low"] <= b["share_correct"] <= b["high"] for b in bins)
    assert set(targets) == {"empirical", "lognormal", "quantiles"}
    assert max(targets["empirical"]["hard"].lengths) < 80  # wrong ones are not to be followed


def test_the_command_writes_figures_a_page_and_targets_that_can_be_read(tmp_path, capsys):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for name, seed in (("data", 0), ("other", 1)):
        Dataset.from_list(rows_of_two_difficulties(seed=seed)).to_json(tmp_path / f"{name}.jsonl")
    command = ["lengths", "--dataset_name", str(tmp_path / "data.jsonl"), "--tokenizer", str(tmp_path / "tokenizer")]
    command += ["--reference_dataset", str(tmp_path / "other.jsonl"), "--output_dir", str(tmp_path / "out")]
    cli.main(command)
    figures = json.loads((tmp_path / "out" / "lengths.json").read_text())
    assert figures["layout"] == "trl-dpg lengths 1" and figures["measure"] == "reasoning"
    assert figures["reference"]["hard"]["wasserstein"] < 0.15
    for form in ("empirical", "lognormal", "quantiles"):
        targets = LengthTargets.read(str(tmp_path / "out" / f"target_{form}.json"))
        assert set(targets) == {"easy", "hard"}
        assert targets["easy"].quantile(np.array([0.5])) < targets["hard"].quantile(np.array([0.5]))
    page = (tmp_path / "out" / "lengths.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "default-src 'none'" in page
    assert len(list((tmp_path / "out").glob("*.png"))) == 3
    printed = capsys.readouterr().out
    assert "against the reference" in printed and "difficulty: the column difficulty" in printed


def test_a_dataset_without_correctness_and_difficulty_has_a_report_too(tmp_path):
    Dataset.from_list([{"text": words(k)} for k in range(3, 30)]).to_parquet(tmp_path / "data.parquet")
    cli.main(["lengths", "--dataset_name", str(tmp_path / "data.parquet"), "--output_dir", str(tmp_path / "out")])
    figures = json.loads((tmp_path / "out" / "lengths.json").read_text())
    assert figures["measure"] == "all" and list(figures["by_difficulty"]) == ["all"]
    assert figures["overall"]["share_correct"] is None and len(list((tmp_path / "out").glob("*.png"))) == 2


@pytest.fixture
def bad(tmp_path):
    """A dataset with columns that can be misread."""
    rows = [
        sample(3 + k, number=k / 100, correct="yes", hard=["x"], negative=-k, short=k > 5, text_length=f"{k} tokens")
        for k in range(60)
    ]
    Dataset.from_list(rows).to_json(tmp_path / "data.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "strange.jsonl").write_text('{"image": 3}\n')
    (tmp_path / "answers.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "file").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--dataset_name is required"),
        ("--dataset_name {0}/none.jsonl", "there is no file"),
        ("--dataset_name {0}/empty.jsonl", "--dataset_name"),
        ("--dataset_name {0}/broken.jsonl", "could not be read"),
        ("--dataset_name {0}/strange.jsonl", "Row 0 of the dataset is not a sample"),
        ("--dataset_name {0}/data.jsonl --tokenizer {0}/none", "--tokenizer"),
        ("--dataset_name {0}/data.jsonl --measure thoughts", "--measure 'thoughts'"),
        ("--dataset_name {0}/data.jsonl --correct_column correct", "must hold true and false, or numbers, got e.g."),
        ("--dataset_name {0}/data.jsonl --correct_column none", "--correct_column: there is no column 'none'"),
        ("--dataset_name {0}/data.jsonl --length_column none", "--length_column: there is no column 'none'"),
        ("--dataset_name {0}/data.jsonl --length_column text_length", "holds no numbers but e.g. '0 tokens'"),
        ("--dataset_name {0}/data.jsonl --length_column negative", "has -1.0 in row 1"),
        ("--dataset_name {0}/data.jsonl --length_column number --tokenizer x", "Give one of the two"),
        ("--dataset_name {0}/data.jsonl --difficulty level", "--difficulty: there is no column 'level'"),
        ("--dataset_name {0}/data.jsonl --difficulty number", "has 60 different values"),
        ("--dataset_name {0}/data.jsonl --difficulty hard --difficulty_edges 1", "cut numbers, but 'hard' holds"),
        ("--dataset_name {0}/data.jsonl --difficulty number --difficulty_edges 2 1", "must be increasing"),
        ("--dataset_name {0}/answers.jsonl --measure reasoning", "has anything to measure"),
        ("--dataset_name {0}/answers.jsonl --difficulty solved", "needs the prompts of the samples"),
        (
            "--dataset_name {0}/answers.jsonl --reference_dataset {0}/none.json",
            "--reference_dataset: there is no file",
        ),
        ("--dataset_name {0}/answers.jsonl --output_dir {0}/file", "is a file"),
    ],
)
def test_bad_input_is_refused_with_the_remedy_and_nothing_is_written(arguments, message, bad, capsys):
    before = sorted(bad.rglob("*"))
    argv = arguments.format(bad).split()
    if "--correct_column" not in argv and "data.jsonl" in arguments:
        argv += ["--correct_column", "short"]
    if "--output_dir" not in argv:
        argv += ["--output_dir", str(bad / "out")]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["lengths", *argv])
    assert stopped.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
    assert sorted(bad.rglob("*")) == before


def test_quantiles_refuses_levels_that_do_not_increase():
    with pytest.raises(ValueError, match="two or more increasing levels"):
        Quantiles([0.5, 0.5], [3, 4])
