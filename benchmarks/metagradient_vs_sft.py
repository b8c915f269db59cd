"""
What does a metagradient cost over the fine-tuning it differentiates?

Seconds of `metagradient` over seconds of a plain PyTorch SFT loop of the same steps (AdamW, the fastest attention),
both without the metric: medians of interleaved repetitions in one process. `qlora` is LoRA over a 4-bit base (nf4,
float32 compute), in the SFT loop as well.

    python benchmarks/metagradient_vs_sft.py                          # reference model on the CPU
    python benchmarks/metagradient_vs_sft.py --device cuda --hidden 2048 --layers 16 --vocab 128256
"""

import argparse
import statistics
import tempfile
import time

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from trl_dpg import InnerLoopConfig, Student, metagradient


def make_model(args, kind):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=args.length,
    )
    model = LlamaForCausalLM(config).to(args.device)
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
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    return model.train()


def sft(model, batches):
    """The loop whose steps the metagradient differentiates."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0)
    for ids in batches:
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def head_sum(student):
    """A metric that costs nothing: some trained parameters' sum."""
    return student.theta[:1000].sum()


def timed(function, device):
    started = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main(args):
    torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, {args.device}, {args.threads} threads; {args.layers} x {args.hidden}, "
        f"vocabulary {args.vocab},"
    )
    print(f"sequence {args.length}, {args.batch} samples a step, float32; medians of {args.repeat}\n")
    print("| student | T | SFT, s | recompute / SFT | retention / SFT |")
    print("|---|---|---|---|---|")
    for kind in args.kinds.split(","):
        for steps in map(int, args.steps.split(",")):
            model = make_model(args, kind)
            data = torch.randint(0, args.vocab, (steps * args.batch, args.length))
            samples = [{"input_ids": row} for row in data.tolist()]
            student = Student(model)
            batches = [ids.to(args.device) for ids in data.split(args.batch)]
            sft_model = make_model(args, kind)
            runs = {"sft": lambda m=sft_model, b=batches: sft(m, b)}
            for name, budget in (("recompute", 0), ("retention", "auto")):
                config = InnerLoopConfig(batch_size=args.batch, learning_rate=1e-6, memory_budget=budget)
                runs[name] = lambda s=student, x=samples, c=config: metagradient(s, x, head_sum, c, metric_before=0.0)
            seconds = {name: [] for name in runs}
            for repetition in range(args.repeat + 1):
                for name, function in runs.items():
                    elapsed = timed(function, args.device)
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
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kinds", default="lora,full")
    parser.add_argument("--steps", default="1,4,8")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    main(parser.parse_args())
