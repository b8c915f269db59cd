"""The README's diff: four lines or fewer, and both sides run."""

import pathlib
import re

import pytest
from datasets import Dataset

from tests.tiny import make_model, make_tokenizer


README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
DIFF = re.search(r"```diff\n(.*?)```", README, re.DOTALL).group(1).splitlines()


def side(sign):
    return "\n".join(line[1:] for line in DIFF if line[:1] in ("", " ", sign))


def test_at_most_four_lines_change():
    assert sum(line.startswith("+") for line in DIFF) <= 4
    assert sum(line.startswith("-") for line in DIFF) <= 4


@pytest.mark.parametrize("sign", ["-", "+"], ids=["before", "after"])
def test_both_sides_of_the_diff_train(sign, tmp_path, monkeypatch):
    make_model(scale=1.0).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    script = side(sign)
    for name in ("Qwen/Qwen3-0.6B", "HuggingFaceTB/SmolLM2-135M"):
        script = script.replace(name, str(tmp_path / "model"))
    arguments = dict(
        max_steps=1, max_completion_length=4, report_to="none", use_cpu=True, bf16=False, save_strategy="no"
    )
    config = "from trl import GRPOConfig as Config" if sign == "-" else "from trl_dpg import DPGConfig as Config"
    script = script.replace("    train_dataset=dataset,", "    train_dataset=dataset, args=Config(**arguments),")
    rewards = {"accuracy_reward": lambda completions, **kwargs: [float(len(c)) for c in completions]}
    monkeypatch.setattr(
        "datasets.load_dataset",
        lambda name, split: Dataset.from_dict({"prompt": ["w1 w2", "w3"] * 4, "solution": ["w1"] * 8}),
    )
    monkeypatch.setattr("trl.rewards.accuracy_reward", rewards["accuracy_reward"])
    monkeypatch.chdir(tmp_path)
    scope = {"arguments": arguments}
    exec(f"{config}\n{script}", scope)
    assert scope["trainer"].state.global_step == 1
