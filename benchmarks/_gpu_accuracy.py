"""Checks of `gpu.py` that compare scores with a yardstick."""

import threading
from unittest import mock

import torch
from _gpu_rows import Row, Setting, at_least, at_most, needs, tf32
from _side_by_side import _peak, _reset_peak
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.tiny import make_model, make_samples, make_tokenizer
from tests.unroll import log_likelihood, relative_error, unroll
from trl_dpg import InnerLoopConfig, Student, metagradient
from trl_dpg.environment import environment as versions
from trl_dpg.kernels import mode
from trl_dpg.metrics import LanguageModelingMetric
from trl_dpg.verification import PASS, WARN, verify


LOOP = dict(learning_rate=1e-3, eps_root=1e-7)
FLOAT32 = 2e-4
"""Largest relative error of float32 scores, as in tests/test_metagradient.py."""
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "bitsandbytes")


def environment(setting: Setting):
    installed = versions()
    yield Row("versions", ", ".join(f"{name} {installed[name]}" for name in ("python", *PACKAGES)))
    if not setting.cuda:
        yield needs("GPU", "CUDA")
        return
    device = torch.cuda.get_device_properties(0)
    memory = f"{device.total_memory / 1e9:.1f} GB, CUDA {torch.version.cuda}"
    yield Row("GPU", f"{torch.cuda.device_count()} x {device.name}, {memory}")


# -- against the float64 unroll --------------------------------------------------------------------------------------


def _data(setting):
    """Samples, the metric's samples, and the samples of a step: T = 4."""
    number, low, high = (32, 32, 64) if setting.real else (8, 4, 12)
    return make_samples(number, low=low, high=high), make_samples(4, seed=5), number // 4


def _model(setting, family="llama", lora=True, scale=1.0):
    model = make_model(family, scale=scale, hidden_size=256 if setting.real and family != "gpt2" else None)
    if lora:
        torch.manual_seed(3)
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    return model


def _scores(setting, model, **changes):
    samples, held_out, batch_size = _data(setting)
    config = InnerLoopConfig(**LOOP | dict(batch_size=batch_size) | changes)
    student = model if isinstance(model, Student) else Student(model.to(setting.device))
    return metagradient(student, samples, LanguageModelingMetric(held_out), config).scores


def _exact(setting, model):
    samples, held_out, batch_size = _data(setting)
    plain = dict(lr=LOOP["learning_rate"], eps_root=LOOP["eps_root"], batch_size=batch_size)
    return unroll(model, samples, log_likelihood(held_out), torch.ones(len(samples)), **plain)[0]


def scores(setting: Setting):
    """T = 4. The yardstick is tests/unroll.py on the CPU."""
    for name, lora in (("LoRA", True), ("full", False)):
        model = _model(setting, lora=lora)
        exact = _exact(setting, model)  # before the model is moved
        with tf32(False):
            yield at_most(f"Llama, {name}, float32: relative error", _error(setting, model, exact), FLOAT32)
        what = f"Llama, {name}, TF32: Pearson"
        if setting.cuda:
            with tf32(True):
                found = _scores(setting, model)
            yield at_least(what, _pearson(found, exact), PASS, f", relative error {relative_error(found, exact):.1e}")
        else:
            yield needs(what, "CUDA")
        model = _model(setting, "gpt2", lora).double()  # no float32 parts; scores are returned in float32
        exact = _exact(setting, model)
        yield at_most(f"GPT-2, {name}, float64: relative error", _error(setting, model, exact), 1e-6)


def _error(setting, model, exact):
    return relative_error(_scores(setting, model), exact)


def _pearson(a, b):
    return torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1].item()


def checkpointing(setting: Setting):
    """`gradient_checkpointing`: on a GPU, blocks run again in autograd's own thread, where no mode is on by itself."""
    model = _model(setting)
    exact = _exact(setting, model)
    _scores(setting, model)  # puts the model on the device
    found, calls, peaks = {}, {}, {}
    for enabled in (False, True):
        recorder = _Recorder()
        before = _reset_peak(setting.device)
        with mock.patch.object(mode, "SiLU", recorder):
            found[enabled] = _scores(setting, model, gradient_checkpointing=enabled, memory_budget=0)
        peaks[enabled] = _peak(setting.device) - before
        calls[enabled] = recorder
    with_blocks, without = calls[True].threads, calls[False].threads
    yield at_most("relative error with `gradient_checkpointing`", relative_error(found[True], exact), FLOAT32)
    yield at_most("with it against without it", relative_error(found[True], found[False]), 5e-5)
    again = f" ({len(with_blocks)} and {len(without)})"
    yield at_least("our SiLU: calls with it / without it", len(with_blocks) / len(without), 1.01, again)
    what = "our SiLU in autograd's device threads"
    threads = len(set(with_blocks) - {threading.get_ident()})
    yield at_least(what, threads, 1, " threads") if setting.cuda else needs(what, "CUDA")
    what = "peak with it / without it"
    yield Row(what, f"{peaks[True] / peaks[False]:.2f}") if setting.cuda else needs(what, "CUDA")


class _Recorder:
    """Takes the place of the SiLU in `TwiceDifferentiable`, and notes the thread of each call."""

    def __init__(self):
        self.silu, self.threads = mode.SiLU, []

    def apply(self, *args):
        self.threads.append(threading.get_ident())
        return self.silu.apply(*args)


# -- 4 bits, and 16 bits --------------------------------------------------------------------------------------------


def _four_bit_models(setting, compute):
    """A 4-bit student, and the same with ordinary layers that hold the dequantised weights."""
    path, size = setting.folder / "four_bits", 512 if setting.real else 64
    if not path.exists():
        make_model("llama", scale=2.0, vocab_size=64, hidden_size=size).save_pretrained(path)
        make_tokenizer().save_pretrained(path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)

    def load():
        return AutoModelForCausalLM.from_pretrained(
            path, quantization_config=quantization, dtype=torch.float32, device_map={"": setting.device}
        )

    def student(model):
        torch.manual_seed(4)
        adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        return Student(adapted, make_tokenizer())

    return student(load()), student(load().dequantize(torch.float32))


def four_bits(setting: Setting):
    for compute in ("float32", "bfloat16"):
        quantized, plain = _four_bit_models(setting, compute)
        found, expected = _scores(setting, quantized), _scores(setting, plain)
        error = relative_error(found, expected)
        if compute == "float32":
            yield at_most("float32 compute: relative difference to the dequantised network", error, 3e-2)
        limit = PASS if compute == "float32" else WARN
        yield at_least(f"{compute} compute: Pearson", _pearson(found, expected), limit, f", relative {error:.1e}")


def bf16_verify(setting: Setting):
    """`verify` of students whose copies compute in bfloat16."""
    samples, held_out, batch_size = _data(setting)
    full = Student(_model(setting, lora=False, scale=2.0).to(setting.device))
    students = {"full": (full, 1e-4), "4-bit LoRA": (_four_bit_models(setting, "float32")[0], 1e-2)}
    for name, (student, learning_rate) in students.items():
        config = InnerLoopConfig(learning_rate=learning_rate, eps_root=1e-5, batch_size=batch_size)
        metric = LanguageModelingMetric(held_out)
        result = verify(student, samples, metric, config, num_directions=6, try_remedies=False)
        for check in ("pearson", "bf16_agreement"):
            value = result[check].value
            yield at_least(f"{name}: {check}", float("nan") if value is None else value, PASS)
