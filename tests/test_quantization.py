"""What a 4-bit base does to the metric, and what helps."""

import shutil

import pytest
import torch
from transformers import GPTNeoXJapaneseConfig, GPTNeoXJapaneseForCausalLM

from tests.tiny import make_model, make_samples, make_tokenizer
from trl_dpg import InnerLoopConfig, metagradient
from trl_dpg.config import StudentArguments
from trl_dpg.metrics import LanguageModelingMetric
from trl_dpg.student.checks import bnb_modules
from trl_dpg.verification import quantization, quantization_check, without_quantization


METRIC = LanguageModelingMetric(make_samples(4))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("student")
    make_model("llama", scale=2.0, vocab_size=64, hidden_size=64).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


def load(path, **kwargs):
    kwargs = dict(student_load_in_4bit=True, student_use_peft=True) | kwargs
    return StudentArguments(student_model_name_or_path=path, **kwargs).load_student()


def start(student):
    """Φ before fine-tuning."""
    return metagradient(student, make_samples(2), METRIC, InnerLoopConfig()).metric_before


def test_the_check_compares_with_the_student_in_float32_and_with_the_fine_tuning(path):
    student = load(path)
    in_4_bits, in_float32 = start(student), start(load(path, student_load_in_4bit=False))
    shift = abs(in_4_bits - in_float32)
    assert shift > 1e-3
    check = quantization_check(student, METRIC, in_4_bits, in_4_bits + 0.5 * shift)
    assert check.status == "warn" and check.value == pytest.approx(in_4_bits - in_float32, rel=1e-3)
    assert f"{in_float32:.4g} in float32" in check.meaning and "`load_in_4bit`" in check.advice
    check = quantization_check(student, METRIC, in_4_bits, in_4_bits - 2 * shift)
    assert check.status == "pass" and check.advice == ""


def test_the_copy_has_the_adapters_of_the_student(path):
    student = load(path)
    with torch.no_grad():
        for parameter in student.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    copy = without_quantization(student)
    assert torch.equal(copy.initial_theta(), student.initial_theta())
    assert not bnb_modules(copy.model, "Linear4bit")


def test_without_4_bits_or_memory_there_is_nothing_to_compare(path, monkeypatch):
    assert quantization_check(load(path, student_load_in_4bit=False), METRIC, -4.0, -3.0) is None
    student = load(path)
    assert quantization_check(student, METRIC, float("nan"), float("nan")) is None  # the fine-tuning diverged
    size = 4 * student.model.get_base_model().num_parameters()
    monkeypatch.setattr(quantization, "free_memory", lambda device: 2 * size - 1)
    assert without_quantization(student) is None
    monkeypatch.setattr(quantization, "free_memory", lambda device: 2 * size)
    assert without_quantization(student) is not None


def test_the_dtype_of_the_base_without_4_bits_is_said(path):
    student = load(path, student_model_init_kwargs={"dtype": "bfloat16"})
    check = quantization_check(student, METRIC, start(student), -3.0, {"dtype": "bfloat16"})
    assert "in bfloat16; fine-tuning" in check.meaning and "float32" not in check.meaning


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_base_that_cannot_be_loaded_or_does_not_fit_is_a_skipped_check(path, tmp_path, monkeypatch):
    shutil.copytree(path, tmp_path / "student")
    student = load(str(tmp_path / "student"))
    check = quantization_check(student, out_of_memory, -4.0, -3.0)
    assert check.status == "skip" and "not enough memory" in check.meaning
    shutil.rmtree(tmp_path / "student")  # as a Hub id without a network
    check = quantization_check(student, METRIC, -4.0, -3.0)
    assert check.status == "skip" and "could not be loaded without 4 bits: " in check.meaning
    monkeypatch.setattr(quantization, "Student", out_of_memory)
    assert quantization_check(student, METRIC, -4.0, -3.0).meaning.endswith("4 bits: CUDA out of memory.")


def test_modules_that_are_skipped_and_the_head_are_not_quantised(path):
    student = load(path, student_bnb_4bit_skip_modules=["v_proj", "down_proj"])
    quantised = {name.split(".")[-2] for name in bnb_modules(student.model, "Linear4bit")}  # before .base_layer
    assert quantised == {"q_proj", "k_proj", "o_proj", "gate_proj", "up_proj"}
    in_float32 = start(load(path, student_load_in_4bit=False))
    everything = load(path, student_bnb_4bit_skip_modules=[*quantised, "v_proj", "down_proj"])
    assert start(everything) == pytest.approx(in_float32, rel=1e-5)


def test_a_head_of_another_name_is_not_quantised_either(tmp_path):
    config = GPTNeoXJapaneseConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    GPTNeoXJapaneseForCausalLM(config).save_pretrained(tmp_path)  # its head is called `embed_out`
    make_tokenizer().save_pretrained(tmp_path)
    arguments = StudentArguments(
        student_model_name_or_path=str(tmp_path),
        student_model_init_kwargs={"dtype": "float32"},
        student_load_in_4bit=True,
        student_use_peft=True,
        student_bnb_4bit_skip_modules=["dense_4h_to_h"],
    )
    model = arguments.load_student().model
    quantised = {name.split(".")[-2] for name in bnb_modules(model, "Linear4bit")}
    assert quantised == {"query_key_value", "dense", "dense_h_to_4h"}
    assert type(model.get_output_embeddings()) is torch.nn.Linear
