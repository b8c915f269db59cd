"""Where the student is: on which device, when it is moved, and what stays the same."""

import weakref
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from transformers.integrations import deepspeed
from transformers.utils import logging

from tests.small_runs import CONFIG, METRIC, PROMPTS, TEXTS, TOKENIZER, dpg_config, make_student, make_trainer
from tests.tiny import make_model
from trl_dpg import DPGReward, Student
from trl_dpg.config import StudentArguments
from trl_dpg.student import loading, placement
from trl_dpg.student.placement import Placement


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("student")
    make_model("llama", vocab_size=64, hidden_size=64).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return str(path)


def cards(monkeypatch, number, own="cuda:0", processes=1):
    """A machine with so many GPUs, as far as `Placement` asks for them."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda") if number else None)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: number)
    state = SimpleNamespace(device=torch.device(own), num_processes=processes)
    monkeypatch.setattr(placement, "PartialState", lambda: state)


class Traveller:
    """A student that only notes where it is sent."""

    def __init__(self, device="cpu"):
        self.device, self.journey = torch.device(device), []

    def to(self, device):
        self.device = torch.device(device)
        self.journey.append(str(device))


# -- which device ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "own", "where"),
    [
        ("auto", "cuda:3", "cuda:3"),
        ("auto", "cpu", "cpu"),
        ("auto", "cpu:1", "cpu"),  # as accelerate calls it on the second of several processes
        ("cpu", "cuda:0", "cpu"),
        ("cuda:1", "cuda:0", "cuda:1"),
        ("cuda", "cuda:2", "cuda:2"),
        ("cuda", "cpu", "cuda:0"),
    ],
)
def test_a_student_works_on_the_device_of_its_setting(device, own, where, monkeypatch):
    cards(monkeypatch, 4, own)
    student = Traveller()
    Placement(device).move_in(student)
    assert student.device == torch.device(where)
    Placement(device).move_in(student)
    assert len(student.journey) == (where != "cpu")  # not moved again


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "meta", "", "1"])
def test_what_is_no_device_is_refused_when_the_configuration_is_made(device, tmp_path):
    with pytest.raises(ValueError, match=f"student_device must be 'auto', 'cpu' or .* got {device!r}"):
        dpg_config(tmp_path, student_device=device)


@pytest.mark.parametrize(
    ("device", "number", "has"), [("cuda:2", 2, "2 cuda devices"), ("cuda", 0, "no cuda devices")]
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(device, number, has, monkeypatch, tmp_path):
    cards(monkeypatch, number)
    message = f"student_device='{device}', but this machine has {has}. Use 'auto' or 'cpu'."
    with pytest.raises(ValueError, match=message):
        DPGReward(make_student(), METRIC, student_device=device)
    with pytest.raises(ValueError, match=message):
        StudentArguments("not/there", student_device=device).load_student()


def test_one_card_for_the_students_of_all_processes_is_refused(monkeypatch):
    cards(monkeypatch, 4, processes=4)
    with pytest.raises(ValueError, match="student_device='cuda:1' would put the students of all 4 processes on one"):
        Placement("cuda:1").where()
    assert Placement("cuda").where() == torch.device("cuda:0")


def test_a_student_is_loaded_where_it_works(path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "trl_dpg.student.student.load_pretrained",
        lambda kind, *args, **kwargs: seen.append(kwargs.get("device_map")) or kind.from_pretrained(args[0]),
    )
    cards(monkeypatch, 2)
    StudentArguments(path, student_device="cuda:1").load_student()
    assert seen[0] == {"": torch.device("cuda:1")}
    with pytest.raises(ValueError, match="`device` apply while a model is loaded"):
        Student(make_model(), TOKENIZER, device="cpu")


# -- offload ---------------------------------------------------------------------------------------------------------


def test_an_offloaded_student_is_on_the_card_only_while_it_works(monkeypatch):
    cards(monkeypatch, 1)
    emptied = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    student = Traveller("cuda:0")
    placed = Placement("auto", offload=True)
    for move in (placed.move_out, placed.move_in, placed.move_in, placed.move_out, placed.move_out):
        move(student)
    assert student.journey == ["cpu", "cuda:0", "cpu"] and len(emptied) == 2
    Placement("auto").move_out(student := Traveller("cuda:0"))
    assert student.journey == []


def test_offload_of_a_student_in_host_memory_is_refused_or_said_to_be_idle(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"student_offload moves .* with student_device='cpu' it is always there"):
        dpg_config(tmp_path, student_device="cpu", student_offload=True)
    said = []
    monkeypatch.setattr(placement.logger, "warning_once", said.append)
    reward = DPGReward(make_student(), METRIC, CONFIG, student_offload=True)
    assert reward(PROMPTS, TEXTS) == DPGReward(make_student(), METRIC, CONFIG)(PROMPTS, TEXTS)
    assert said == ["student_offload has no effect: the student works on the CPU, in host memory."]


@pytest.fixture
def order(monkeypatch):
    """What happens, in order. A move gives each parameter new memory, as a move to a card and back does."""
    happened = []

    def move(name):
        def moved(self, student):
            happened.append(name)
            for parameter in student.model.parameters():
                parameter.data = parameter.data.clone()

        return moved

    for name in ("move_in", "move_out"):
        monkeypatch.setattr(Placement, name, move(name))
    return happened


def test_the_student_comes_after_the_completions_and_goes_before_the_update(order, tmp_path, monkeypatch):
    trainer = make_trainer(dpg_config(tmp_path, max_steps=2, student_offload=True))
    for name in ("_generate", "_calculate_rewards", "compute_loss"):
        method = getattr(trainer, name)
        monkeypatch.setattr(
            trainer,
            name,
            lambda *args, name=name, method=method, **kwargs: order.append(name) or method(*args, **kwargs),
        )
    trainer.train()
    step = ["_generate", "_calculate_rewards", "move_in", "move_out", "compute_loss"]
    assert order == ["move_out", *step, *step]


def test_a_moved_student_has_the_same_rewards_and_its_metric_before_is_not_computed_again(order):
    calls = []

    def metric(student):
        calls.append(list(order))
        return METRIC(student)

    reward = DPGReward(make_student(), metric, CONFIG, student_offload=True)
    stays = DPGReward(make_student(), METRIC, CONFIG)
    for _ in range(3):
        assert reward(PROMPTS, TEXTS) == stays(PROMPTS, TEXTS)
    assert len(calls) == 1 + 3 and all(before[-1] == "move_in" for before in calls)
    with torch.no_grad():
        next(reward.student.model.parameters()).mul_(1.5)  # another student now
    reward(PROMPTS, TEXTS)
    assert len(calls) == 1 + 3 + 2


def test_the_student_goes_after_an_error_too(order):
    def metric(student):
        raise RuntimeError("no benchmark")

    with pytest.raises(RuntimeError, match="no benchmark"):
        DPGReward(make_student(), metric, CONFIG, student_offload=True)(PROMPTS, TEXTS)
    assert order[-1] == "move_out"


def test_a_move_keeps_4_bit_weights_as_they_are(path, monkeypatch):
    import bitsandbytes.functional

    student = Student(
        path,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    )
    reward = DPGReward(student, METRIC, CONFIG)
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    assert any("quant_state" in name for name in before)
    rewards = reward(PROMPTS, TEXTS)

    def quantised(*args, **kwargs):
        raise AssertionError("quantised again")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", quantised)
    student.to("cpu")
    after = student.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert reward(PROMPTS, TEXTS) == rewards


# -- beside an engine that shards ------------------------------------------------------------------------------------


@pytest.fixture
def sharding(monkeypatch):
    """Settings of a generator that is sharded: ZeRO-3, and FSDP that loads on the first process only."""
    zero3 = Mock(is_zero3=lambda: True)
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", weakref.ref(zero3))
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    return zero3


def test_the_student_is_loaded_whole_and_the_generator_sharded_afterwards(path, sharding, monkeypatch):
    student = Student(path, peft_config=LoraConfig(r=4, task_type="CAUSAL_LM"))
    assert all(parameter.numel() > 0 for parameter in student.model.parameters())
    assert deepspeed.is_deepspeed_zero3_enabled()

    def fail(*args, **kwargs):
        assert (
            not deepspeed.is_deepspeed_zero3_enabled() and "FSDP_CPU_RAM_EFFICIENT_LOADING" not in loading.os.environ
        )
        raise OSError("no such file")

    monkeypatch.setattr("trl_dpg.student.student.load_pretrained", fail)
    with pytest.raises(OSError, match="no such file"):
        Student(path)
    assert deepspeed.is_deepspeed_zero3_enabled() and loading.os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


def test_a_student_that_was_loaded_sharded_is_refused():
    model = make_model()
    model.lm_head.weight.data = torch.empty(0)  # what ZeRO-3 leaves of it
    with pytest.raises(
        ValueError, match=r"parameter 'lm_head.weight' is empty: DeepSpeed ZeRO-3 has sharded the model"
    ):
        Student(model, TOKENIZER)


def test_zero3s_linear_layer_stays_out_of_the_sweeps(monkeypatch):
    """DeepSpeed replaces torch's function in the whole process. It stands in for its own here."""
    own = torch.nn.functional.linear
    expected = DPGReward(make_student(), METRIC, CONFIG)(PROMPTS, TEXTS)

    def zero3_linear(x, weight, bias=None):
        return own(x, weight, bias)

    student = make_student()
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear)
    assert DPGReward(student, METRIC, CONFIG)(PROMPTS, TEXTS) == expected
    assert student.tells_samples_apart and torch.nn.functional.linear is zero3_linear


# -- vLLM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (dict(top_p=0.9, top_k=50), "top_p=0.9, top_k=50"),
        (dict(min_p=0.1), "min_p=0.1"),
        (dict(repetition_penalty=1.1), "repetition_penalty=1.1"),
        (dict(temperature=0.7, top_p=1.0, top_k=0), None),
        (dict(top_p=0.9, vllm_importance_sampling_correction=False), None),
        (dict(top_p=0.9, use_vllm=False), None),
    ],
)
def test_filters_that_bias_trls_importance_ratio_are_warned_of(settings, named, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(logging.get_logger("trl_dpg.sampling"), "warning", said.append)
    dpg_config(tmp_path, **dict(use_vllm=True) | settings)
    assert [named is not None and f"use_vllm with {named}: " in text for text in said] == [True] * (named is not None)
