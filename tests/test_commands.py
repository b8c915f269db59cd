"""`trl-dpg generate`, `evaluate` and `env`."""

import base64
import json
import logging
import math
import os
import runpy
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from datasets import load_dataset
from huggingface_hub import DatasetCard, ModelCard

from tests.tiny import on_two_processes
from trl_dpg import cli, toy
from trl_dpg.provenance import check_manifest, read_manifest
from trl_dpg.scripts.arguments import CommandArguments, num_cores, say_once
from trl_dpg.scripts.evaluate import interval


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Generator, student and prompts as files."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = toy.word_tokenizer([*toy.LANGUAGE_A, *toy.LANGUAGE_B])
    models = [toy.tiny_llama(tokenizer, 32, 1, seed) for seed in (0, 1)]
    toy.save_world(folder, tokenizer, *models, ["ba be", "bi", "bo ba"], ["lan len lin", "ton tan"])
    return folder


def generate(world, output_dir, *arguments):
    command = ["generate", "--model_name_or_path", str(world / "generator")]
    command += ["--dataset_name", str(world / "prompts.jsonl"), "--output_dir", str(output_dir)]
    cli.main([*command, "--max_completion_length", "6", *arguments])
    return load_dataset(str(output_dir), split="train")


def test_a_generated_dataset_has_a_text_for_each_prompt_and_a_valid_card(world, tmp_path):
    dataset = generate(world, tmp_path, "--num_samples", "7", "--temperature", "0.7")
    assert dataset["source_prompt"] == ["ba be", "bi", "bo ba", "ba be", "bi", "bo ba", "ba be"]
    assert set(dataset.column_names) == {"text", "source_prompt"} and len(set(dataset["text"])) > 1
    card = DatasetCard.load(tmp_path / "README.md")
    card.data.to_dict()
    assert "dpg" in card.data.tags and '"temperature": 0.7' in card.text and "2604.08423" in card.text
    manifest = read_manifest(tmp_path)
    assert check_manifest(tmp_path) == [] and manifest["settings"]["temperature"] == 0.7
    assert manifest["models"]["model_name_or_path"]["name"] == str(world / "generator")
    assert list(manifest["files"]) == ["train.parquet"] and "## Manifest" in card.text


def test_texts_that_were_sampled_again_are_not_read_from_a_cache(world, tmp_path):
    texts = [generate(world, tmp_path / "data", "--seed", seed, "--overwrite")["text"] for seed in ("1", "2")]
    assert texts[0] != texts[1]


def test_what_is_in_the_folder_is_not_overwritten_unasked(world, tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(SystemExit) as raised:
        generate(world, tmp_path)
    assert raised.value.code == 2 and "has README.md already" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "mine" and not (tmp_path / "train.parquet").exists()


def test_a_toy_worlds_recipe_serves_all_commands(tmp_path, capsys):
    recipe = str(Path(__file__).parents[1] / "recipes" / "pattern_67" / "mini.yaml")
    data = tmp_path / "data"
    cli.main(
        ["dpg", "--config", recipe, "--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--evaluate", "false"]
    )
    cli.main(
        ["generate", "--config", recipe, "--model_name_or_path", str(tmp_path / "run"), "--output_dir", str(data)]
        + ["--num_samples", "24"]
    )
    few = ["--student_batch_size", "8", "--config", recipe]
    evaluation = ["--datasets", str(data / "train.parquet"), "--seeds", "0", "--output_dir", str(tmp_path / "ev")]
    cli.main(["evaluate", *evaluation, *few])
    assert (tmp_path / "ev" / "evaluation.json").exists()
    cli.main(["attribute", "--dataset_name", str(data / "train.parquet"), "--output_dir", str(tmp_path / "at"), *few])
    assert (tmp_path / "at" / "scored.parquet").exists() and "metric before" in capsys.readouterr().out
    for folder in ("run", "data", "at"):
        assert check_manifest(tmp_path / folder) == []
    manifest = read_manifest(tmp_path / "run")
    assert manifest["settings"]["max_steps"] > 0 and manifest["settings"]["num_train_epochs"]
    assert manifest["settings"]["run"]["metric"].startswith("WeightPatternMetric") and manifest["inputs"]["prompts"]
    assert {"model.safetensors", "dpg_log.jsonl", "summary.json"} <= set(manifest["files"])
    assert "## Manifest" in (tmp_path / "run" / "README.md").read_text()


def test_pairs_keep_their_prompts(world, tmp_path):
    dataset = generate(world, tmp_path, "--train_on", "prompt_completion")
    assert dataset["prompt"] == ["ba be", "bi", "bo ba"] and len(dataset["completion"]) == 3


def test_a_recipe_gives_prompts_and_sampling(world, tmp_path):
    articles = tmp_path / "articles.jsonl"
    articles.write_text('{"text": "ba be bi bo"}\n{"text": "bo"}\n')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("prompt_template: '{text} bu'\nmax_prompt_tokens: 2\ntemperature: 0.5\nlearning_rate: 1e-3\n")
    cli.main(
        f"generate --config {recipe} --model_name_or_path {world / 'generator'} --dataset_name {articles} "
        f"--output_dir {tmp_path / 'out'} --max_completion_length 4".split()
    )
    dataset = load_dataset(str(tmp_path / "out"), split="train")
    assert dataset["source_prompt"] == ["ba be bu", "bo bu"]
    assert '"temperature": 0.5' in (tmp_path / "out" / "README.md").read_text()


def test_generation_kwargs_override_the_other_arguments(world, tmp_path):
    override = ["--temperature", "9", "--generation_kwargs", '{"top_k": 1, "temperature": 0.5, "max_new_tokens": 2}']
    texts = [generate(world, tmp_path / seed, *override, "--seed", seed)["text"] for seed in ("1", "2")]
    assert texts[0] == texts[1] and all(len(text.split()) <= 2 for text in texts[0])


def test_vllm_samples_with_the_same_arguments(world, tmp_path, monkeypatch):
    class LLM:
        def __init__(self, model, **kwargs):
            assert model == str(world / "generator")

        def generate(self, prompts, parameters):
            asked.update(parameters)
            return [SimpleNamespace(outputs=[SimpleNamespace(text=f"{prompt} bu")]) for prompt in prompts]

    asked = {}
    parameters = SimpleNamespace(StructuredOutputsParams=lambda **kwargs: tuple(kwargs.items()))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=dict))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", parameters)
    further = '{"top_p": 0.25, "max_tokens": 3, "stop": ["ba"], "structured_outputs": {"regex": "b.*"}}'
    dataset = generate(world, tmp_path, "--use_vllm", "--top_p", "0.5", "--generation_kwargs", further)
    assert dataset["text"] == ["ba be bu", "bi bu", "bo ba bu"]
    expected = {"temperature": 1.0, "top_p": 0.25, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    assert asked == expected | {"max_tokens": 3, "stop": ["ba"], "structured_outputs": (("regex", "b.*"),)}


def test_trl_sft_trains_on_what_was_generated(world, tmp_path):
    generate(world, tmp_path / "data", "--num_samples", "8")
    command = [sys.executable, "-m", "trl.scripts.sft", "--dataset_name", str(tmp_path / "data")]
    command += ["--model_name_or_path", str(world / "student"), "--output_dir", str(tmp_path / "student")]
    command += ["--max_steps", "1", "--report_to", "none", "--bf16", "false", "--use_cpu"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-2000:]
    assert (tmp_path / "student" / "model.safetensors").exists()


def evaluate(world, *arguments):
    command = ["evaluate", "--student_model_name_or_path", str(world / "student"), "--student_batch_size", "4"]
    command += [
        "--metric",
        "language_modeling",
        "--metric_kwargs",
        json.dumps({"dataset": str(world / "benchmark.jsonl")}),
    ]
    cli.main([*command, "--student_learning_rate", "1e-2", *arguments])


def test_the_dataset_nearer_to_the_benchmark_wins_beyond_its_interval(world, tmp_path, capsys):
    ours, theirs = tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl"
    ours.write_text('{"text": "lan len lin"}\n{"text": "ton tan"}\n' * 8)
    theirs.write_text('{"text": "ba be bi"}\n{"text": "bo ba"}\n' * 8)
    output = tmp_path / "out" / "figures.json"
    evaluate(world, "--datasets", str(ours), str(theirs), "--seeds", "0", "1", "--output_file", str(output))
    figures = json.loads(output.read_text())
    assert figures["before"][0] == figures["before"][1]  # trained in full: the same start
    first, second = figures["datasets"].values()
    assert first["mean"] > figures["before"][0] and first["mean"] > second["mean"]
    difference = second["first_minus_this"]
    assert difference["mean"] == pytest.approx(first["mean"] - second["mean"])
    assert difference["mean"] - difference["half_width"] > 0
    assert "first minus this" in capsys.readouterr().out


def test_empty_samples_are_left_out_and_seeds_that_change_nothing_are_told(world, tmp_path, capsys):
    full, holes = tmp_path / "full.jsonl", tmp_path / "holes.jsonl"
    full.write_text('{"text": "lan len lin"}\n{"text": "ton tan"}\n')
    holes.write_text('{"text": "lan len lin"}\n{"text": ""}\n{"text": "ton tan"}\n')
    output = tmp_path / "figures.json"
    evaluate(world, "--datasets", str(full), str(holes), "--seeds", "0", "1", "--output_file", str(output))
    first, second = json.loads(output.read_text())["datasets"].values()
    assert first["metric"] == second["metric"] and (first["empty"], second["empty"]) == (0, 1)
    printed = capsys.readouterr().out
    assert "holes.jsonl: 1 empty samples were left out" in printed and "the seeds change nothing" in printed


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", [], "--datasets: all 2 samples of {!r} are empty."),
        ("", ["--num_samples", "3"], "--datasets: all 2 samples of {!r} are empty."),
        ("ba", ["--num_samples", "3"], "--num_samples is 3, but {!r} has 2 samples that are not empty."),
    ],
)
def test_a_dataset_with_too_few_samples_is_named_with_the_flag(text, arguments, message, world, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": text}) + "\n")
    with pytest.raises(SystemExit) as raised:
        evaluate(world, "--datasets", str(data), *arguments)
    assert raised.value.code == 2 and message.format(str(data)) in capsys.readouterr().err


def test_evaluate_shows_one_bar_over_students_and_each_notice_once(world, tmp_path, capsys):
    student = tmp_path / "student"
    shutil.copytree(world / "student", student)
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"eos_token_id": 3}))  # transformers warns of it
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "lan len lin"}\n{"text": "ton tan"}\n' * 2)
    data = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    more = ["--student_model_name_or_path", str(student), "--output_dir", str(tmp_path / "out")]
    transformers_handler = logging.getLogger("transformers").handlers[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers_handler, "stream", sys.stderr)  # that which is captured
        evaluate(world, "--datasets", *data, "--seeds", "0", "1", *more)
    printed, errors = capsys.readouterr()
    assert errors.count("The tokenizer has new PAD/BOS/EOS tokens") == 1
    assert "4/4" in errors and "student" in errors
    assert "Tokenizing" not in errors and "Loading weights" not in errors
    figures = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert f"| {data[0]} | 4 | {figures['before'][0]:.5g} | " in printed


def test_each_seed_draws_its_own_samples(world, tmp_path):
    data, output = tmp_path / "data.jsonl", tmp_path / "figures.json"
    data.write_text("".join(f'{{"text": "{word} {word}"}}\n' for word in ("lan", "ba", "ton", "be", "lin", "do")))
    arguments = ["--datasets", str(data), "--num_samples", "2", "--seeds", "0", "1", "--output_file", str(output)]
    evaluate(world, *arguments)
    (figures,) = json.loads(output.read_text())["datasets"].values()
    assert len(set(figures["metric"])) == 2 and figures["samples"] == 2


def test_the_interval_is_students_t():
    mean, half = interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3) and half == pytest.approx(4.302653 * math.sqrt(7 / 3 / 3), rel=1e-6)
    assert interval([1.0]) == (1.0, None)


def test_env_names_versions_and_devices(capsys):
    cli.main(["env"])
    printed = capsys.readouterr().out
    assert "- torch: 2." in printed and "- devices:" in printed and "- vllm: not installed" in printed


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(["--version"])
    assert raised.value.code == 0 and capsys.readouterr().out == f"trl-dpg {version('trl-dpg')}\n"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main([command, "--help"])
    assert raised.value.code == 0 and f"trl-dpg {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_is_a_module_for_accelerate(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["module", "--no_such_argument"])
    with pytest.raises(SystemExit) as raised:
        runpy.run_module(f"trl_dpg.scripts.{command}", run_name="__main__")
    assert raised.value.code == 2 and f"trl-dpg {command}: error: " in capsys.readouterr().err


def test_two_processes_share_the_prompts_out(world, tmp_path):
    command = ["--model_name_or_path", str(world / "generator"), "--dataset_name", str(world / "prompts.jsonl")]
    command += ["--output_dir", str(tmp_path), "--num_samples", "7", "--max_completion_length", "4"]
    process = on_two_processes("trl_dpg.scripts.generate", *command)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("7 texts") == 1
    dataset = load_dataset(str(tmp_path), split="train")
    assert dataset["source_prompt"] == ["ba be", "bi", "bo ba", "ba be", "bi", "bo ba", "ba be"]


@pytest.mark.parametrize("command", [["tune", "--dataset_name", "a"]])
def test_a_command_for_one_process_says_so(command, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as raised:
        cli.main([*command, "--metric", "weight_norm", "--student_model_name_or_path", "b"])
    assert raised.value.code == 2 and f"trl-dpg {command[0]} runs on one process, not 2" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["", "two"])
def test_a_number_of_processes_that_is_none_is_named(value, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(SystemExit) as raised:
        cli.main(["tune", "--dataset_name", "a", "--metric", "weight_norm", "--student_model_name_or_path", "b"])
    assert raised.value.code == 2
    assert f"WORLD_SIZE must be the number of processes, got {value!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [1", "expected ',' or ']'"), ("no_such_key: 1", "keys that no command knows: --no_such_key")],
)
def test_a_config_file_that_cannot_be_read_is_named(content, message, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(content)
    with pytest.raises(SystemExit) as raised:
        cli.main(["env", "--config", str(tmp_path / "own.yaml")])
    assert raised.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["generate", "--config"], "argument --config: expected one argument"),
        (["generate"], "--model_name_or_path is required"),
        (
            ["generate", "--model_name_or_path", "m", "--dataset_name", "d"],
            "--model_name_or_path 'm' could not be loaded",
        ),
        (["generate", "--model_name_or_path", "m", "--dataset_name", "d", "--temperature", "0"], "--temperature must"),
        (["evaluate", "--metric", "weight_norm"], "--datasets is required"),
        (["evaluate", "--metric", "weight_norm", "--datasets", "a", "--seeds", "1", "1"], "--seeds must be different"),
        (["evaluate", "--metric", "weight_norm", "--datasets", "a"], "--student_model_name_or_path is required"),
        (["evaluate", "--datasets", "a"], "--metric is required"),
        (["evaluate", "--metric", "weight_norm", "--datasets", "a", "--num_samples", "0"], "--num_samples must be at"),
        (["evaluate", "--metric", "weight_norm", "--datasets", "a", "--output_file", "."], "'.' is a folder"),
        (["generate", "--top_p", "1.5"], "--top_p must be above 0 and at most 1"),
        (["generate", "--top_k", "-1"], "--top_k must be at least 0"),
        (["generate", "--dtype", "foo"], "--dtype must be one of"),
        (["generate", "--max_prompt_tokens", "0"], "--max_prompt_tokens must be at least 1"),
        (["quickstart", "--picture_steps", "0"], "--picture_steps must be at least 1"),
        (["env", "--verbose"], "unrecognized arguments: --verbose"),
        (["verify", "--metric", "weight_norm", "--student_lr", "1e-3"], "unrecognized arguments: --student_lr 1e-3"),
        (["dpg", "--metric", "weight_norm", "--student-lr", "1e-3"], "--student_learning_rate"),
        (["verify", "--metric", "weight_norm", "--student_bath_size=1"], "Did you mean --student_batch_size"),
        (["env", "--config", "none.yaml"], "none.yaml"),
        (["fly"], "invalid choice: 'fly'"),
    ],
)
def test_wrong_usage_is_named_and_ends_with_status_2(command, message, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(command)
    assert raised.value.code == 2 and message in capsys.readouterr().err


# -- the Hub ----------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as an upload needs; remembers what it was sent."""

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(length).decode()
        self.server.requests.append((self.path, body))
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            self.answer(
                {
                    "commitUrl": self.server.url + "/datasets/someone/data/commit/0",
                    "commitOid": "0" * 40,
                    "success": True,
                }
            )
        elif "validate-yaml" in self.path:
            self.answer({"errors": [], "warnings": []})
        else:
            self.answer({"url": f"{self.server.url}/datasets/someone/data", "name": "someone/data", "id": "0"})

    def do_GET(self):
        self.server.requests.append((self.path, ""))
        self.answer({"id": "someone/data", "sha": "0" * 40, "siblings": [], "private": False, "tags": []})

    do_HEAD = do_GET

    def answer(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.requests = f"http://127.0.0.1:{server.server_port}", []
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def committed(hub):
    """Files of the last commit, by name."""
    body = [body for path, body in hub.requests if "/commit/" in path][-1]
    lines = [json.loads(line) for line in body.splitlines()]
    return {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }


def run_online(command, hub):
    online = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_stand_in", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | online)
    assert process.returncode == 0, process.stderr[-2000:]


def test_a_generator_is_pushed_with_its_card(tmp_path, hub):
    recipe = Path(__file__).parents[1] / "recipes" / "pattern_67" / "mini.yaml"
    command = [sys.executable, "-m", "trl_dpg.cli", "dpg", "--config", str(recipe), "--output_dir", str(tmp_path)]
    command += ["--max_steps", "1", "--evaluate", "false", "--push_to_hub", "--hub_model_id", "someone/generator"]
    run_online(command, hub)
    files = committed(hub)
    assert files["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    for word in (
        "Dataset Policy Gradients",
        "WeightPatternMetric",
        '"optimizer": "adamw"',
        "pixel_accuracy",
        "2604.08423",
        "## Manifest",
    ):
        assert word in card
    assert files["manifest.json"] == (tmp_path / "manifest.json").read_bytes()
    ModelCard(card).data.to_dict()


def test_a_dataset_is_pushed_with_its_card(world, tmp_path, hub):
    command = [sys.executable, "-m", "trl_dpg.cli", "generate", "--model_name_or_path", str(world / "generator")]
    command += ["--dataset_name", str(world / "prompts.jsonl"), "--output_dir", str(tmp_path)]
    command += ["--max_completion_length", "4", "--hub_dataset_id", "someone/data", "--private"]
    run_online(command, hub)
    created = json.loads(next(body for path, body in hub.requests if path.endswith("/repos/create")))
    assert created["type"] == "dataset" and created["visibility"] == "private"
    files = committed(hub)
    assert files["train.parquet"] == (tmp_path / "train.parquet").read_bytes()
    for name in ("README.md", "manifest.json", "manifest_rows.npz"):
        assert files[name] == (tmp_path / name).read_bytes()


def test_a_command_prints_what_is_its_own(tmp_path):
    """No loading bars, and no notices about the code of other packages: what a new user can do nothing about."""
    arguments = ["--config", "recipes/new_language/mini.yaml", "--max_steps", "1", "--output_dir", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TQDM_")}
    run = subprocess.run(
        [sys.executable, "-m", "trl_dpg.cli", "dpg", *arguments],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stderr.splitlines() == ["CPU threads: 1"]
    lines = [line for line in run.stdout.splitlines() if line and not line.startswith(("[INFO]", "    "))]
    table = ["texts", "metric", "perplexity", "word_share"]
    assert [line.split(":")[0].split(" ")[0] for line in lines[3:]] == ["1", "fresh", "fresh", *table, "All"]
    assert all(line.startswith(f"{tmp_path.name}: ") for line in lines[:3])


@pytest.mark.parametrize(
    "given, environment, size, expected",
    [
        (None, None, 10, 1),
        (None, None, 6_000_000, 3),
        (None, "2", 10, None),
        (4, None, 10, 4),
        (4, "2", 6_000_000, 4),
    ],
)
def test_the_default_number_of_threads_fits_the_model(given, environment, size, expected, monkeypatch, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 3)
    say_once.cache_clear()
    num_cores.cache_clear()
    models = [torch.nn.Linear(1, 1), torch.nn.Linear(size, 1, device="meta")]
    CommandArguments(num_threads=given).set_threads(*models)
    CommandArguments(num_threads=given).set_threads(*models)
    assert set(chosen) == ({expected} if expected else set())
    assert capsys.readouterr().err == "CPU threads: 6\n"
    num_cores.cache_clear()


def test_a_tiny_generator_does_not_take_the_threads_of_a_larger_student(monkeypatch):
    threads = [6]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 8)
    num_cores.cache_clear()
    for size in (10, 6_000_000):
        CommandArguments().set_threads(torch.nn.Linear(size, 1, device="meta"))
    assert threads == [6, 1, 6]
    num_cores.cache_clear()
