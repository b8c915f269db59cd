"""The reward in TRL's own trainers, and over several ranks."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from tests.small_runs import CONFIG, METRIC, PROMPTS, TEXTS, TOKENIZER, make_student
from tests.tiny import QUIET, make_model, make_tokenizer
from trl_dpg import DPGReward, InnerLoopConfig, Student, metagradient
from trl_dpg.metrics import LanguageModelingMetric, WeightNormMetric


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


def test_another_student_in_a_reward_has_its_own_start():
    reward, logged = DPGReward(make_student(), METRIC, CONFIG), {}
    reward(PROMPTS, TEXTS)
    reward.student = Student(make_model(seed=3, scale=1.0), processing_class=TOKENIZER)
    reward(PROMPTS, TEXTS, log_metric=logged.__setitem__)
    assert logged["dpg/metric_before"] == metagradient(reward.student, TEXTS, METRIC, CONFIG).metric_before


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


# -- the generator's tokens -----------------------------------------------------------------------------------------

PER_TOKEN = InnerLoopConfig(learning_rate=1e-3, eps_root=1e-6, batch_size=4, per_token=True)
IDS = [[*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id] for text in TEXTS]


def character_student():
    vocab = {token: k for k, token in enumerate(["<pad>", "<eos>", *"w0123456789 <>eosadi"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    return Student(make_model(scale=1.0), processing_class=fast)


def character_scores(student, rows):
    """For "w1 w2 w3": w1| w2| w3|eos is 2 characters, 3, 3, and eos."""
    scores = metagradient(student, rows, METRIC, PER_TOKEN).token_scores
    starts = [len(row["prompt"]) if isinstance(row, dict) else 0 for row in rows]
    lengths = [[2, *[3] * (len(ids) - 2), 1] for ids in IDS]
    return [
        torch.stack([part.sum() for part in row[start : start + sum(n)].split(n)])
        for row, start, n in zip(scores, starts, lengths, strict=True)
    ]


def assert_all_close(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)


def test_a_generator_of_words_receives_the_scores_of_a_students_characters():
    reward, columns = DPGReward(character_student(), METRIC, PER_TOKEN, processing_class=TOKENIZER), {}
    rewards = reward(PROMPTS, TEXTS, completion_ids=IDS, log_extra=columns.__setitem__)
    scores = reward.last_token_scores
    assert [len(row) for row in scores] == [len(ids) for ids in IDS]
    assert all((row != 0).all() for row in scores)
    assert_all_close(scores, character_scores(character_student(), TEXTS))
    assert [row.sum().item() for row in scores] == pytest.approx(columns["dpg_score"], rel=1e-4)
    assert columns["dpg_token_scores"] == [row.tolist() for row in scores]
    plain = DPGReward(character_student(), METRIC, CONFIG)  # its first step is scored in another way, in float32
    assert rewards == pytest.approx(plain(PROMPTS, TEXTS), rel=1e-5) and plain.last_token_scores is None


def test_a_generator_with_the_students_tokenizer_receives_the_students_scores():
    reward = DPGReward(make_student(), METRIC, PER_TOKEN, processing_class=TOKENIZER)
    reward(PROMPTS, TEXTS, completion_ids=IDS)
    scores = metagradient(make_student(), TEXTS, METRIC, PER_TOKEN).token_scores
    assert_all_close(reward.last_token_scores, [row[: len(ids)] for row, ids in zip(scores, IDS, strict=True)])


def test_what_the_student_learns_about_eos_goes_to_the_last_token_if_none_was_written():
    scores = {}
    for name, ids in dict(ended=IDS, cut=[ids[:-1] for ids in IDS]).items():
        reward = DPGReward(make_student(), METRIC, PER_TOKEN, processing_class=TOKENIZER)
        reward(PROMPTS, TEXTS, completion_ids=ids)
        scores[name] = reward.last_token_scores
    assert_all_close(scores["cut"], [torch.cat([row[:-2], row[-2:].sum()[None]]) for row in scores["ended"]])


def test_token_scores_of_messages_are_those_of_their_text():
    reward = DPGReward(character_student(), METRIC, PER_TOKEN, processing_class=TOKENIZER)
    reward(PROMPTS, [[{"role": "assistant", "content": text}] for text in TEXTS], completion_ids=IDS)
    assert_all_close(reward.last_token_scores, character_scores(character_student(), TEXTS))


@pytest.mark.parametrize("conversational", [False, True])
def test_token_scores_given_the_prompt_are_those_of_the_completion_alone(conversational):
    def rendered(student):
        student.processing_class.chat_template = (
            "{% for m in messages %}{{ 'wo ' if m.role == 'user' else 'wa ' }}{{ m.content }}"
            "{{ ' ' if m.role == 'user' else '<eos>' }}{% endfor %}{% if add_generation_prompt %}wa {% endif %}"
        )
        return student

    # Either way the student reads "wo w1 wa w1 w2 w3<eos>" and learns from "w1 w2 w3<eos>"
    prompts, completions = [f"wo {prompt} wa " for prompt in PROMPTS], TEXTS
    rows = [{"prompt": p, "completion": t} for p, t in zip(prompts, TEXTS, strict=True)]
    expected = character_scores(character_student(), rows)
    if conversational:
        prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        completions = [[{"role": "assistant", "content": text}] for text in TEXTS]
    reward = DPGReward(
        rendered(character_student()), METRIC, PER_TOKEN, train_on="prompt_completion", processing_class=TOKENIZER
    )
    reward(prompts, completions, completion_ids=IDS)
    assert_all_close(reward.last_token_scores, expected)


def test_tokens_that_the_student_did_not_read_score_zero():
    config = dataclasses.replace(PER_TOKEN, max_length=4)
    reward, columns = DPGReward(character_student(), METRIC, config, processing_class=TOKENIZER), {}
    completions = [*TEXTS[:-1], ""]
    reward(PROMPTS, completions, completion_ids=[*IDS[:-1], [1]], log_extra=columns.__setitem__)
    for row, score in zip(reward.last_token_scores, columns["dpg_score"], strict=True):
        assert row.sum().item() == pytest.approx(score, rel=1e-4)
        assert (row[2:] == 0).all()  # of "w1 w2 w3" it read "w1 w"
    assert all((row[:2] != 0).all() for row in reward.last_token_scores[:-1])
    assert reward.last_token_scores[-1].tolist() == [0.0]


def test_token_scores_of_several_datasets_come_in_the_completions_order():
    config = dataclasses.replace(PER_TOKEN, batch_size=2)
    reward = DPGReward(make_student(), METRIC, config, False, 2, processing_class=TOKENIZER)
    reward(PROMPTS, TEXTS, completion_ids=IDS)
    for k in (0, 1):
        alone = metagradient(make_student(), TEXTS[k::2], METRIC, config).token_scores
        expected = [row[: len(ids)] for row, ids in zip(alone, IDS[k::2], strict=True)]
        assert_all_close(reward.last_token_scores[k::2], expected)


def test_token_scores_without_the_generators_tokenizer_or_ids_raise():
    with pytest.raises(ValueError, match="trainer's `processing_class`"):
        DPGReward(make_student(), METRIC, PER_TOKEN)(PROMPTS, TEXTS, completion_ids=IDS)
    with pytest.raises(ValueError, match="`completion_ids`"):
        DPGReward(make_student(), METRIC, PER_TOKEN, processing_class=TOKENIZER)(PROMPTS, TEXTS)


# -- what is refused ------------------------------------------------------------------------------------------------

NAIVE = InnerLoopConfig(attribution="dataset", per_token=True)
SLOW = Student(make_model(vocab_size=400), ByT5Tokenizer())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(inner_loop_config=InnerLoopConfig(attribution="dataset")), "cross_group_batching=False"),
        (dict(cross_group_batching=False), "needs num_generations"),
        (dict(train_on="prompt"), "train_on 'prompt'"),
        (dict(metric=3), "must be a callable.*got 3"),
        (dict(student=Student(make_model())), "no tokenizer"),
        (dict(inner_loop_config=InnerLoopConfig(per_token=True), student=SLOW), "ByT5Tokenizer.*Use a fast tokenizer"),
        (dict(inner_loop_config=NAIVE, cross_group_batching=False, num_generations=2), "no scores per_token"),
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
        **QUIET,
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
        reward, logged = DPGReward(make_student(), METRIC, CONFIG, verify_steps=1, **kwargs), {{}}
        results[name] = reward(PROMPTS[mine], TEXTS[mine], log_metric=logged.__setitem__)
        results[name + "_verified"] = logged["dpg/verify/pearson"]

    reward = DPGReward(make_student(), METRIC, PER_TOKEN, processing_class=TOKENIZER)
    reward(PROMPTS[mine], TEXTS[mine], completion_ids=IDS[mine])
    results["tokens"] = [scores.tolist() for scores in reward.last_token_scores]
    batch = reward.last_batch
    results["batch"] = [batch.prompts, batch.completions, batch.tokens]
    results["sums"] = [scores.sum().item() for scores in batch.token_scores]
    assert batch.scores.tolist() == pytest.approx(results["sums"], rel=1e-4, abs=1e-9)
    pathlib.Path({out!r}, f"{{state.process_index}}.json").write_text(json.dumps(results))
"""


def on_two_ranks(script, folder):
    """What each rank's script writes."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = folder / "ranks.py"
    path.write_text(textwrap.dedent(script).format(root=root, out=str(folder)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(path)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert output.returncode == 0, output.stderr[-2000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_two_ranks_score_their_completions_as_one_dataset(tmp_path):
    both = on_two_ranks(RANKS, tmp_path)
    alone, verified = {}, {}
    for name, kwargs in dict(together=dict(), apart=dict(cross_group_batching=False, num_generations=2)).items():
        reward, logged = DPGReward(make_student(), METRIC, CONFIG, verify_steps=1, **kwargs), {}
        alone[name] = reward(PROMPTS, TEXTS, log_metric=logged.__setitem__)
        verified[name] = logged["dpg/verify/pearson"]
    reward = DPGReward(make_student(), METRIC, PER_TOKEN, processing_class=TOKENIZER)
    reward(PROMPTS, TEXTS, completion_ids=IDS)
    for rank, results in enumerate(both):
        tokens = [torch.tensor(scores) for scores in results["tokens"]]
        assert_all_close(tokens, reward.last_token_scores[4 * rank : 4 * rank + 4])
        batch = reward.last_batch
        assert results["batch"] == [batch.prompts, batch.completions, batch.tokens]
        assert results["sums"] == pytest.approx(batch.scores.tolist(), rel=1e-4, abs=1e-9)
        for name, rewards in alone.items():
            assert results[name] == pytest.approx(rewards[4 * rank : 4 * rank + 4], rel=1e-5)
            assert results[name + "_verified"] == pytest.approx(verified[name], abs=1e-4)


FAILING_RANKS = """
    import datetime, json, pathlib, sys
    sys.path.insert(0, {root!r})
    import tests.conftest
    from accelerate import PartialState
    from tests.test_reward import *

    state = PartialState(cpu=True, timeout=datetime.timedelta(seconds=30))
    rank, mine = state.process_index, slice(4 * state.process_index, 4 * state.process_index + 4)

    def metric(student):
        if rank == 0:
            raise RuntimeError("no benchmark")
        return METRIC(student)

    def score(metric=METRIC, config=CONFIG, cross_group_batching=True, **kwargs):
        reward = DPGReward(make_student(), metric, config, cross_group_batching, 2, processing_class=TOKENIZER)
        batch = dict(prompts=PROMPTS[mine], completions=TEXTS[mine], completion_ids=IDS[mine])
        reward(**batch | (kwargs if rank == 1 else {{}}))

    calls = dict(
        metric=lambda: score(metric=metric),
        completion=lambda: score(completions=[None] * 4),
        length=lambda: score(prompts=PROMPTS),
        split=lambda: score(prompts=["w1"], completions=["w1"], cross_group_batching=False),
        ids=lambda: score(config=PER_TOKEN, completion_ids=None),
        alignment=lambda: score(config=PER_TOKEN, completion_ids=[[None]] * 4),
    )
    results = {{}}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            results[name] = repr(error)
    pathlib.Path({out!r}, f"{{rank}}.json").write_text(json.dumps(results))
"""


def test_an_error_on_one_rank_is_raised_on_all_and_none_waits(tmp_path):
    first, second = on_two_ranks(FAILING_RANKS, tmp_path)
    failed = dict(metric=0, completion=1, length=1, ids=1)
    for name, rank in failed.items():
        error, elsewhere = (first, second)[:: 1 - 2 * rank]
        assert elsewhere[name] == repr(RuntimeError(f"The DPG reward failed on rank {rank}: {error[name]}"))
    assert first["alignment"] == second["alignment"] and "NoneType" in first["alignment"]  # both align the tokens
    assert first["split"] == second["split"] and "5 completions cannot be split" in first["split"]
    assert "no benchmark" in first["metric"] and "`completion_ids`" in second["ids"]


def test_the_norm_is_a_metric_of_its_own():
    logged = {}
    DPGReward(make_student(), WeightNormMetric(), CONFIG)(PROMPTS, TEXTS, log_metric=logged.__setitem__)
    assert logged["dpg/weight_norm"] == pytest.approx(-logged["dpg/metric_after"])
