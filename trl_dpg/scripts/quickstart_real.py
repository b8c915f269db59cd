"""
The quickstart with a real model: `trl-dpg quickstart --real`.

SmolLM2-135M-Instruct is asked in English to rephrase English paragraphs, and learns to answer in another language,
because such texts lower the loss of a 4-bit LoRA student on that language. No prompt mentions it. The settings are
those of `recipes/new_language/smollm2.yaml`.
"""

import json
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
    plot(summary, language, folder / "curves.png")
    print(f"Curves: {folder / 'curves.png'}")
    return summary


def plot(summary: dict[str, Any], language: str, path: Path) -> None:
    """Draw the share of the language, Φ, and the fresh students' Φ on held-out paragraphs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves, fresh = summary["curves"], summary["fresh_students"]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    steps = range(1, len(curves["dpg/metric_after"]) + 1)
    axes[0].plot(steps, curves["rewards/target_language/mean"])
    axes[0].set(title=f"completions in {NAMES[language]}", ylabel="share", ylim=(0, 1.02), xlabel="generator step")
    axes[1].plot(steps, curves["dpg/metric_after"], label="after the student's fine-tuning")
    axes[1].plot(steps, curves["dpg/metric_before"], color="gray", label="before")
    axes[1].set(title=f"Φ = −loss on {NAMES[language]}", ylabel="nats per token", xlabel="generator step")
    axes[1].legend(fontsize="small")
    places = {f"held-out {NAMES[language]}": "held_out", "held-out English": "held_out_english"}
    for shift, state, color in ((-0.2, "untrained", "tab:gray"), (0.2, "trained", "tab:blue")):
        for place, name in enumerate(places.values()):
            changes = [value - fresh["before"][name] for value in fresh[state][name]]
            label = f"texts of the {state} generator" if place == 0 else None
            axes[2].bar(place + shift, sum(changes) / len(changes), width=0.38, color=color, label=label)
            axes[2].plot([place + shift] * len(changes), changes, "k.", markersize=4)
    axes[2].axhline(0, color="black", linewidth=0.8)
    axes[2].set(title="fresh students: change of Φ", xticks=range(len(places)), xticklabels=places)
    axes[2].legend(fontsize="small")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)
