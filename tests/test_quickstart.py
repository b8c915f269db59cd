"""The quickstart, a few steps of it, through the command line."""

import json
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, "-m", "trl_dpg.cli", "quickstart", "--output_dir", str(output_dir)]
    command += ["--language_steps", "12", "--picture_steps", "3"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert process.returncode == 0, process.stderr[-3000:]
    return output_dir, process.stdout


def test_the_summary_has_every_figure(run):
    summary = json.loads((run[0] / "summary.json").read_text())
    for name in ("target_language_share_first", "target_language_share_last10", "pixel_accuracy_last10"):
        assert 0 <= summary[name] <= 1
    assert summary["fresh_student_language_metric"] < 0 > summary["untrained_language_metric"]
    assert 0 <= summary["fresh_student_pixel_accuracy"] <= 1 and 0.2 <= summary["untrained_pixel_accuracy"] <= 0.8
    assert len(summary["target_language_share"]) == len(summary["language_metric"]) == 12
    assert len(summary["pixel_accuracy"]) == len(summary["picture_metric"]) == 3
    assert summary["seconds"] > 0


def test_generators_are_checkpoints_and_pictures_are_drawn(run):
    output_dir, printed = run
    for act in ("language", "picture"):
        AutoModelForCausalLM.from_pretrained(output_dir / act / "generator")
        AutoTokenizer.from_pretrained(output_dir / act / "generator")
        assert "Dataset Policy Gradients" in (output_dir / act / "generator" / "README.md").read_text()
    for name in ("curves.png", "picture.png"):
        assert (output_dir / name).read_bytes()[:4] == b"\x89PNG"
    assert "██" in printed and "share of B words" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["fly"], "invalid choice: 'fly'"), (["quickstart", "--steps", "3"], "unrecognized arguments: --steps 3")],
)
def test_wrong_usage_exits_with_status_2(arguments, message):
    process = subprocess.run([sys.executable, "-m", "trl_dpg.cli", *arguments], capture_output=True, text=True)
    assert process.returncode == 2 and message in process.stderr
