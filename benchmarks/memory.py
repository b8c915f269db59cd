"""
What does a metagradient hold in memory as the inner loop gets longer, and as the vocabulary grows?

Peak memory of `metagradient` with `memory_budget=0`, counted from before the run, with the model loaded: resident
memory on the CPU (Linux only), what tensors take on CUDA. Each cell is a process of its own.

For the inner loop's length T, the states of the trainable tensors (parameters, gradient and two moments of each step
that is held) are taken off: the rest should not depend on T. For the vocabulary V, the student has LoRA on all linear
layers but the head, so no copy of the head's weight is needed either, and the peak should hardly depend on V.

    python benchmarks/memory.py                                       # reference model on the CPU
    python benchmarks/memory.py --device cuda --hidden 2048 --layers 16
"""

import argparse
import json
import subprocess
import sys

import torch
from _side_by_side import _peak, _reset_peak, add_arguments
from metagradient_vs_sft import head_sum, make_model

from trl_dpg import InnerLoopConfig, Student, metagradient


def run(args):
    """One cell, in this process; prints the peak and the trainable parameters' bytes."""
    torch.set_num_threads(args.threads)
    student = Student(make_model(args, args.kinds))
    data = torch.randint(0, args.vocab, (int(args.steps) * args.batch, args.length))
    samples = [{"input_ids": row} for row in data.tolist()]
    config = InnerLoopConfig(
        batch_size=args.batch,
        learning_rate=1e-6,
        memory_budget=0,
        checkpoint_interval=args.checkpoint_interval,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    metagradient(student, samples[:1], head_sum, config, metric_before=0.0)  # imports and thread pools
    before = _reset_peak(args.device)
    metagradient(student, samples, head_sum, config, metric_before=0.0)
    print(json.dumps([_peak(args.device) - before, student.initial_theta().nbytes]))


def cell(args, **changes):
    options = vars(args) | changes | {"cell": True}
    command = [sys.executable, __file__]
    for name, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if value is not False:
            command += [f"--{name.replace('_', '-')}", *(() if value is True else map(str, values))]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main(args):
    print(f"torch {torch.__version__}, {args.device}; {args.layers} x {args.hidden}, sequence {args.length},")
    print(f"{args.batch} samples a step, float32, memory_budget=0\n")
    print("| student | T | checkpoint_interval | peak, MB | beyond the states, MB | ratio to T = 1 |")
    print("|---|---|---|---|---|---|")
    for kind in args.kinds.split(","):
        first = None
        for steps in map(int, args.steps.split(",")):
            for interval in sorted({1, round(steps**0.5)}):
                peak, theta = cell(args, kinds=kind, steps=steps, checkpoint_interval=interval)
                held = 4 * steps if interval == 1 else 4 * interval + 3 * (steps // interval)
                beyond = (peak - held * theta) / 1e6
                first = first or beyond
                cells = kind, steps, interval, f"{peak / 1e6:.0f}", f"{beyond:.0f}", f"{beyond / first:.2f}"
                print(f"| {' | '.join(map(str, cells))} |", flush=True)
    print("\n| V | head, MB | all logits, MB | peak, MB | ratio |\n|---|---|---|---|---|")
    first = None
    for vocab in args.vocabularies:
        peak, _ = cell(args, kinds="lora", steps=1, vocab=vocab)
        first = first or peak
        head, logits = 4e-6 * vocab * args.hidden, 4e-6 * vocab * args.batch * args.length
        print(f"| {vocab} | {head:.0f} | {logits:.0f} | {peak / 1e6:.0f} | {peak / first:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=(4096, 32000, 128256))
    parser.add_argument("--cell", action="store_true", help=argparse.SUPPRESS)
    add_arguments(parser, steps="1,8,32")
    arguments = parser.parse_args()
    run(arguments) if arguments.cell else main(arguments)
