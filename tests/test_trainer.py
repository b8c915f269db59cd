"""The trainer: configuration, logging, evaluation, model card."""

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl import GRPOConfig, TrlParser

from tests.small_runs import TOKENIZER, TRAIN_METRIC, TRAIN_PROMPTS, dpg_config, make_trainer
from tests.tiny import make_model, make_tokenizer
from trl_dpg import DPGConfig, InnerLoopConfig, Student
from trl_dpg.metrics import LanguageModelingMetric


def train_logs(trainer):
    trainer.train()
    return [log for log in trainer.state.log_history if "dpg/metric_after" in log]


def test_everything_a_step_should_log_is_logged(tmp_path):
    (log,) = train_logs(make_trainer(dpg_config(tmp_path)))
    names = (
        "score/mean score/std score/min score/max metric_before metric_after metric_change predicted_change seconds"
    )
    names += " student_loss/first student_loss/last num_empty num_truncated perplexity"
    assert {f"dpg/{name}" for name in names.split()} <= set(log)
    assert log["rewards/dpg/std"] == pytest.approx(1.0, rel=0.05)  # unit scale: TRL's 1e-4 does not swallow it


def test_the_generator_trains_and_the_student_does_not(tmp_path):
    trainer = make_trainer(dpg_config(tmp_path, max_steps=2, learning_rate=1e-3))
    generator = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    student = {name: p.detach().clone() for name, p in trainer.dpg_reward.student.model.named_parameters()}
    trainer.train()
    assert any(not torch.equal(p, generator[name]) for name, p in trainer.model.named_parameters())
    assert all(torch.equal(p, student[name]) for name, p in trainer.dpg_reward.student.model.named_parameters())


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        (dict(max_steps=50), True),
        (dict(max_steps=50, learning_rate=1e-5), False),
        (dict(max_steps=201), False),
        (dict(max_steps=-1), False),
    ],
)
def test_a_short_run_with_the_default_learning_rate_is_warned_of(settings, warned, tmp_path, monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr("trl_dpg.trainer.logger.warning", warnings.append)
    make_trainer(dpg_config(tmp_path, **settings))
    assert [("50 steps" in text, "5e-05" in text, "1e-3" in text) for text in warnings] == [(True,) * 3] * warned


def test_further_rewards_and_weights_go_beside_the_dpg_reward(tmp_path):
    def length(completions, **kwargs):
        return [float(len(completion)) for completion in completions]

    trainer = make_trainer(dpg_config(tmp_path, reward_weights=[1.0, 0.5]), reward_funcs=length)
    assert trainer.reward_func_names == ["dpg", "length"]
    (log,) = train_logs(trainer)
    expected = log["rewards/dpg/mean"] + 0.5 * log["rewards/length/mean"]
    assert log["reward"] == pytest.approx(expected, rel=1e-4)


def test_one_weight_less_is_for_the_further_rewards_and_another_number_raises(tmp_path):
    def length(completions, **kwargs):
        return [float(len(completion)) for completion in completions]

    args = dpg_config(tmp_path, reward_weights=[0.5])
    trainer = make_trainer(args, reward_funcs=length)
    assert trainer.reward_weights.tolist() == [1.0, 0.5] and args.reward_weights == [0.5]
    with pytest.raises(ValueError, match=r"3 weights for 2 rewards: DPG's comes first"):
        make_trainer(dpg_config(tmp_path, reward_weights=[1.0, 1.0, 1.0]), reward_funcs=length)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("language_modeling", r"the text 'language_modeling'.*LanguageModelingMetric\(texts\)"),
        ([TRAIN_METRIC, TRAIN_METRIC], r"is a list.*CombinedMetric\(metrics, weights\)"),
        (LanguageModelingMetric, "the class LanguageModelingMetric. Pass an instance"),
    ],
)
def test_what_is_no_metric_is_told_what_to_pass(metric, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(dpg_config(tmp_path), target_metric=metric)


def test_evaluation_trains_a_student_on_the_eval_completions(tmp_path):
    args = dpg_config(
        tmp_path,
        per_device_eval_batch_size=8,
        num_generations_eval=2,
        eval_strategy="steps",
        eval_steps=1,
        cross_group_batching=False,
    )
    trainer = make_trainer(args, eval_dataset=TRAIN_PROMPTS.select(range(8)))
    sizes = []
    score = trainer.dpg_reward.score
    trainer.dpg_reward.score = lambda datasets: sizes.append([len(rows) for rows in datasets]) or score(datasets)
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "eval_dpg/metric_after" in log]
    (train_log,) = [log for log in trainer.state.log_history if "dpg/metric_before" in log]
    assert log["eval_dpg/metric_before"] == pytest.approx(train_log["dpg/metric_before"])
    assert sizes[0] == [4, 4, 4, 4] and sizes[1:] == [[4, 4], [4, 4]]


def test_the_student_can_come_from_the_flat_arguments(tmp_path):
    make_model(seed=2, vocab_size=64, hidden_size=64).save_pretrained(tmp_path / "student")
    TOKENIZER.save_pretrained(tmp_path / "student")
    args = dpg_config(
        tmp_path,
        student_model_name_or_path=str(tmp_path / "student"),
        student_load_in_4bit=True,
        student_use_peft=True,
        student_lora_r=2,
        student_lora_target_modules=["q_proj"],
    )
    trainer = make_trainer(args, student=None, student_processing_class=None)
    student = trainer.dpg_reward.student
    assert sum(p.numel() for p in student.model.parameters() if p.requires_grad) == 2 * 2 * (64 + 64)
    assert "4-bit base" in student.describe()
    assert len(train_logs(trainer)) == 1


def test_a_student_can_have_its_own_tokenizer(tmp_path):
    tokenizer = make_tokenizer([f"w{k}" for k in reversed(range(50))])
    trainer = make_trainer(
        dpg_config(tmp_path),
        student_processing_class=tokenizer,
        student_peft_config=LoraConfig(target_modules="all-linear"),
    )
    assert trainer.dpg_reward.student.processing_class is tokenizer
    assert len(train_logs(trainer)) == 1


def test_the_generators_tokens_are_scored_in_their_own_positions(tmp_path):
    sampled = []

    def keep(completion_ids, **kwargs):
        sampled.extend(completion_ids)
        return [0.0] * len(completion_ids)

    tokenizer = make_tokenizer([f"w{k}" for k in reversed(range(50))])
    args = dpg_config(tmp_path, per_token=True, log_completions=True)
    trainer = make_trainer(args, student_processing_class=tokenizer, reward_funcs=keep)
    trainer.train()
    scores = trainer.dpg_reward.last_token_scores
    assert [len(row) for row in scores] == [len(ids) for ids in sampled]
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    for row, logged, total in zip(scores, table["dpg_token_scores"], table["dpg_score"], strict=True):
        assert logged.tolist() == row.tolist()
        assert row.sum().item() == pytest.approx(total, rel=1e-4, abs=1e-9)


def test_a_student_object_is_used_as_it_is(tmp_path):
    student = Student(make_model(seed=2), processing_class=TOKENIZER)
    trainer = make_trainer(dpg_config(tmp_path), student=student, student_processing_class=None)
    assert trainer.dpg_reward.student is student


def test_the_model_card_names_paper_metric_student_and_inner_loop(tmp_path):
    trainer = make_trainer(dpg_config(tmp_path))
    trainer.create_model_card(model_name="generator")
    card = (tmp_path / "README.md").read_text()
    for part in ("2604.08423", "Synthetic Data for any Differentiable Target", "LanguageModelingMetric", "dpg"):
        assert part in card
    assert "`LlamaForCausalLM`" in card and '"learning_rate": 0.001' in card


def test_the_model_card_links_nothing_that_is_local(tmp_path):
    trainer = make_trainer(dpg_config(tmp_path / "spanish"))
    (tmp_path / "texts.jsonl").write_text("{}")
    for dataset_name in (str(tmp_path / "texts.jsonl"), f"{tmp_path}/*.jsonl", "someone/texts"):
        trainer.create_model_card(dataset_name=dataset_name)
        card = (tmp_path / "spanish" / "README.md").read_text()
        assert "# Model Card for spanish\n" in card and "None" not in card.split("## Dataset Policy")[0]
        assert ("huggingface.co/datasets" in card) == (dataset_name == "someone/texts")
        assert str(tmp_path) not in card


def test_a_checkpoints_card_shows_the_first_and_the_last_step_that_logged_a_figure(tmp_path):
    saving = dict(max_steps=4, verify_steps=2, save_strategy="steps", save_steps=2)
    logs = train_logs(make_trainer(dpg_config(tmp_path, **saving)))
    assert ["dpg/verify/pearson" in log for log in logs] == [True, False, True, False]
    card = (tmp_path / "README.md").read_text()
    for name, last in (("perplexity", 3), ("verify/pearson", 2)):
        assert f"| {name} | {logs[0][f'dpg/{name}']:.5g} | {logs[last][f'dpg/{name}']:.5g} |" in card


def test_yaml_and_flags_reach_the_inner_loop(tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"output_dir: {tmp_path}\nstudent_learning_rate: 5.0e-6\nstudent_eps_root: 1.0e-9\nstudent_optimizer: sgd\n"
        "per_token: true\n"
        "student_batch_size: 4\nuse_cpu: true\nbf16: false\nstudent_model_init_kwargs: {revision: main}\n"
    )
    parser = TrlParser(DPGConfig)
    (args,) = parser.parse_args_and_config(["--config", str(tmp_path / "run.yaml"), "--student_num_epochs", "2"])
    assert args.inner_loop_config() == InnerLoopConfig(
        optimizer="sgd", learning_rate=5e-6, batch_size=4, num_epochs=2, seed=args.seed, per_token=True
    )
    assert args.student_model_init_kwargs == {"revision": "main"}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(student_optimizer="lion"), "Unknown optimizer 'lion'"),
        (dict(student_batch_size=6), r"student_batch_size \(6\) must divide the 16 samples"),
        (dict(student_batch_size=16, cross_group_batching=False), "must divide the 4 samples"),
        (dict(student_load_in_4bit=True), "needs student_use_peft"),
        (dict(attribution="dataset"), "cross_group_batching"),
    ],
)
def test_bad_configurations_raise(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(dpg_config(tmp_path, **kwargs))


def test_missing_student_or_metric_raises(tmp_path):
    with pytest.raises(ValueError, match="A student is required"):
        make_trainer(dpg_config(tmp_path), student=None)
    with pytest.raises(ValueError, match="`target_metric` is required"):
        make_trainer(dpg_config(tmp_path), target_metric=None)


@pytest.mark.parametrize("wrap", ["neither", "student", "generator"])
def test_one_model_for_both_generator_and_student_raises(tmp_path, wrap):
    model = make_model()
    generator = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if wrap == "generator" else model
    peft_config = LoraConfig(target_modules=["q_proj"]) if wrap == "student" else None
    with pytest.raises(ValueError, match="share parameters"):
        make_trainer(dpg_config(tmp_path), model=generator, student=model, student_peft_config=peft_config)


def test_arguments_that_a_student_object_would_ignore_raise(tmp_path):
    student = Student(make_model(seed=2), processing_class=TOKENIZER)
    with pytest.raises(ValueError, match=r"`Student` already.*args\.student_use_peft"):
        make_trainer(dpg_config(tmp_path, student_use_peft=True), student=student, student_processing_class=None)


def test_plain_grpo_arguments_raise(tmp_path):
    with pytest.raises(ValueError, match=r"must be a DPGConfig.*got GRPOConfig"):
        make_trainer(GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))
