"""
What does a constraint cost, and is it kept? The new language in miniature, with and without a limit on the old one.

    python benchmarks/constrained.py
    python benchmarks/constrained.py --seeds 42 --output_dir runs/constrained_once

Each seed has a world, a generator and students of its own. Both runs have the settings of
`recipes/constrained/mini.yaml`; the one without a constraint has the benchmark in B alone as its metric. Fresh
students, which `SFTTrainer` fine-tunes on newly sampled texts, say what was gained in B and lost in A. An interrupted
benchmark goes on with the runs that are missing.
"""

import argparse
import json
import statistics
from pathlib import Path

import yaml

from trl_dpg import cli


RECIPE = Path(__file__).parents[1] / "recipes" / "constrained" / "mini.yaml"
WITHOUT = ["--metric", "language_modeling", "--metric_kwargs", "{}"]


def figures(output: Path, flags: list[str]) -> dict[str, float]:
    """What the fresh students of a run gained in B, and how their metric of A changed; means over them."""
    path = output / "summary.json"
    if not path.exists() or "fresh_students" not in json.loads(path.read_text()):
        cli.main(["dpg", "--config", str(RECIPE), "--output_dir", str(output), *flags])
    summary = json.loads(path.read_text())
    students, curves = summary["fresh_students"], summary["curves"]
    changes = {name: statistics.mean(students["trained"][name]) - students["before"][name] for name in NAMES}
    multipliers = curves.get("dpg/multiplier/language_A", [0.0])
    return changes | {"share": curves["rewards/word_share/mean"][-1], "multiplier": multipliers[-1]}


NAMES = ("metric", "language_A")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/constrained_benchmark"))
    parser.add_argument("--steps", type=int, help="of the generator; by default those of the recipe")
    args = parser.parse_args()
    eps = yaml.safe_load(RECIPE.read_text())["metric_kwargs"]["constraints"]["language_A"]["eps"]
    steps = [] if args.steps is None else ["--max_steps", str(args.steps)]
    print(f"limit: A may fall by {eps} nats per token\n")
    print("| seed | constraint | gain in B | change of A | kept | share of B, last step | multiplier | gain, share |")
    print("|---|---|---|---|---|---|---|---|")
    for seed in args.seeds:
        gains = {}
        for name, flags in {"no": WITHOUT, "yes": []}.items():
            found = figures(args.output_dir / f"{name}_{seed}", ["--seed", str(seed), *flags, *steps])
            gains[name] = found["metric"]
            cells = [seed, name, f"{found['metric']:.2f}", f"{found['language_A']:.2f}"]
            cells += ["yes" if found["language_A"] >= -eps else "no", f"{found['share']:.2f}"]
            cells += [f"{found['multiplier']:.2f}", f"{gains[name] / gains['no']:.0%}"]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
