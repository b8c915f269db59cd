"""
Predicted time and memory of a reward step for students of 1B, 8B and 70B, from one card of 24 GB to eight nodes.

    python benchmarks/sizes.py

Nothing is loaded, and no network is needed. Models are configurations of Llamas, saved to a folder with a stand-in
tokenizer. Memory is that of `trl-dpg memory` for a recipe and the flags of a row. Time is arithmetic, as written out
in docs/scaling.md, with the figures of the hardware below.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from trl_dpg.memory import estimate
from trl_dpg.scripts import memory


RECIPES = Path(__file__).parents[1] / "recipes/new_language"
SHAPES = {
    "1B": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, head_dim=64),
    "8B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "70B": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
}
VOCABULARY, KEY_VALUE_HEADS = 128256, 8
SAMPLES, LENGTH = 256, 128
"""Of the dataset, and of the metric's texts."""


class Card(NamedTuple):
    """
    A GPU.

    Attributes:
        peak (`dict[str, float]`): Dense FLOP/s by the type of the products, from its data sheet.
        bandwidth (`float`): Bytes a second of its memory.
    """

    peak: dict[str, float]
    bandwidth: float


CARDS = {
    "RTX 4090": Card({"float32": 82.6e12, "TF32": 82.6e12, "bfloat16": 165e12}, 1.01e12),
    "H100": Card({"float32": 67e12, "TF32": 494.5e12, "bfloat16": 989e12}, 3.35e12),
}
PRODUCTS = "TF32", "float32"
ACHIEVED = 0.4
"""The part of the peak that is reached."""
LINKS = {"NVLink": 450e9 / 2, "InfiniBand": 50e9 / 2}
"""Bytes a second in one direction, half of the data sheet's."""
EXCHANGED = 5 + 2
"""Numbers for each trained parameter, see the table in docs/distributed.md. A sum that all ranks get counts twice."""
VECTOR_BYTES = 65 * 4
"""That AdamW and its derivative read and write for each number and step."""
UNPACKED_BYTES = 0.5625 + 4
"""That are read and written when a weight of 4 bits becomes one of float32."""


class Case(NamedTuple):
    """A row: the models, the machine, and the flags for a recipe."""

    generator: str
    student: str
    trained: str
    cards: int
    card: str
    link: str
    memory: str
    recipe: str
    flags: str = ""
    metric_batch: int = 4  # texts; each rank takes whole batches of the metric


ONE_NODE = "--num_processes 8 --per_device_train_batch_size 4 --gradient_accumulation_steps 1"
EIGHT_NODES = "--num_processes 64 --per_device_train_batch_size 1 --gradient_accumulation_steps 1"
SAME_DATA = "--generation_batch_size 256 --student_batch_size 256"
LEAST = "--student_micro_batch_size 1 --student_gradient_checkpointing true"
NODE = 8, "H100", "NVLink", "80GB"
NODES = 64, "H100", "InfiniBand", "80GB"
DDP, FSDP2 = "--accelerate_config multi_gpu", "--accelerate_config fsdp2"
CASES = [
    Case("1B, LoRA", "1B", "4-bit LoRA", 1, "RTX 4090", "", "24GB", "qlora.yaml"),
    Case("8B, LoRA", "8B", "4-bit LoRA", 1, "H100", "", "80GB", "8b.yaml"),
    Case("1B, all", "1B", "all", *NODE, "full.yaml", f"{DDP} {ONE_NODE} {SAME_DATA}"),
    Case("8B, LoRA", "8B", "4-bit LoRA", *NODE, "8b.yaml", f"{DDP} {ONE_NODE}"),
    Case("8B, all", "8B", "4-bit LoRA", *NODE, "8b.yaml", f"{FSDP2} --use_peft false {ONE_NODE}"),
    Case("70B, LoRA", "8B", "4-bit LoRA", *NODE, "8b.yaml", f"{FSDP2} {ONE_NODE}"),
    Case("70B, all", "70B", "4-bit LoRA", *NODES, "8b.yaml", f"{FSDP2} --use_peft false {EIGHT_NODES} {LEAST}", 1),
]
"""Recipes are those of `recipes/new_language/`."""


def save_models(folder: Path) -> None:
    """A folder for each shape, with a configuration and a tokenizer of one word, but without weights."""
    tokenizer = Tokenizer(models.WordLevel({"w": 0, "<eos>": 1}, unk_token="w"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for name, shape in SHAPES.items():
        sizes = dict(vocab_size=VOCABULARY, num_key_value_heads=KEY_VALUE_HEADS, tie_word_embeddings=name == "1B")
        LlamaConfig(**sizes, **shape).save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder / name)


def settings(case: Case, folder: Path):
    """The arguments of `trl-dpg memory` for a row."""
    texts = [" ".join(["w"] * LENGTH)] * 8
    metric = ["--metric", "language_modeling"]
    metric += ["--metric_kwargs", json.dumps({"texts": texts, "batch_size": case.metric_batch})]
    paths = ["--model_name_or_path", str(folder / case.generator.split(",")[0])]
    paths += ["--student_model_name_or_path", str(folder / case.student)]
    argv = ["--config", str(RECIPES / case.recipe), *paths, *metric, "--memory", case.memory, *case.flags.split()]
    script, training, *others = memory.make_parser().parse_args_and_config(args=argv)
    training.output_dir = str(folder / "run")
    return script, training, *others


def predicted_memory(arguments):
    """The [`MemoryEstimate`](trl_dpg.memory.MemoryEstimate) of `trl-dpg memory` with these arguments."""
    script, training, model, dataset = arguments
    prompt = memory.prompt_tokens(script, training, model, dataset)
    return estimate(memory.make_setup(script, training, model, prompt))


class Counts(NamedTuple):
    """
    Of a shape.

    Attributes:
        blocks (`int`): Weights of the linear layers in the blocks.
        head (`int`): Weights of the head.
        lora (`int`): Parameters of LoRA with r = 16 on all linear layers of the blocks.
        norms (`int`): Weights of the norms.
    """

    blocks: int
    head: int
    lora: int
    norms: int


def counts(name: str) -> Counts:
    shape = SHAPES[name]
    h, f, n = (shape[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    kv = h // shape["num_attention_heads"] * KEY_VALUE_HEADS
    layers = [(h, h), (h, kv), (h, kv), (h, h), (h, f), (h, f), (f, h)]
    lora = 16 * sum(a + b for a, b in layers)
    return Counts(n * sum(a * b for a, b in layers), VOCABULARY * h, n * lora, (2 * n + 1) * h)


class Seconds(NamedTuple):
    """Predicted seconds of a reward step, by what takes them."""

    arithmetic: float
    unpacking: float
    vectors: float
    exchange: float


def predicted_seconds(case: Case, products: str, kept: bool, micro_batch: int, checkpointing: bool) -> Seconds:
    """
    A reward step with T = 1, without the metric before fine-tuning.

    Args:
        case (`Case`): The row.
        products (`str`): Type of the matrix products.
        kept (`bool`): Whether what the scores need is kept from the forward sweep, or computed again.
        micro_batch (`int`): Samples of a micro-batch.
        checkpointing (`bool`): Whether blocks run again in each backward pass.
    """
    own, card, adapters = counts(case.student), CARDS[case.card], "LoRA" in case.trained
    trained = own.lora if adapters else own.blocks + own.head + own.norms
    training = (2 if adapters else 4) + (0 if kept else 2) + checkpointing * (1 if kept else 2)
    metric = 2 if adapters else 3
    flops = 2 * (own.blocks + own.head) * LENGTH  # F of a sample
    samples, batches = SAMPLES / case.cards, math.ceil(SAMPLES / case.metric_batch / case.cards)
    passes = training * samples / micro_batch + metric * batches
    return Seconds(
        flops * (training * samples + metric * batches * case.metric_batch) / (ACHIEVED * card.peak[products]),
        UNPACKED_BYTES * own.blocks * passes / card.bandwidth if "4-bit" in case.trained else 0.0,
        VECTOR_BYTES * trained / case.cards / card.bandwidth,
        EXCHANGED * 4 * trained / LINKS[case.link] if case.link else 0.0,
    )


def time_row(case: Case, training, products: str) -> str:
    """A row of the table of times. The first of two figures is for gradients of samples that are all kept."""
    size = training.student_micro_batch_size or training.student_batch_size
    checkpointing = training.student_gradient_checkpointing
    both = [predicted_seconds(case, products, kept, size, checkpointing) for kept in (True, False)]
    cells = [case.student, case.trained, f"{case.cards} x {case.card}", products]
    cells += [
        f"{both[0].arithmetic:.2f}, {both[1].arithmetic:.2f}",
        f"{both[0].unpacking:.2f}, {both[1].unpacking:.2f}",
    ]
    cells += [f"{both[0].vectors * 1e3:.1f}", f"{both[0].exchange * 1e3:.1f}"]
    return f"| {' | '.join([*cells, ', '.join(f'{sum(seconds):.1f}' for seconds in both)])} |"


def memory_row(case: Case, found) -> str:
    cells = [f"{case.cards} x {case.memory}", case.generator, f"{case.student}, {case.trained}"]
    cells += [f"{phase.total / 1e9:.1f}" for phase in found.phases]
    changes = ", ".join(f"{change.setting} {change.value}" for change in found.changes)
    fits = "yes" if found.fits else f"with {changes}" if any(c.fits for c in found.changes) else "no"
    return f"| {' | '.join([*cells, fits])} |"


def main() -> None:
    print(
        "| student | trained | GPUs | products | arithmetic, s | unpacking, s | vectors, ms | exchange, ms | sum, s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        save_models(Path(folder))
        planned = [(case, settings(case, Path(folder))) for case in CASES]
        rows = [time_row(case, arguments[1], products) for case, arguments in planned for products in PRODUCTS]
        print(*dict.fromkeys(rows), sep="\n", flush=True)  # the time does not depend on the generator
        print("\n| GPUs | generator | student | generation | fine-tuning | metric | attribution | update | fits |")
        print("|---|---|---|---|---|---|---|---|---|")
        parts = []
        for case, arguments in planned:
            found = predicted_memory(arguments)
            print(memory_row(case, found), flush=True)
            parts.append(f"\n{case.cards} x {case.memory}, {case.generator}, {case.student}:\n{found.render()}")
    print(*parts, sep="\n")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
