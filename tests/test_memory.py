"""The predicted memory of a training: against what tensors take, and what the command says."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, LlamaConfig

from tests.tiny import make_tokenizer
from trl_dpg import InnerLoopConfig, Student, cli, metagradient
from trl_dpg.memory import Setup, StudentMemory, StudentTraces, empty_model, estimate, weight_bytes
from trl_dpg.memory.live_bytes import LiveBytes
from trl_dpg.memory.trajectory_bytes import trajectory_bytes
from trl_dpg.metagradients.fine_tuning import FineTuning
from trl_dpg.metagradients.memory_plan import MemoryPlan
from trl_dpg.metagradients.trajectory import forward_sweep
from trl_dpg.metrics import LanguageModelingMetric, WeightNormMetric


LLAMA = LlamaConfig(
    vocab_size=512,
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    tie_word_embeddings=True,
)
GPT2 = GPT2Config(vocab_size=512, n_embd=96, n_layer=1, n_head=4, n_positions=128)
LORA = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
FOUR = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
LENGTH = 48
GIGABYTE = 10**9


def data(number):
    torch.manual_seed(0)
    rows = torch.randint(3, 512, (number, LENGTH)).tolist()
    return [{"input_ids": row[k % 2 :]} for k, row in enumerate(rows)]


METRIC = LanguageModelingMetric(data(4), batch_size=4)


def real_student(kind, folder, config):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    init = {"quantization_config": FOUR} if kind == "qlora" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **init)
    model.config._name_or_path = ""
    return Student(model, peft_config=None if kind == "full" else LORA, disable_dropout=True)


def planned_student(kind, config=LLAMA):
    four = FOUR if kind == "qlora" else None
    return Student(empty_model(config, torch.float32, None if kind == "full" else LORA, four), disable_dropout=True)


@pytest.mark.parametrize(
    ("kind", "settings", "number", "metric"),
    [
        ("lora", dict(memory_budget=0), 8, METRIC),
        ("lora", dict(memory_budget=GIGABYTE, micro_batch_size=4), 32, METRIC),
        ("qlora", dict(memory_budget=0), 32, METRIC),
        ("full", dict(memory_budget=GIGABYTE, max_grad_norm=1.0), 8, METRIC),
        ("full", dict(memory_budget=0, checkpoint_interval=2, micro_batch_size=2, optimizer="sgd"), 32, METRIC),
        ("full", dict(attribution="dataset"), 32, WeightNormMetric("model.norm.weight")),
    ],
)
def test_the_predicted_peak_is_that_of_the_tensors(kind, settings, number, metric, tmp_path):
    config = InnerLoopConfig(**settings)
    planned = planned_student(kind)
    memory = StudentMemory(StudentTraces(planned, LENGTH, False), config, number, metric, free=64 * GIGABYTE)
    predicted = max(phase.total for phase in memory.phases())

    student = real_student(kind, tmp_path, LLAMA)
    metagradient(student, data(2), metric, InnerLoopConfig())  # checks that are made once
    with LiveBytes(student.model.parameters()) as live:
        metagradient(student, data(number), metric, config)
    assert predicted == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("kind", ["lora", "qlora", "full"])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_weights_are_counted_as_they_are_loaded(kind, config, tmp_path):
    real, planned = real_student(kind, tmp_path, config), planned_student(kind, config)
    assert weight_bytes(planned.model) == weight_bytes(real.model)
    assert planned.describe().split("`")[-1] == real.describe().split("`")[-1]
    assert planned.initial_theta().nbytes == real.initial_theta().nbytes


@pytest.mark.parametrize("interval", [1, 2, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_trajectory_has_the_size_that_the_plan_says(interval, optimizer, tmp_path):
    config = InnerLoopConfig(batch_size=1, memory_budget=0, checkpoint_interval=interval, optimizer=optimizer)
    model = get_peft_model(AutoModelForCausalLM.from_config(LLAMA), LORA)
    model.config._name_or_path = ""
    fine_tuning = FineTuning(Student(model), data(6), config)
    student = fine_tuning.student
    with fine_tuning.sweeping(), LiveBytes(student.model.parameters()) as live:
        kept = forward_sweep(student, fine_tuning.steps, torch.ones(6), config)
        size = live.now
    assert kept.last is not None
    theta = student.initial_theta().nbytes
    expected = trajectory_bytes(config, theta, 6, MemoryPlan(config, theta, 6, 1).stretch(GIGABYTE))
    assert expected == pytest.approx(size, rel=0.02)
    assert trajectory_bytes(config, theta, 6, 6, num_ranks=4) == trajectory_bytes(config, theta, 6, 6) // 4


def test_changes_are_tried_until_the_training_fits():
    traces = StudentTraces(planned_student("lora"), LENGTH, False)

    def setup(memory):
        def student(config, free):
            return StudentMemory(traces, config, 8, METRIC, free)

        return Setup(weight_bytes(traces.student.model), student, InnerLoopConfig(), None, memory)

    large = estimate(setup(GIGABYTE))
    assert large.fits and not large.changes
    none = estimate(setup(1000))
    assert not none.fits and none.changes and not none.changes[-1].fits
    some = estimate(setup(none.changes[-1].peak))
    assert not some.fits and some.changes[-1].fits and some.changes[-1].peak <= some.memory
    assert {change.setting for change in some.changes} == {"student_micro_batch_size", "student_memory_budget"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    AutoModelForCausalLM.from_config(LLAMA).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text('{"prompt": "w1 w2 w3"}\n' * 4)
    path = folder / "recipe.yaml"
    path.write_text(
        f"""
output_dir: {folder}/run
model_name_or_path: {folder}/model
student_model_name_or_path: {folder}/model
dataset_name: {folder}/prompts.jsonl
metric: language_modeling
metric_kwargs: {{texts: [w4 w5 w6]}}
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
num_generations: 4
max_completion_length: 32
student_batch_size: 8
bf16: false
"""
    )
    return path


def run(recipe, *arguments):
    cli.main(["memory", "--config", str(recipe), *arguments])


def test_the_command_says_that_it_fits_and_writes_all_figures(recipe, tmp_path, capsys):
    run(recipe, "--memory", "1GB", "--json_file", str(tmp_path / "memory.json"))
    out = capsys.readouterr().out
    assert "Prompts of 3 tokens" in out and "It fits:" in out
    figures = json.loads((tmp_path / "memory.json").read_text())
    assert figures["fits"] and figures["memory"] == GIGABYTE
    assert list(figures["phases"]) == ["generation", "fine-tuning", "metric", "attribution", "update"]
    for phase in figures["phases"].values():
        assert phase["total"] == sum(size for name, size in phase.items() if name != "total")
    assert figures["peak"] == max(phase["total"] for phase in figures["phases"].values())


def test_a_student_in_host_memory_is_on_the_device_during_the_reward_only(recipe, tmp_path):
    path = tmp_path / "memory.json"
    run(recipe, "--memory", "1GB", "--student_offload", "true", "--json_file", str(path))
    sizes = {name: parts["student's weights"] for name, parts in json.loads(path.read_text())["phases"].items()}
    weights = sizes["metric"]
    assert weights > 0
    assert sizes == dict.fromkeys(("fine-tuning", "metric", "attribution"), weights) | {"generation": 0, "update": 0}


def test_the_command_names_the_setting_and_ends_with_1_if_it_does_not_fit(recipe, capsys):
    with pytest.raises(SystemExit) as ended:
        run(recipe, "--memory", "10MB", "--device_type", "cpu")
    out = capsys.readouterr().out
    assert ended.value.code == 1
    assert "It does not fit:" in out and "--student_micro_batch_size" in out


def test_processes_are_planned_and_not_started(recipe, tmp_path, capsys):
    def parts(*arguments):
        path = tmp_path / "memory.json"
        run(recipe, "--memory", "8GB", "--json_file", str(path), *arguments)
        return json.loads(path.read_text())["phases"]["update"]

    one, two = parts(), parts("--num_processes", "2")
    assert "One device of 2" in capsys.readouterr().out
    assert two["generator's gradients"] == 2 * one["generator's gradients"]  # DDP's buckets
    sharded = parts("--num_processes", "2", "--accelerate_config", "fsdp2")
    for name in ("generator's weights", "generator's optimizer", "generator's gradients"):
        assert sharded[name] == one[name] // 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "much"], "--memory must be a size such as 24GB or 80GiB, got 'much'"),
        (["--device_type", "tpu"], "--device_type must be 'cpu' or 'cuda', got 'tpu'"),
        (["--num_processes", "0"], "--num_processes must be at least 1, got 0"),
        (["--accelerate_config", "none_such"], "--accelerate_config: Accelerate config none_such"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, recipe, capsys):
    with pytest.raises(SystemExit) as ended:
        run(recipe, *arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err
