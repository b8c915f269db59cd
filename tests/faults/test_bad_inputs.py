"""Bad inputs of commands, config files and Python: each gets one message that names the value, and no traceback."""

import errno
import importlib
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import IterableDataset

from tests.small_runs import CONFIG, METRIC, dpg_config, make_student, make_trainer
from trl_dpg import DPGReward, InnerLoopConfig, attribute, cli, metagradient, toy
from trl_dpg.files import write_json
from trl_dpg.metrics import CombinedMetric, LanguageModelingMetric, WeightNormMetric, WeightPatternMetric
from trl_dpg.redaction import HIDDEN, redacted


FILES = {
    "bad_json.jsonl": '{"text": "a"}\n{"text": \n',
    "empty.jsonl": "",
    "null_prompts.jsonl": '{"prompt": "ba"}\n{"prompt": null}\n{"prompt": "bo"}\n',
    "list_prompts.jsonl": '{"prompt": ["ba", "be"]}\n' * 4,
    "number_prompts.jsonl": '{"prompt": 3}\n' * 4,
    "one_prompt.jsonl": '{"prompt": "ba"}\n',
    "number_texts.jsonl": '{"text": 3}\n' * 4,
    "negative_ids.jsonl": '{"input_ids": [5, -1, 6]}\n' * 4,
    "float_ids.jsonl": '{"input_ids": [5.5, 6.0]}\n' * 4,
    "large_ids.jsonl": '{"input_ids": [5, 99999]}\n' * 4,
    "bad_labels.jsonl": '{"input_ids": [5, 6], "labels": [-100, -7]}\n' * 4,
    "large_labels.jsonl": '{"input_ids": [5, 6], "labels": [-100, 99999]}\n' * 4,
    "short_labels.jsonl": '{"input_ids": [5, 6], "labels": [6]}\n' * 4,
    "mixed.jsonl": '{"prompt": "ba", "completion": [{"role": "assistant", "content": "be"}]}\n' * 4,
    "dpg_log.jsonl": "no json\n",
    "hidden.yaml": 'student_model_init_kwargs: \'{"token": "sesame", \'\n',
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models, data and config files, good ones and bad ones."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = toy.word_tokenizer([*toy.LANGUAGE_A, *toy.LANGUAGE_B])
    models = [toy.tiny_llama(tokenizer, 16, 1, seed) for seed in (0, 1)]
    toy.save_world(folder, tokenizer, *models, ["ba be", "bi", "bo ba", "be"] * 4, ["lan len lin", "ton tan"])
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "samples.jsonl").write_text('{"text": "ba be"}\n{"text": "bo bi"}\n{"text": "lan"}\n{"text": "ton"}\n')
    for kind in ("generator", "student"):
        broken = folder / f"broken_{kind}"
        broken.mkdir()
        for file in (folder / kind).iterdir():
            content = file.read_bytes()
            (broken / file.name).write_bytes(content[:-100] if file.suffix == ".safetensors" else content)
    (folder / "no_tokenizer").mkdir()
    for file in (folder / "student").iterdir():
        content = file.read_bytes()
        (folder / "no_tokenizer" / file.name).write_bytes(content[:50] if file.name == "tokenizer.json" else content)
    (folder / "a_file").write_text("")
    (folder / "linked").mkdir()
    (folder / "linked" / "summary.json").symlink_to(folder / "a_file")
    return folder


BASE = {
    "dpg": "--model_name_or_path {w}/generator --student_model_name_or_path {w}/student --dataset_name "
    "{w}/prompts.jsonl --metric weight_norm --per_device_train_batch_size 8 --num_generations 4 "
    "--max_completion_length 4 --student_batch_size 4 --max_steps 1 --report_to none --save_strategy no "
    "--evaluate false --output_dir {o}",
    "attribute": "--student_model_name_or_path {w}/student --dataset_name {w}/samples.jsonl --metric weight_norm "
    "--student_batch_size 2 --output_dir {o}",
    "evaluate": "--student_model_name_or_path {w}/student --datasets {w}/samples.jsonl --metric weight_norm "
    "--student_batch_size 2 --seeds 0 --output_dir {o}",
    "verify": "--student_model_name_or_path {w}/student --dataset_name {w}/samples.jsonl --metric weight_norm "
    "--student_batch_size 2 --num_samples 4 --output_dir {o}",
    "tune": "--student_model_name_or_path {w}/student --dataset_name {w}/samples.jsonl --metric weight_norm "
    "--student_batch_size 2 --num_samples 4 --output_dir {o} --student_learning_rate auto",
    "generate": "--model_name_or_path {w}/generator --dataset_name {w}/prompts.jsonl --max_completion_length 4 "
    "--output_dir {o}",
    "mix": "--dataset_name {w}/samples.jsonl --output_dir {o}",
    "lengths": "--dataset_name {w}/samples.jsonl --output_dir {o}",
    "report": "--run_dir {o}",
    "teach": "--base_url http://127.0.0.1:9/v1 --model m --dataset_name {w}/prompts.jsonl --output_dir {o}",
    "metrics": "",
    "rewards": "",
}
LM = "--metric language_modeling --metric_kwargs"
USAGE = [  # command, further arguments, what the message names
    ("dpg", "--temperature 0", "temperature must be positive and finite, got 0.0"),
    ("dpg", "--temperature nan", "temperature must be positive and finite, got nan"),
    ("dpg", "--top_p 2", "top_p must be above 0 and at most 1, got 2.0"),
    ("dpg", "--top_p nan", "top_p must be above 0 and at most 1, got nan"),
    ("dpg", "--top_k -3", "top_k must be at least 0, got -3"),
    ("dpg", "--min_p 1.5", "min_p must be from 0 to 1, got 1.5"),
    ("dpg", "--repetition_penalty 0", "repetition_penalty must be positive"),
    ("dpg", "--max_steps -5", "max_steps must be at least 1, or -1 for num_train_epochs, got -5"),
    ("dpg", "--student_weight_decay nan", "weight_decay must be a finite number, got nan"),
    ("dpg", "--student_eps_root nan", "eps_root must be a finite number, got nan"),
    ("dpg", "--student_max_grad_norm nan", "max_grad_norm must be a finite number, got nan"),
    ("dpg", "--student_learning_rate inf", "learning_rate must be a finite number, got inf"),
    ("dpg", "--student_learning_rate fast", "learning_rate must be a number or 'auto', got 'fast'"),
    ("dpg", "--seed -1", "seed must not be negative, got -1"),
    ("dpg", "--num_fresh_students 0", "--num_fresh_students must be at least 1"),
    ("dpg", "--dataset_name {w}/null_prompts.jsonl", "1 rows have no prompt (null in `prompt`)"),
    ("dpg", "--dataset_name {w}/list_prompts.jsonl", "must hold texts or conversations"),
    ("dpg", "--dataset_name {w}/number_prompts.jsonl", "must hold texts or conversations"),
    ("dpg", "--dataset_name {w}/one_prompt.jsonl --dataset_streaming", "has 1 rows, but a generation batch takes 2"),
    ("dpg", "--dataset_name {w}/bad_json.jsonl", "bad_json.jsonl' could not be read"),
    ("dpg", "--dataset_name {w}/empty.jsonl", "empty.jsonl'"),
    ("dpg", "--dataset_name {w}/none.jsonl", "there is no file"),
    ("dpg", "--model_name_or_path {w}/broken_generator", "broken_generator': the weights 'model.safetensors' are dam"),
    ("dpg", "--student_model_name_or_path {w}/broken_student", "the weights 'model.safetensors' are damaged"),
    ("dpg", "--student_model_name_or_path {w}/no_tokenizer", "The student's tokenizer in"),
    ("dpg", f"{LM} " + '{{"texts":["a"],"max_length":-5}}', "max_length must be a whole number of at least 1, got -5"),
    ("dpg", f"{LM} " + '{{"texts":["a"],"batch_size":0}}', "batch_size must be a whole number of at least 1, got 0"),
    ("dpg", f"{LM} " + '{{"texts":[1,2]}}', "A sample is 1; expected a text or a row"),
    ("dpg", f"{LM} " + '{{"texts":["lan"],"dataset":"x"}}', "needs one of `dataset`"),
    ("dpg", "--output_dir {w}/a_file", "a_file' is a file or is inside a file"),
    ("dpg", "--output_dir {w}/linked", "has a link, summary.json -> "),
    ("dpg", "--student_model_init_kwargs [", "student_model_init_kwargs must be JSON"),
    ("attribute", "--dataset_chunk 0", "--dataset_chunk (0) must be a multiple"),
    ("attribute", "--dataset_chunk -2", "--dataset_chunk (-2) must be a multiple"),
    ("attribute", "--keep_top nan", "--keep_top is a share"),
    ("attribute", "--num_shown -1", "--num_shown must be at least 0"),
    ("attribute", "--student_max_length 0", "max_length must be at least 1, got 0"),
    ("attribute", "--dataset_name {w}/negative_ids.jsonl", "A sample has -1 in `input_ids`"),
    ("attribute", "--dataset_name {w}/float_ids.jsonl", "A sample has [5.5, 6.0] in `input_ids`"),
    ("attribute", "--dataset_name {w}/large_ids.jsonl", "Token id 99999 does not exist in the student"),
    ("attribute", "--dataset_name {w}/bad_labels.jsonl", "A sample has -7 in `labels`"),
    ("attribute", "--dataset_name {w}/large_labels.jsonl", "A sample has 99999 in `labels`"),
    ("attribute", "--dataset_name {w}/short_labels.jsonl", "2 `input_ids` but 1 `labels`"),
    ("attribute", "--dataset_name {w}/number_texts.jsonl", "holds no text but int64"),
    ("attribute", "--dataset_name {w}/mixed.jsonl", "a text and messages in `prompt` and `completion`"),
    ("attribute", "--dataset_split test", "could not be read (split 'test')"),
    ("attribute", "--student_model_name_or_path {w}/broken_student", "the weights 'model.safetensors' are damaged"),
    ("attribute", '--metrics {{"a":{{"metric":"weight_norm"}}}}', "--metric and --metrics both say"),
    ("attribute", "--output_dir {w}/linked", "has a link, summary.json -> "),
    ("evaluate", "--datasets {w}/number_texts.jsonl", "the column 'text' holds int64, expected texts"),
    ("evaluate", "--seeds -1", "--seeds must be at least 0"),
    ("evaluate", "--max_tokens 3 --num_samples 2", "--num_samples and --max_tokens both say how much is drawn"),
    ("evaluate", "--metric tests.faults.test_bad_inputs.writes", "The metric changes the student's weights"),
    ("evaluate", "--metric tests.faults.test_bad_inputs.permutes", "The metric changes the student's weights"),
    ("verify", "--num_directions 2", "--num_directions must be at least 3"),
    ("verify", "--attribution dataset", "there is nothing to verify"),
    ("verify", "--dataset_name {w}/number_texts.jsonl", "the column 'text' holds int64, expected texts"),
    ("verify", "--metric tests.faults.test_bad_inputs.gives_a_number", "returned 3.0, a float"),
    ("verify", "--metric tests.faults.test_bad_inputs.gives_a_vector", "a tensor of shape (2,)"),
    ("verify", "--metric tests.faults.test_bad_inputs.is_not_differentiable", "is not differentiable"),
    ("verify", "--metric tests.faults.test_bad_inputs.is_nan", "it must be finite"),
    ("generate", "--temperature nan", "--temperature must be positive and finite, got nan"),
    ("generate", "--min_p -1", "--min_p must be from 0 to 1, got -1"),
    ("generate", "--batch_size 0", "--batch_size must be at least 1"),
    ("generate", "--generation_kwargs [", "--generation_kwargs must be JSON"),
    ("generate", "--model_name_or_path {w}/broken_generator", "the weights 'model.safetensors' are damaged"),
    ("generate", "--dataset_name {w}/null_prompts.jsonl", "1 rows have no prompt"),
    (
        "mix",
        "--num_samples 2 --target lognormal:-4,1",
        "lognormal needs a median and a sigma above 0, got -4",
    ),
    ("mix", "--num_samples 0", "--num_samples must be at least 1"),
    ("lengths", "--measure words", "'words'"),
    ("report", "--run_dir {w}/nowhere", "There is no folder"),
    ("report", "--run_dir {w}", "is not JSON"),
    ("teach", "--num_samples 0", "--num_samples must be at least 1"),
    ("teach", "--request_parameters [", "--request_parameters must be JSON"),
    ("metrics", "loss", "loss"),
]
RECIPES = [  # command, a line of its config file, what the message names
    ("dpg", "student_batch_size: true", "student_batch_size must be a whole number, but"),
    ("dpg", "student_batch_size: [4]", "student_batch_size must be a whole number, but"),
    ("dpg", "student_max_length: 8.5", "student_max_length must be a whole number, but"),
    ("dpg", "student_num_epochs: null", "student_num_epochs must be a whole number, but"),
    ("dpg", "student_learning_rate: false", "student_learning_rate must be a number or a word, but"),
    ("dpg", "metric: 67", "metric must be a text, but"),
    ("dpg", "dataset_name: no", "dataset_name must be a text, but"),
    ("dpg", "held_out_metrics: [a]", "held_out_metrics must be a mapping or a text, but"),
    ("dpg", "student_batch_size: {a: 1}", "student_batch_size must be a whole number, but"),
    ("attribute", "metrics: 3", "metrics must be a mapping or a text, but"),
    ("evaluate", "seeds: 3", "seeds must be a list, but"),
    ("generate", "num_samples: many", "invalid int value: 'many'"),
    ("verify", "- a list", "is not a mapping of arguments to values"),
]


def permutes(student):
    """A metric that changes the student, and leaves its weights' sums and the like as they are."""
    with torch.no_grad():
        weight = next(student.student.model.parameters())
        weight.copy_(weight.flip(0))
    return WeightNormMetric()(student)


def writes(student):
    """A metric that changes the student, which it must not."""
    with torch.no_grad():
        next(student.student.model.parameters()).add_(1e-3)
    return WeightNormMetric()(student)


def gives_a_number(student):
    return 3.0


def gives_a_vector(student):
    return student.weight("lm_head.weight").sum(0)[:2]


def is_not_differentiable(student):
    return student.weight("lm_head.weight").detach().sum()


def is_nan(student):
    return student.weight("lm_head.weight").sum() * math.nan


def is_random(student):
    return student.weight("lm_head.weight").norm() * (1 + torch.rand(()))


def outcome(command, further, world, folder, capsys):
    """The exit status of a command, and what it wrote to stderr."""
    words = f"{BASE[command]} {further}".format(w=world, o=folder).split()
    with pytest.raises(SystemExit) as raised:
        cli.main([command, *words])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return raised.value.code, error


@pytest.mark.parametrize(("command", "further", "message"), USAGE)
def test_wrong_usage_is_named_and_ends_with_status_2(command, further, message, world, tmp_path, capsys):
    code, error = outcome(command, further, world, tmp_path / "out", capsys)
    assert message in error and code == 2


@pytest.mark.parametrize(("command", "line", "message"), RECIPES)
def test_a_config_file_with_a_value_of_another_type_is_refused(command, line, message, world, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(line + "\n")
    code, error = outcome(command, f"--config {recipe}", world, tmp_path / "out", capsys)
    assert message in error and code == 2


def test_texts_that_are_none_are_empty_to_all_commands(world, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "ba be"}\n{"text": null}\n{"text": "bo bi"}\n{"text": "lan"}\n')
    student = ["--student_model_name_or_path", str(world / "student"), "--student_batch_size", "2"]
    shared = [*student, "--metric", "weight_norm"]
    cli.main(["attribute", *shared, "--dataset_name", str(data), "--output_dir", str(tmp_path / "attribution")])
    assert json.loads((tmp_path / "attribution" / "summary.json").read_text())["num_empty"] == 1
    cli.main(["evaluate", *shared, "--datasets", str(data), "--seeds", "0", "--output_dir", str(tmp_path / "out")])
    figures = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [row["empty"] for row in figures["datasets"].values()] == [1]
    cli.main(["verify", *shared, "--dataset_name", str(data), "--num_samples", "4"])


def test_a_random_metric_is_warned_of_once(world, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("trl_dpg.evaluation.logger.warning", warnings.append)
    further = "--metric tests.faults.test_bad_inputs.is_random --seeds 0 1"
    cli.main(["evaluate", *f"{BASE['evaluate']} {further}".format(w=world, o=tmp_path / "out").split()])
    (warning,) = warnings
    assert "it is random" in warning and "torch.random.fork_rng" in warning


SECRET = "sesame-open-0123456789"


def test_credentials_are_in_no_file_and_in_no_message(world, tmp_path, capsys):
    kwargs = ["--student_model_init_kwargs", json.dumps({"token": SECRET})]
    argv = f"{BASE['dpg']} --save_strategy steps --save_steps 1".format(w=world, o=tmp_path / "run").split()
    own = ["--model_init_kwargs", json.dumps({"token": SECRET})]
    cli.main(["dpg", *argv, *kwargs, *own])
    cli.main(["report", "--run_dir", str(tmp_path / "run")])
    argv = BASE["attribute"].format(w=world, o=tmp_path / "attribution").split()
    for _ in range(2):  # the second one goes on from the journal
        cli.main(["attribute", *argv, *kwargs])
    argv = BASE["tune"].format(w=world, o=tmp_path / "tune").split()
    cli.main(["tune", *argv, *kwargs])
    with pytest.raises(SystemExit):
        cli.main(["attribute", *argv, "--student_model_init_kwargs", json.dumps({"token": SECRET})[:-1]])
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err and "hidden" in shown.err
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "training_args.bin"]
    assert len(files) > 20
    assert [str(path) for path in files if SECRET.encode() in path.read_bytes()] == []
    assert "hidden" in (tmp_path / "run" / "dpg_config.json").read_text()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"api_key": SECRET, "model": "m"}, {"api_key": HIDDEN, "model": "m"}),
        ({"extra_headers": [{"Authorization": "Bearer x"}]}, {"extra_headers": [{"Authorization": HIDDEN}]}),
        ({"url": "https://me:word@host/path"}, {"url": f"https://{HIDDEN}@host/path"}),
        (
            {"per_token": True, "eos_token": "</s>", "token": None},
            {"per_token": True, "eos_token": "</s>", "token": None},
        ),
    ],
)
def test_credentials_are_known_by_their_names(settings, expected):
    assert redacted(settings) == expected


RANDOM = "Ab3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hI6kL9nO2qR5tU8wX1zA4cD7fG0iJ3lM6"
KEYS = ["hf_" + RANDOM[:34], "sk-" + RANDOM[:48], f"sk-proj-{RANDOM[:30]}_{RANDOM[30:50]}-{RANDOM[:9]}"]
KEYS += [
    "ghp_" + RANDOM[:36],
    "github_pat_" + RANDOM,
    "xoxb-123456789012-1234567890123-" + RANDOM[:24],
    "AKIA" + 16 * "Z",
]


@pytest.mark.parametrize("key", KEYS)
def test_keys_are_known_by_their_looks_and_told_apart(key):
    shown = {redacted(text.format(own)) for own in (key, key[:-1] + "Y") for text in ("{}", "The key is {}. Why?")}
    assert len(shown) == 4 and all(key[:12] not in text and "<hidden:" in text for text in shown)
    assert redacted([*shown]) == [*shown]
    assert redacted(f"Bearer {key}") == f"Bearer {HIDDEN}" and redacted({"token": key}) == {"token": HIDDEN}


@pytest.mark.parametrize(
    "path",
    [
        "/scratch/hf_checkpoints_run1",
        "data/sk-wikipedia-articles.jsonl",
        "sk-wikipedia-articles-of-2024/train.jsonl",
        "sk-wikipedia-articles-of-2024.jsonl",
        "/data/sk-wikipedia-articles-of-2024",
        "sk-wikipedia-articles",
        "ghp_of_all_the_students",
        "AKIAHABARA_station_photographs",
    ],
)
def test_a_path_is_not_taken_for_a_key(path):
    assert redacted({"dataset_name": path}) == {"dataset_name": path}


PYTHON = {  # what a script does, and what the message names
    "learning_rate": (
        lambda: InnerLoopConfig(learning_rate=math.nan),
        "learning_rate must be a finite number, got nan",
    ),
    "betas": (lambda: InnerLoopConfig(betas=(0.9, math.nan)), r"betas\[1\] must be a finite number, got nan"),
    "momentum": (
        lambda: InnerLoopConfig(optimizer="sgd", momentum=math.inf),
        "momentum must be a finite number, got inf",
    ),
    "batch_size": (lambda: InnerLoopConfig(batch_size=True), "batch_size must be a whole number, got True"),
    "max_length": (lambda: InnerLoopConfig(max_length=8.5), "max_length must be a whole number, got 8.5"),
    "metric": (lambda: DPGReward(make_student(), 5), "must be a callable"),
    "metric's length": (
        lambda: LanguageModelingMetric(["w1"], max_length=-5),
        "must be .* at least 1, got -5",
    ),
    "metric's text": (lambda: LanguageModelingMetric("w1 w2"), "is one text, 'w1 w2'. Give a list"),
    "metric's weights": (lambda: CombinedMetric([METRIC], [1.0, 2.0]), "got 2 and 1"),
    "pattern": (lambda: WeightPatternMetric([[2, 1]]), "must be a matrix of 1 and -1"),
    "ids": (lambda: make_student().tokenize([{"input_ids": [1, -2]}], 8), r"A sample has -2 in `input_ids`"),
    "ids' type": (lambda: make_student().tokenize([{"input_ids": [1.0, 2.0]}], 8), "expected a list of whole numbers"),
    "nested ids": (lambda: make_student().tokenize([{"input_ids": [[1, 2]]}], 8), "expected a list of whole numbers"),
    "labels": (
        lambda: make_student().tokenize([{"input_ids": [1, 2], "labels": [1, -3]}], 8),
        "A sample has -3 in `labels`",
    ),
    "text": (lambda: make_student().tokenize([{"text": 7}], 8), r"A sample has 7 \(int\) in `text`"),
    "prompt": (lambda: make_student().tokenize([{"prompt": ["w1"], "completion": "w2"}], 8), "not of messages"),
    "row": (lambda: make_student().tokenize([7], 8), "A sample is 7; expected a text or a row"),
    "size": (
        lambda: attribute(make_student(), ["w1"], METRIC, CONFIG, size=0),
        r"`chunk_size` \(0\) must be",
    ),
    "no samples": (lambda: attribute(make_student(), [], METRIC, CONFIG), "has no samples"),
    "weights": (lambda: metagradient(make_student(), ["w1 w2"], METRIC, CONFIG, [math.nan]), "not finite"),
    "stream": (
        lambda: make_trainer(
            dpg_config("unused"), train_dataset=IterableDataset.from_generator(lambda: iter([{"prompt": "w1"}]))
        ),
        "train_dataset has 1 rows, but a generation batch takes 4 prompts",
    ),
}


@pytest.mark.parametrize("name", PYTHON)
def test_wrong_arguments_in_python_are_named(name):
    function, message = PYTHON[name]
    with pytest.raises(ValueError, match=message):
        function()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"top_p": math.nan}, "top_p must be above 0"),
        ({"min_p": 2.0}, "min_p must be from 0 to 1"),
        ({"max_steps": -5}, "max_steps must be at least 1, or -1"),
        ({"max_steps": 0}, "max_steps must be at least 1, or -1"),
        ({"student_eps_root": math.nan}, "eps_root must be a finite number"),
        ({"student_momentum": math.nan}, "momentum must be a finite number"),
    ],
)
def test_a_configuration_refuses_what_would_be_ignored_or_replaced(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        dpg_config(tmp_path, **settings)


def test_a_folder_with_a_link_to_a_file_is_refused_by_the_trainer(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dpg_log.jsonl").symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"has a link, dpg_log\.jsonl -> "):
        make_trainer(dpg_config(tmp_path / "out"))
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    for name in ("figures.json", "figures.json.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    write_json(tmp_path / "figures.json", {"a": 1})
    assert (tmp_path / "mine").read_text() == "mine"
    assert json.loads((tmp_path / "figures.json").read_text()) == {"a": 1}


def test_a_pickle_in_the_place_of_weights_is_not_run(world, tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    folder = tmp_path / "student"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((world / "student" / name).read_bytes())
    torch.save({"lm_head.weight": Harm()}, folder / "pytorch_model.bin")
    argv = f"{BASE['attribute']} --student_model_name_or_path {folder}".format(w=world, o=tmp_path / "out").split()
    with pytest.raises(SystemExit):
        cli.main(["attribute", *argv])
    assert not (tmp_path / "harm").exists()


def test_the_report_escapes_all_that_it_shows_and_loads_nothing(world, tmp_path):
    argv = BASE["dpg"].format(w=world, o=tmp_path).split()
    cli.main(["dpg", *argv])
    evil = "<script src=//evil.example></script>"
    config = json.loads((tmp_path / "dpg_config.json").read_text())
    config["settings"]["seed"] = evil
    config["metric"] = config["student"] = evil
    (tmp_path / "dpg_config.json").write_text(json.dumps(config))
    (tmp_path / "trainer_state.json").write_text(json.dumps({"max_steps": evil}))
    cli.main(["report", "--run_dir", str(tmp_path), "--title", evil])
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<script" not in page and page.count("&lt;script") >= 5
    assert "default-src 'none'" in page


# -- real processes --------------------------------------------------------------------------------------------------


def process(command, world, folder, further="", **kwargs):
    words = f"{BASE[command]} {further}".format(w=world, o=folder).split()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "trl_dpg.cli", command, *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=300, env=environment, **kwargs)


def test_a_full_disk_is_said_in_a_sentence_and_ends_with_status_1(world, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))

    done = process("attribute", world, tmp_path / "out", preexec_fn=limit)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: The disk is full, or a limit on the size of files is reached" in done.stderr


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_vanishes_is_named(number, world, tmp_path, monkeypatch, capsys):
    def gone(path, record):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("trl_dpg.callbacks.append_line", gone)
    code, error = outcome("dpg", "", world, tmp_path / "out", capsys)
    assert code == 1 and "The disk does not answer any more" in error and "dpg_log.jsonl" in error


def test_no_command_trusts_the_code_of_a_model_by_default():
    found = set()
    for command in cli.COMMANDS:
        parser = importlib.import_module(f"trl_dpg.scripts.{command}").make_parser()
        actions = [action for action in parser._actions if "trust_remote_code" in action.dest]
        assert not any(action.default for action in actions), command
        found |= {command} if actions else set()
    assert {"dpg", "generate", "verify"} <= found


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_to_is_named(number, world, tmp_path, monkeypatch, capsys):
    def mkdir(path, *args, **kwargs):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    code, error = outcome("attribute", "", world, tmp_path / "out", capsys)
    assert code == 2 and f"cannot be made ({os.strerror(number)})" in error


def test_an_error_of_another_library_is_one_message_with_its_place(world, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise KeyError("columns")

    monkeypatch.setattr("trl_dpg.scripts.scored_samples.load_data", fail)
    code, error = outcome("attribute", "", world, tmp_path / "out", capsys)
    assert code == 1 and "KeyError: 'columns' (" in error and "TRL_DPG_TRACEBACK=1" in error
    monkeypatch.setenv("TRL_DPG_TRACEBACK", "1")
    with pytest.raises(KeyError):
        cli.main(["attribute", *BASE["attribute"].format(w=world, o=tmp_path / "out").split()])


def test_numbers_that_are_not_finite_end_with_status_1(world, tmp_path, capsys):
    code, error = outcome(
        "dpg", "--student_learning_rate 1e30 --student_batch_size 2", world, tmp_path / "out", capsys
    )
    assert code == 1 and "the student's learning rate (1e+30) is too high" in error.lower()


def test_the_number_of_processes_that_is_asked_for_is_started(world, tmp_path, monkeypatch, capsys):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    argv = [*BASE["generate"].format(w=world, o=tmp_path / "out").split(), "--num_processes", "2"]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    cli.main(["generate", *argv])
    assert launched[0].num_processes == 2 and launched[0].multi_gpu  # else accelerate starts one
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    with pytest.raises(SystemExit) as raised:
        cli.main(["generate", *argv])
    assert raised.value.code == 2 and "this machine has 1 cuda device" in capsys.readouterr().err
    assert len(launched) == 1
