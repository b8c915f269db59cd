"""
What does a DPG training step cost over a GRPO step with a constant reward?

The trainers of the quickstart's two acts (a 4-bit LoRA student and a language; a fully trained student and a picture)
as they are, with a reward of zeros in DPG's place, and with per-token scores in the generator's tokens. Median seconds
of a step, the first two left out; the ways take turns.

    python benchmarks/dpg_vs_grpo_step.py
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from trl_dpg import DPGReward
from trl_dpg.scripts import quickstart


class Trained(Exception):
    """Ends an act after its training."""


class Clock(TrainerCallback):
    """Seconds of each training step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.started)

    def on_train_end(self, args, state, control, **kwargs):
        raise Trained


def step_seconds(act, way, steps):
    clock = Clock()

    def train(generator, tokenizer, prompts, table, **arguments):
        arguments["args"].max_steps = steps
        arguments["args"].per_token = way == "per token"
        train_generator(generator, tokenizer, prompts, clock, **arguments)

    score, train_generator = DPGReward.__call__, quickstart.train_generator
    quickstart.train_generator = train
    if way == "GRPO":
        DPGReward.__call__ = lambda self, prompts, completions, **kwargs: [0.0] * len(completions)
    try:
        with tempfile.TemporaryDirectory() as folder:
            act(Path(folder), steps)
    except Trained:
        return statistics.median(clock.seconds[2:])
    finally:
        DPGReward.__call__, quickstart.train_generator = score, train_generator


def main(args):
    torch.set_num_threads(args.threads)
    quickstart.console.quiet = True
    print(f"torch {torch.__version__}, {args.threads} threads; medians of {args.repeat} runs of {args.steps} steps\n")
    print("| act | GRPO, s | DPG, s | DPG / GRPO | per token / DPG |\n|---|---|---|---|---|")
    acts = {"language, 4-bit LoRA": quickstart.language_act, "picture, full": quickstart.picture_act}
    for name, act in acts.items():
        seconds = {"GRPO": [], "DPG": [], "per token": []}
        for _ in range(args.repeat):
            for way in seconds:
                seconds[way].append(step_seconds(act, way, args.steps))
        grpo, dpg = (statistics.median(seconds[way]) for way in ("GRPO", "DPG"))
        ratios = [
            statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))
            for over, under in (("DPG", "GRPO"), ("per token", "DPG"))
        ]
        print(f"| {name} | {grpo:.3f} | {dpg:.3f} | {ratios[0]:.2f} | {ratios[1]:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=3)
    main(parser.parse_args())
