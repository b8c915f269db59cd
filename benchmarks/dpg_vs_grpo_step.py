"""
What does a DPG training step cost over a GRPO step with a constant reward?

The trainers of the quickstart's two acts (a 4-bit LoRA student and a language; a fully trained student and a picture)
as they are, with a reward of zeros in DPG's place, and with per-token scores in the generator's tokens. Median seconds
of a step, the first two left out; the ways take turns. `--real`: the trainer of `new_language/smollm2.yaml`, in
DPG and with zeros; only the first step is left out.

    python benchmarks/dpg_vs_grpo_step.py
    python benchmarks/dpg_vs_grpo_step.py --real --steps 3 --repeat 1    # SmolLM2-135M-Instruct, downloaded once
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from trl_dpg import DPGReward
from trl_dpg.scripts import dpg, quickstart
from trl_dpg.scripts.quickstart_real import RECIPE
from trl_dpg.scripts.registry import make_metric, make_rewards


class Trained(Exception):
    """Ends an act after its training."""


class Clock(TrainerCallback):
    """Seconds of each training step."""

    def __init__(self, read):
        self.read, self.seconds = read, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = self.read()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self.read() - self.started)

    def on_train_end(self, args, state, control, **kwargs):
        raise Trained


def real_training(folder, steps, clock):
    """The recipe's training, as `trl-dpg dpg` makes it."""
    flags = ["--config", str(RECIPE), "--output_dir", str(folder), "--save_strategy", "no", "--max_steps", str(steps)]
    parsed = dpg.make_parser().parse_args_and_config(args=flags)
    dpg.make_toy_world(*parsed[:3])
    rewards = make_rewards(parsed[0].reward_funcs, parsed[0].reward_kwargs)
    trainer = dpg.make_trainer(*parsed, make_metric(parsed[0]), rewards)
    trainer.add_callback(clock)
    trainer.train()


def step_seconds(act, way, args):
    clock = Clock(time.process_time if args.cpu_seconds else time.perf_counter)

    def train(generator, tokenizer, prompts, table, **arguments):
        arguments["args"].max_steps = args.steps
        arguments["args"].per_token = way == "per token"
        train_generator(generator, tokenizer, prompts, clock, **arguments)

    score, train_generator = DPGReward.__call__, quickstart.train_generator
    quickstart.train_generator = train
    if way == "GRPO":
        DPGReward.__call__ = lambda self, prompts, completions, **kwargs: [0.0] * len(completions)
    try:
        with tempfile.TemporaryDirectory() as folder:
            act(Path(folder), args.steps, *[clock] * args.real)
    except Trained:
        return statistics.median(clock.seconds[1 if args.real else 2 :])
    finally:
        DPGReward.__call__, quickstart.train_generator = score, train_generator


def main(args):
    torch.set_num_threads(args.threads)
    quickstart.console.quiet = True
    kind = "seconds of the CPU, " if args.cpu_seconds else ""
    print(f"torch {torch.__version__}, {args.threads} threads; {kind}medians of")
    print(f"{args.repeat} runs of {args.steps} steps\n")
    columns = ["training", "GRPO, s", "DPG, s", "DPG / GRPO", *["per token / DPG"] * (not args.real)]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    acts = {"language, 4-bit LoRA": quickstart.language_act, "picture, full": quickstart.picture_act}
    if args.real:
        acts = {"SmolLM2-135M, 4-bit LoRA": real_training}
    for name, act in acts.items():
        seconds = {"GRPO": [], "DPG": []} | ({} if args.real else {"per token": []})
        for _ in range(args.repeat):
            for way in seconds:
                seconds[way].append(step_seconds(act, way, args))
        medians = (statistics.median(seconds[way]) for way in ("GRPO", "DPG"))
        ratios = [
            f"{statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True)):.2f}"
            for over, under in (("DPG", "GRPO"), ("per token", "DPG"))
            if over in seconds
        ]
        print(f"| {name} | {' | '.join([f'{median:.3f}' for median in medians] + ratios)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--real", action="store_true", help="SmolLM2-135M-Instruct and real texts")
    parser.add_argument("--cpu-seconds", action="store_true", help="seconds in which a core computed; others may work")
    main(parser.parse_args())
