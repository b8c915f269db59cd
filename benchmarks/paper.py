"""
The paper's experiments at a small size: does the method do what it claims, and which part of it does?

Every cell of the matrix (experiment x way of making the reward x seed) is a run of `trl-dpg dpg` with a recipe of
`recipes/` and a few flags, in a process of its own. A finished cell is not run again, and an interrupted one with the
real model goes on from its last checkpoint. Ends with a table (`results.json`, `results.md`) and a figure for each
experiment.

    python benchmarks/paper.py                                       # the miniatures: hours on two cores
    python benchmarks/paper.py --experiments pattern_67 --seeds 0 1 2 --jobs 2
    python benchmarks/paper.py --real --output-dir runs/paper_real   # SmolLM2: a day on two cores
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_dpg.generation import generate_texts
from trl_dpg.scripts import dpg
from trl_dpg.scripts.data import load_data
from trl_dpg.scripts.fresh_students import judge
from trl_dpg.scripts.quickstart_real import NAMES
from trl_dpg.scripts.quickstart_real import plot as plot_real
from trl_dpg.scripts.registry import make_held_out_metrics, make_metric, make_rewards


RECIPES = Path(__file__).resolve().parents[1] / "recipes"

# The figure that counts, as it is named in summary.json
FIGURES = {
    "pattern_67": "pixel_accuracy",
    "qr_code": "pixel_accuracy",
    "l2_norm": "weight_norm",
    "new_language": "word_share",
    "uuid": "contains",
}
MINI = tuple(FIGURES)
REAL = {NAMES[language].lower(): language for language in NAMES}  # the new language with SmolLM2
FIGURES |= dict.fromkeys(REAL, "target_language")
TITLES = {
    "adamw": "AdamW metagradients",
    "sgd": "SGD metagradients",
    "separate": "AdamW, no cross-group batching",
    "naive": "naive: the metric itself",
    "levenshtein": "Levenshtein similarity",
    "embedding_similarity": "embedding similarity",
    "language_id": "language id",
    "target_language": "language id",
}
# Four datasets, each of one completion of every prompt, as in the paper
SEPARATE = ["--cross_group_batching", "false", "--num_generations", "4"]
SGD_RATES = {
    "new_language": "3",
    "spanish": "3",
}  # elsewhere 0.3: of 0.3, 3 and 30 the largest with which fine-tuning is stable
WAYS = {
    experiment: {
        "adamw": [],
        "sgd": ["--student_optimizer", "sgd", "--student_learning_rate", SGD_RATES.get(experiment, "0.3")],
        "separate": SEPARATE,
        "naive": [*SEPARATE, "--attribution", "dataset"],
    }
    for experiment in (*MINI, "spanish")
}
WAYS |= {experiment: {"adamw": []} for experiment in REAL if experiment != "spanish"}
# As many student steps as with all completions in one dataset
BATCH_SIZES = {"pattern_67": 8, "qr_code": 24, "l2_norm": 8, "new_language": 32, "uuid": 16, "spanish": 8}
for experiment, batch_size in BATCH_SIZES.items():
    for way in ("separate", "naive"):
        WAYS[experiment][way] = [*WAYS[experiment][way], "--student_batch_size", str(batch_size)]
# Rewards that know the benchmark's texts, in DPG's place; its own weighs nothing
for reward in ("levenshtein", "embedding_similarity", "language_id"):
    WAYS["new_language"][reward] = [
        *("--reward_funcs", "word_share", reward, "--reward_weights", "0", "0", "1"),
        *("--toy_world_kwargs", '{"reward_models": true}'),
    ]
WAYS["spanish"]["levenshtein"] = [
    *("--reward_funcs", "target_language", "levenshtein", "--reward_weights", "0", "0", "1")
]
WAYS["spanish"]["target_language"] = ["--reward_weights", "0", "1"]


def recipe(experiment: str) -> list[str]:
    """The flags that name an experiment's recipe."""
    if experiment not in REAL:
        return ["--config", str(RECIPES / experiment / "mini.yaml")]
    flags = ["--config", str(RECIPES / "new_language" / "smollm2.yaml"), "--resume_from_checkpoint", "auto"]
    return [*flags, "--toy_world_kwargs", json.dumps({"language": REAL[experiment]})]


def run_cell(folder: Path, experiment: str, way: str, seed: int) -> None:
    if (folder / "summary.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "trl_dpg.scripts.dpg", *recipe(experiment), "--evaluate", str(way == "adamw")]
    command += ["--output_dir", str(folder), "--seed", str(seed), "--num_threads", "1", *WAYS[experiment][way]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    with (folder / "log.txt").open("a") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    state = f"{time.perf_counter() - started:.0f} s" if code == 0 else f"FAILED, see {folder / 'log.txt'}"
    print(f"{experiment} / {way} / seed {seed}: {state}", flush=True)


def judge_cell(folder: Path, experiment: str, way: str, seed: int) -> None:
    """
    Fresh students on newly sampled texts, fine-tuned as the recipe says, whatever the way.

    A run of another way has no evaluation of its own: it would use the student of the way (SGD, or more and smaller
    steps), which does not compare.
    """
    if not (folder / "summary.json").exists() or (folder / "evaluation.json").exists():
        return
    figures = json.loads((folder / "summary.json").read_text())
    if way == "adamw":
        (folder / "evaluation.json").write_text(json.dumps({name: figures[name] for name in ("untrained", "trained")}))
        return
    torch.set_num_threads(1)
    arguments = [*recipe(experiment), "--output_dir", str(folder), "--seed", str(seed)]
    script_args, args, model_args, _ = dpg.make_parser().parse_args_and_config(args=arguments)
    dpg.make_toy_world(script_args, args, model_args)
    metric, held_out = make_metric(script_args), make_held_out_metrics(script_args)
    rewards = make_rewards(script_args.reward_funcs, script_args.reward_kwargs)
    data = load_data(script_args.dataset_name)
    rows = data.select([k % len(data) for k in range(args.generation_batch_size)])
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    figures = {}
    for name, path in (("untrained", model_args.model_name_or_path), ("trained", folder)):
        generator = AutoModelForCausalLM.from_pretrained(path)
        texts = generate_texts(generator, tokenizer, rows["prompt"], args.max_completion_length, seed=seed)
        figures[name] = judge(texts, rows, args, metric, rewards, script_args.greedy_prompt, held_out)
    (folder / "evaluation.json").write_text(json.dumps(figures, indent=2, ensure_ascii=False))


def collect(output_dir: Path) -> dict:
    """All finished runs by experiment and way, whether this command made them or one before it."""
    results: dict = {}
    for experiment, ways in WAYS.items():
        for way in ways:
            runs = [
                json.loads((path.parent / "summary.json").read_text()) | json.loads(path.read_text())
                for path in sorted((output_dir / experiment / way).glob("*/evaluation.json"))
            ]
            if runs:
                results.setdefault(experiment, {})[way] = runs
    return results


def spread(values: list[float], digits: int = 3) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else mean


def table(results: dict) -> str:
    lines = []
    for experiment, ways in results.items():
        keys = {FIGURES[experiment]: FIGURES[experiment], "metric": "Φ"}
        if experiment in REAL:
            keys |= {"held_out": "Φ, held-out texts", "held_out_english": "Φ, English"}
        columns = [f"{title}, {texts}" for title in keys.values() for texts in ("untrained", "trained")]
        columns = ["reward", "seeds", *columns, "seconds"]
        lines += [f"### {experiment}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for way, runs in ways.items():
            cells = [TITLES[way], str(len(runs))]
            for key in keys:
                cells += [spread([run[texts][key] for run in runs]) for texts in ("untrained", "trained")]
            cells.append(spread([run["seconds"] for run in runs], 0))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def plot(results: dict, output_dir: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    for experiment, ways in results.items():
        figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
        name = FIGURES[experiment]
        for axis, key in zip(axes, (name, "dpg/metric_after"), strict=True):
            for way, runs in ways.items():
                band(axis, [curve_of(run, key) for run in runs], TITLES[way])
            axis.set_xlabel("generator step")
            axis.set_ylabel("Φ" if key == "dpg/metric_after" else name)
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize="small")
        figure.suptitle(f"{experiment}: mean and range over seeds")
        figure.savefig(output_dir / f"{experiment}.png", dpi=120)
        plt.close(figure)


def overview(results: dict, output_dir: Path) -> None:
    """One figure of three experiments, for the README."""
    from matplotlib import pyplot as plt

    if not {"pattern_67", "new_language", "qr_code"} <= set(results):
        return
    figure, axes = plt.subplots(1, 4, figsize=(13, 3), width_ratios=(1.3, 1.1, 0.9, 0.9), layout="constrained")
    for way in ("adamw", "naive"):
        band(axes[0], [curve_of(run, "pixel_accuracy") for run in results["pattern_67"][way]], TITLES[way])
    axes[0].set(title="67 in the student's head", xlabel="generator step", ylabel="pixel accuracy", ylim=(0, 1.03))
    axes[0].legend(fontsize="small", loc="lower right")
    axes[0].grid(alpha=0.3)

    language = results["new_language"]
    losses = {"untrained generator": [-run["untrained"]["metric"] for run in language["adamw"]]}
    for way in ("levenshtein", "language_id", "embedding_similarity", "adamw"):
        losses[TITLES[way]] = [-run["trained"]["metric"] for run in language.get(way, [])]
    for place, (title, values) in enumerate(losses.items()):
        axes[1].barh(place, statistics.mean(values), color="tab:blue" if title == TITLES["adamw"] else "tab:gray")
        axes[1].plot(values, [place] * len(values), "k.", markersize=4)
    axes[1].set(yticks=range(len(losses)), yticklabels=losses, xlabel="loss on language B [nats]")
    axes[1].set(title="a fresh 4-bit student")
    axes[1].invert_yaxis()

    code = results["qr_code"]["adamw"][0]
    for axis, texts, title in zip(axes[2:], ("untrained", "trained"), ("before", "after"), strict=True):
        axis.imshow(code[texts]["picture"], cmap="gray_r", vmin=-1, vmax=1)
        axis.set(title=f"QR code, {title}")
        axis.set_axis_off()
    figure.savefig(output_dir / "overview.png", dpi=110)
    plt.close(figure)


def band(axis, curves: list[list[float]], label: str) -> None:
    """The mean of several runs, and from the lowest to the highest."""
    columns = list(zip(*curves, strict=False))
    steps = range(1, len(columns) + 1)
    (line,) = axis.plot(steps, [statistics.mean(c) for c in columns], label=label)
    axis.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=line.get_color(), alpha=0.2)


def curve_of(run: dict, key: str) -> list[float]:
    curves = run["curves"]
    return next(curves[name] for name in (key, f"dpg/{key}", f"rewards/{key}/mean") if name in curves)


def main(args):
    experiments = args.experiments or (REAL if args.real else MINI)
    output_dir = Path(args.output_dir)
    cells = [
        (output_dir / experiment / way / str(seed), experiment, way, seed)
        for seed in args.seeds
        for experiment in experiments
        for way in WAYS[experiment]
        if args.ways is None or way in args.ways
    ]
    if not args.tables_only:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda cell: run_cell(*cell), cells))
    for cell in cells:
        judge_cell(*cell)
    results = collect(output_dir)
    figures = {
        experiment: {
            way: [{key: run[key] for key in ("seed", "steps", "seconds", "untrained", "trained")} for run in runs]
            for way, runs in ways.items()
        }
        for experiment, ways in results.items()
    }
    (output_dir / "results.json").write_text(json.dumps(figures, indent=2, ensure_ascii=False))
    (output_dir / "results.md").write_text(table(results))
    plot(results, output_dir)
    overview(results, output_dir)
    real = {language: results[name]["adamw"] for name, language in REAL.items() if "adamw" in results.get(name, {})}
    if real:
        plot_real(real, output_dir / "real.png")
    print(table(results))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", default="runs/paper")
    parser.add_argument("--experiments", nargs="+", choices=list(FIGURES))
    parser.add_argument(
        "--real", action="store_true", help="all languages with SmolLM2, in the place of the miniatures"
    )
    parser.add_argument("--ways", nargs="+", choices=list(TITLES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tables-only", action="store_true", help="of the cells that are finished")
    main(parser.parse_args())
