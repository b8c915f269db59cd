"""Checks of `gpu.py` that measure time and memory: of a student of 1B parameters, if the size is real."""

import argparse
import contextlib
import io
import runpy
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from _gpu_rows import GIB, Row, Setting, allocated, at_most, free_at_most, needs, tf32
from _side_by_side import _peak, _reset_peak
from metagradient_vs_sft import head_sum, make_model, padded, sft, timed
from transformers import LlamaConfig, LlamaForCausalLM

from tests.small_runs import CONFIG, METRIC, PROMPTS, TEXTS, make_student
from tests.unroll import relative_error
from trl_dpg import DPGReward, InnerLoopConfig, Student, metagradient
from trl_dpg.metagradients import trajectory
from trl_dpg.metagradients.fine_tuning import FineTuning
from trl_dpg.metagradients.memory import GraphBudget, free_memory
from trl_dpg.student.placement import Placement
from trl_dpg.student_arguments import StudentArguments
from trl_dpg.toy import word_tokenizer


TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
CARD = 24 * GIB
"""Memory of the card for which recipes/uuid/qlora.yaml is written."""


def shape(setting: Setting) -> dict:
    """Llama-3.2-1B, or a tiny model."""
    if setting.real:
        sizes = dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16)
        return sizes | dict(num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=2048)
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    return sizes | dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)


def saved_llama(setting: Setting) -> Path:
    """A model with random weights in bfloat16, and a tokenizer of words. Made once."""
    path = setting.folder / "llama"
    if not path.exists():
        sizes = shape(setting)
        tokenizer = word_tokenizer([f"w{k}" for k in range(sizes["vocab_size"] - 3)])
        tokenizer.chat_template = TEMPLATE
        torch.manual_seed(0)
        special = dict(bos_token_id=None, eos_token_id=1, pad_token_id=0)
        with torch.device(setting.device):
            model = LlamaForCausalLM(LlamaConfig(**sizes, **special, tie_word_embeddings=True)).bfloat16()
        beside = path.with_name("llama-unfinished")
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        beside.rename(path)
    return path


def qlora_student(setting: Setting) -> Student:
    """LoRA of rank 16 on all linear layers over a base of 4 bits, as in recipes/uuid/qlora.yaml."""
    path = str(saved_llama(setting))
    arguments = StudentArguments(student_model_name_or_path=path, student_load_in_4bit=True, student_use_peft=True)
    return arguments.load_student()


def random_rows(setting: Setting, number: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    length = 128 if setting.real else 8
    return torch.randint(3, shape(setting)["vocab_size"], (number, length), generator=generator).tolist()


class Recorded(GraphBudget):
    """A budget that notes what it was given, and how often a graph was kept."""

    made: list["Recorded"] = []

    def __init__(self, left):
        super().__init__(left)
        self.given, self.kept = left, 0
        Recorded.made.append(self)

    def take(self, *args, **kwargs):
        taken = super().take(*args, **kwargs)
        self.kept += taken
        return taken


@contextlib.contextmanager
def recorded():
    Recorded.made = []
    with mock.patch.object(trajectory, "GraphBudget", Recorded):
        yield Recorded.made


# -- time ------------------------------------------------------------------------------------------------------------


def costs(setting: Setting):
    """
    Seconds of `metagradient` over seconds of plain SFT with the same micro-batches. Each is run once, after a run of
    one micro-batch.
    """
    micro = 16 if setting.real else 4
    plans = [(False, 16, 2), (False, 16, 8)]
    if setting.real:
        plans = [(True, 1024, 1), (True, 1024, 8), (True, 64, 1), (True, 32, 8), (False, 128, 1)]
    timer = argparse.Namespace(cpu_seconds=False, device=setting.device)
    student, plain = qlora_student(setting), qlora_student(setting).model.train()
    for fast, number, steps in plans:
        rows = random_rows(setting, number)
        samples = [{"input_ids": row} for row in rows]
        size = min(micro, number // steps)
        batches = [padded(rows[k : k + size], setting.device) for k in range(0, number, size)]
        with tf32(fast):
            sft(plain, batches[:1])
            before = _reset_peak(setting.device)
            seconds = timed(lambda p=plain, b=batches, s=steps: sft(p, b, len(b) // s), timer)
            title = f"QLoRA, N = {number} x {len(rows[0])}, T = {steps}, {'TF32' if fast else 'float32'}"
            peak = (_peak(setting.device) - before) / 1e9
            yield Row(f"{title}: SFT", f"{seconds:.2f} s, peak {peak:.1f} GB above the weights", value=seconds)
            for name, budget in (("recompute", 0), ("retention", "auto")):
                config = InnerLoopConfig(
                    batch_size=number // steps, micro_batch_size=size, learning_rate=1e-6, memory_budget=budget
                )
                metagradient(student, samples[:size], head_sum, config, metric_before=0.0)
                before = _reset_peak(setting.device)
                with recorded() as budgets:
                    run = lambda x=samples, c=config: metagradient(student, x, head_sum, c, metric_before=0.0)  # noqa: E731
                    elapsed = timed(run, timer)
                peak = (_peak(setting.device) - before) / 1e9
                kept = f"{sum(b.kept for b in budgets)} of {number // size} micro-batches kept"
                figure = f"{elapsed / seconds:.2f} ({elapsed:.2f} s, peak {peak:.1f} GB above the weights, {kept})"
                yield Row(f"{title}: metagradient with {name} / SFT", figure, value=elapsed / seconds)


def offload(setting: Setting):
    """`offload_trajectory` of a student all of whose parameters are trained."""
    sizes = dict(vocab=64, hidden=32, layers=2, heads=4)
    sizes |= dict(vocab=32000, hidden=2048, layers=2, heads=16) if setting.real else {}
    length, steps = (128, 4) if setting.real else (8, 4)
    arguments = argparse.Namespace(**sizes, device=setting.device, length=length, rank=8)
    student = Student(make_model(arguments, "full"))
    ids = torch.randint(0, sizes["vocab"], (8 * steps, length), generator=torch.Generator().manual_seed(0))
    samples = [{"input_ids": row} for row in ids.tolist()]
    timer = argparse.Namespace(cpu_seconds=False, device=setting.device)
    found, seconds, peaks = {}, {}, {}
    for enabled in (False, True):
        config = InnerLoopConfig(
            batch_size=8, learning_rate=1e-5, memory_budget=0, checkpoint_interval=1, offload_trajectory=enabled
        )

        def run(config=config, enabled=enabled):
            found[enabled] = metagradient(student, samples, head_sum, config, metric_before=0.0).scores

        run()  # pinned memory is allocated in the first run, and used again
        before = _reset_peak(setting.device)
        seconds[enabled] = timed(run, timer)
        peaks[enabled] = (_peak(setting.device) - before) / 1e9
    yield at_most("relative difference of the scores", relative_error(found[True], found[False]), 1e-5)
    what = "time and peak with `offload_trajectory`"
    if not setting.cuda:
        yield needs(what, "CUDA")
        return
    copied = 2 * 4 * student.initial_theta().nbytes * steps  # θ, g and two moments, there and back
    more = seconds[True] - seconds[False]
    with_it, without = (f"{seconds[enabled]:.2f} s and {peaks[enabled]:.1f} GB" for enabled in (True, False))
    yield Row(what, f"{with_it}, without it {without}")
    yield Row("time of the copies", f"{more:.2f} s for {copied / 1e9:.1f} GB", value=more)
    yield Row("a copy to pinned memory alone", f"{copy_rate():.1f} GB/s")


def placement(setting: Setting):
    """`student_offload`: the same scores, what is left on the GPU between two rewards, and the seconds of a move."""
    kept, moved = (DPGReward(make_student(), METRIC, CONFIG, student_offload=offload) for offload in (False, True))
    for reward in (kept, moved):
        reward(PROMPTS, TEXTS)
    found, expected = moved.last_batch.scores, kept.last_batch.scores
    yield at_most("relative difference of the scores with `student_offload`", relative_error(found, expected), 1e-5)
    what = "a student of 1B between two rewards"
    if not setting.cuda:
        yield needs(what, "CUDA")
        return
    before = torch.cuda.memory_allocated()
    with torch.device(setting.device):
        student = Student(LlamaForCausalLM(LlamaConfig(**shape(setting))))
    size, place = torch.cuda.memory_allocated() - before, Placement(offload=True)
    seconds = []
    for move in (place.move_out, place.move_in):
        torch.cuda.synchronize()
        started = time.perf_counter()
        move(student)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        if move == place.move_out:
            yield at_most(f"{what}: left on the GPU / its size", (torch.cuda.memory_allocated() - before) / size, 0.01)
    yield Row(f"{what}: moves of {size / 1e9:.1f} GB", f"out {seconds[0]:.2f} s, in {seconds[1]:.2f} s")


def copy_rate() -> float:
    """GB/s from the GPU to pinned memory."""
    source = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    target = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
    torch.cuda.synchronize()
    started = time.perf_counter()
    target.copy_(source)
    torch.cuda.synchronize()
    return GIB / 1e9 / (time.perf_counter() - started)


def benchmarks(setting: Setting):
    """The other benchmarks with `--device`, in this process. `costs` has the figures at a real size."""
    sizes = dict(hidden=1024, heads=8, layers=4, vocab=32000, length=128) if setting.real else None
    sizes = sizes or dict(hidden=32, heads=1, layers=1, vocab=64, length=8)
    common = [f"--{name}={value}" for name, value in sizes.items()]
    common += ["--device", setting.device, "--threads", "1", "--repeat", "1"]
    scripts = {
        "metagradient_vs_sft.py": ["--kinds", "lora,full", "--steps", "1,4"],
        "many_metrics.py": ["--kinds", "lora", "--steps", "1,4", "--number", "4"],
        "memory.py": ["--kinds", "lora", "--steps", "4", "--cell"],
        "scaling.py": ["--kinds", "lora", "--hidden", str(sizes["hidden"] // 4), "--heads", str(sizes["heads"])],
    }
    for script, flags in scripts.items():
        output = io.StringIO()
        path = str(Path(__file__).with_name(script))
        with mock.patch.object(sys, "argv", [script, *common, *flags]), contextlib.redirect_stdout(output):
            runpy.run_path(path, run_name="__main__")
        print(output.getvalue())
        last = output.getvalue().splitlines()[-1]
        yield Row(f"{script}: its last line", last.strip("| ").replace("|", "/"), "pass", "it ends")


# -- memory ----------------------------------------------------------------------------------------------------------


def memory(setting: Setting):
    """`memory_budget="auto"` with 24 GiB free: what it plans with, against what CUDA says."""
    number, micro = (256, 8) if setting.real else (16, 2)
    student = qlora_student(setting)
    samples = [{"input_ids": row} for row in random_rows(setting, number)]
    with free_at_most(setting, CARD), tf32(True):
        for steps in (1, 8):
            config = InnerLoopConfig(batch_size=number // steps, micro_batch_size=micro, learning_rate=1e-6)
            metagradient(student, samples[:micro], head_sum, config, metric_before=0.0)
            _reset_peak(setting.device)
            start, free = allocated(setting), free_memory(student.device)
            with recorded() as budgets:
                held = FineTuning(student, samples, config).sweep(torch.ones(number), keep_states=True)
            (budget,) = budgets
            planned = 4 * held.theta.nbytes * steps + budget.given - budget.left
            found = allocated(setting) - start
            kept = f"{budget.kept} of {number // micro} graphs, budget {budget.given / 1e9:.2f} GB"
            what = f"T = {steps}: states and kept graphs, CUDA's bytes / planned bytes"
            figure = f"{found / planned:.3f} ({found / 1e9:.2f} GB; {kept})"
            within = "pass" if abs(found / planned - 1) <= 0.15 else "fail"
            yield Row(what, figure, within, "0.85 to 1.15", found / planned) if setting.cuda else needs(what, "CUDA")
            del held
            before = _reset_peak(setting.device)
            metagradient(student, samples, head_sum, config, metric_before=0.0)
            peak = _peak(setting.device) - before
            more = f" ({peak / 1e9:.2f} of {free / 1e9:.2f} GB)"
            yield at_most(
                f"T = {steps}: peak of `metagradient` / memory that is free before it", peak / free, 1.0, more
            )
