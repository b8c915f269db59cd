"""
The quickstart with a real model: `trl-dpg quickstart --real`.

SmolLM2-135M-Instruct is asked in English to rephrase English paragraphs, and learns to answer in another language,
because such texts lower the loss of a 4-bit LoRA student on that language. No prompt mentions it. The settings are
those of `recipes/new_language/smollm2.yaml`.
"""

import json
import statistics
from importlib.resources import files
from pathlib import Path
from typing import Any

from . import dpg


NAMES = {"spa": "Spanish", "deu": "German", "fra": "French", "ita": "Italian"}
RECIPE = Path(str(files("trl_dpg"))) / "recipes" / "new_language" / "smollm2.yaml"


def run(output_dir: str | None, language: str, arguments: list[str]) -> dict[str, Any]:
    """
    Train the generator, test fresh students and draw the curves. A run that was stopped is continued.

    Args:
        output_dir (`str`, *optional*): Folder for the results. By default it is named after the language.
        language (`str`): `"spa"`, `"deu"`, `"fra"` or `"ita"`.
        arguments (`list[str]`): Further flags of `trl-dpg dpg`.
    """
    folder = Path(output_dir or f"runs/new_language_smollm2_{language}")
    flags = ["--config", str(RECIPE), "--output_dir", str(folder), "--resume_from_checkpoint", "auto"]
    flags += ["--toy_world_kwargs", json.dumps({"language": language}), *arguments]
    print(f"SmolLM2-135M-Instruct learns to write {NAMES[language]}. If it is stopped, the same command continues.")
    dpg.main(*dpg.make_parser().parse_args_and_config(args=flags))
    summary = json.loads((folder / "summary.json").read_text())
    plot({language: [summary]}, folder / "curves.png")
    print(f"Curves: {folder / 'curves.png'}")
    return summary


def plot(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """
    Draw the share of the language, the change of Φ, and what fresh students gained on held-out paragraphs.

    Args:
        runs (`dict[str, list[dict]]`): Summaries of runs by language. For several runs, lowest and highest are shown.
        path (`Path`): The file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.5), width_ratios=(1, 1, 1.3), layout="constrained")
    labels: list[str] = []
    for language, summaries in runs.items():
        for axis, key in zip(axes, ("rewards/target_language/mean", "dpg/metric_change"), strict=False):
            columns = list(zip(*(summary["curves"][key] for summary in summaries), strict=False))
            steps = range(1, len(columns) + 1)
            (line,) = axis.plot(steps, [statistics.mean(column) for column in columns], label=NAMES[language])
            lowest, highest = ([function(column) for column in columns] for function in (min, max))
            axis.fill_between(steps, lowest, highest, color=line.get_color(), alpha=0.2)
        for held_out, name in (("held_out", NAMES[language]), ("held_out_english", "English")):
            for shift, state, color in ((-0.2, "untrained", "tab:gray"), (0.2, "trained", "tab:blue")):
                fresh = [summary["fresh_students"] for summary in summaries]
                changes = [value - one["before"][held_out] for one in fresh for value in one[state][held_out]]
                place = len(labels) + shift
                label = None if labels else f"texts of the {state} generator"
                axes[2].bar(place, statistics.mean(changes), width=0.38, color=color, label=label)
                axes[2].plot([place] * len(changes), changes, "k.", markersize=3)
            labels.append(name if held_out == "held_out" else f"{name}\n({NAMES[language]})")
    axes[0].set(title="completions in the language", ylabel="share", ylim=(0, 1.02), xlabel="generator step")
    axes[1].set(title="change of Φ by the student's fine-tuning", ylabel="nats per token", xlabel="generator step")
    axes[2].set(title="fresh students: change of Φ on held-out texts", xticks=range(len(labels)), xticklabels=labels)
    axes[2].axhline(0, color="black", linewidth=0.8)
    axes[2].set_ylim(top=1.3 * axes[2].get_ylim()[1])  # room for the legend
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=130)
    plt.close(figure)
