"""
Which length of reasoning is best, and does DPG find it? The task is that of `trl_dpg/practice/prefix_sums.py`.

Small models are trained from random weights. Every model and every measurement is a file of the output folder, written
when it is finished. The same command goes on where it was stopped. A folder belongs to the number of steps and the
learning rate of its first run: `settings.json`.

    python benchmarks/cot_length.py                                  # everything
    python benchmarks/cot_length.py --parts curves --sizes 1 2 3     # accuracy against the length alone
    python benchmarks/cot_length.py --parts choice                   # after recipes/cot_length/mini.yaml

Parts, which build on each other:

- `curves`: accuracy against t, for each T and number of layers, of models that are trained on all t alike.
- `data`: models that are trained on one t, on the best t for each T as measured in `curves`, and on t = 1 and 3.
- `scores`: the scores of `trl_dpg.attribute` for samples with different t, against their distance from the best.
- `figures`: tables and pictures of docs/cot_length.md, from the files.
- `choice`: which t a generator chooses before and after recipes/cot_length/mini.yaml. Not among the defaults.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.stats import spearmanr
from tqdm import tqdm
from transformers import LlamaForCausalLM

from trl_dpg import InnerLoopConfig, Student, attribute
from trl_dpg.evaluation import interval
from trl_dpg.files import write_json
from trl_dpg.metrics import LanguageModelingMetric
from trl_dpg.practice.prefix_sums import (
    BASE,
    MAX_OPERATORS,
    STEP_SIZES,
    UNIFORM,
    Mixture,
    RightAnswerMetric,
    answer,
    as_row,
    prefix_sums_model,
    prefix_sums_tokenizer,
    train,
    with_reasoning,
)
from trl_dpg.scripts.toy_world import world_folder


TESTED = (8, 12, 16, 20, 24)
"""The values of T that are tested."""

EQUAL = 0.005
"""Accuracies that differ by less are taken to be equal. On 3,000 expressions this is two standard errors near 1."""
SHORT = 3
"""t of the short half of the long-short mixture."""


def expressions(operators: int, number: int, seed: int) -> np.ndarray:
    """Digits `[number, T + 1]` of random expressions."""
    return np.random.default_rng([seed, operators]).integers(BASE, size=(number, operators + 1))


def trained(
    folder: Path, name: str, layers: int, mixture: Mixture, seed: int, num_steps: int, learning_rate: float
) -> LlamaForCausalLM:
    """The model of this name: from its file, or trained now."""
    path = folder / "models" / name
    if not (path / "training.json").exists():
        model = prefix_sums_model(layers, seed=seed)
        started, losses = time.process_time(), []
        with tqdm(desc=name, total=num_steps, unit="step") as progress:

            def on_step(step, loss):
                losses.append(loss)
                progress.update()

            train(model, mixture, num_steps, learning_rate=learning_rate, seed=seed, on_step=on_step)
        model.save_pretrained(path)
        prefix_sums_tokenizer().save_pretrained(path)
        figures = {"cpu_seconds": time.process_time() - started, "loss": statistics.mean(losses[-50:])}
        write_json(path / "training.json", figures | {"layers": layers, "seed": seed, "num_steps": num_steps})
    return LlamaForCausalLM.from_pretrained(path)


def cell(path: Path, make) -> dict:
    """The figures in a file, or those of `make()`, which are written to it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, make())
    return json.loads(path.read_text())


def check_settings(folder: Path, settings: dict[str, float]) -> None:
    """Refuse a folder whose models were trained with other settings."""
    stored = cell(folder / "settings.json", lambda: settings)
    for name, value in settings.items():
        if stored[name] != value:
            raise SystemExit(
                f"{folder} has models with --{name} {stored[name]}, not {value}. Choose another --output_dir."
            )


def measure(model, path: Path, mixture: Mixture, number: int = 1000) -> None:
    """
    Write to a file, by t and T: accuracy with greedy decoding, and mean length in tokens.

    The control token of each t of the mixture is forced in turn. With several t, the model also chooses it ("free").
    What is in the file already is not measured again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = json.loads(path.read_text()) if path.exists() else {}
    for T in TESTED:
        sizes = sorted(set(mixture[T]))
        for name, t in [*((str(t), t) for t in sizes), *[("free", None)] * (len(sizes) > 1)]:
            row = figures.setdefault(name, {})
            if str(T) not in row:
                result = answer(model, expressions(T, number, seed=999), t)
                row[str(T)] = {"accuracy": float(result.right.mean()), "tokens": float(result.num_tokens.mean())}
    write_json(path, figures)


def measured(folder: Path, name: str, seed: int | str = "*") -> dict[int, dict[str, dict[str, dict[str, float]]]]:
    """The figures of the models of this name, by seed."""
    paths = folder.glob(f"data/{name}_seed_{seed}.json")
    by_seed = {int(path.stem.rpartition("_")[2]): json.loads(path.read_text()) for path in paths}
    return dict(sorted(by_seed.items()))


def curves(folder: Path, sizes: list[int], seeds: list[int], num_steps: int, learning_rate: float) -> None:
    """Accuracy against t, of models that are trained on all t alike."""
    for seed in seeds:
        for layers in sizes:
            name = f"uniform_{layers}_layers_seed_{seed}"
            model = trained(folder, name, layers, UNIFORM, seed, num_steps, learning_rate)
            measure(model, folder / "data" / f"{name}.json", UNIFORM)


def mean_curves(folder: Path, layers: int, seed: int | str = "*") -> dict[int, dict[int, list[float]]]:
    """Accuracy of each seed, or of one, by T and t."""
    runs = measured(folder, f"uniform_{layers}_layers", seed).values()
    return {T: {t: [run[str(t)][str(T)]["accuracy"] for run in runs] for t in STEP_SIZES if t <= T} for T in TESTED}


def best_step_sizes(folder: Path, layers: int, seed: int | str = "*") -> dict[int, int]:
    """
    The best t by T: the largest, and so the shortest reasoning, whose mean accuracy is as high as any up to `EQUAL`.

    The mean is over all seeds, or it is the accuracy of one.
    """
    best = {}
    for T, by_size in mean_curves(folder, layers, seed).items():
        means = {t: statistics.mean(values) for t, values in by_size.items()}
        best[T] = max(t for t, mean in means.items() if mean >= max(means.values()) - EQUAL)
    return best


def best_mixture(folder: Path, layers: int) -> dict[int, list[int]]:
    """
    The best t for each T, of models of the same size that are trained on all t alike.

    A T that is not tested has the best t of the next longer one that is. The first choice is kept in a file.
    """
    best = cell(folder / "data" / f"best_{layers}_layers.json", lambda: best_step_sizes(folder, layers))
    mixture = {}
    for T in range(1, MAX_OPERATORS + 1):
        t = best[str(min(tested for tested in TESTED if tested >= T))]
        mixture[T] = [max(size for size in STEP_SIZES if size <= min(t, T))]
    return mixture


def mixtures(best: Mixture) -> dict[str, Mixture]:
    """What models of the part `data` are trained on."""
    lengths = range(1, MAX_OPERATORS + 1)
    long_short = {T: [1, min(T, SHORT)] for T in lengths}
    one, two, three = ({T: [min(T, t)] for T in lengths} for t in (1, 2, 3))
    return {"only_1": one, "best": best, "long_short": long_short, "only_2": two, "only_3": three}


def data(folder: Path, layers: int, seeds: list[int], num_steps: int, learning_rate: float) -> None:
    """Accuracy of models that are trained on other mixtures, with each control token that they know."""
    for arm, mixture in mixtures(best_mixture(folder, layers)).items():
        for seed in seeds:
            name = f"{arm}_{layers}_layers_seed_{seed}"
            model = trained(folder, name, layers, mixture, seed, num_steps, learning_rate)
            measure(model, folder / "data" / f"{name}.json", mixture)


def scores(folder: Path, layers: int, seeds: list[int], number: int = 256) -> None:
    """For each T, score samples with each t alike, by two metrics on other expressions of the same T."""
    tokenizer = prefix_sums_tokenizer()
    config = InnerLoopConfig(batch_size=64, learning_rate=1e-4, eps_root=1e-5)
    for seed in seeds:
        best = best_step_sizes(folder, layers, seed)
        for T in TESTED:
            sizes = [t for t in STEP_SIZES if t <= T]
            digits = expressions(T, number, seed=seed)
            rows = [as_row(with_reasoning(digits[k : k + 1], sizes[k % len(sizes)])[0]) for k in range(number)]
            tested = expressions(T, 64, seed=777)
            every = [as_row(with_reasoning(tested[k : k + 1], sizes[k % len(sizes)])[0]) for k in range(64)]
            metrics = {
                "right_answer": RightAnswerMetric([tested]),
                "all_lengths": LanguageModelingMetric(every, add_eos=True),
            }
            for name, metric in metrics.items():

                def score(metric=metric, rows=rows, T=T, sizes=sizes, seed=seed, best=best):
                    model = LlamaForCausalLM.from_pretrained(
                        folder / "models" / f"uniform_{layers}_layers_seed_{seed}"
                    )
                    result = attribute(Student(model, tokenizer), rows, metric, config, size=64, num_repeats=2)
                    steps = np.array([row["num_steps"] for row in rows])
                    distance = np.abs(np.log(steps / math.ceil(T / best[T])))
                    test = spearmanr(result.scores, distance)
                    by_size = {str(t): float(result.scores[k :: len(sizes)].mean()) for k, t in enumerate(sizes)}
                    return {
                        "spearman": test.statistic,
                        "p_value": test.pvalue,
                        "best": best[T],
                        "mean_score": by_size,
                        "rank_correlation": result.rank_correlation,
                        "metric_before": result.metric_before,
                        "metric_after": result.metric_after,
                    }

                figures = cell(folder / "scores" / f"{name}_{layers}_layers_T_{T}_seed_{seed}.json", score)
                print(
                    f"{name} T = {T} seed {seed}: Spearman {figures['spearman']:+.2f}, {figures['mean_score']}",
                    flush=True,
                )


def draw_curves(folder: Path, sizes: list[int], path: Path) -> None:
    """Accuracy against t for each number of layers, and the number of steps N at the highest point against T."""
    figure, axes = plt.subplots(1, len(sizes) + 1, figsize=(3.2 * (len(sizes) + 1), 3.2), layout="constrained")
    colors = plt.cm.viridis(np.linspace(0, 0.9, len(TESTED)))
    for axis, layers in zip(axes, sizes, strict=False):
        best = best_step_sizes(folder, layers)
        for color, (T, by_size) in zip(colors, mean_curves(folder, layers).items(), strict=True):
            means = [statistics.mean(values) for values in by_size.values()]
            axis.plot(list(by_size), means, color=color, label=f"T = {T}")
            axis.fill_between(
                list(by_size),
                *zip(*((min(v), max(v)) for v in by_size.values()), strict=True),
                color=color,
                alpha=0.12,
            )
            if max(means) > 1.2 / BASE:  # above chance
                axis.plot(best[T], means[list(by_size).index(best[T])], "o", color=color)
        axis.axhline(1 / BASE, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=f"{layers} layer{'s' * (layers > 1)}", xlabel="t, operators in a step", ylim=(0, 1.03))
        axis.set_xticks(STEP_SIZES)
    axes[0].set_ylabel("accuracy")
    axes[0].legend(frameon=False, fontsize=8)
    for layers, marker in zip(sizes, "osd", strict=False):
        curves = mean_curves(folder, layers)
        learned = [T for T in TESTED if max(map(statistics.mean, curves[T].values())) > 1.2 / BASE]
        steps = [math.ceil(T / best_step_sizes(folder, layers)[T]) for T in learned]
        axes[-1].plot(learned, steps, marker=marker, alpha=0.8, label=f"{layers} layer{'s' * (layers > 1)}")
    axes[-1].set(title="best number of steps", xlabel="T, operators of the expression", ylabel="N", ylim=(0, None))
    axes[-1].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def data_figures(folder: Path, layers: int) -> dict[str, dict[str, np.ndarray]]:
    """
    `accuracy` and `tokens`, each `[seeds, tested T]`, and `seeds`, by what the models were trained on and how they
    were tested.

    `any t`: the mean over all t, as if t was drawn at random. `free`: the model chose t.
    """
    best = best_mixture(folder, layers)
    ways: dict[str, tuple[str, Callable[[int], Sequence[int | str]]]] = {
        "longest": ("only_1", lambda T: [1]),
        "t = 2": ("only_2", lambda T: [2]),
        "t = 3": ("only_3", lambda T: [3]),
        "best t": ("best", lambda T: best[T]),
        "all t, any t": ("uniform", lambda T: UNIFORM[T]),
        "all t, best t": ("uniform", lambda T: best[T]),
        "all t, free": ("uniform", lambda T: ["free"]),
        "long-short, long": ("long_short", lambda T: [1]),
        "long-short, short": ("long_short", lambda T: [SHORT]),
        "long-short, free": ("long_short", lambda T: ["free"]),
    }
    arms = {}
    for way, (name, tested) in ways.items():
        if runs := measured(folder, f"{name}_{layers}_layers"):
            arms[way] = {"seeds": np.array(list(runs))}
            for figure in ("accuracy", "tokens"):
                arms[way][figure] = np.array(
                    [
                        [np.mean([run[str(t)][str(T)][figure] for t in tested(T)]) for T in TESTED]
                        for run in runs.values()
                    ]
                )
    return arms


def draw_data(arms: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Accuracy of models by what they were trained on."""
    figure, axis = plt.subplots(figsize=(9, 3.4), layout="constrained")
    for k, (arm, runs) in enumerate(arms.items()):
        places = np.arange(len(TESTED)) + (k - (len(arms) - 1) / 2) * 0.8 / len(arms)
        (line,) = axis.plot(places, runs["accuracy"].mean(axis=0), "_", markersize=9, label=arm)
        axis.plot(places, runs["accuracy"].T, ".", color=line.get_color(), markersize=5)
    axis.axhline(1 / BASE, color="grey", linewidth=0.8, linestyle=":")
    axis.set_xticks(range(len(TESTED)), [f"T = {T}" for T in TESTED])
    axis.set(ylabel="accuracy", ylim=(0, 1.05), title="by training data (dot: a seed, line: the mean)")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=100)


def draw_scores(folder: Path, layers: int, path: Path) -> None:
    """Mean scores of `attribute` by t."""
    figure, axis = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for T in TESTED:
        for file in sorted(folder.glob(f"scores/right_answer_{layers}_layers_T_{T}_seed_*.json"))[:1]:
            first = json.loads(file.read_text())
            sizes = list(map(int, first["mean_score"]))
            scores = np.array(list(first["mean_score"].values()))
            means = scores / np.abs(scores).max()
            (line,) = axis.plot(sizes, means, marker=".", label=f"T = {T}")
            axis.plot(first["best"], means[sizes.index(first["best"])], "o", color=line.get_color())
    axis.axhline(0, color="grey", linewidth=0.8, linestyle=":")
    axis.set(
        xlabel="t of the sample",
        ylabel="mean score, relative",
        title="scores of attribute, first seed (dot: the best t)",
    )
    axis.set_xticks(STEP_SIZES)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def plus_minus(values: np.ndarray) -> str:
    """Mean and half the width of its 95 % interval, from one value a seed."""
    mean, width = interval(values.tolist())
    return f"{mean:+.2f}" if width is None else f"{mean:.2f} ± {width:.2f}"


def figures(folder: Path, sizes: list[int], layers: int, scored_layers: int) -> None:
    """Tables on the screen, and pictures in the output folder."""
    for size in sizes:
        best = best_step_sizes(folder, size)
        for T, by_size in mean_curves(folder, size).items():
            row = "  ".join(f"t={t}: {statistics.mean(values):.2f}" for t, values in by_size.items())
            others = [
                f"t={t}: {plus_minus(np.subtract(by_size[best[T]], values))}"
                for t, values in by_size.items()
                if abs(STEP_SIZES.index(t) - STEP_SIZES.index(best[T])) == 1
            ]
            print(f"{size} layers  T={T:2}  {row}  best N = {math.ceil(T / best[T])}, above {'  '.join(others)}")
    draw_curves(folder, sizes, folder / "curves.png")
    arms = data_figures(folder, layers)
    if "longest" not in arms:
        return
    longest = arms["longest"]
    for arm, runs in arms.items():
        means = runs["accuracy"].mean(axis=1)
        _, own, others = np.intersect1d(runs["seeds"], longest["seeds"], return_indices=True)
        above = means[own] - longest["accuracy"][others].mean(axis=1)
        columns = [*map(plus_minus, runs["accuracy"].T), plus_minus(means), plus_minus(above) if len(above) else ""]
        print(f"{arm:18} | {' | '.join(columns)} | {runs['tokens'].mean():.1f} tokens")
    for name in ("right_answer", "all_lengths"):
        for T in TESTED:
            files = sorted(folder.glob(f"scores/{name}_{scored_layers}_layers_T_{T}_seed_*.json"))
            values = [f"{json.loads(path.read_text())['spearman']:+.2f}" for path in files]
            print(f"{name}, T = {T}: Spearman of score and distance from the best length, by seed: {' '.join(values)}")
    draw_data(arms, folder / "data.png")
    draw_scores(folder, scored_layers, folder / "scores.png")


def choice(run: Path, operators: int = 6, number: int = 2000) -> None:
    """Which t a generator of recipes/cot_length/mini.yaml chooses, and how often its answers are right."""
    tested = expressions(operators, number, seed=999)
    for state, folder in (("untrained", world_folder(str(run)) / "generator"), ("trained", run)):
        model = LlamaForCausalLM.from_pretrained(folder)
        chosen = answer(model, tested, temperature=1.0)
        print(f"{state}: right {chosen.right.mean():.3f}, {chosen.num_tokens.mean():.1f} tokens")
        for t in UNIFORM[operators]:
            forced = answer(model, tested, t, temperature=1.0).right.mean()
            print(f"  t = {t}: chosen {(chosen.control == t).mean():.3f}, right if it is forced {forced:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/cot_length"))
    parser.add_argument("--parts", nargs="+", default=["curves", "data", "scores", "figures"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 3], help="numbers of layers of the curves")
    parser.add_argument("--layers", type=int, default=1, help="number of layers of the part `data`")
    parser.add_argument("--scored_layers", type=int, default=3, help="number of layers of the part `scores`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_steps", type=int, default=4000)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--run", type=Path, default=Path("runs/cot_length_mini"), help="the run of the part `choice`")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if {"curves", "data"} & set(args.parts):
        check_settings(args.output_dir, {"num_steps": args.num_steps, "learning_rate": args.learning_rate})
    if "curves" in args.parts:
        curves(args.output_dir, args.sizes, args.seeds, args.num_steps, args.learning_rate)
    if "data" in args.parts:
        data(args.output_dir, args.layers, args.seeds, args.num_steps, args.learning_rate)
    if "scores" in args.parts:
        scores(args.output_dir, args.scored_layers, args.seeds)
    if "figures" in args.parts:
        figures(args.output_dir, args.sizes, args.layers, args.scored_layers)
    if "choice" in args.parts:
        choice(args.run)


if __name__ == "__main__":
    main()
