"""
Which samples of an SFT set help a metric? Score them all, keep the best third, look at both ends.

`trl-dpg attribute` does the same from the command line.

    python examples/filter_dataset.py --student HuggingFaceTB/SmolLM2-135M --dataset trl-lib/Capybara
"""

from dataclasses import dataclass

from datasets import load_dataset
from trl import TrlParser

from trl_dpg import InnerLoopConfig, Student, attribute
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

    # Large batches and eps_root, so that a score depends on the sample and not on its neighbours (docs/attribution.md)
    config = InnerLoopConfig(learning_rate=1e-5, batch_size=64, micro_batch_size=8, eps_root=1e-6, max_length=256)
    result = attribute(Student(arguments.student), dataset, metric, config, progress=True)
    print(f"metric {result.metric_before:.4f} -> {result.metric_after:.4f} by fine-tuning on {len(dataset)} samples")
    print(result.chance())

    for title, rows in (("best", result.ranking[:3]), ("worst", result.ranking[-3:])):
        print(f"\n{title}:")
        for row in rows.tolist():
            print(f"  {result.scores[row]:+.2e}  {str(dataset[row])[:100]}")
    kept = dataset.select(result.top(arguments.keep))
    kept.to_json(arguments.output)
    print(f"\n{len(kept)} samples: {arguments.output}")


if __name__ == "__main__":
    main(*TrlParser(Arguments).parse_args_and_config())
