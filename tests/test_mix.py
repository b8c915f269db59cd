"""`trl-dpg mix`: lengths that follow a target, clean data, mixtures, and what is refused."""

import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset, load_dataset

from tests.teacher_server import Server
from trl_dpg import cli
from trl_dpg.length_target import LengthTargets, LogNormal
from trl_dpg.practice.lengths import distances, measure
from trl_dpg.practice.lengths.rows import DataError
from trl_dpg.practice.mixing import (
    MixConfig,
    Sources,
    choose,
    contaminated,
    exact_duplicates,
    mix,
    near_duplicates,
    rewrite,
)
from trl_dpg.practice.mixing.resampling import round_shares
from trl_dpg.provenance import check_manifest


RNG = np.random.default_rng(0)
MEDIANS = {"easy": 40, "medium": 60, "hard": 120}


def sentence(number, rng):
    return " ".join(rng.choices(["so", "then", "we", "add", "two", "check", "wait", "sum", "seven"], k=number))


def make_rows(number, seed=0, factor=1.0):
    """Samples with log-normal lengths by difficulty. No two are equal."""
    rng, rows = random.Random(seed), []
    for k in range(number):
        name = ("easy", "medium", "hard")[k % 3]
        length = max(round(factor * MEDIANS[name] * rng.lognormvariate(0, 0.8)), 1)
        rows.append(
            {
                "prompt": f"What is {seed} plus {k}?",
                "completion": f"It is {seed + k}.",
                "reasoning": sentence(length, rng),
                "difficulty": name,
                "finish_reason": "length" if k % 50 == 0 else "stop",
                "correct": k % 10 != 1,
                "n": length,
            }
        )
    return rows


def make_mixture(rows, target="lognormal:50,0.4", num_samples=100, short=None, replay=None, benchmark=(), **config):
    datasets = [None if part is None else Dataset.from_list(part) for part in (rows, short, replay)]
    measured = [None if part is None else measure(part) for part in datasets[:2]]
    sources = Sources(datasets[0], measured[0], datasets[1], measured[1], datasets[2], benchmark)
    return mix(sources, None if target is None else LengthTargets.read(target), MixConfig(num_samples, **config))


# -- the choice -------------------------------------------------------------------------------------------------------


def test_the_choice_follows_the_target_without_repeating_a_sample():
    lengths = LogNormal(100.0, 0.8).spread(5000)
    target = LogNormal(80.0, 0.4)
    chosen = choose(lengths, target, 1000, np.random.default_rng(0))
    assert len(set(chosen.rows.tolist())) == 1000 and not chosen.holes and not chosen.num_elsewhere
    before, after = distances(lengths, target), distances(lengths[chosen.rows], target)
    assert after["wasserstein"] < 0.05 * before["wasserstein"] and after["ks"] < 0.1 * before["ks"]


def test_what_is_missing_is_reported_and_filled_from_the_nearest_lengths():
    lengths = np.concatenate([np.full(50, 10.0), np.full(500, 100.0), np.full(500, 1000.0)])
    target = LengthTargets.read("empirical:10,1000")["all"]
    chosen = choose(lengths, target, 200, np.random.default_rng(0))
    (hole,) = chosen.holes
    assert hole.low <= 10 <= hole.high and (hole.wanted, hole.missing) == (100, 50)
    assert chosen.num_elsewhere == 50
    assert np.unique(lengths[chosen.rows], return_counts=True)[1].tolist() == [50, 50, 100]
    strict = choose(lengths, target, 200, np.random.default_rng(0), fill=False)
    assert len(strict.rows) == 150 and strict.num_elsewhere == 0 and strict.holes == chosen.holes


def test_inside_a_bin_samples_are_drawn_with_probabilities_by_their_weights():
    lengths, target = np.full(3, 10.0), LogNormal(10.0, 0.001)
    weights = np.log([1.0, 2.0, 5.0])
    rng = np.random.default_rng(0)
    drawn = [choose(lengths, target, 1, rng, log_weights=weights).rows[0] for _ in range(3000)]
    # Three standard deviations of a share of 3000 draws are below 0.03
    assert np.bincount(drawn) / 3000 == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.03)


def test_shares_are_rounded_to_their_sum():
    assert round_shares({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, 100) == {"a": 34, "b": 33, "c": 33}
    assert sum(round_shares({"a": 0.15, "b": 0.85}, 7).values()) == 7


# -- clean data -------------------------------------------------------------------------------------------------------


def slowly_contaminated(texts, benchmark, ngram):
    """The definition, with sets of tuples."""

    def split(text):
        return "".join(c if c.isalnum() else " " for c in text.lower()).split()

    def runs(found, length):
        return {tuple(found[k : k + length]) for k in range(len(found) - length + 1)}

    marks = []
    for text in texts:
        mark = False
        for item in map(split, benchmark):
            length = min(ngram, len(item))
            mark |= len(item) >= 5 and bool(runs(item, length) & runs(split(text), length))
        marks.append(mark)
    return marks


def test_contamination_is_a_shared_run_of_words():
    rng = random.Random(1)
    benchmark = [sentence(k, rng) for k in (3, 5, 6, 9, 20, 30)]
    texts = [sentence(40, rng) for _ in range(200)]
    texts[7] = f"{texts[7]} {benchmark[5].upper().replace(' ', ', ')}!"
    texts[9] = f"x {benchmark[1]}"
    texts[11] = f"z z {benchmark[0]} z z z z z z z z z z"  # three words are too few to look for
    found = contaminated(texts, benchmark, ngram=8)
    assert found.rows.tolist() == slowly_contaminated(texts, benchmark, 8)
    assert found.rows[[7, 9, 11]].tolist() == [True, True, False] and found.num_too_short == 1 and found.num_hit >= 2


def test_duplicates_but_for_case_and_white_space_are_found():
    assert exact_duplicates(["A b", "a  B\n", "a c"]).tolist() == [False, True, False]


def test_near_duplicates_are_those_above_the_similarity():
    pytest.importorskip("datasketch")
    rng = random.Random(0)
    texts = [sentence(200, rng) for _ in range(4)]
    words = texts[0].split()
    almost = " ".join([*words[:100], "other", *words[101:]])  # 5 of 196 runs of five words differ
    assert near_duplicates([*texts, almost], 0.8).tolist() == [False] * 4 + [True]
    half = " ".join(words[:100] + texts[1].split()[:100])
    assert not near_duplicates([*texts, half], 0.8).any()


def test_without_datasketch_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasketch", None)
    with pytest.raises(ImportError, match=r"pip install 'trl-dpg\[mix\]'"):
        near_duplicates(["a"])


def test_cut_off_wrong_repeated_and_contaminated_samples_are_left_out_and_counted():
    rows = make_rows(300)
    rows[4] = rows[5] | {"difficulty": rows[4]["difficulty"]}
    benchmark = [rows[8]["prompt"] + " " + rows[8]["reasoning"]]
    mixture = make_mixture(rows, num_samples=150, benchmark=benchmark)
    dropped = mixture.figures["dropped"]
    assert dropped == {"empty": 0, "truncated": 6, "wrong": 30, "contaminated": 1, "exact_duplicates": 1}
    chosen = mixture.dataset
    assert (
        all(chosen["correct"])
        and "length" not in chosen["finish_reason"]
        and rows[8]["prompt"] not in chosen["prompt"]
    )
    everything = make_mixture(rows, num_samples=300, keep_wrong=True, keep_truncated=True, deduplicate="none")
    assert len(everything.dataset) == 300 and everything.figures["dropped"] == {"empty": 0, "truncated": 0, "wrong": 0}


# -- the mixture ------------------------------------------------------------------------------------------------------


def test_each_difficulty_follows_its_own_target_at_its_share():
    target = {"easy": "lognormal:30,0.3", "medium": "lognormal:60,0.3", "hard": "lognormal:100,0.3"}
    shares = {"easy": 1, "medium": 1, "hard": 2}
    mixture = make_mixture(make_rows(3000), target, 400, difficulty_shares=shares)
    names = np.array(mixture.dataset["difficulty"][:])
    lengths = np.array(mixture.dataset["length"][:])
    assert {name: int((names == name).sum()) for name in shares} == {"easy": 100, "medium": 100, "hard": 200}
    for name, text in target.items():
        assert distances(lengths[names == name], LengthTargets.read(text)["all"])["wasserstein"] < 0.05
    before, after = mixture.figures["before"], mixture.figures["after"]
    assert after["wasserstein"] < 0.1 * before["wasserstein"]
    assert after["effective_sample_size"] > 0.9 * 400 and before["num_samples"] == 3000


def test_the_same_seed_makes_the_same_mixture_and_another_one_another():
    rows = make_rows(900)
    first, again, other = (make_mixture(rows, seed=seed).dataset["prompt"][:] for seed in (0, 0, 1))
    assert first == again and set(first) != set(other)


def test_samples_with_high_scores_are_preferred():
    rows = [row | {"dpg_score": 1e-6 * (k % 2)} for k, row in enumerate(make_rows(2000))]
    mixture = make_mixture(rows, num_samples=100, score_column="dpg_score")
    plain = make_mixture(rows, num_samples=100)
    # Scores of two standard deviations' difference: e² to 1
    assert np.mean(mixture.dataset["dpg_score"][:]) > 0.75e-6 > 0.65e-6 > np.mean(plain.dataset["dpg_score"][:])


def test_long_and_short_samples_ask_for_what_they_are_and_short_ones_are_of_the_same_prompts():
    rows = make_rows(600)
    short = [row | {"reasoning": f"so {k} seven", "n": 3} for k, row in enumerate(make_rows(600))]
    mixture = make_mixture(rows, num_samples=200, short=short, short_ratio=0.4)
    assert mixture.figures["sources"] == {"data": 120, "short": 80} and mixture.figures["short"]["num_paired"] == 80
    for row in mixture.dataset:
        brief = "Think briefly" in row["prompt"]
        assert brief == (row["source"] == "short") == (row["length"] == 3)
        assert brief != ("Think it through in detail" in row["prompt"])
    assert "between detailed and brief" in mixture.figures["prompt_for_use"]


def test_an_instruction_goes_into_the_last_message_of_the_user():
    rows = [
        {"messages": [{"role": "user", "content": f"{k}?"}, {"role": "assistant", "content": sentence(k + 2, random)}]}
        for k in range(40)
    ]
    mixture = make_mixture(rows, None, 20, short=rows, short_ratio=0.5, short_prompt="Be brief.", long_prompt="")
    ends = {row["source"]: row["messages"][0]["content"].split("?")[1] for row in mixture.dataset}
    assert ends == {"short": "\n\nBe brief.", "data": ""}
    assert all(row["messages"][1]["role"] == "assistant" for row in mixture.dataset)


def test_other_data_is_replayed_at_its_share_without_the_benchmark():
    replay = [{"prompt": f"Tell me tale {k}.", "completion": "Once upon a time there was a king."} for k in range(100)]
    benchmark = ["Tell me tale 3 . once upon a time there was a king"]
    mixture = make_mixture(make_rows(600), num_samples=200, replay=replay, replay_ratio=0.25, benchmark=benchmark)
    assert mixture.figures["sources"] == {"data": 150, "replay": 50}
    assert mixture.figures["replay"] == {"dropped": {"contaminated": 1}}
    kept = [row for row in mixture.dataset if row["source"] == "replay"]
    assert len(kept) == 50 and all(row["length"] is None for row in kept)
    assert "Tell me tale 3." not in mixture.dataset["prompt"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_samples": 700}, "700 samples are to come from the dataset, which has"),
        ({"difficulty_shares": {"trivial": 1}}, "has 'trivial', but the difficulties of the samples are"),
        ({"target": {"easy": "lognormal:30,0.3"}}, "no lengths for the difficulty"),
        ({"short_ratio": 0.5}, "`short_ratio` and `short_dataset` belong together"),
        ({"short": make_rows(20), "short_ratio": 0.5}, "50 short samples are needed, but `short_dataset` has"),
        ({"replay": make_rows(20), "replay_ratio": 0.5}, "50 samples of other data are needed"),
        ({"replay": [{"text": "a"}] * 90, "replay_ratio": 0.5}, r"different columns, \['prompt', 'completion'"),
        ({"score_column": "prompt"}, "`score_column`: 'prompt' must hold numbers"),
        ({"score_column": "dpg_score"}, "there is no column 'dpg_score'"),
        ({"short_ratio": 1.0}, "`short_ratio` is a share from 0 to below 1"),
        ({"bin_width": 0.0}, "`bin_width` is a width in log-length"),
        ({"deduplicate": "fuzzy"}, "`deduplicate` must be"),
        ({"near_duplicates": 80}, "`near_duplicates` is a similarity between 0 and 1"),
        ({"difficulty_shares": {"easy": -1}}, "shares of 0 or more"),
        ({"ngram": 0}, "`ngram` must be at least 1"),
    ],
)
def test_what_cannot_be_mixed_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        make_mixture(make_rows(600), **given)


def test_texts_without_prompts_cannot_be_asked_to_be_brief():
    rows = [{"text": sentence(k + 2, random)} for k in range(40)]
    with pytest.raises(DataError, match="Set `long_prompt` and `short_prompt` to ''"):
        make_mixture(rows, None, 20, short=rows, short_ratio=0.5)
    plain = make_mixture(rows, None, 20, short=rows, short_ratio=0.5, long_prompt="", short_prompt="")
    assert len(plain.dataset) == 20


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mix")
    Dataset.from_list(make_rows(900)).to_json(folder / "data.jsonl")
    Dataset.from_list(make_rows(300, seed=5, factor=0.5)).to_json(folder / "like.jsonl")
    Dataset.from_dict({"image": ["a"]}).to_json(folder / "images.jsonl")
    (folder / "other.json").write_text('{"layout": 3}')
    return folder


def run(files, output_dir, *arguments):
    cli.main(["mix", "--dataset_name", str(files / "data.jsonl"), "--output_dir", str(output_dir), *arguments])
    return json.loads((output_dir / "mix.json").read_text())


def test_the_command_writes_a_dataset_that_trl_can_load_its_figures_and_a_card(files, tmp_path, capsys):
    figures = run(files, tmp_path / "out", "--target", "lognormal:50,0.4", "--num_samples", "200")
    assert figures["after"]["wasserstein"] < 0.1 * figures["before"]["wasserstein"]
    assert figures["unit"] == "words" and figures["num_written"] == 200
    dataset = load_dataset(str(tmp_path / "out"), split="train")
    assert len(dataset) == 200 and {"length", "difficulty", "source", "reasoning"} <= set(dataset.column_names)
    assert "lognormal:50,0.4" in (tmp_path / "out" / "README.md").read_text()
    assert check_manifest(tmp_path / "out") == []
    assert "200 of 200 samples (200 data). Left out: 18 truncated" in capsys.readouterr().out


def test_the_command_starts_without_torch_and_what_else_takes_seconds_to_import(files, tmp_path):
    rows = ["--dataset_name", str(files / "data.jsonl"), "--output_dir", str(tmp_path), "--num_samples", "100"]
    code = "import sys; from trl_dpg import cli; cli.main(sys.argv[1:]); print(*sys.modules)"
    command = [sys.executable, "-c", code, "mix", *rows, "--target", "lognormal:50,0.4"]
    modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[-2].split()
    assert "datasets" in modules and not {"torch", "transformers", "scipy.stats", "accelerate"} & set(modules)


@pytest.mark.parametrize("kind", ["fitted", "dataset", "json"])
def test_a_target_may_be_a_fitted_one_a_dataset_or_json_by_difficulty(kind, files, tmp_path):
    cli.main(["lengths", "--dataset_name", str(files / "like.jsonl"), "--output_dir", str(tmp_path / "fit")])
    target = {
        "fitted": str(tmp_path / "fit" / "target_lognormal.json"),
        "dataset": str(files / "like.jsonl"),
        "json": '{"easy": "lognormal:20,0.8", "medium": "lognormal:30,0.8", "all": "lognormal:60,0.8"}',
    }[kind]
    figures = run(files, tmp_path / "out", "--target", target, "--num_samples", "100")
    assert figures["after"]["wasserstein"] < 0.25 * figures["before"]["wasserstein"]
    assert set(figures["after"]["by_difficulty"]) == {"easy", "medium", "hard"}


def test_an_earlier_mixture_is_replaced_only_on_request(files, tmp_path, capsys):
    run(files, tmp_path, "--num_samples", "20", "--output_format", "jsonl")
    text = (tmp_path / "train.jsonl").read_text()
    with pytest.raises(SystemExit):
        run(files, tmp_path, "--num_samples", "30", "--output_format", "jsonl")
    assert "has train.jsonl and mix.json and README.md already" in capsys.readouterr().err
    assert (tmp_path / "train.jsonl").read_text() == text
    run(files, tmp_path, "--num_samples", "30", "--output_format", "jsonl", "--overwrite")
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--num_samples is required"),
        ("--num_samples 0", "--num_samples must be at least 1"),
        ("--num_samples 9000", "--num_samples: 9000 samples are to come from the dataset, which has"),
        ("--num_samples 9 --target normal:3", "--target: 'normal:3' is neither a file nor a target"),
        ("--num_samples 9 --target {0}/none.jsonl", "--target: there is no file"),
        ("--num_samples 9 --target {0}/other.json", "--target"),
        ('--num_samples 9 --target {{"easy":"lognormal:9,1"}}', "The target has no lengths for"),
        ("--num_samples 9 --output_format csv", "--output_format must be"),
        ("--num_samples 9 --short_ratio 2", "--short_ratio is a share"),
        ("--num_samples 9 --short_ratio 0.5", "--short_ratio and --short_dataset belong together"),
        ("--num_samples 9 --replay_dataset {0}/like.jsonl", "--replay_ratio and --replay_dataset belong together"),
        ("--num_samples 9 --replay_ratio 0.5 --replay_dataset {0}/none.jsonl", "--replay_dataset: there is no file"),
        ("--num_samples 9 --benchmarks {0}/none.jsonl", "--benchmarks: there is no file"),
        ("--num_samples 9 --benchmarks {0}/images.jsonl", "Name it by --benchmark_column"),
        ("--num_samples 9 --benchmarks {0}/images.jsonl --benchmark_column text", "has no column 'text'"),
        ("--num_samples 9 --benchmark_column text", "Give both"),
        ("--num_samples 9 --difficulty_shares easy", "--difficulty_shares must be JSON"),
        ('--num_samples 9 --difficulty_shares {{"easy":"half"}}', "--difficulty_shares maps difficulties to numbers"),
        ("--num_samples 9 --teacher m", "Give both, or neither"),
        ("--num_samples 9 --teacher m --base_url http://x/v1 --length_column n", "Use --tokenizer"),
        ("--num_samples 9 --teacher m --base_url http://x/v1 --short_dataset {0}/like.jsonl", "Give one of the two"),
        ("--num_samples 9 --verifier judge", "--verifier must be"),
        ("--num_samples 9 --bin_width 7", "--bin_width is a width in log-length"),
        ("--num_samples 9 --score_column none", "--score_column: there is no column"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(arguments, message, files, tmp_path, capsys):
    before = sorted(files.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        run(files, tmp_path / "out", *arguments.format(files).split())
    assert stopped.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
    assert sorted(files.rglob("*")) == before and not (tmp_path / "out").exists()


# -- rewrites ---------------------------------------------------------------------------------------------------------


def answering(completions, asked):
    """A teacher that answers in turn. `None`: no answer."""

    def ask(requests):
        asked.extend(requests)
        return [
            {"row": k, "completion": text, "finish_reason": "length" if text == "so we" else "stop"}
            for k, text in enumerate(completions)
            if text is not None
        ]

    return ask


def same(answer, right):
    if "?" in right:
        raise ValueError("no answer")
    return answer.rstrip(".") == right.rstrip(".")


def test_a_rewrite_replaces_the_reasoning_and_keeps_the_answer_and_must_be_shorter_and_right():
    long = "first we add 3 and 4 and then we check that it is 7"
    rows = [{"prompt": f"{k}?", "completion": "7", "reasoning": long, "solution": "7"} for k in range(7)]
    rows[6]["solution"] = "?"
    good = "add 3 and 4 FINAL ANSWER: 7."
    texts = [good, "add 3 and 4 FINAL ANSWER: 8", f"{long} FINAL ANSWER: 7", "add 3 and 4", "so we", None, good]
    asked = []
    short, figures = rewrite(Dataset.from_list(rows), answering(texts, asked), same)
    assert short.to_list() == [rows[0] | {"reasoning": "add 3 and 4"}]
    assert figures["asked"] == 7 and figures["written"] == 1 and figures["unanswered"] == 1
    assert figures["dropped"] == {"another answer": 2, "not shorter": 1, "without an answer": 1, "cut off": 1}
    assert "0?" in asked[0]["prompt"] and long in asked[0]["prompt"] and "structure" in asked[0]["prompt"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"prompt": "3 + 4?", "completion": "<think>\none two three four\n</think>\n\n7"},
            {"completion": "<think>\none four\n</think>\n\n7"},
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "one two three four?", "reasoning_content": None},
                    {"role": "assistant", "content": "7", "reasoning_content": "one two three four"},
                ]
            },
            {
                "messages": [
                    {"role": "user", "content": "one two three four?", "reasoning_content": None},
                    {"role": "assistant", "content": "7", "reasoning_content": "one four"},
                ]
            },
        ),
        (
            {"prompt": "3 + 4?", "completion": "one two three four, so 7", "solution": "7"},
            {"completion": "one four\n\n7"},
        ),
    ],
)
def test_a_rewrite_stands_where_the_reasoning_was(row, expected):
    short, _ = rewrite(Dataset.from_list([row]), answering(["one four\nFINAL ANSWER: 7"], []), same)
    assert short[0] == row | expected


def test_rewrites_of_the_longest_samples_are_mixed_in_with_their_prompts():
    dataset = Dataset.from_list(make_rows(600))
    asked = []

    def rewriter(part):
        texts = [f"so {k} FINAL ANSWER: {row['completion']}" for k, row in enumerate(part)]
        short, figures = rewrite(part, answering(texts, asked), same)
        return short, measure(short), figures

    sources = Sources(dataset, measure(dataset), rewrite=rewriter)
    mixture = mix(sources, LengthTargets.read("lognormal:60,0.4"), MixConfig(100, short_ratio=0.3))
    assert mixture.figures["sources"] == {"data": 70, "short": 30} and len(asked) == 30
    long = [row["length"] for row in mixture.dataset if row["source"] == "data"]
    brief = [row for row in mixture.dataset if row["source"] == "short"]
    assert all(row["length"] == 2 and "Think briefly" in row["prompt"] for row in brief)
    plain = {row["prompt"].split("\n")[0]: row["length"] for row in mixture.dataset if row["source"] == "data"}
    assert sorted(plain[row["prompt"].split("\n")[0]] for row in brief) == sorted(long)[-30:]
    with pytest.raises(DataError, match=r"at most 0\.5, got 0\.7"):
        mix(sources, None, MixConfig(100, short_ratio=0.7))


def test_the_command_has_long_samples_shortened_by_a_server_and_asks_once(files, tmp_path, capsys):
    def reply(request, number):
        answer = re.search(r"What is (\d+) plus (\d+)", request["messages"][-1]["content"])
        total = sum(map(int, answer.groups()))
        wrong = total % 5 == 0  # a teacher that errs
        return {"content": f"we add the two\nFINAL ANSWER: {total + wrong}"}

    command = ["--target", "lognormal:60,0.4", "--num_samples", "100", "--short_ratio", "0.3", "--teacher", "teacher"]
    with Server(reply) as server:
        figures = run(files, tmp_path / "out", *command, "--base_url", server.url)
        asked = len(server.requests)
        again = run(files, tmp_path / "out", *command, "--base_url", server.url, "--overwrite")
        assert asked == 30 == len(server.requests) and again["short"] == figures["short"]
    written, dropped = figures["short"]["written"], figures["short"]["dropped"]
    assert 0 < written < 30 and dropped == {"another answer": 30 - written}
    assert figures["sources"] == {"data": 70, "short": written} and figures["num_written"] == 70 + written
    dataset = load_dataset(str(tmp_path / "out" / "train.parquet").rsplit("/", 1)[0], split="train")
    brief = [row for row in dataset if row["source"] == "short"]
    assert len(brief) == written and all(row["reasoning"] == "we add the two" for row in brief)
    assert f"{written} of 30 rewrites" in capsys.readouterr().out
