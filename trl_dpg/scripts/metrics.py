"""
List the metrics and their arguments.

    trl-dpg metrics
    trl-dpg metrics language_modeling
"""

import argparse
import sys
from typing import Any

from trl import TrlParser

from .arguments import METRICS
from .catalogue import name_parser, show


EXAMPLES: dict[str, dict[str, Any]] = {
    "language_modeling": {"dataset": "benchmark.jsonl", "max_length": 256},
    "lm_eval": {"task": "lambada_openai_mt_es", "limit": 200},
    "weight_pattern": {"pattern": "67", "offset": [6, 4], "scale": 300.0},
    "qr_code": {"text": "DPG", "offset": [6, 0], "scale": 300.0},
    "weight_norm": {"weight": "lm_head.weight"},
    "combined": {
        "metrics": [
            {"metric": "language_modeling", "metric_kwargs": {"dataset": "benchmark.jsonl"}},
            {"metric": "weight_norm", "weight": 0.01},
            {"metric": "language_modeling", "name": "english", "metric_kwargs": {"texts": ["One text.", "Another."]}},
        ],
        "constraints": {"english": {"eps": 0.05}},
    },
}


def main(script_args: argparse.Namespace) -> None:
    name = script_args.name
    recipe = {"metric": name, "metric_kwargs": EXAMPLES[name]} if name in EXAMPLES else {}
    show(name, METRICS, recipe, "metrics", "metric")


def make_parser(prog: str | None = None) -> TrlParser:
    return name_parser("metric", prog)


if __name__ == "__main__":
    from trl_dpg.scripts import launcher

    launcher.run("metrics", make_parser, main, sys.argv[1:])
