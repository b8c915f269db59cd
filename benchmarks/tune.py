"""
Does `trl-dpg tune` find values that hold for other samples, and does training with them do as well as with set values?

    python benchmarks/tune.py                                    # tune, then verify with other samples: five set-ups
    python benchmarks/tune.py --set_ups language picture --train  # also train with the recipe's values and with auto

Each result is written to `output_dir` when it is known. An interrupted benchmark goes on from there.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from trl_dpg import InnerLoopConfig, Student, cli, toy
from trl_dpg.declaration import declaration_world
from trl_dpg.generation import generate_texts
from trl_dpg.metrics import PATTERN_67, LanguageModelingMetric, WeightPatternMetric
from trl_dpg.scripts.quickstart import read_world
from trl_dpg.tuning import tune
from trl_dpg.verification import verify


AUTO = {"learning_rate": "auto", "eps_root": "auto"}
RECIPES = {"language": "recipes/new_language/mini.yaml", "picture": "recipes/pattern_67/mini.yaml"}


def lora(path: Path) -> Student:
    torch.manual_seed(0)
    adapters = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    base = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    return Student(str(path), peft_config=adapters, quantization_config=base)


def language(folder: Path):
    """Act one of the quickstart: 4-bit LoRA, T = 1."""
    toy.languages_world(folder, seed=0)
    generator, tokenizer, prompts, benchmark = read_world(folder)
    samples = [generate_texts(generator, tokenizer, prompts[:128], max_new_tokens=8, seed=seed) for seed in (0, 1)]
    config = InnerLoopConfig(**AUTO, batch_size=128)
    return lora(folder / "student"), LanguageModelingMetric(benchmark, batch_size=64), config, samples


def picture(folder: Path):
    """Act two of the quickstart: all parameters, T = 8."""
    toy.characters_world(folder, seed=0)
    generator, tokenizer, prompts, _ = read_world(folder)
    samples = [generate_texts(generator, tokenizer, prompts[:256], max_new_tokens=16, seed=seed) for seed in (0, 1)]
    metric = WeightPatternMetric(PATTERN_67, offset=(6, 4), scale=300.0)
    config = InnerLoopConfig(**AUTO, batch_size=32, max_length=17, loss_normalization="max_length")
    return Student(str(folder / "student")), metric, config, samples


def real_texts(folder: Path) -> tuple[list[str], list[str]]:
    """Paragraphs to fine-tune on, and the metric's."""
    folder.mkdir(parents=True, exist_ok=True)
    declaration_world(folder, seed=0)
    files = [folder / f"{name}.jsonl" for name in ("held_out", "held_out_english", "benchmark")]
    spanish, english, benchmark = ([json.loads(line)["text"] for line in file.open()] for file in files)
    return [text for pair in zip(spanish, english, strict=False) for text in pair], benchmark


def real_4bit(folder: Path):
    """SmolLM2-135M over 4 bits, T = 1, as in recipes/new_language/smollm2.yaml, with fewer samples."""
    texts, benchmark = real_texts(folder)
    config = InnerLoopConfig(**AUTO, batch_size=16, max_length=32)
    metric = LanguageModelingMetric(benchmark, max_length=48)
    return lora(folder / "student"), metric, config, [texts[:16], texts[16:32]]


def real_full(folder: Path):
    """SmolLM2-135M, all parameters, T = 2."""
    texts, benchmark = real_texts(folder)
    config = InnerLoopConfig(**AUTO, batch_size=4, max_length=24)
    metric = LanguageModelingMetric(benchmark[:6], max_length=32)
    return Student(str(folder / "student")), metric, config, [texts[:8], texts[8:16]]


def rough(folder: Path):
    """A model of large random weights, all parameters, T = 8."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, vocab_size=61, max_position_embeddings=64))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    rows = [{"input_ids": torch.randint(0, 61, (10,)).tolist()} for _ in range(136)]
    metric = LanguageModelingMetric(rows[128:])
    return Student(model), metric, InnerLoopConfig(**AUTO, batch_size=8), [rows[:64], rows[64:128]]


SET_UPS = {
    "language": language,
    "picture": picture,
    "real_4bit": real_4bit,
    "real_full": real_full,
    "rough": rough,
}


def tuned_and_verified(name: str, folder: Path) -> dict:
    """The chosen values, what they cost, and the figures of `verify` with other samples."""
    student, metric, config, (first, others) = SET_UPS[name](folder / f"{name}_world")
    choice = tune(student, first, metric, config, progress=True)
    print(choice.render(), flush=True)
    chosen = choice.apply(config)
    result = verify(
        student, others, metric, chosen, compare_precision=False, try_remedies=False, progress=True, seed=7
    )
    print(result.render(), flush=True)
    figures = {check.name: check.value for check in result.checks}
    return choice.figures() | {"verify": figures, "directions": len(result.actual)}


def trained(name: str, folder: Path, steps: int, seed: int) -> dict:
    """Figures of fresh students after a training with the recipe's values, and after one with auto."""
    found = {}
    for values in ("set", "auto"):
        output = folder / f"{name}_{values}_{steps}_{seed}"
        if not (output / "summary.json").exists() or "trained" not in json.loads(
            (output / "summary.json").read_text()
        ):
            flags = [f"--student_{field}={value}" for field, value in AUTO.items()] if values == "auto" else []
            arguments = ["dpg", "--config", RECIPES[name], "--output_dir", str(output), "--max_steps", str(steps)]
            cli.main([*arguments, "--seed", str(seed), *flags])
        summary = json.loads((output / "summary.json").read_text())
        found[values] = {k: v for k, v in summary["trained"].items() if isinstance(v, float)}
        found[values] |= {"in training": {k: v["last10"] for k, v in summary["training"].items() if "pixel" in k}}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set_ups", nargs="+", choices=SET_UPS, default=list(SET_UPS))
    parser.add_argument("--train", action="store_true", help="train the miniatures among the set-ups")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/tune"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.set_ups:
        path = args.output_dir / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(tuned_and_verified(name, args.output_dir), indent=2))
        figures = json.loads(path.read_text())
        chosen, verified = figures["chosen"], figures["verify"]
        cells = [name, f"{chosen['learning_rate']:.0e}", f"{chosen['eps_root']:.0e}", f"{figures['reward_steps']:.1f}"]
        cells += [f"{verified[key]:.4f}" for key in ("pearson", "slope", "metasmoothness")]
        rows.append(f"| {' | '.join(cells)} |")
    print("| set-up | learning rate | eps_root | reward steps | Pearson, other samples | slope | metasmoothness |")
    print("|---|---|---|---|---|---|---|", *rows, sep="\n")
    for name in [name for name in args.set_ups if args.train and name in RECIPES]:
        for seed in args.seeds:
            for values, figures in trained(name, args.output_dir, args.steps, seed).items():
                print(f"{name}, seed {seed}, {values} values: {figures}", flush=True)


if __name__ == "__main__":
    main()
