"""
Which length of reasoning is best, and does DPG find it? The task is that of `trl_dpg/practice/prefix_sums.py`.

Small models are trained from random weights. Every model and every measurement is a file of the output folder, written
when it is finished. The same command goes on where it was stopped.

    python benchmarks/cot_length.py                                  # everything
    python benchmarks/cot_length.py --parts curves --sizes 1 2 3     # accuracy against the length alone

Parts, which build on each other:

- `curves`: accuracy against t, for each T and number of layers, of models that are trained on all t alike.
- `data`: models that are trained on the best t for each T, on t = 1 (the longest), and on both t = 1 and 3.
- `scores`: the scores of `trl_dpg.attribute` for samples with different t, against their distance from the best.
- `figures`: tables and pictures of docs/cot_length.md, from the files.
"""

import argparse
import json
import math
import statistics
import time
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


TESTED = (6, 8, 10, 12)
"""The values of T that are tested."""

BEST = {T: 2 if T <= 8 else 3 for T in range(1, MAX_OPERATORS + 1)}
"""t with which the first model of one layer was most often right. It had learned no t for T = 10 and more."""

SHORT = 3
"""t of the short half of the long-short mixture."""


def expressions(operators: int, number: int, seed: int) -> np.ndarray:
    """Digits `[number, T + 1]` of random expressions."""
    return np.random.default_rng([seed, operators]).integers(BASE, size=(number, operators + 1))


def trained(folder: Path, name: str, layers: int, mixture: Mixture, seed: int, num_steps: int) -> LlamaForCausalLM:
    """The model of this name: from its file, or trained now."""
    path = folder / "models" / name
    if not (path / "training.json").exists():
        model = prefix_sums_model(layers, seed=seed)
        started, losses = time.process_time(), []
        with tqdm(desc=name, total=num_steps, unit="step") as progress:

            def on_step(step, loss):
                losses.append(loss)
                progress.update()

            train(model, mixture, num_steps, seed=seed, on_step=on_step)
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


def measure(model, path: Path, step_sizes: list[int], number: int = 500) -> None:
    """
    Write to a file, by t and T: accuracy with a forced control token and greedy decoding, and mean length in tokens.

    Lengths T that are in the file already are not measured again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = json.loads(path.read_text()) if path.exists() else {}
    for t in step_sizes:
        row = figures.setdefault(str(t), {})
        for T in TESTED:
            if str(T) not in row and t <= T:
                result = answer(model, expressions(T, number, seed=999), t)
                row[str(T)] = {"accuracy": float(result.right.mean()), "tokens": float(result.num_tokens.mean())}
    write_json(path, figures)


def curves(folder: Path, sizes: list[int], seeds: list[int], num_steps: int) -> None:
    """Accuracy against t, of models that are trained on all t alike."""
    for seed in seeds:
        for layers in sizes:
            model = trained(folder, f"uniform_{layers}_layers_seed_{seed}", layers, UNIFORM, seed, num_steps)
            measure(model, folder / "curves" / f"{layers}_layers_seed_{seed}.json", list(STEP_SIZES))


def mean_curves(folder: Path, layers: int, seed: int | str = "*") -> dict[int, dict[int, list[float]]]:
    """Accuracy of each seed, or of one, by T and t."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob(f"curves/{layers}_layers_seed_{seed}.json"))]
    return {T: {t: [run[str(t)][str(T)]["accuracy"] for run in runs] for t in STEP_SIZES if t <= T} for T in TESTED}


def best_step_sizes(folder: Path, layers: int, seed: int | str = "*") -> dict[int, int]:
    """t with the highest mean accuracy of all seeds, or of one, by T. Of equal ones the smallest."""
    curves = mean_curves(folder, layers, seed)
    means = {T: {t: statistics.mean(values) for t, values in by_size.items()} for T, by_size in curves.items()}
    return {T: max(by_size, key=by_size.__getitem__) for T, by_size in means.items()}


def mixtures() -> dict[str, Mixture]:
    """What models of the part `data` are trained on."""
    lengths = range(1, MAX_OPERATORS + 1)
    return {
        "longest": {T: [1] for T in lengths},
        "best": {T: [min(T, BEST[T])] for T in lengths},
        "long_short": {T: [1, min(T, SHORT)] for T in lengths},
    }


def data(folder: Path, layers: int, seeds: list[int], num_steps: int) -> None:
    """Accuracy of models that are trained on other mixtures, with each control token that they know."""
    for seed in seeds:
        for arm, mixture in mixtures().items():
            model = trained(folder, f"{arm}_{layers}_layers_seed_{seed}", layers, mixture, seed, num_steps)
            known = sorted({t for sizes in mixture.values() for t in sizes})
            measure(model, folder / "data" / f"{arm}_seed_{seed}.json", known)


def scores(folder: Path, layers: int, seeds: list[int], number: int = 256) -> None:
    """For each T, score samples with each t alike, by two metrics on other expressions of the same T."""
    tokenizer = prefix_sums_tokenizer()
    config = InnerLoopConfig(batch_size=64, learning_rate=1e-3, eps_root=1e-5)
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
            axis.plot(best[T], max(means), "o", color=color)
        axis.axhline(1 / BASE, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=f"{layers} layer{'s' * (layers > 1)}", xlabel="t, operators in a step", ylim=(0, 1.03))
        axis.set_xticks(STEP_SIZES)
    axes[0].set_ylabel("accuracy")
    axes[0].legend(frameon=False, fontsize=8)
    for layers, marker in zip(sizes, "osd", strict=False):
        steps = [math.ceil(T / t) for T, t in best_step_sizes(folder, layers).items()]
        axes[-1].plot(TESTED, steps, marker=marker, alpha=0.8, label=f"{layers} layer{'s' * (layers > 1)}")
    axes[-1].set(title="best number of steps", xlabel="T, operators of the expression", ylabel="N", ylim=(0, None))
    axes[-1].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def data_figures(folder: Path, layers: int) -> dict[str, dict[int, list[float]]]:
    """Accuracy of each seed by mixture and T. `uniform, any t`: the mean over all t, as if t was drawn at random."""
    best = best_step_sizes(folder, layers)
    curves = mean_curves(folder, layers)
    arms: dict[str, dict[int, list[float]]] = {
        "uniform, any t": {T: np.mean(list(by_size.values()), axis=0).tolist() for T, by_size in curves.items()},
        "uniform, best t": {T: by_size[best[T]] for T, by_size in curves.items()},
    }
    runs = {
        arm: [json.loads(path.read_text()) for path in sorted(folder.glob(f"data/{arm}_seed_*.json"))]
        for arm in ("longest", "best", "long_short")
    }
    arms["longest"] = {T: [run["1"][str(T)]["accuracy"] for run in runs["longest"]] for T in TESTED}
    arms["best"] = {T: [run[str(BEST[T])][str(T)]["accuracy"] for run in runs["best"]] for T in TESTED}
    for name, t in (("long-short, long", "1"), ("long-short, short", str(SHORT))):
        arms[name] = {T: [run[t][str(T)]["accuracy"] for run in runs["long_short"]] for T in TESTED}
    return {arm: by_length for arm, by_length in arms.items() if by_length[TESTED[0]]}  # the finished ones


def draw_uses(folder: Path, layers: int, scored_layers: int, path: Path) -> None:
    """Accuracy of models by what they were trained on, and mean scores of `attribute` by t."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    arms = data_figures(folder, layers)
    for k, (arm, by_length) in enumerate(arms.items()):
        places = np.arange(len(TESTED)) + (k - (len(arms) - 1) / 2) * 0.12
        (line,) = left.plot(places, [statistics.mean(values) for values in by_length.values()], "_", markersize=11)
        for place, values in zip(places, by_length.values(), strict=True):
            left.plot([place] * len(values), values, ".", color=line.get_color())
        line.set_label(arm)
    left.set_xticks(range(len(TESTED)), [f"T = {T}" for T in TESTED])
    left.set(ylabel="accuracy", ylim=(0, 1.05), title="by training data (dot: a seed, line: the mean)")
    left.legend(frameon=False, fontsize=8)
    for T in TESTED:
        cells = [
            json.loads(file.read_text())
            for file in sorted(folder.glob(f"scores/right_answer_{scored_layers}_layers_T_{T}_seed_*.json"))
        ]
        if cells:
            sizes = list(map(int, cells[0]["mean_score"]))
            scores = np.array(list(cells[0]["mean_score"].values()))
            means = scores / np.abs(scores).max()
            (line,) = right.plot(sizes, means, marker=".", label=f"T = {T}")
            right.plot(cells[0]["best"], means[sizes.index(cells[0]["best"])], "o", color=line.get_color())
    right.axhline(0, color="grey", linewidth=0.8, linestyle=":")
    right.set(
        xlabel="t of the sample",
        ylabel="mean score, relative",
        title="scores of attribute, first seed (dot: the best t)",
    )
    right.set_xticks(STEP_SIZES)
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def figures(folder: Path, sizes: list[int], layers: int, scored_layers: int) -> None:
    """Tables on the screen, and pictures in the output folder."""
    for size in sizes:
        best = best_step_sizes(folder, size)
        for T, by_size in mean_curves(folder, size).items():
            row = "  ".join(f"t={t}: {statistics.mean(values):.2f}" for t, values in by_size.items())
            print(f"{size} layers  T={T:2}  {row}  best N = {math.ceil(T / best[T])}")
    for arm, by_length in data_figures(folder, layers).items():
        rows = [*by_length.values(), np.mean(list(by_length.values()), axis=0).tolist()]  # the last one: all T
        cells = [f"{mean:.2f} ± {width or math.nan:.2f}" for mean, width in map(interval, rows)]
        print(f"{arm:20} {'  '.join(cells)}")
    for name in ("right_answer", "all_lengths"):
        for T in TESTED:
            files = sorted(folder.glob(f"scores/{name}_{scored_layers}_layers_T_{T}_seed_*.json"))
            values = [f"{json.loads(path.read_text())['spearman']:+.2f}" for path in files]
            print(f"{name}, T = {T}: Spearman of score and distance from the best length, by seed: {' '.join(values)}")
    draw_curves(folder, sizes, folder / "curves.png")
    draw_uses(folder, layers, scored_layers, folder / "uses.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/cot_length"))
    parser.add_argument("--parts", nargs="+", default=["curves", "data", "scores", "figures"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 3], help="numbers of layers of the curves")
    parser.add_argument("--layers", type=int, default=1, help="number of layers of the part `data`")
    parser.add_argument("--scored_layers", type=int, default=3, help="number of layers of the part `scores`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_steps", type=int, default=2000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if "curves" in args.parts:
        curves(args.output_dir, args.sizes, args.seeds, args.num_steps)
    if "data" in args.parts:
        data(args.output_dir, args.layers, args.seeds, args.num_steps)
    if "scores" in args.parts:
        scores(args.output_dir, args.scored_layers, args.seeds)
    if "figures" in args.parts:
        figures(args.output_dir, args.sizes, args.layers, args.scored_layers)


if __name__ == "__main__":
    main()
