"""Replay: rows that are mixed into a student's data and never scored."""

import json

import pytest
import torch
from datasets import Dataset

from tests.small_runs import CONFIG, METRIC, PROMPTS, TEXTS, TOKENIZER, dpg_config, make_student, make_trainer
from tests.tiny import make_model
from tests.unroll import log_likelihood, unroll
from trl_dpg import DPGReward, InnerLoopConfig, Student, attribute, metagradient
from trl_dpg.attribution import plan_chunks
from trl_dpg.evaluation import evaluate_dataset
from trl_dpg.metagradients.config import SettingsError
from trl_dpg.replay import Replay


ROWS = ["w11 w12", "w13 w14 w15", "w16", "w17 w18", "w19 w20 w21"]


def hand_mixed(texts, rows, size, number):
    """Batches of `size` texts and then `number` rows, and the places of the texts."""
    mixed, own = [], []
    rows = iter(rows)
    for start in range(0, len(texts), size):
        own += range(len(mixed), len(mixed) + len(texts[start : start + size]))
        mixed += [*texts[start : start + size], *(next(rows) for _ in range(number))]
    return mixed, own


@pytest.mark.parametrize("normalization", ["example_tokens", "max_length", "batch_tokens"])
def test_scores_are_the_metagradients_with_the_rows_in_the_inner_loop(normalization):
    student = Student(make_model(scale=1.0, dtype=torch.float64), processing_class=TOKENIZER)
    settings = dict(learning_rate=1e-3, eps_root=1e-6, loss_normalization=normalization, max_length=12)
    replay, columns = Replay(ROWS, ratio=0.5), {}
    reward = DPGReward(student, METRIC, InnerLoopConfig(batch_size=4, **settings), replay=replay)
    reward(PROMPTS, TEXTS, log_extra=columns.__setitem__)
    mixed, own = hand_mixed(TEXTS, replay.draw(4, 1), 4, 2)
    alone = metagradient(student, mixed, METRIC, InnerLoopConfig(batch_size=6, **settings)).scores[own]
    assert columns["dpg_score"] == pytest.approx(alone.tolist())
    ids = [{"input_ids": TOKENIZER(text + "<eos>")["input_ids"]} for text in mixed]
    phi = log_likelihood([{"input_ids": TOKENIZER("w1 w2 w3 w4")["input_ids"]}])
    settings = dict(lr=1e-3, eps_root=1e-6, batch_size=6, normalization=normalization, max_length=12)
    unrolled, *_ = unroll(make_model(scale=1.0), ids, phi, torch.ones(len(ids), dtype=torch.float64), **settings)
    assert columns["dpg_score"] == pytest.approx(unrolled[own].tolist(), rel=1e-4)


def test_each_batch_has_the_ratio_and_a_smaller_last_one_fewer_rows():
    mixture = Replay(ROWS, ratio=0.5).mix(list(range(10)), 4, index=1)
    kinds = "".join("s" if place in mixture.own else "r" for place in range(len(mixture.examples)))
    assert kinds == "ssssrrssssrrssr"
    assert [mixture.examples[place] for place in mixture.own] == list(range(10))
    assert Replay(ROWS, ratio=0.5).widened(CONFIG).batch_size == 6
    assert Replay(ROWS, ratio=3).number(8, 4) == 24


def test_draws_depend_on_seed_and_index_and_repeat_rows_only_if_there_are_too_few():
    replay = Replay(Dataset.from_dict({"text": [f"w{k}" for k in range(50)], "other": [0] * 50}), seed=3)
    first = replay.draw(20, 1)
    assert first == replay.draw(20, 1) and set(first[0]) == {"text"}
    assert len({row["text"] for row in first}) == 20
    assert first != replay.draw(20, 2) and first != Replay(replay.rows, seed=4).draw(20, 1)
    assert sorted(Replay(ROWS).draw(12, 1)).count("w16") in (2, 3)


def test_each_call_has_other_rows_and_evaluations_always_the_same(monkeypatch):
    indices = []
    monkeypatch.setattr(Replay, "draw", lambda self, number, index: indices.append(index) or [ROWS[0]] * number)
    reward = DPGReward(make_student(), METRIC, CONFIG, replay=Replay(ROWS))
    for training in (True, False, False, True):
        reward.choice.training = training
        reward(PROMPTS, TEXTS)
    assert indices == [1, 0, 0, 2]


def test_empty_completions_score_zero_and_a_batch_of_them_is_refused():
    reward, logged = DPGReward(make_student(), METRIC, CONFIG, replay=Replay(ROWS)), {}
    rewards = reward(PROMPTS, [*TEXTS[:-1], ""], log_metric=logged.__setitem__)
    assert rewards[-1] == 0 and all(rewards[:-1]) and logged["dpg/num_empty"] == 1
    with pytest.raises(ValueError, match=r"None of the 8 samples has a token to learn from.*Only replayed rows"):
        reward(PROMPTS, [""] * 8)


def test_tokens_have_scores_of_the_samples_alone():
    config = InnerLoopConfig(learning_rate=1e-3, eps_root=1e-6, batch_size=4, per_token=True)
    reward = DPGReward(make_student(), METRIC, config, processing_class=TOKENIZER, replay=Replay(ROWS))
    reward(PROMPTS, TEXTS, completion_ids=[[*TOKENIZER(text)["input_ids"], 1] for text in TEXTS])
    sums = [scores.sum().item() for scores in reward.last_token_scores]
    assert sums == pytest.approx(reward.last_batch.scores.tolist(), rel=1e-4, abs=1e-9)


def test_a_verification_changes_the_weights_of_the_samples_alone():
    reward, logged = DPGReward(make_student(), METRIC, CONFIG, replay=Replay(ROWS), verify_steps=1), {}
    reward(PROMPTS, TEXTS, log_metric=logged.__setitem__)
    assert logged["dpg/verify/pearson"] > 0.99


def test_chunks_of_a_dataset_have_rows_of_their_own():
    replay, texts = Replay(ROWS, ratio=0.5), TEXTS + ["w1 w1", "w2 w7"]
    found = attribute(make_student(), texts, METRIC, CONFIG, size=8, replay=replay)
    wide = replay.widened(CONFIG)
    for index, (rows, scored) in enumerate(plan_chunks(10, 8, CONFIG.seed)):
        mixed, own = hand_mixed([texts[row] for row in rows], replay.draw(4, index), 4, 2)
        scores = metagradient(make_student(), mixed, METRIC, wide).scores[own]
        assert found.scores[rows[scored]] == pytest.approx(scores.numpy()[scored])


def test_a_fresh_students_data_has_the_rows_too():
    replay = Replay(ROWS, ratio=0.5)
    load = lambda: Student(make_model(scale=1.0), processing_class=TOKENIZER)  # noqa: E731
    found = evaluate_dataset(load, TEXTS, METRIC, CONFIG, seed=7, replay=replay)
    by_hand = evaluate_dataset(load, [*TEXTS, *replay.draw(4, 7)], METRIC, replay.widened(CONFIG), seed=7)
    assert found.metric == by_hand.metric


def test_texts_become_completions_beside_prompts_and_other_formats_are_refused():
    pairs = Dataset.from_dict({"prompt": ["w1"] * 4, "completion": ["w2"] * 4})
    mixed = Replay(ROWS, ratio=0.5).add_to(pairs, 4, index=1)
    assert mixed["prompt"] == ["w1"] * 4 + [""] * 2 and set(mixed["completion"][4:]) < set(ROWS)
    messages = Replay([{"messages": [{"role": "user", "content": "w1"}]}])
    with pytest.raises(SettingsError, match=r"`replay_dataset` has the columns \['messages'\] and the samples have"):
        messages.add_to(pairs, 4, index=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Replay(ROWS, ratio=0), "`replay_ratio` must be a number above 0, got 0"),
        (lambda: Replay(ROWS, ratio=float("nan")), "got nan"),
        (lambda: Replay([]), "is empty"),
        (lambda: Replay("w1 w2"), "must be a list or a Dataset, got str"),
        (lambda: Replay(Dataset.from_dict({"answer": ["w1"]})), r"has the columns \['answer'\]"),
        (lambda: Replay(ROWS, ratio=0.1).widened(CONFIG), "gives no row to a batch of 4 samples.*more than 0.125"),
        (lambda: DPGReward(server="http://127.0.0.1:1", replay=Replay(ROWS)), "`replay` would have no effect"),
    ],
)
def test_what_cannot_be_replayed_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.faults
def test_a_training_goes_on_with_the_rows_that_would_have_come(tmp_path, monkeypatch):
    indices = []
    draw = Replay.draw
    monkeypatch.setattr(Replay, "draw", lambda self, number, index: indices.append(index) or draw(self, number, index))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    further = dict(replay_dataset=str(tmp_path / "rows.jsonl"), max_steps=3, save_strategy="steps", save_steps=2)
    whole = make_trainer(dpg_config(tmp_path / "run", **further))
    whole.train()
    again = make_trainer(dpg_config(tmp_path / "run", **further))
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert indices == [1, 2, 3, 3]
    last = [run.state.log_history[-2]["dpg/metric_after"] for run in (whole, again)]
    assert last[0] == last[1]
    changed = make_trainer(dpg_config(tmp_path / "run", **further), replay_dataset=[*ROWS, "w1"])
    with pytest.raises(ValueError, match="replayed rows"):
        changed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
