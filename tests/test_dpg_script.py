"""`trl-dpg dpg`: the recipes, small, and what they write."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM

from tests.tiny import make_model, make_tokenizer, on_two_processes
from trl_dpg import cli, toy
from trl_dpg.evaluation import evaluate_dataset, generate_texts, sft_config
from trl_dpg.metagradients import InnerLoopConfig, metagradient
from trl_dpg.metrics import LanguageModelingMetric
from trl_dpg.scripts import dpg, fresh_students, registry


RECIPES = Path(__file__).parents[1] / "recipes"
MINI = sorted(set(RECIPES.glob("*/mini*.yaml")) - set(RECIPES.glob("audit/*")))
OTHER = [own for pattern in ("mini*.yaml", "smollm2.yaml") for own in RECIPES.glob(f"*/{pattern}")]
FULL = sorted(set(RECIPES.glob("*/*.yaml")) - set(OTHER) - set(RECIPES.glob("warm_start/*")))
SMALL = ["--max_steps", "2", "--per_device_train_batch_size", "32", "--num_generations", "16"]
SMALL += ["--student_batch_size", "16"]


def name(path):
    return f"{path.parent.name}-{path.stem}"


def run(recipe, output_dir, *arguments):
    cli.main(["dpg", "--config", str(recipe), "--output_dir", str(output_dir), *SMALL, *arguments])
    return json.loads((output_dir / "summary.json").read_text())


LONG = ("cot_length", "families", "replay")  # a longer world, three students, or six fresh ones


@pytest.mark.parametrize(
    "recipe", [pytest.param(own, marks=[pytest.mark.faults] * (own.parent.name in LONG), id=name(own)) for own in MINI]
)
def test_a_mini_recipe_runs_and_ends_with_the_figures_of_fresh_students(recipe, tmp_path):
    summary = run(recipe, tmp_path)
    assert summary["steps"] == 2 and summary["seconds"] > 0
    figure = {"pattern_67": "pixel_accuracy", "qr_code": "scanned_text", "l2_norm": "weight_norm"}
    figure |= {"new_language": "word_share", "uuid": "contains", "cot_length": "right_answer"}
    figure |= {"families": "metric/gpt2", "replay": "language_A", "constrained": "kept/language_A"}
    for texts in ("untrained", "trained"):
        assert torch.isfinite(torch.tensor(summary[texts]["metric"]))
        assert figure[recipe.parent.name] in summary[texts]
        assert len(summary[texts]["samples"]) == 8
    assert len(summary["curves"]["dpg/metric_after"]) == 2
    assert "fresh students on texts of the | untrained generator" in (tmp_path / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.model_type == "llama"


SEPARATE = ["--cross_group_batching", "false", "--num_generations", "4", "--student_batch_size", "8"]


def test_ablations_are_flags(tmp_path):
    """The first step's figures tell them apart: all start alike."""
    recipe = RECIPES / "pattern_67" / "mini.yaml"
    ways = {"adamw": [], "sgd": ["--student_optimizer", "sgd"]}
    ways |= {"separate": SEPARATE, "naive": [*SEPARATE, "--attribution", "dataset"]}
    first = {}
    for way, arguments in ways.items():
        curves = run(recipe, tmp_path / way, "--evaluate", "false", *arguments)["curves"]
        first[way] = {name: values[0] for name, values in curves.items()}
    assert len({figures["dpg/metric_after"] for figures in first.values()}) == 3
    assert first["separate"]["dpg/metric_after"] == first["naive"]["dpg/metric_after"]
    assert [way for way in ways if "dpg/predicted_change" not in first[way]] == ["naive"]


@pytest.mark.parametrize("recipe", FULL, ids=name)
def test_a_full_recipe_builds_its_trainer(recipe, tmp_path, monkeypatch):
    """With tiny models of the same architecture in the places of the real ones, and a few articles."""
    settings = yaml.safe_load(recipe.read_text())
    tokenizer = toy.character_tokenizer(bos=True)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    llamas = ("meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.1-8B-Instruct")
    models = {"gpt2": tiny_gpt2(tokenizer)} | dict.fromkeys(llamas, tiny_llama(tokenizer))
    for hub_id, model in models.items():
        model.save_pretrained(tmp_path / hub_id)
        tokenizer.save_pretrained(tmp_path / hub_id)
    asked = []

    def load_data(name, config=None, split="train", streaming=False):
        asked.append((name, config, split))
        rows = settings["generation_batch_size"] // settings["num_generations"]
        return Dataset.from_dict({"id": ["0"] * rows, "text": ["some text " * 200] + ["short"] * (rows - 1)})

    class Reached(BaseException):
        pass

    def train(self, **kwargs):
        built.append(self)
        raise Reached

    built = []
    monkeypatch.setattr(dpg, "load_data", load_data)
    monkeypatch.setattr(registry, "lm_eval", lambda **kwargs: LanguageModelingMetric(["some text"]))
    monkeypatch.setattr("trl_dpg.rewards.LanguageIDReward", FakeLanguageID)
    monkeypatch.setattr("trl_dpg.DPGTrainer.train", train)
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", lambda **kwargs: kwargs)
    arguments = ["--model_name_or_path", str(tmp_path / settings["model_name_or_path"])]
    arguments += ["--student_model_name_or_path", str(tmp_path / settings["student_model_name_or_path"])]
    arguments += [
        "--bf16",
        "false",
        "--report_to",
        "none",
        "--output_dir",
        str(tmp_path / "out"),
        "--evaluate",
        "false",
    ]
    with pytest.raises(Reached):
        cli.main(["dpg", "--config", str(recipe), *arguments])
    (trainer,) = built
    assert asked == [("wikimedia/wikipedia", "20231101.en", settings["dataset_train_split"])]
    (message,) = trainer.train_dataset[0]["prompt"]
    assert message["content"].startswith("Rephrase this Wikipedia article.\n\nsome text")
    assert len(message["content"]) < 1100 and trainer.args.num_generations == 4
    assert trainer.args.generation_batch_size % settings["student_batch_size"] == 0
    student = trainer.dpg_reward.student
    assert "4-bit" in student.describe() or not settings.get("student_load_in_4bit")
    if trainer.use_vllm:
        assert trainer.vllm_generation["mode"] == "colocate" and trainer.vllm_generation["enable_sleep_mode"]
        assert trainer.dpg_reward.placement.offload


class FakeLanguageID:
    __name__ = "language_id"

    def __init__(self, language, **kwargs):
        assert re.fullmatch("[a-z]{3}_Latn", language)  # as the default classifier names them

    def __call__(self, completions, **kwargs):
        return [0.0] * len(completions)


def tiny_llama(tokenizer):
    return toy.tiny_llama(tokenizer, hidden_size=64, num_layers=1, seed=0)


def tiny_gpt2(tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=128))


def test_generation_kwargs_override_how_the_final_test_samples(tmp_path):
    override = ["--temperature", "0.9", "--generation_kwargs", '{"temperature": 0.5, "max_new_tokens": 3}']
    summary = run(RECIPES / "pattern_67" / "mini.yaml", tmp_path, *override)
    assert all(len(text) <= 3 for name in ("untrained", "trained") for text in summary[name]["samples"])


# -- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metric", "qrcode"], "Did you mean 'qr_code'"),
        (["--metric", "no_such_module.metric"], "could not import 'no_such_module.metric'"),
        (["--metric_kwargs", "{scale"], "--metric_kwargs must be JSON"),
        (["--toy_world", "moon"], "--toy_world: unknown name 'moon'"),
        (["--reward_funcs", "length"], "--reward_funcs: unknown name 'length'"),
        (["--reward_kwargs", '{"contains": {"text": "a"}}'], "not in --reward_funcs"),
        (["--dataset_name", "prompts.jsonl"], "there is no file 'prompts.jsonl'"),
        (["--prompt_template", "{text}"], "cannot be filled in (KeyError('text'))"),
        (["--metric_kwargs", '{"pattern": "67", "size": 3}'], "--metric_kwargs does not fit 'weight_pattern'"),
        (["--metric_kwargs", "[1]"], "--metric_kwargs must be a mapping"),
        (["--reward_weights", "1", "2"], "--reward_weights has 2 weights for 1 rewards"),
        (["--toy_world_kwargs", '{"moons": 2}'], "--toy_world_kwargs does not fit 'characters'"),
        (["--conversational"], "--conversational: the generator's tokenizer has no chat template"),
        (["--model_name_or_path", "/nowhere"], "--model_name_or_path '/nowhere' could not be loaded"),
        (["--student_model_name_or_path", "/nowhere"], "--student_model_name_or_path '/nowhere' could not be loaded"),
        (["--train_on", "prompt"], "Unknown train_on 'prompt'"),
        (["--verify_steps", "-1"], "verify_steps must not be negative"),
    ],
)
def test_wrong_input_is_named_and_ends_with_status_2(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        run(RECIPES / "pattern_67" / "mini.yaml", tmp_path, *arguments)
    assert raised.value.code == 2 and message in capsys.readouterr().err


def test_too_few_prompts_for_a_step_are_refused(tmp_path, capsys):
    (tmp_path / "one.jsonl").write_text('{"prompt": "abcd"}\n')
    with pytest.raises(SystemExit) as raised:
        run(RECIPES / "pattern_67" / "mini.yaml", tmp_path / "out", "--dataset_name", str(tmp_path / "one.jsonl"))
    assert raised.value.code == 2 and "has 1 rows, but a generation batch takes 2 prompts" in capsys.readouterr().err


def test_switches_of_accelerate_may_stand_in_a_recipe(tmp_path, monkeypatch):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    own = tmp_path / "own.yaml"
    recipe = (RECIPES / "pattern_67" / "mini.yaml").read_text()
    own.write_text(recipe + "multi_gpu: true\ntpu: false\nnum_processes: 2\n")
    cli.main(["dpg", f"--config={own}"])
    (arguments,) = launched
    assert arguments.multi_gpu and not arguments.tpu and arguments.num_processes == 2
    assert arguments.training_script_args == ["--config", str(own)]


def test_batches_are_checked_as_those_of_the_processes_that_will_run(tmp_path, monkeypatch, capsys):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    recipe, accelerates = RECIPES / "new_language" / "mini.yaml", tmp_path / "accelerate.yaml"
    half = ["dpg", "--config", str(recipe), "--per_device_train_batch_size", "64"]
    accelerates.write_text("num_processes: 2\n")
    cli.main([*half, "--num_processes=2"])
    cli.main([*half, "--accelerate_config", str(accelerates)])
    own = tmp_path / "own.yaml"
    own.write_text(recipe.read_text() + "num_processes: 2\n")
    cli.main(["dpg", "--config", str(own), *half[3:]])
    assert [arguments.num_processes for arguments in launched] == [2, None, 2]
    with pytest.raises(SystemExit):
        cli.main(["dpg", "--config", str(own), *half[3:], "--num_processes", "1"])
    assert "must divide the 64 samples" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(half)
    assert "must divide the 64 samples" in capsys.readouterr().err


def test_what_accelerate_runs_ends_with_its_own_status(monkeypatch):
    def fail(arguments):
        raise subprocess.CalledProcessError(2, "python")

    monkeypatch.setattr("accelerate.commands.launch.launch_command", fail)
    with pytest.raises(SystemExit) as raised:
        cli.main(["dpg", "--num_processes", "2", "--config", str(RECIPES / "pattern_67" / "mini.yaml")])
    assert raised.value.code == 2


def test_accelerates_arguments_are_passed_on(tmp_path, monkeypatch):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    recipe = str(RECIPES / "pattern_67" / "mini.yaml")
    cli.main(["dpg", "--num_processes", "2", "--config", recipe, "--accelerate_config", "multi_gpu", "--seed", "3"])
    (arguments,) = launched
    assert arguments.num_processes == 2 and arguments.config_file.endswith("multi_gpu.yaml") and arguments.module
    assert arguments.training_script == "trl_dpg.scripts.dpg"
    assert arguments.training_script_args == ["--config", recipe, "--seed", "3"]
    own = tmp_path / "own.yaml"
    own.write_text(Path(recipe).read_text() + "num_processes: 8\n")
    cli.main(["dpg", "--config", str(own), "--num_processes", "2"])
    assert launched[1].num_processes == 2 and launched[1].training_script_args == ["--config", str(own)]
    cli.main(["dpg", "--config", str(own)])
    assert launched[2].num_processes == 8


def test_two_processes_train_one_generator(tmp_path):
    recipe = ["--config", str(RECIPES / "pattern_67" / "mini.yaml"), "--output_dir", str(tmp_path / "out"), *SMALL]
    process = on_two_processes("trl_dpg.scripts.dpg", *recipe)
    assert process.returncode == 0, process.stderr[-3000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"] == 2 and "trained" not in summary
    samples = json.loads((tmp_path / "out" / "dpg_config.json").read_text())
    assert samples["environment"] and process.stdout.count("see `trl-dpg evaluate`") == 1


def test_a_streamed_dataset_trains_as_any_other(tmp_path):
    rows = [json.dumps({"body": text}) + "\n" for text in ("abcd", "efgh", "bcde", "fgha")]
    (tmp_path / "prompts.jsonl").write_text("".join(rows * 8))
    streamed = ["--dataset_name", str(tmp_path / "prompts.jsonl"), "--dataset_streaming"]
    summary = run(RECIPES / "pattern_67" / "mini.yaml", tmp_path / "out", *streamed, "--prompt_template", "{body}")
    assert summary["steps"] == 2 and "pixel_accuracy" in summary["trained"]


def test_prompts_may_be_a_mixture_of_datasets(tmp_path, monkeypatch):
    for name, text in (("first", "abcd"), ("second", "efgh")):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"body": text}) + "\n") * 2)
    own = yaml.safe_load((RECIPES / "pattern_67" / "mini.yaml").read_text())
    own["datasets"] = [{"path": "json", "data_files": str(tmp_path / f"{name}.jsonl")} for name in ("first", "second")]
    own["prompt_template"] = "{body}"
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    trained_on = []
    monkeypatch.setattr(
        "trl_dpg.DPGTrainer.train", lambda self, **kwargs: trained_on.extend(self.train_dataset["prompt"])
    )
    run(tmp_path / "own.yaml", tmp_path / "out", "--evaluate", "false")
    assert sorted(trained_on) == ["abcd", "abcd", "efgh", "efgh"]


def test_a_recipe_combines_metrics(tmp_path):
    own = yaml.safe_load((RECIPES / "pattern_67" / "mini.yaml").read_text())
    part = {"metric": own["metric"], "metric_kwargs": own.get("metric_kwargs") or {}}
    norm = {"metric": "weight_norm", "weight": 0.001}
    own |= {"metric": "combined", "metric_kwargs": {"metrics": [part, norm]}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    curves = run(tmp_path / "own.yaml", tmp_path / "out", "--max_steps", "1", "--evaluate", "false")["curves"]
    assert {"dpg/pixel_accuracy", "dpg/weight_norm"} <= set(curves)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ([], "combined needs `metrics`"),
        ([{"metric": "weight_norm", "weights": 2}], "got {'metric': 'weight_norm', 'weights': 2}"),
        ([{"metric": "weight_nrm"}], "Did you mean 'weight_norm'?"),
    ],
)
def test_a_combined_metric_that_cannot_be_made_is_named(metrics, message):
    with pytest.raises(registry.UsageError, match=re.escape(message)):
        registry.named_metric("combined", {"metrics": metrics})


# -- the honest test -------------------------------------------------------------------------------------------------


def test_a_fresh_sft_student_agrees_with_the_inner_loop(tmp_path):
    """One step of SFTTrainer on equally long texts is one step of ours: the same metric."""
    from trl_dpg import Student

    texts = ["w1 w2 w3 w4", "w4 w3 w2 w1", "w2 w2 w5 w6", "w7 w1 w7 w1"]
    metric = LanguageModelingMetric(["w1 w2 w3", "w5 w4"])

    def load():
        return Student(make_model(), make_tokenizer())

    config = InnerLoopConfig(batch_size=4, learning_rate=1e-2, eps_root=0.0, eps=1e-3)
    ours = metagradient(load(), texts, metric, config)
    result = evaluate_dataset(load, texts, metric, config)
    assert result.metric != pytest.approx(ours.metric_before, rel=1e-3)
    assert result.metric == pytest.approx(ours.metric_after, rel=1e-4)
    assert result.proxies["perplexity"] == pytest.approx(torch.tensor(-result.metric).exp().item(), rel=1e-4)


def test_the_sft_settings_follow_the_inner_loop(tmp_path):
    settings = sft_config(InnerLoopConfig(eps_root=1e-6, betas=(0.8, 0.99), weight_decay=0.1), tmp_path)
    assert (settings.adam_epsilon, settings.adam_beta1, settings.weight_decay) == (1e-3, 0.8, 0.1)
    settings = sft_config(InnerLoopConfig(optimizer="sgd", momentum=0.5, max_grad_norm=2.0), tmp_path)
    assert (settings.optim, settings.optim_args, settings.max_grad_norm) == ("sgd", "momentum=0.5", 2.0)


def test_all_empty_texts_are_refused():
    with pytest.raises(ValueError, match="All texts are empty"):
        evaluate_dataset(lambda: None, ["", ""], lambda student: None, InnerLoopConfig())


def test_generated_texts_are_the_models_own_and_repeat_with_the_seed():
    tokenizer = toy.word_tokenizer(toy.LANGUAGE_A)
    model = toy.tiny_llama(tokenizer, hidden_size=32, num_layers=1, seed=0)
    state = torch.random.get_rng_state()
    texts = [generate_texts(model, tokenizer, ["ba be", "do"], 5, seed=seed, batch_size=1) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)  # of a training around it, for example
    assert texts[0] == texts[1] != texts[2]
    assert all(set(text.split()) <= set(toy.LANGUAGE_A) for text in texts[0])
    assert model.training


def test_gradient_checkpointing_does_not_change_what_is_generated():
    model, tokenizer = make_model().train(), make_tokenizer()
    texts = generate_texts(model, tokenizer, ["w1 w2", "w3"], 8)
    model.gradient_checkpointing_enable()
    assert generate_texts(model, tokenizer, ["w1 w2", "w3"], 8) == texts
    assert model.is_gradient_checkpointing and model.training


UUID = RECIPES / "uuid" / "mini.yaml"


@pytest.mark.parametrize("resume", ["auto", "true"])
def test_a_finished_run_that_is_started_again_trains_no_further(resume, tmp_path):
    arguments = ["--save_strategy", "steps", "--save_steps", "2", "--evaluate", "false"]
    first = run(UUID, tmp_path, *arguments)
    again = run(UUID, tmp_path, *arguments, "--resume_from_checkpoint", resume)
    assert again["steps"] == first["steps"] == 2 and again["curves"] == first["curves"]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path, tmp_path / "checkpoint-2")]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_true_needs_a_checkpoint(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(UUID, tmp_path / "new", "--resume_from_checkpoint", "true", "--evaluate", "false")
    assert "--resume_from_checkpoint: there is no checkpoint in" in capsys.readouterr().err


def test_fresh_students_have_the_numbers_that_auto_chose(tmp_path):
    """With one reward weight less, the trainer has a copy of the arguments."""
    auto = ["--student_learning_rate", "auto", "--student_eps_root", "auto", "--reward_weights", "0.0"]
    summary = run(UUID, tmp_path, *auto)
    assert torch.isfinite(torch.tensor(summary["trained"]["metric"]))


@pytest.mark.faults
def test_a_finished_run_takes_the_numbers_of_auto_from_its_file(tmp_path, capsys):
    arguments = ["--save_strategy", "steps", "--save_steps", "2", "--evaluate", "false", "--max_steps", "2"]
    arguments += ["--student_learning_rate", "auto", "--student_eps_root", "auto"]
    run(UUID, tmp_path, *arguments)
    config = (tmp_path / "dpg_config.json").read_text()
    run(UUID, tmp_path, *arguments, "--resume_from_checkpoint", "auto")
    rate = json.loads((tmp_path / "tune.json").read_text())["chosen"]["learning_rate"]
    assert f'"learning_rate": {rate}' in (tmp_path / "README.md").read_text()
    assert (tmp_path / "dpg_config.json").read_text() == config
    (tmp_path / "tune.json").unlink()
    with pytest.raises(SystemExit):
        run(UUID, tmp_path, *arguments, "--resume_from_checkpoint", "auto")
    assert "No step was left to train" in capsys.readouterr().err


def test_what_was_measured_before_fresh_students_fail_is_kept(tmp_path, monkeypatch):
    judge, calls = fresh_students.judge, []

    def fails_at_the_sixth(*arguments):
        calls.append(arguments)
        if len(calls) == 6:
            raise RuntimeError("out of memory")
        return judge(*arguments)

    monkeypatch.setattr(fresh_students, "judge", fails_at_the_sixth)
    with pytest.raises(SystemExit, match="1"):
        run(UUID, tmp_path, "--num_fresh_students", "3")
    summary = json.loads((tmp_path / "summary.json").read_text())
    fresh = summary["fresh_students"]
    assert fresh["seeds"] == [42, 43] and len(fresh["untrained"]["metric"]) == len(fresh["trained"]["metric"]) == 2
    assert summary["trained"]["metric"] == pytest.approx(sum(fresh["trained"]["metric"]) / 2)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ('{"a": "language_modeling"}', "'a' must have `metric` and perhaps `metric_kwargs`, got 'language_modeling'"),
        ('{"a": {"metric": "language_modeling", "kwargs": {}}}', "'a' must have `metric` and perhaps `metric_kwargs`"),
        ('{"metric": {"metric": "weight_norm"}}', "'metric' is the name of another figure"),
        ('{"contains": {"metric": "weight_norm"}}', "'contains' is the name of another figure"),
        ('{"a": {"metric": "language_modeling", "metric_kwargs": null}}', "'a': .*there is no file"),
        ('{"a": {"metric": "language_modelling"}}', "'a': .*Did you mean 'language_modeling'"),
    ],
)
def test_wrong_held_out_metrics_are_refused_by_their_name(metrics, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(UUID, tmp_path, "--held_out_metrics", metrics)
    error = capsys.readouterr().err
    assert re.search(f"--held_out_metrics: {message}", " ".join(error.split()))
