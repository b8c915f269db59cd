"""
Which samples of an SFT set help a metric? Score them all, keep the best third, look at both ends.

`trl-dpg attribute` does the same for sets of any size, and can be stopped and resumed.

    python examples/filter_dataset.py --student HuggingFaceTB/SmolLM2-135M --dataset trl-lib/Capybara
"""

from dataclasses import dataclass

import torch
from datasets import load_dataset
from trl import TrlParser

from trl_dpg import InnerLoopConfig, Student, metagradient
from trl_dpg.metrics import LanguageModelingMetric


@dataclass
class Arguments:
    student: str = "HuggingFaceTB/SmolLM2-135M"
    dataset: str = "trl-lib/Capybara"
    benchmark: str = "Salesforce/wikitext"
    benchmark_config: str | None = "wikitext-2-raw-v1"
    num_samples: int = 256
    keep: float = 0.33
    output: str = "filtered.jsonl"


def main(arguments: Arguments) -> None:
    dataset = load_dataset(arguments.dataset, split="train").select(range(arguments.num_samples))
    texts = load_dataset(arguments.benchmark, arguments.benchmark_config, split="validation")["text"]
    metric = LanguageModelingMetric([text for text in texts if len(text) > 100][:64])

    # Large batches and eps_root, so that a score hangs on the sample and not on its neighbours (docs/attribution.md)
    config = InnerLoopConfig(learning_rate=1e-5, batch_size=64, micro_batch_size=8, eps_root=1e-6, max_length=256)
    student = Student(arguments.student)
    out = metagradient(student, dataset, metric, config)
    print(f"metric {out.metric_before:.4f} -> {out.metric_after:.4f} by fine-tuning on all {len(dataset)} samples")
    shuffled = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    again = metagradient(student, dataset.select(shuffled.tolist()), metric, config).scores
    agreement = torch.corrcoef(torch.stack([out.scores[shuffled], again]))[0, 1]
    print(f"correlation with the scores in another order: {agreement:.2f}; near 0 the ranking is chance")

    order = out.scores.argsort(descending=True).tolist()
    for title, rows in (("best", order[:3]), ("worst", order[-3:])):
        print(f"\n{title}:")
        for row in rows:
            print(f"  {out.scores[row]:+.2e}  {str(dataset[row])[:100]}")
    kept = dataset.select(order[: round(arguments.keep * len(order))])
    kept.to_json(arguments.output)
    print(f"\n{len(kept)} samples: {arguments.output}")


if __name__ == "__main__":
    main(*TrlParser(Arguments).parse_args_and_config())
