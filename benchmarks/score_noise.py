"""
How far do the scores of `trl-dpg attribute` depend on chance, and do they find the right samples?

    python benchmarks/score_noise.py

The quickstart's two languages: a student that knows A, a benchmark in B, and a dataset with 30% of its sentences in B.
Printed for each inner loop: the rank correlation of the scores in two random orders; how often a sentence of B scores
above one of A (0.5 is chance); and the benchmark of fresh students, fine-tuned by SFTTrainer on the best 30%, on a
random 30% and on the worst 30%.
"""

import argparse
import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from trl_dpg import InnerLoopConfig, Student, cli, toy
from trl_dpg.evaluation import evaluate_dataset
from trl_dpg.metrics import LanguageModelingMetric


INNER_LOOPS = [  # chunk, batch size, epochs, learning rate, eps_root
    (256, 8, 1, 1e-4, 1e-9),  # the defaults
    (256, 8, 1, 1e-4, 1e-3),
    (8, 8, 1, 1e-4, 1e-9),
    (8, 8, 1, 1e-4, 1e-3),
    (256, 32, 1, 1e-3, 1e-5),
    (256, 32, 1, 1e-3, 1e-3),
    (256, 32, 1, 1e-4, 1e-5),
    (256, 32, 1, 1e-4, 1e-3),
    (256, 256, 4, 1e-3, 1e-3),
    (64, 64, 1, 1e-3, 1e-3),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_samples", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        report(Path(folder), args.num_samples, args.seed)


def report(folder: Path, num_samples: int, seed: int):
    toy.languages_world(folder, seed=seed)
    rng = random.Random(seed + 1)
    in_b = np.array([rng.random() < 0.3 for _ in range(num_samples)])
    texts = np.array([toy.sentence(toy.LANGUAGE_B if b else toy.LANGUAGE_A, rng) for b in in_b])
    data, student, benchmark = folder / "samples.jsonl", str(folder / "student"), str(folder / "benchmark.jsonl")
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts.tolist()))
    metric = LanguageModelingMetric([json.loads(line)["text"] for line in Path(benchmark).read_text().splitlines()])
    judge = InnerLoopConfig(batch_size=32, learning_rate=1e-3, eps_root=0.0, num_epochs=2)

    def judged(rows):
        return evaluate_dataset(lambda: Student(student), texts[rows].tolist(), metric, judge, seed).metric

    size = round(0.3 * num_samples)
    chance = judged(np.random.default_rng(seed).permutation(num_samples)[:size])
    print("chunk batch epochs    lr  eps_root | rank corr.  B above A | best 30%  random  worst 30%")
    for k, (chunk, batch, epochs, learning_rate, eps_root) in enumerate(INNER_LOOPS):
        output = folder / str(k)
        cli.main(
            f"attribute --dataset_name {data} --student_model_name_or_path {student} --metric language_modeling "
            f"--dataset_chunk {chunk} --student_batch_size {batch} --student_num_epochs {epochs} "
            f"--student_learning_rate {learning_rate} --student_eps_root {eps_root} --num_repeats 2 --num_shown 0 "
            f"--output_format jsonl --output_dir {output} --metric_kwargs".split()
            + [json.dumps({"dataset": benchmark})]
        )
        scores = np.array([json.loads(line)["dpg_score"] for line in (output / "scored.jsonl").open()])
        correlation = json.loads((output / "summary.json").read_text())["score"]["rank_correlation"]
        above = (scores[in_b][:, None] > scores[~in_b]).mean()
        ranking = np.argsort(-scores)
        inner_loop = f"{chunk:5} {batch:5} {epochs:6} {learning_rate:5.0e} {eps_root:9.0e}"
        outcome = f"{judged(ranking[:size]):8.2f} {chance:7.2f} {judged(ranking[-size:]):10.2f}"
        print(f"{inner_loop} | {correlation:10.2f} {above:10.2f} | {outcome}", flush=True)


if __name__ == "__main__":
    main()
