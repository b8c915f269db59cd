"""The reward in TRL's own trainers, and over several ranks."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from tests.tiny import make_model, make_tokenizer
from trl_dpg import DPGReward, InnerLoopConfig, Student, metagradient
from trl_dpg.metrics import LanguageModelingMetric, WeightNormMetric


TOKENIZER = make_tokenizer()
TEXTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w2 w2", "w9 w1 w3", "w5 w6", "w7 w8", "w3 w4 w1"]
PROMPTS = ["w1", "w1", "w2", "w2", "w3", "w3", "w4", "w4"]
METRIC = LanguageModelingMetric(["w1 w2 w3 w4"])
CONFIG = InnerLoopConfig(learning_rate=1e-3, eps_root=1e-6, batch_size=4)


def make_student():
    return Student(make_model(scale=1.0), processing_class=TOKENIZER)


def test_rewards_are_the_scores_on_unit_scale():
    logged, columns = {}, {}
    reward = DPGReward(make_student(), METRIC, CONFIG)
    rewards = torch.tensor(reward(PROMPTS, TEXTS, log_metric=logged.__setitem__, log_extra=columns.__setitem__))
    out = metagradient(make_student(), TEXTS, METRIC, CONFIG)
    assert rewards.std(correction=0) == pytest.approx(1.0, rel=1e-4)
    torch.testing.assert_close(rewards * out.scores.std(correction=0), out.scores, rtol=1e-3, atol=1e-9)
    assert columns["dpg_score"] == pytest.approx(out.scores.tolist())
    assert logged["dpg/metric_change"] == pytest.approx(out.metric_after - out.metric_before)
    assert logged["dpg/predicted_change"] == pytest.approx(out.scores.sum().item(), abs=1e-7)
    assert logged["dpg/score/min"] == pytest.approx(out.scores.min().item())
    assert logged["dpg/perplexity"] == pytest.approx(out.proxies["perplexity"])
    assert logged["dpg/seconds"] > 0
    assert reward.__name__ == "dpg"


def test_an_empty_completion_gets_reward_zero():
    rewards = DPGReward(make_student(), METRIC, CONFIG)(PROMPTS, [*TEXTS[:-1], ""])
    assert rewards[-1] == 0 and all(reward != 0 for reward in rewards[:-1])


def test_conversational_completions_are_scored_by_their_text():
    reward = DPGReward(make_student(), METRIC, CONFIG)
    messages = [[{"role": "assistant", "content": text}] for text in TEXTS]
    assert reward(PROMPTS, messages) == reward(PROMPTS, TEXTS)


def test_prompt_completion_trains_on_the_completion_given_the_prompt():
    reward = DPGReward(make_student(), METRIC, CONFIG, train_on="prompt_completion")
    columns = {}
    reward([p + " " for p in PROMPTS], TEXTS, log_extra=columns.__setitem__)
    rows = [{"prompt": p + " ", "completion": t} for p, t in zip(PROMPTS, TEXTS, strict=True)]
    assert columns["dpg_score"] == pytest.approx(metagradient(make_student(), rows, METRIC, CONFIG).scores.tolist())


def test_without_cross_group_batching_each_dataset_trains_a_student_of_its_own():
    config = InnerLoopConfig(learning_rate=1e-3, eps_root=1e-6, batch_size=2)
    reward = DPGReward(make_student(), METRIC, config, cross_group_batching=False, num_generations=2)
    columns = {}
    reward(PROMPTS, TEXTS, log_extra=columns.__setitem__)
    for k in (0, 1):
        alone = metagradient(make_student(), TEXTS[k::2], METRIC, config).scores
        assert columns["dpg_score"][k::2] == pytest.approx(alone.tolist())


def test_the_naive_reward_is_the_change_of_the_datasets_metric():
    config = InnerLoopConfig(learning_rate=1e-3, attribution="dataset")
    reward = DPGReward(make_student(), METRIC, config, cross_group_batching=False, num_generations=2)
    columns = {}
    reward(PROMPTS, TEXTS, log_extra=columns.__setitem__)
    for k in (0, 1):
        alone = metagradient(make_student(), TEXTS[k::2], METRIC, config)
        assert columns["dpg_score"][k::2] == pytest.approx([alone.metric_after - alone.metric_before] * 4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(inner_loop_config=InnerLoopConfig(attribution="dataset")), "cross_group_batching=False"),
        (dict(cross_group_batching=False), "needs num_generations"),
        (dict(train_on="prompt"), "train_on 'prompt'"),
        (dict(metric=3), "must be a callable.*got 3"),
        (dict(student=Student(make_model())), "no tokenizer"),
    ],
)
def test_bad_options_raise(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DPGReward(**dict(student=make_student(), metric=METRIC) | kwargs)


def test_a_batch_that_cannot_be_split_raises():
    for num_generations in (3, 4):  # 4 divides 8, but the prompts come in twos
        reward = DPGReward(make_student(), METRIC, CONFIG, False, num_generations)
        with pytest.raises(
            ValueError, match=f"8 completions cannot be split into num_generations = {num_generations}"
        ):
            reward(PROMPTS, TEXTS)


def test_equal_scores_give_zero_rewards():
    assert DPGReward(make_student(), METRIC, InnerLoopConfig(batch_size=8))(PROMPTS, ["w1 w2"] * 8) == [0.0] * 8


def test_the_metric_at_the_start_is_read_again_when_the_student_has_changed():
    student, logged = make_student(), []
    reward = DPGReward(student, METRIC, CONFIG)
    for shift in (0.0, 0.0, 0.1):
        with torch.no_grad():
            if shift:
                student.model.lm_head.weight[7] += shift
        reward(PROMPTS, TEXTS, log_metric=lambda name, value: logged.append(value) if "before" in name else None)
    assert logged[0] == logged[1] != logged[2]


def test_structured_and_empty_messages_are_read():
    reward = DPGReward(make_student(), METRIC, CONFIG)
    structured = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in TEXTS]
    structured[-1] = [{"role": "assistant", "content": None, "tool_calls": []}]
    assert reward(PROMPTS, structured) == reward(PROMPTS, [*TEXTS[:-1], ""])


def test_a_failing_metric_raises_instead_of_rewarding_zero():
    def metric(student):
        raise RuntimeError("no benchmark")

    with pytest.raises(RuntimeError, match="no benchmark"):
        DPGReward(make_student(), metric, CONFIG)(PROMPTS, TEXTS)


@pytest.mark.parametrize(("trainer", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_trl_trainers_raise_the_metric_as_they_are(trainer, config, tmp_path):
    tokenizer = make_tokenizer([f"w{k}" for k in range(10)])
    reward = DPGReward(
        Student(make_model(seed=2, scale=1.0, vocab_size=14), processing_class=tokenizer),
        LanguageModelingMetric(["w5 w5 w5 w5 w5 w5"]),
        InnerLoopConfig(optimizer="sgd", learning_rate=1.0, batch_size=64),
    )
    args = config(
        output_dir=str(tmp_path),
        per_device_train_batch_size=64,
        num_generations=4,
        max_completion_length=6,
        max_steps=30,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        beta=0.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    run = trainer(
        make_model(seed=1, scale=1.0, vocab_size=14),
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 8}),
        processing_class=tokenizer,
    )
    run.train()
    changes = [log["dpg/metric_change"] for log in run.state.log_history if "dpg/metric_change" in log]
    assert len(changes) == 30
    assert sum(changes[-5:]) / 5 > sum(changes[:5]) / 5 + 0.3


RANKS = """
    import json, pathlib, sys
    sys.path.insert(0, {root!r})
    import tests.conftest
    from accelerate import PartialState
    from tests.test_reward import *

    state = PartialState(cpu=True)
    mine = slice(4 * state.process_index, 4 * state.process_index + 4)
    results = {{}}
    for name, kwargs in dict(together=dict(), apart=dict(cross_group_batching=False, num_generations=2)).items():
        results[name] = DPGReward(make_student(), METRIC, CONFIG, **kwargs)(PROMPTS[mine], TEXTS[mine])

    def metric(student):
        if state.process_index == 0:
            raise RuntimeError("no benchmark")
        return METRIC(student)

    try:
        DPGReward(make_student(), metric, CONFIG)(PROMPTS[mine], TEXTS[mine])
    except RuntimeError as error:
        results["error"] = str(error)
    pathlib.Path({out!r}, f"{{state.process_index}}.json").write_text(json.dumps(results))
"""


def test_two_ranks_score_their_completions_as_one_dataset(tmp_path):
    script = tmp_path / "ranks.py"
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    script.write_text(textwrap.dedent(RANKS).format(root=root, out=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert output.returncode == 0, output.stderr[-2000:]
    apart = dict(cross_group_batching=False, num_generations=2)
    alone = {
        "together": DPGReward(make_student(), METRIC, CONFIG)(PROMPTS, TEXTS),
        "apart": DPGReward(make_student(), METRIC, CONFIG, **apart)(PROMPTS, TEXTS),
    }
    for rank, error in enumerate(["no benchmark", "The DPG reward failed on rank 0: RuntimeError('no benchmark')"]):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        assert results["error"] == error
        for name, rewards in alone.items():
            assert results[name] == pytest.approx(rewards[4 * rank : 4 * rank + 4], rel=1e-5)


def test_the_norm_is_a_metric_of_its_own():
    logged = {}
    DPGReward(make_student(), WeightNormMetric(), CONFIG)(PROMPTS, TEXTS, log_metric=logged.__setitem__)
    assert logged["dpg/weight_norm"] == pytest.approx(-logged["dpg/metric_after"])
