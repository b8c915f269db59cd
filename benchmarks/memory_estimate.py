"""
How close is the predicted peak of a reward step to the measured one?

Each configuration runs `metagradient` in a process of its own on the CPU: the peak of its resident memory (Linux),
from before the run with the model loaded. The prediction is made without weights, from the model's configuration. The
allocator returns freed memory to the system, so that the peak is that of the tensors; `--keep` leaves it as the
library sets it up. `--live` also counts the bytes of the tensors while they are made.

    python benchmarks/memory_estimate.py
    python benchmarks/memory_estimate.py --only "LoRA, T = 8"
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from _side_by_side import _peak, _reset_peak
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from trl_dpg import InnerLoopConfig, Student, metagradient
from trl_dpg.declaration import declaration_world
from trl_dpg.memory.empty_models import empty_model, weight_bytes
from trl_dpg.memory.live_bytes import LiveBytes
from trl_dpg.memory.student_memory import StudentMemory
from trl_dpg.memory.student_traces import StudentTraces
from trl_dpg.metrics import LanguageModelingMetric


MODEL = dict(hidden=384, layers=6, vocab=4096)
SMALL = dict(steps=8, layers=4, batch=4)
GIGABYTE = 1_000_000_000
CONFIGURATIONS = {
    "LoRA, T = 1, recompute": dict(kind="lora", steps=1, memory_budget=0),
    "LoRA, T = 1, retention": dict(kind="lora", steps=1, memory_budget=8 * GIGABYTE),
    "LoRA, T = 8, recompute": dict(kind="lora", **SMALL, memory_budget=0),
    "LoRA, T = 8, retention": dict(kind="lora", **SMALL, memory_budget=8 * GIGABYTE),
    "4-bit LoRA, T = 8, micro-batches of 2, sequence 256": dict(
        kind="qlora", **SMALL, memory_budget=0, micro=2, length=256
    ),
    "all parameters, T = 1, retention, vocabulary 32000": dict(
        kind="full", steps=1, memory_budget=8 * GIGABYTE, vocab=32000
    ),
    "all parameters, T = 8, recompute": dict(kind="full", **SMALL, memory_budget=0),
    "all parameters, T = 8, checkpoint_interval 3": dict(kind="full", **SMALL, memory_budget=0, interval=3),
    "SmolLM2-135M, 4-bit LoRA, T = 1, 32 x 32, retention": dict(
        kind="qlora", steps=1, memory_budget=8 * GIGABYTE, model="smollm2", batch=32, length=32
    ),
    "SmolLM2-135M, LoRA, T = 4, recompute": dict(kind="lora", steps=4, memory_budget=0, model="smollm2", length=48),
}
"""Settings of each row. Where nothing else is given: 8 samples of 128 tokens a step; with T = 8, 4 samples."""


@cache
def smollm2():
    """Where SmolLM2-135M-Instruct is, which is downloaded once."""
    with tempfile.TemporaryDirectory() as folder:
        declaration_world(Path(folder))
        return str(Path(folder, "student").resolve())


def settings(name):
    chosen = dict(batch=8, length=128, micro=None, interval=1, model=None) | MODEL | CONFIGURATIONS[name]
    if chosen["model"] == "smollm2":
        chosen["path"] = smollm2()
    return chosen


def model_config(chosen):
    if chosen["model"]:
        return chosen["path"]
    hidden = chosen["hidden"]
    return LlamaConfig(
        vocab_size=chosen["vocab"],
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=chosen["layers"],
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
    )


def student_kwargs(kind):
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if kind != "full" else None
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return {"peft_config": lora, "quantization_config": four if kind == "qlora" else None}


def inner_loop(chosen):
    return InnerLoopConfig(
        batch_size=chosen["batch"],
        micro_batch_size=chosen["micro"],
        memory_budget=chosen["memory_budget"],
        checkpoint_interval=chosen["interval"],
        learning_rate=1e-6,
    )


def data(chosen, number, seed):
    """Samples of one length. Every second one is a token shorter, so that there is padding."""
    torch.manual_seed(seed)
    ids = torch.randint(3, chosen["vocab"], (number, chosen["length"])).tolist()
    return [{"input_ids": row[k % 2 :]} for k, row in enumerate(ids)]


def make_metric(chosen):
    return LanguageModelingMetric(data(chosen, chosen["batch"] // 2, 1), batch_size=chosen["batch"] // 2)


def predict(chosen):
    config = model_config(chosen)
    student = Student(empty_model(config, **student_kwargs(chosen["kind"])))
    traces = StudentTraces(student, chosen["length"], accelerator=False)
    number = chosen["batch"] * chosen["steps"]
    memory = StudentMemory(traces, inner_loop(chosen), number, make_metric(chosen), free=16 * GIGABYTE)
    phases = memory.phases()
    return {phase.name: {name: size / 1e6 for name, size in phase.parts.items()} for phase in phases}, weight_bytes(
        student.model
    )


def load(chosen, folder):
    """The student with weights, as it is loaded from a path."""
    source = model_config(chosen)
    if not isinstance(source, str):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(source).save_pretrained(folder)
        source = str(folder)
    kwargs = {name: value for name, value in student_kwargs(chosen["kind"]).items() if value is not None}
    tokenizer = None
    if not chosen["model"]:  # a model without a tokenizer: samples are token ids
        init = {name: value for name, value in kwargs.items() if name == "quantization_config"}
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **init)
        model.config._name_or_path = ""
        return Student(model, tokenizer, peft_config=kwargs.get("peft_config"))
    return Student(source, **kwargs)


def measure(name, live):
    """One configuration, in this process: the peak beyond the loaded model, and the bytes of the model."""
    chosen = settings(name)
    with tempfile.TemporaryDirectory() as folder:
        student = load(chosen, folder)
    metric, samples = make_metric(chosen), data(chosen, chosen["batch"] * chosen["steps"], 0)
    config = inner_loop(chosen)
    small = LanguageModelingMetric([{"input_ids": [3, 4, 5]}])
    metagradient(student, [{"input_ids": [3, 4, 5, 6]}, {"input_ids": [3, 4, 5]}], small, config)  # imports, checks
    before = _reset_peak("cpu")
    tensors = LiveBytes(student.model.parameters())
    if live:
        with tensors:
            metagradient(student, samples, metric, config)
    else:
        metagradient(student, samples, metric, config)
    print(json.dumps([_peak("cpu") - before, tensors.peak]))


def measured(name, args):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if not args.keep:
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, "--cell", name, *(["--live"] if args.live else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main(args):
    torch.set_num_threads(1)
    print("| configuration | weights, MB | predicted, MB | measured, MB | predicted / measured | phase of the peak |")
    print("|---|---|---|---|---|---|")
    for name in CONFIGURATIONS:
        if args.only and not any(text in name for text in args.only):
            continue
        phases, weights = predict(settings(name))
        phase = max(phases, key=lambda own: sum(phases[own].values()))
        predicted = sum(phases[phase].values())
        peak, tensors = measured(name, args)
        cells = f"{weights / 1e6:.0f}", f"{predicted:.0f}", f"{peak / 1e6:.0f}", f"{predicted * 1e6 / peak:.2f}", phase
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        if args.live:
            print(f"  tensors: {tensors / 1e6:.0f} MB")
        if args.parts:
            for own, parts in phases.items():
                print("  ", own, {part: round(size) for part, size in parts.items() if size})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="configurations whose names have one of these texts")
    parser.add_argument("--keep", action="store_true", help="let the process keep freed memory")
    parser.add_argument("--live", action="store_true", help="also count the tensors' bytes in the measured run")
    parser.add_argument("--parts", action="store_true", help="print the parts of each phase")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    measure(arguments.cell, arguments.live) if arguments.cell else main(arguments)
