"""The warm start: the steps of its page, one after the other, each small, with a teacher of the tests' own."""

import importlib
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from trl import TrlParser

from tests.teacher_server import Server
from trl_dpg import cli


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "warm_start.md").read_text()
SMALL = {
    "teach": "--dataset_train_split train[:32]",
    "mix": "--num_samples 16",
    "dpg": "--max_steps 1 --per_device_train_batch_size 32 --num_generations 16",
    "generate": "--num_samples 32",
    "evaluate": "--seeds 0 1",
}


def thinks(request, number):
    question = request["messages"][-1]["content"].split()
    return {"content": f"<think> {' '.join(question[: 1 + len(question[0] + question[2]) % 4])} </think> lan len lin"}


@pytest.fixture
def steps(tmp_path, monkeypatch):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
    return [shlex.split(line) for line in blocks.splitlines() if line]


def test_each_step_of_the_page_reads_what_the_one_before_has_written(steps, monkeypatch):
    with Server(thinks) as server:
        for program, command, *arguments in steps:
            if program == "python":
                monkeypatch.setattr(sys, "argv", [command, *arguments, "--epochs", "1"])
                runpy.run_path(command, run_name="__main__")
            elif program == "trl":
                script = importlib.import_module(f"trl.scripts.{command}")
                parser: TrlParser = script.make_parser()
                script.main(*parser.parse_args_and_config([*arguments, "--num_train_epochs", "1"]))
            else:
                url = ["--base_url", server.url] if command == "teach" else []
                cli.main([command, *arguments, *SMALL[command].split(), *url])
    figures = json.loads(Path("runs/warm_start/evaluation/evaluation.json").read_text())
    assert len(figures["datasets"]) == 3 and figures["seeds"] == [0, 1]
    sample = json.loads(Path("runs/warm_start/teacher/samples.jsonl").read_text().splitlines()[0])
    assert sample["reasoning"] and sample["completion"] == "lan len lin"
