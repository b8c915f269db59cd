"""
How close are the scores of `attribution="first_order"` to the exact ones on a real model?

SmolLM2-135M-Instruct with LoRA (r = 8), fine-tuned on paragraphs of the Declaration of Human Rights, half Spanish and
half English (`trl_dpg.declaration`, downloaded once). The metric is minus the loss on other Spanish paragraphs.
Printed for each learning rate: the Pearson correlation of both over the samples, their relative L2 difference, and
the seconds of each (the metric of the fine-tuned student included).

    python benchmarks/first_order.py
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from trl_dpg import InnerLoopConfig, Student, metagradient
from trl_dpg.declaration import MODEL, declaration_world
from trl_dpg.metrics import LanguageModelingMetric


def read(world, *names):
    return [[json.loads(line)["text"] for line in (world / f"{n}.jsonl").read_text().splitlines()] for n in names]


def main(args):
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_seconds else time.perf_counter
    number = args.steps * args.batch
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        declaration_world(world)
        spanish, english, benchmark = read(world, "held_out", "held_out_english", "benchmark")
        model = AutoModelForCausalLM.from_pretrained(world / "student", dtype=torch.float32)
        torch.manual_seed(0)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        student = Student(model, peft_config=lora)
    texts = [text for pair in zip(spanish, english, strict=True) for text in pair]
    samples = [texts[k % len(texts)] for k in range(number)]
    metric = LanguageModelingMetric(benchmark, max_length=args.length)
    print(
        f"torch {torch.__version__}, {args.threads} threads; {MODEL}, T = {args.steps} steps of {args.batch} samples"
    )
    print(f"of {len(texts)} paragraphs, at most {args.length} tokens, eps_root {args.eps_root:g}\n")
    print("| learning rate | Pearson | relative difference | exact, s | first order, s |\n|---|---|---|---|---|")
    for rate in args.learning_rates:
        scores, seconds = [], []
        for attribution in ("metagradient", "first_order"):
            config = InnerLoopConfig(
                attribution=attribution,
                learning_rate=rate,
                eps_root=args.eps_root,
                batch_size=args.batch,
                max_length=args.length,
                memory_budget=0,
            )
            started = clock()
            scores.append(metagradient(student, samples, metric, config, metric_before=0.0).scores.double())
            seconds.append(clock() - started)
        exact, first = scores
        pearson = torch.corrcoef(torch.stack(scores))[0, 1]
        error = (first - exact).norm() / exact.norm()
        print(f"| {rate:g} | {pearson:.5f} | {error:.1e} | {seconds[0]:.0f} | {seconds[1]:.0f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=(1e-4, 5e-4))
    parser.add_argument("--eps-root", type=float, default=1e-7)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-seconds", action="store_true", help="seconds in which a core computed; others may work")
    main(parser.parse_args())
