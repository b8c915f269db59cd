"""
Two small experiments with Dataset Policy Gradients. They make their own models, need no network, and take some minutes
on a CPU.

Act one, the language: a generator writes language A. Its texts are training data of a 4-bit LoRA student, and it is
rewarded if they lower the student's loss on language B. No prompt mentions B.

Act two, the picture: a generator writes characters. It is rewarded if fine-tuning on its texts changes a student's
weights as wanted: the signs of the changes draw the number 67.

Each act ends with a test: stock SFTTrainer trains a fresh student on newly sampled texts.
"""

import json
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)
from transformers.utils import logging
from trl import TrlParser

from .. import toy
from ..config import DPGConfig
from ..evaluation import Evaluation, evaluate_dataset
from ..generation import generate_texts
from ..live_table import LiveTable
from ..metrics import PATTERN_67, LanguageModelingMetric, Metric, WeightPatternMetric
from ..rewards import WordShareReward
from ..trainer import DPGTrainer
from .arguments import UsageError, at_least
from .quickstart_real import NAMES
from .quickstart_real import run as run_real


SEED = 0
console = Console()


@dataclass
class QuickstartArguments:
    """
    Arguments of the quickstart.

    Args:
        output_dir (`str`, *optional*):
            Folder for curves, picture, generators and `summary.json`. By default `runs/quickstart`, and with `real`
            `runs/new_language_smollm2_<language>`.
        language_steps (`int`, *optional*, defaults to `60`):
            Generator steps of act one.
        picture_steps (`int`, *optional*, defaults to `150`):
            Generator steps of act two.
        real (`bool`, *optional*, defaults to `False`):
            In the place of both acts: SmolLM2-135M-Instruct learns to write another language. It takes the most part
            of an hour on 2 CPU cores, and downloads 100 MB once. A run that was stopped is continued.
        language (`str`, *optional*, defaults to `"spa"`):
            The language with `real`: `"spa"`, `"deu"`, `"fra"` or `"ita"`.
        real_steps (`int`, *optional*):
            Generator steps with `real`. By default those of `recipes/new_language/smollm2.yaml`.
    """

    output_dir: str | None = field(default=None, metadata={"help": "Folder for the results, by default in runs/."})
    language_steps: int = field(default=60, metadata={"help": "Generator steps of act one, the language."})
    picture_steps: int = field(default=150, metadata={"help": "Generator steps of act two, the picture."})
    real: bool = field(default=False, metadata={"help": "In the place of both acts: a real model and real texts."})
    language: str = field(default="spa", metadata={"help": f"With --real: {', '.join(NAMES)}."})
    real_steps: int | None = field(default=None, metadata={"help": "With --real: generator steps."})

    def __post_init__(self):
        at_least(1, language_steps=self.language_steps, picture_steps=self.picture_steps, real_steps=self.real_steps)
        if self.language not in NAMES:
            raise UsageError(f"--language must be one of {', '.join(NAMES)}, got {self.language!r}.")


def train_generator(
    generator: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    table: LiveTable,
    **trainer_arguments,
) -> None:
    """Train a generator by [`DPGTrainer`], and save it."""
    trainer = DPGTrainer(
        model=generator,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[table],
        **trainer_arguments,
    )
    trainer.remove_callback(PrinterCallback)
    table.reward = trainer.dpg_reward
    trainer.train()
    trainer.save_model(trainer.args.output_dir)
    trainer.create_model_card(model_name=table.title)


def common_arguments(output_dir: Path) -> dict:
    """Settings that both acts have."""
    return dict(
        output_dir=str(output_dir),
        lr_scheduler_type="constant",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=SEED,
    )


def judge(args: DPGConfig, metric: Metric, *datasets: list[str]) -> list[Evaluation]:
    """Test a fresh student on each list of texts."""
    console.print("A fresh student, trained by SFTTrainer on newly sampled texts ...")
    return [evaluate_dataset(args.load_student, texts, metric, args.inner_loop_config(), SEED) for texts in datasets]


def language_act(output_dir: Path, steps: int) -> dict:
    """Act one: a generator of language A learns to write language B."""
    console.print("\n[bold]Act one: the language.[/] A 4-bit LoRA student should get better at language B.")
    set_seed(SEED)
    toy.languages_world(output_dir, SEED)
    generator, tokenizer, prompts, benchmark = read_world(output_dir)
    untrained_texts = generate_texts(generator, tokenizer, prompts[:256], max_new_tokens=8)
    args = DPGConfig(
        **common_arguments(output_dir / "generator"),
        max_steps=steps,
        learning_rate=1e-3,
        per_device_train_batch_size=128,
        num_generations=8,
        max_completion_length=8,
        reward_weights=[1.0, 0.0],
        student_model_name_or_path=str(output_dir / "student"),
        student_load_in_4bit=True,
        student_use_peft=True,
        student_lora_r=8,
        student_lora_alpha=16,
        student_batch_size=128,
        student_learning_rate=1e-2,
        student_eps_root=1e-5,  # near the squares of the gradients, which makes scores smooth, see docs/concepts.md
    )
    metric = LanguageModelingMetric(benchmark, batch_size=64)
    share = "rewards/word_share/mean"
    columns = {"dpg/metric_after": "metric", share: "share of B words"}
    table = LiveTable("language", columns, share, every=5, console=console)
    train_generator(
        generator,
        tokenizer,
        prompts,
        table,
        target_metric=metric,
        reward_funcs=WordShareReward(toy.LANGUAGE_B),  # weight 0: only logged
        args=args,
    )

    texts = generate_texts(generator, tokenizer, prompts[:256], max_new_tokens=8)
    fresh, untrained = (result.metric for result in judge(args, metric, texts, untrained_texts))
    console.print(f"  metric {fresh:.3f} (on the untrained generator's texts: {untrained:.3f})")
    console.print(f"  the generator now writes: [green]{texts[0]}[/]   (before: {untrained_texts[0]})")
    shares = table.history[share]
    return {
        "target_language_share_first": shares[0],
        "target_language_share_last10": sum(shares[-10:]) / len(shares[-10:]),
        "fresh_student_language_metric": fresh,
        "untrained_language_metric": untrained,
        "language_metric": table.history["dpg/metric_after"],
        "target_language_share": shares,
    }


def picture_act(output_dir: Path, steps: int) -> dict:
    """Act two: a generator of characters learns to draw 67 into a student's LM head."""
    console.print(
        "\n[bold]Act two: the picture.[/] Fine-tuning on the texts should draw 67 into the student's LM head."
    )
    set_seed(SEED)
    toy.characters_world(output_dir, SEED)
    generator, tokenizer, prompts, _ = read_world(output_dir)
    untrained_texts = generate_texts(generator, tokenizer, prompts[:256], max_new_tokens=16)
    args = DPGConfig(
        **common_arguments(output_dir / "generator"),
        max_steps=steps,
        learning_rate=2e-3,
        per_device_train_batch_size=256,
        num_generations=32,
        max_completion_length=16,
        student_model_name_or_path=str(output_dir / "student"),
        student_batch_size=32,
        student_learning_rate=1e-3,
        student_eps_root=1e-6,
        student_max_length=17,  # 16 characters and the eos token
        student_loss_normalization="max_length",
    )
    # Rows of the head are tokens, columns are hidden units. The offset selects letters and leaves out special tokens.
    # Eight steps at 1e-3 change a weight by 1e-3 to 8e-3. At this scale the softplus is flat where a pixel is right.
    metric = WeightPatternMetric(PATTERN_67, offset=(6, 4), scale=300.0)
    columns = {"dpg/metric_after": "metric", "dpg/pixel_accuracy": "pixel accuracy"}
    table = LiveTable("picture", columns, "dpg/pixel_accuracy", every=20, console=console)
    train_generator(generator, tokenizer, prompts, table, target_metric=metric, args=args)

    texts = generate_texts(generator, tokenizer, prompts[:256], max_new_tokens=16)
    results = judge(args, metric, texts, untrained_texts)
    accuracies = [result.proxies["pixel_accuracy"] for result in results]
    pictures = [metric.decode(result.finetuned) for result in results]
    console.print(
        f"  pixel accuracy {accuracies[0]:.3f} (on the untrained generator's texts: {accuracies[1]:.3f})\n\n"
        "  what stands in its weights:        before training the generator:"
    )
    for row, before in zip(*(picture.tolist() for picture in pictures), strict=True):
        drawn = ["".join("██" if pixel > 0 else "··" for pixel in line) for line in (row, before)]
        console.print(f"    {drawn[0]}                     {drawn[1]}")
    pixels = table.history["dpg/pixel_accuracy"]
    return {
        "pixel_accuracy_last10": sum(pixels[-10:]) / len(pixels[-10:]),
        "fresh_student_pixel_accuracy": accuracies[0],
        "untrained_pixel_accuracy": accuracies[1],
        "picture_metric": table.history["dpg/metric_after"],
        "pixel_accuracy": pixels,
        "picture": pictures[0].int().tolist(),
    }


def read_world(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str], list[str]]:
    """Load the generator, its tokenizer, the prompts and the benchmark's texts."""
    generator = AutoModelForCausalLM.from_pretrained(folder / "generator")
    tokenizer = AutoTokenizer.from_pretrained(folder / "generator")
    prompts, benchmark = (
        [json.loads(line)[column] for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name, column in (("prompts", "prompt"), ("benchmark", "text"))
    )
    return generator, tokenizer, prompts, benchmark


def plot(summary: dict, output_dir: Path) -> None:
    """Draw the curves and the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex="col", layout="constrained")
    panels = [
        ("target_language_share", "share of B words", axes[0, 0]),
        ("language_metric", "Φ = −loss on B [nats]", axes[1, 0]),
        ("pixel_accuracy", "pixel accuracy", axes[0, 1]),
        ("picture_metric", "Φ = −mean softplus", axes[1, 1]),
    ]
    for key, label, axis in panels:
        axis.plot(range(1, len(summary[key]) + 1), summary[key])
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if key in ("target_language_share", "pixel_accuracy"):
            axis.set_ylim(0, 1.02)
    axes[0, 0].set_title("Act one: the language (4-bit LoRA student)")
    axes[0, 1].set_title("Act two: the picture")
    for axis in axes[1]:
        axis.set_xlabel("generator step")
    figure.savefig(output_dir / "curves.png", dpi=150)
    figure, axis = plt.subplots(figsize=(3.5, 3))
    axis.imshow(torch.tensor(summary["picture"]), cmap="gray_r", vmin=-1, vmax=1)
    axis.set_axis_off()
    figure.savefig(output_dir / "picture.png", dpi=150)


def main(script_args: QuickstartArguments) -> dict:
    if script_args.real:
        steps = script_args.real_steps
        return run_real(
            script_args.output_dir, script_args.language, [] if steps is None else ["--max_steps", str(steps)]
        )
    torch.set_num_threads(1)  # more threads do not help models this small, and cost much on a busy machine
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)
    output_dir = Path(script_args.output_dir or "runs/quickstart")
    output_dir.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    summary = language_act(output_dir / "language", script_args.language_steps)
    language_seconds = time.perf_counter() - started
    summary |= picture_act(output_dir / "picture", script_args.picture_steps)
    seconds = time.perf_counter() - started
    summary |= {
        "seconds": seconds,
        "seconds_language": language_seconds,
        "seconds_picture": seconds - language_seconds,
    }
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2))
    plot(summary, output_dir)
    console.print(f"\nDone in {seconds:.0f} s. Curves, picture, generators and summary.json: {output_dir}")
    return summary


def make_parser(prog: str | None = None) -> TrlParser:
    return TrlParser(QuickstartArguments, prog=prog)


if __name__ == "__main__":
    from trl_dpg.scripts import launcher

    launcher.run("quickstart", make_parser, main, sys.argv[1:])
