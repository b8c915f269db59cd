"""
List the further rewards and their arguments.

    trl-dpg rewards
    trl-dpg rewards levenshtein
"""

import argparse
import sys
from typing import Any

from trl import TrlParser

from .arguments import REWARDS
from .catalogue import name_parser, show


EXAMPLES: dict[str, dict[str, Any]] = {
    "contains": {"text": "your answer"},
    "word_share": {"words": ["el", "la", "los", "las"]},
    "levenshtein": {"references": ["Todos los seres humanos nacen libres."]},
    "embedding_similarity": {"references": ["Todos los seres humanos nacen libres."]},
    "language_id": {"language": "spa_Latn"},
    "target_language": {"language": "spa"},
    "length_distribution": {"target": "lognormal:400,0.6"},
    "length_budget": {"check": "trl.rewards.accuracy_reward"},
    "shorter_better": {"check": "trl.rewards.accuracy_reward"},
    "adaptive_length_penalty": {"check": "trl.rewards.accuracy_reward"},
}


def main(script_args: argparse.Namespace) -> None:
    name = script_args.name
    recipe: dict[str, Any] = {}
    if name in EXAMPLES:  # DPG's weight comes first; this reward is only logged
        recipe = {"reward_funcs": [name], "reward_kwargs": {name: EXAMPLES[name]}, "reward_weights": [1.0, 0.0]}
    show(name, REWARDS, recipe, "rewards", "reward_funcs")


def make_parser(prog: str | None = None) -> TrlParser:
    return name_parser("reward", prog)


if __name__ == "__main__":
    from trl_dpg.scripts import launcher

    launcher.run("rewards", make_parser, main, sys.argv[1:])
