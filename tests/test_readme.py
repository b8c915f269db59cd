"""The README's diff: four lines or fewer, and both sides run. The YAML of the docs can be read."""

import pathlib
import re

import pytest
import yaml
from datasets import Dataset

from tests.tiny import make_model, make_tokenizer
from trl_dpg.scripts.dpg import make_parser


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


def test_the_recipes_in_the_docs_are_read(tmp_path):
    """One after the other they are one recipe."""
    page = (pathlib.Path(__file__).parent.parent / "docs" / "training.md").read_text()
    recipe = "\n".join(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL))
    settings = yaml.safe_load(recipe)
    assert recipe.count("prompt_template:") == 2 and len(settings["datasets"]) == 2
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings | {"bf16": False, "output_dir": str(tmp_path)}))
    *arguments, from_config, unknown = make_parser().parse_args_and_config(
        args=["--config", str(tmp_path / "recipe.yaml")],
        return_remaining_strings=True,
        separate_remaining_strings=True,
    )
    assert not from_config and not unknown
    script_args, training_args, model_args, dataset_args = arguments
    assert dataset_args.datasets[1].data_files == "articles.jsonl" and model_args.lora_r == 32
    assert script_args.reward_funcs[0] == "language_id" and training_args.reward_weights == [1.0, 0.0, 0.2]
