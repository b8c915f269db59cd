"""
What does a metagradient cost over the fine-tuning it differentiates?

Seconds of `metagradient` over seconds of a plain PyTorch SFT loop of the same steps (AdamW, the fastest attention),
both without the metric: medians of interleaved repetitions in one process. `qlora` is LoRA over a 4-bit base (nf4,
float32 compute), in the SFT loop as well.

    python benchmarks/metagradient_vs_sft.py                          # reference model on the CPU
    python benchmarks/metagradient_vs_sft.py --attribution first_order --kinds lora --steps 8
    python benchmarks/metagradient_vs_sft.py --real --kinds qlora --steps 1 --rank 8 --length 32 --batch 32
    python benchmarks/metagradient_vs_sft.py --device cuda --hidden 2048 --layers 16 --vocab 128256
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from _side_by_side import add_model_arguments
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from trl_dpg import InnerLoopConfig, Student, metagradient
from trl_dpg.declaration import declaration_world


def real_world(folder):
    """A folder with SmolLM2-135M-Instruct, and paragraphs of the Declaration of Human Rights in its tokens."""
    declaration_world(Path(folder))
    tokenizer = AutoTokenizer.from_pretrained(Path(folder, "student"))
    files = ("held_out.jsonl", "held_out_english.jsonl", "benchmark.jsonl")
    lines = [line for file in files for line in Path(folder, file).read_text().splitlines()]
    return str(Path(folder, "student")), [tokenizer(json.loads(line)["text"]).input_ids for line in lines]


def make_model(args, kind, folder=None):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=args.length,
    )
    model = LlamaForCausalLM(config) if folder is None else LlamaForCausalLM.from_pretrained(folder)
    model = model.to(args.device)
    if kind == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32"
        )
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = LlamaForCausalLM.from_pretrained(
                folder, quantization_config=quantization, device_map={"": args.device}, dtype=torch.float32
            )
        model.config.name_or_path = ""  # nowhere to look for a tokenizer: samples are token ids
    if kind in ("lora", "qlora"):
        model = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear"))
    return model.train()


def sft(model, batches, accumulate=1):
    """The loop whose steps the metagradient differentiates. A step takes this many batches."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0)
    for number, (ids, mask) in enumerate(batches, 1):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        (loss / accumulate).backward()
        if number % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


def head_sum(student):
    """A metric that costs nothing: some trained parameters' sum."""
    return student.theta[:1000].sum()


def timed(function, args):
    clock = time.process_time if args.cpu_seconds else time.perf_counter
    started = clock()
    function()
    if args.device == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def padded(samples, device):
    """The samples of a step as token ids and attention mask, filled up on the right. No mask if all are as long."""
    ids = pad_sequence([torch.tensor(sample) for sample in samples], batch_first=True, padding_value=-1).to(device)
    mask = ids >= 0
    return ids.clamp(min=0), None if mask.all() else mask.long()


def main(args):
    torch.set_num_threads(args.threads)
    size = f"{args.layers} x {args.hidden}, vocabulary {args.vocab}"
    model = "SmolLM2-135M-Instruct, paragraphs of the Declaration of Human Rights" if args.real else size
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads; {model},")
    print(f"sequence {args.length}, {args.batch} samples a step, float32; medians of {args.repeat}\n")
    print("| student | T | SFT, s | recompute / SFT | retention / SFT |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as world:
        folder, texts = real_world(world) if args.real else (None, None)
        compare(args, folder, texts)


def compare(args, folder, texts):
    for kind in args.kinds.split(","):
        for steps in map(int, args.steps.split(",")):
            number = steps * args.batch
            if texts is None:
                rows = torch.randint(0, args.vocab, (number, args.length)).tolist()
            else:
                rows = [texts[k % len(texts)][: args.length] for k in range(number)]
            samples = [{"input_ids": row} for row in rows]
            student = Student(make_model(args, kind, folder))
            batches = [padded(rows[k : k + args.batch], args.device) for k in range(0, number, args.batch)]
            sft_model = make_model(args, kind, folder)
            runs = {"sft": lambda m=sft_model, b=batches: sft(m, b)}
            for name, budget in (("recompute", 0), ("retention", "auto")):
                config = InnerLoopConfig(
                    batch_size=args.batch, learning_rate=1e-6, memory_budget=budget, attribution=args.attribution
                )
                runs[name] = lambda s=student, x=samples, c=config: metagradient(s, x, head_sum, c, metric_before=0.0)
            seconds = {name: [] for name in runs}
            for repetition in range(args.repeat + 1):
                for name, function in runs.items():
                    elapsed = timed(function, args)
                    if repetition > 0:
                        seconds[name].append(elapsed)
            median = {name: statistics.median(values) for name, values in seconds.items()}
            ratios = [
                statistics.median(a / b for a, b in zip(seconds[name], seconds["sft"], strict=True))
                for name in ("recompute", "retention")
            ]
            print(f"| {kind} | {steps} | {median['sft']:.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, steps="1,4,8")
    parser.add_argument("--attribution", default="metagradient", choices=("metagradient", "first_order"))
    parser.add_argument("--real", action="store_true", help="SmolLM2 and real texts, downloaded once")
    main(parser.parse_args())
