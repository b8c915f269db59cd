"""Every example runs, on tiny models and data in the form of the real ones."""

import runpy
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from tests.tiny import make_model, make_tokenizer


EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
HOOKS = ("openrlhf_reward", "verl_reward")  # of other frameworks: tests/test_serve_clients.py
CHAT = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
DATA = {
    "trl-lib/tldr": {"prompt": ["w1 w2", "w3 w4"] * 8, "completion": ["w5"] * 16},
    "trl-lib/DeepMath-103K": {"prompt": [CHAT[:1]] * 32, "solution": ["w5 w6"] * 32},
    "trl-lib/ultrafeedback_binarized": {"chosen": [CHAT] * 16, "rejected": [CHAT[:1]] * 16},
    "trl-lib/Capybara": {"messages": [[{"role": "user", "content": f"w{k} w{k + 1} w2"}] for k in range(16)]},
    "Salesforce/wikitext": {"text": ["w1 w2 w3 w4 " * 10] * 70},
}


@pytest.mark.parametrize("example", [path for path in EXAMPLES if path.stem not in HOOKS], ids=lambda path: path.stem)
def test_an_example_runs(example, tmp_path, monkeypatch, capsys):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    make_model(scale=1.0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("datasets.load_dataset", lambda name, *args, split: Dataset.from_dict(DATA[name]))
    arguments = ["--student", str(tmp_path / "model")]
    if example.stem == "filter_dataset":
        arguments += ["--num_samples", "16", "--output", str(tmp_path / "kept.jsonl")]
    else:
        arguments += ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), "--bf16", "false"]
        arguments += ["--max_steps", "1", "--max_completion_length", "4", "--report_to", "none", "--use_cpu"]
        arguments += ["--save_strategy", "no"]
    monkeypatch.setattr(sys, "argv", [str(example), *arguments])
    runpy.run_path(str(example), run_name="__main__")
    if example.stem == "filter_dataset":
        assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == 5 and "best:" in capsys.readouterr().out
    elif example.stem == "qlora_student":
        assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    else:
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
