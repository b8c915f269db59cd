"""Warns of a training that goes on without learning anything, and says what to do."""

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging


logger = logging.get_logger(__name__)

WINDOW = 5
"""Logs in a row that must show a fault."""
VERIFICATIONS = 3
ROUNDING = 1e-6
COLLAPSED = 0.02
"""Entropy in nats per token below which a generator writes almost the same text every time."""
AGREES = 0.5
"""Correlation of predicted and actual changes of the metric below which scores say little."""


class GuardCallback(TrainerCallback):
    """
    Warns, once each, if the last logs of a training show that it cannot learn or has stopped learning.

    - The metric after the student's fine-tuning no longer moves.
    - The reward has no spread: all scores are equal, or all rewards of each prompt.
    - The generator's entropy has collapsed.
    - With `verify_steps`, the scores do not predict the metric's actual changes.

    [`DPGTrainer`] adds this callback. With another trainer, pass it in `callbacks`. It reads
    `trainer.state.log_history`, so that a resumed run goes on with the logs before its checkpoint.
    """

    def __init__(self):
        self.said: set[str] = set()

    def on_log(self, args, state, control, logs, **kwargs):
        if not state.is_world_process_zero or "dpg/metric_after" not in logs:
            return
        scored = [entry for entry in state.log_history if "dpg/metric_after" in entry]
        for name, advice in find_faults(scored).items():
            if name not in self.said:
                self.said.add(name)
                logger.warning(f"Step {state.global_step}: {advice}")


def find_faults(scored: Sequence[dict[str, Any]]) -> dict[str, str]:
    """
    What is wrong with a training, and what to do, by the name of the fault.

    Args:
        scored (`list[dict]`): The logs of its reward steps so far.
    """
    found = {}
    last = scored[-WINDOW:]
    if len(last) == WINDOW:
        after = [entry["dpg/metric_after"] for entry in last]
        size = max(abs(value) for value in after)
        if max(after) - min(after) <= ROUNDING * size:
            found["metric"] = (
                f"the metric after the student's fine-tuning has been {after[-1]:.6g} in the last {WINDOW} logs: it "
                f"no longer moves. The last fine-tuning changed it by {last[-1]['dpg/metric_change']:.3g}. If this is "
                "not its best value, raise the student's learning rate (trl-dpg tune), or choose a metric with a "
                "gradient there."
            )
        sizes = [max(abs(entry["dpg/score/min"]), abs(entry["dpg/score/max"])) for entry in last]
        equal = all(entry["dpg/score/std"] <= ROUNDING * s for entry, s in zip(last, sizes, strict=True))
        if equal or all(entry.get("frac_reward_zero_std", 0.0) >= 1 for entry in last):
            found["spread"] = (
                f"in the last {WINDOW} logs, {'all scores' if equal else 'all rewards of each prompt'} were equal, "
                "so that the generator learns nothing. Do its completions differ (temperature, entropy), and do they "
                "have tokens (dpg/num_empty)? Does the student learn (its learning rate)?"
            )
        entropies = [entry.get("entropy", COLLAPSED) for entry in last]
        first = next((entry["entropy"] for entry in scored if "entropy" in entry), 0.0)
        if max(entropies) < min(COLLAPSED, first / 20):
            found["entropy"] = (
                f"the generator's entropy has fallen from {first:.3g} to {entropies[-1]:.3g} nats per token: it "
                "writes almost the same text every time. If you want other texts, go back to an earlier checkpoint, "
                "and lower learning_rate, or set beta (a KL penalty) or a higher temperature."
            )
    verified = [entry["dpg/verify/pearson"] for entry in scored if "dpg/verify/pearson" in entry][-VERIFICATIONS:]
    if len(verified) == VERIFICATIONS and not sum(verified) / VERIFICATIONS >= AGREES:
        found["verify"] = (
            f"in the last {VERIFICATIONS} verifications, predicted and actual changes of the metric had "
            f"correlations of {', '.join(f'{value:.2f}' for value in verified)}: the scores say little about it. Run "
            "trl-dpg verify with this recipe. Usual remedies are a larger student_eps_root, a lower "
            "student_learning_rate and a larger student_batch_size."
        )
    return found
