"""
How well, and how fast, does `trl-dpg attribute --distill` predict exact scores on a real model?

    python benchmarks/distill.py --output_dir runs/distill          # 10,000 texts, 2,000 of them scored: an hour

The student is SmolLM2-135M-Instruct with LoRA. The texts are sayings and paragraphs of manual pages in eight
languages, of 16 to 48 tokens, from packages of Debian (`apt-get download`). The metric is language modelling on
paragraphs of the Declaration of Human Rights in Spanish (`trl_dpg.declaration`, downloaded once).

Printed for each number of blocks, pooling and regressor: Spearman's correlation with the exact scores in
cross-validation. Then of what is chosen: the correlation on held-out samples, over all languages and within each one,
the coverage of the half width, and the samples a second of exact scores, of distilled scores, and their ratio. All of
it runs on one thread. Stopped and started again, it goes on.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from _debian_texts import debian_texts
from datasets import Dataset
from peft import LoraConfig
from scipy.stats import spearmanr
from sklearn.model_selection import KFold

from trl_dpg import InnerLoopConfig, Student, attribute, declaration, metagradient
from trl_dpg.attribution import Journal
from trl_dpg.attribution.distil import FOLDS, fit, make_regressor
from trl_dpg.attribution.features import FeatureReader
from trl_dpg.metrics import LanguageModelingMetric, WeightNormMetric


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/distill"))
    parser.add_argument("--packages", type=Path, help="where the packages of Debian are kept")
    parser.add_argument("--num_texts", type=int, default=10_000)
    parser.add_argument("--num_scored", type=int, default=2_000)
    parser.add_argument("--min_tokens", type=int, default=16)
    parser.add_argument("--max_tokens", type=int, default=48)
    parser.add_argument("--chunk", type=int, default=200)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--eps_root", type=float, default=1e-5)
    parser.add_argument("--blocks", default="1,2,4", help="numbers of blocks that are tried")
    parser.add_argument("--repeat", type=int, default=3, help="of the measurement of the speed")
    parser.add_argument("--analyse_only", action="store_true", help="use the scores that the journal has")
    parser.add_argument("--num_threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    world = args.output_dir / "world"
    if not world.exists():
        world.mkdir()
        declaration.declaration_world(world)
    peft = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    torch.manual_seed(0)
    student = Student(str(world / "student"), peft_config=peft, device="cpu")
    corpus = args.output_dir / "corpus.jsonl"
    if not corpus.exists():
        folder = args.packages or args.output_dir / "packages"
        rows = debian_texts(folder, args.num_texts, student.processing_class, args.min_tokens, args.max_tokens)
        corpus.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    rows = [json.loads(line) for line in corpus.open()]
    texts = Dataset.from_list([{"text": row["text"]} for row in rows])
    languages = np.array([row["language"] for row in rows])

    benchmark = [json.loads(line)["text"] for line in (world / "benchmark.jsonl").open()]
    metric = LanguageModelingMetric(benchmark, max_length=48)
    config = InnerLoopConfig(  # one step a chunk
        batch_size=args.chunk,
        micro_batch_size=20,
        memory_budget=3 << 30,
        learning_rate=args.learning_rate,
        eps_root=args.eps_root,
    )
    scored = np.sort(np.random.default_rng(0).choice(len(texts), args.num_scored, replace=False))
    settings = {name: value for name, value in asdict(config).items() if name != "memory_budget"}
    with Journal(args.output_dir / "attribution.jsonl", settings | {"rows": scored.tolist()}) as journal:
        if args.analyse_only:  # what there is so far
            chunks = list(journal.chunks(args.num_scored // args.chunk))
            rows_scored = scored[np.concatenate([record["rows"] for record in chunks])]
            scores = np.concatenate([record["scores"] for record in chunks]).astype(np.float32)
        else:
            sample = texts.select(scored)
            exact = attribute(student, sample, metric, config, args.chunk, journal=journal, progress=True)
            rows_scored, scores = scored, exact.scores
            print(exact.chance())
    report(student, texts, languages, rows_scored, scores, args)
    speed(student, texts, config, args.repeat)


def report(student, texts, languages, rows, scores, args):
    """What cross-validation finds, and how it does on held-out samples."""
    numbers = [int(number) for number in args.blocks.split(",")]
    features, counts = FeatureReader(student, 1024).read(texts.select(rows), numbers)
    regressor = fit(features, counts, scores)
    print(f"{len(rows)} samples with exact scores\nblocks  pooling           regressor  Spearman in cross-validation")
    for own in regressor.described.candidates:
        print(
            f"{own['num_blocks']:6}  {own['pooling']:16}  {own['regressor']:9}  "
            f"{own['spearman']:.3f} ± {own['standard_error']:.3f}"
        )
    own = regressor.described
    print(
        f"Chosen: {own.num_blocks} blocks, {own.pooling}, {own.regressor}. {own.num_held_out} held-out samples: "
        f"Spearman {own.spearman:.3f} ({own.spearman_interval[0]:.3f} to {own.spearman_interval[1]:.3f}); half width "
        f"{own.half_width:.3g}, standard deviation of the scores {scores.std():.3g}; coverage {own.coverage:.3f}"
    )
    known = languages[rows]
    means = np.array([scores[known == language].mean() for language in known])
    print(f"The mean of each language alone, all samples: Spearman {spearmanr(means, scores).statistic:.3f}")
    predicted = out_of_fold(features[own.num_blocks, own.pooling], scores, own.regressor)
    print(
        f"Within each language, {FOLDS}-fold predictions for all samples (together: "
        f"{spearmanr(predicted, scores).statistic:.3f}):"
    )
    for language in sorted(set(known)):
        mine = known == language
        correlation = spearmanr(predicted[mine], scores[mine]).statistic
        print(f"  {language}: {correlation:.3f} of {mine.sum()}; mean score {scores[mine].mean():.3g}")


def out_of_fold(features, scores, name):
    predicted = np.zeros(len(scores))
    for fitted, left in KFold(FOLDS, shuffle=True, random_state=1).split(scores):
        model = make_regressor(name, 0, len(fitted), features.shape[1]).fit(features[fitted], scores[fitted])
        predicted[left] = model.predict(features[left])
    return predicted


def speed(student, texts, config, repeat):
    """
    Samples per second of processor time. They take turns. The time of exact scores is that of a chunk, without the
    metric, whose share becomes small with large chunks. Features are read from texts, so their time has the tokenizer.
    """
    config = replace(config, batch_size=20)
    silent = WeightNormMetric("model.layers.0.self_attn.q_proj.weight")  # costs next to nothing
    exact_times, times = [], {number: [] for number in (1, 2, 4)}
    for turn in range(repeat):
        started = time.process_time()
        metagradient(student, texts.select(range(20 * turn, 20 * (turn + 1))), silent, config)
        exact_times.append((time.process_time() - started) / 20)
        for number, own in times.items():
            piece = texts.select(range(1000 * turn, 1000 * (turn + 1)))
            started = time.process_time()
            FeatureReader(student, 1024).read(piece, [number])
            own.append((time.process_time() - started) / 1000)
    exact = np.median(exact_times)
    print(f"exact, without the metric: {1 / exact:.2f} samples per second of one core")
    for number, own in times.items():
        print(
            f"{number} blocks: {1 / np.median(own):.1f} samples per second, {exact / np.median(own):.1f} times as many"
        )


if __name__ == "__main__":
    main()
