"""`trl_dpg.live_table` in runs that resume at their end, reuse a generation batch, or evaluate."""

import io
import re

import pytest
from rich.console import Console
from transformers import TrainerState

from tests.small_runs import TRAIN_PROMPTS, dpg_config, make_trainer
from trl_dpg.live_table import LiveTable, estimate


def make_table(terminal=True):
    return LiveTable("a run", console=Console(file=io.StringIO(), force_terminal=terminal, width=120, height=50))


def train(table, args, checkpoint=None, **kwargs):
    trainer = make_trainer(args, callbacks=[table], **kwargs)
    trainer.train(resume_from_checkpoint=checkpoint)
    return table.console.file.getvalue()


def test_a_resumed_run_that_takes_no_step_or_logs_none_shows_the_earlier_figures(tmp_path):
    settings = dict(max_steps=1, save_strategy="steps", save_steps=1)
    prompts = TRAIN_PROMPTS.select(range(4))  # an epoch has one step
    train(make_table(), dpg_config(tmp_path, **settings), train_dataset=prompts)
    checkpoint = str(tmp_path / "checkpoint-1")
    printed = train(make_table(), dpg_config(tmp_path, **settings), checkpoint, train_dataset=prompts)
    assert "1/1 steps in" in printed and "Φ after" in printed and "a step" not in printed
    table, args = make_table(), dpg_config(tmp_path)
    state = TrainerState(max_steps=3, global_step=2, logging_steps=2, is_world_process_zero=True)
    state.log_history = [{"step": 2, "dpg/metric_before": -3.0, "dpg/metric_after": -2.0}]
    table.on_train_begin(args, state, None)
    state.global_step = 3
    table.on_train_end(args, state, None)
    assert "3/3 steps in" in table.console.file.getvalue()


SECONDS = {"fine_tuning": 6.0, "metric": 8.0, "attribution": 6.0}  # of one call of the reward


@pytest.mark.parametrize(
    "settings, steps, share",
    [
        (dict(num_iterations=5), 1, 1.0),  # the logs of the first step have the whole generation batch
        (dict(num_iterations=5), 5, 1 / 5),  # those of five steps, too, as a mean over the steps
        (dict(num_iterations=5), 6, 2 / 6),
        (dict(per_device_train_batch_size=8, gradient_accumulation_steps=2, steps_per_generation=1), 2, 2.0),
    ],
)
def test_the_estimate_is_that_of_a_typical_step_however_many_steps_a_generation_batch_serves(
    settings, steps, share, tmp_path
):
    args = dpg_config(tmp_path, **settings)
    a_step = 2.0 if "gradient_accumulation_steps" in settings else 1 / 5  # calls of the reward
    calls = share * steps
    # One call takes 26 s. The first one takes 30 s more, and 4 s for the metric of the student before its fine-tuning
    first = {"reward": (26 * calls + 4 + 30) / steps, "metric": 4 * (calls + 1) / calls}
    parts = SECONDS | {"generation": 10 * share, "update": 5.0} | first
    logs = {f"dpg/seconds/{name}": value for name, value in parts.items()}
    logs["dpg/seconds"] = sum(parts[name] for name in SECONDS) + 30 / calls
    state = TrainerState(max_steps=100, global_step=steps)
    text = estimate(logs, steps, state, args)
    step, reward, metric = 36 * a_step + 5, 26 * a_step, 4 / 26
    assert f"about {step:.0f} s a step: generation {10 * a_step:.2g}," in text
    assert f"reward {reward:.2g} (its metric {metric:.0%}), update 5." in text


def test_the_seconds_of_a_step_are_a_mean_over_all_steps_of_a_generation_batch(tmp_path):
    table, args = make_table(terminal=False), dpg_config(tmp_path, num_iterations=5)
    state = TrainerState(max_steps=10, logging_steps=1, is_world_process_zero=True)
    table.on_train_begin(args, state, None)
    for state.global_step in range(1, 11):
        logs = {f"dpg/seconds/{name}": 0.0 for name in ("generation", "reward")} | {"dpg/seconds/update": 1.0}
        if state.global_step in (1, 6):
            logs |= {"dpg/seconds/generation": 20.0, "dpg/seconds/reward": 30.0, "dpg/metric_after": -1.0}
        table.on_log(args, state, None, logs)
    printed = table.console.file.getvalue()
    assert printed.count("11 s a step (generation 4, reward 6, update 1)") == 2


@pytest.mark.parametrize("terminal", [True, False])
def test_the_figures_of_an_evaluation_are_printed(terminal, tmp_path):
    args = dpg_config(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8)
    args.num_generations_eval = 4
    printed = train(make_table(terminal), args, eval_dataset=TRAIN_PROMPTS.select(range(2)))
    lines = re.findall(r"a run: step   [12]/2  evaluation: (.*)", printed)
    assert len(lines) == 2
    for name in ("loss", "reward", "Φ before", "Φ after", "perplexity"):
        assert all(re.search(rf"{name} -?\d+\.\d{{4}}", line) for line in lines)
