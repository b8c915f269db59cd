"""Several students: each scores by its own tokens, and their scores on unit scale become one."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerFast

from tests.small_runs import CONFIG, METRIC, PROMPTS, TEXTS, TOKENIZER, dpg_config, make_student, make_trainer
from tests.test_reward import character_student, on_two_ranks
from tests.tiny import make_model
from trl_dpg import DPGReward, InnerLoopConfig, Student, cli, metagradient, toy
from trl_dpg.metagradients.config import SettingsError
from trl_dpg.metrics import CombinedMetric, LanguageModelingMetric
from trl_dpg.replay import Replay
from trl_dpg.scripts.arguments import ToyWorldArguments
from trl_dpg.scripts.toy_world import toy_world
from trl_dpg.several_students import aggregate, factors, student_names
from trl_dpg.student_arguments import StudentArguments


def make_students():
    """Two families with other tokenizers and sizes: one reads words, the other characters."""
    other = character_student()
    gpt2 = Student(make_model("gpt2", seed=2, scale=1.0), processing_class=other.processing_class)
    return [make_student(), gpt2]


def scores_of_each(texts, config=CONFIG):
    return np.array([metagradient(own, texts, METRIC, config).scores.double().numpy() for own in make_students()])


@pytest.mark.parametrize("aggregation", ["mean", "worst"])
def test_rewards_are_the_mean_or_the_lowest_of_the_students_scores_on_unit_scale(aggregation):
    logged, columns = {}, {}
    reward = DPGReward(make_students(), METRIC, CONFIG, student_aggregation=aggregation)
    rewards = reward(PROMPTS, TEXTS, log_metric=logged.__setitem__, log_extra=columns.__setitem__)
    each = scores_of_each(TEXTS)
    unit = each / each.std(axis=1, keepdims=True)
    expected = unit.mean(axis=0) if aggregation == "mean" else unit.min(axis=0)
    assert columns["dpg_score"] == pytest.approx(expected.tolist(), rel=1e-5)
    assert rewards == pytest.approx((expected / expected.std()).tolist(), rel=1e-5)
    outputs = [metagradient(own, TEXTS, METRIC, CONFIG) for own in make_students()]
    names = student_names(reward.students)
    assert names == ["LlamaForCausalLM", "GPT2LMHeadModel"]
    for name, output in zip(names, outputs, strict=True):
        assert logged[f"dpg/metric_before/{name}"] == pytest.approx(output.metric_before)
        assert logged[f"dpg/metric_change/{name}"] == pytest.approx(output.metric_after - output.metric_before)
        assert logged[f"dpg/predicted_change/{name}"] == pytest.approx(output.scores.sum().item(), rel=1e-4)
        assert logged[f"dpg/score/std/{name}"] == pytest.approx(output.scores.std(correction=0).item(), rel=1e-4)
        assert logged[f"dpg/perplexity/{name}"] == pytest.approx(output.proxies["perplexity"])
    assert outputs[0].metric_before != pytest.approx(outputs[1].metric_before)  # by tokens of its own
    assert logged["dpg/metric_after"] == pytest.approx(sum(own.metric_after for own in outputs) / 2)
    predicted = [logged[f"dpg/predicted_change/{name}"] for name in names]
    assert logged["dpg/predicted_change"] == pytest.approx(sum(predicted) / 2)


def test_the_scale_is_that_of_the_whole_batch_also_with_datasets_of_their_own():
    config = InnerLoopConfig(learning_rate=1e-3, eps_root=1e-6, batch_size=2)
    reward, columns = DPGReward(make_students(), METRIC, config, cross_group_batching=False, num_generations=2), {}
    reward(PROMPTS, TEXTS, log_extra=columns.__setitem__)
    each = np.zeros((2, 8))
    for k in (0, 1):
        each[:, k::2] = scores_of_each(TEXTS[k::2], config)
    unit = each / each.std(axis=1, keepdims=True)
    assert columns["dpg_score"] == pytest.approx(unit.mean(axis=0).tolist(), rel=1e-4)


def test_a_student_whose_scores_are_all_equal_has_no_say():
    scores = torch.tensor([[1.0, 2.0, 4.0], [3.0, 3.0, 3.0]], dtype=torch.float64)
    unit = scores * factors(scores)[:, None]
    assert unit[1].tolist() == [0, 0, 0]
    assert aggregate(unit, "mean").tolist() == pytest.approx((unit[0] / 2).tolist())


@pytest.mark.parametrize("aggregation", ["mean", "worst"])
def test_the_scores_of_the_generators_tokens_add_up_to_the_combined_score(aggregation):
    config = InnerLoopConfig(learning_rate=1e-3, eps_root=1e-6, batch_size=4, per_token=True)
    reward = DPGReward(make_students(), METRIC, config, processing_class=TOKENIZER, student_aggregation=aggregation)
    reward(PROMPTS, TEXTS, completion_ids=[[*TOKENIZER(text)["input_ids"], 1] for text in TEXTS])
    sums = [scores.sum().item() for scores in reward.last_token_scores]
    assert sums == pytest.approx(reward.last_batch.scores.tolist(), rel=1e-3, abs=1e-6)


@pytest.mark.faults
def test_every_student_is_verified_and_the_worst_agreement_counts():
    reward, logged = DPGReward(make_students(), METRIC, CONFIG, verify_steps=1), {}
    reward(PROMPTS, TEXTS, log_metric=logged.__setitem__)
    each = [logged[f"dpg/verify/pearson/{name}"] for name in student_names(reward.students)]
    assert logged["dpg/verify/pearson"] == min(each) > 0.99 and each[0] != each[1]


def test_only_the_student_that_works_is_moved_in(monkeypatch):
    reward, moves = DPGReward(make_students(), METRIC, CONFIG), []
    for move in ("move_in", "move_out"):
        monkeypatch.setattr(
            type(reward.placement), move, lambda self, own, move=move: moves.append((reward.students.index(own), move))
        )
    reward(PROMPTS, TEXTS)
    assert moves == [(0, "move_in"), (0, "move_out"), (1, "move_in"), (1, "move_out")]


RANKS = """
    import json, pathlib, sys
    sys.path.insert(0, {root!r})
    import tests.conftest
    from accelerate import PartialState
    from tests.test_several_students import *

    state = PartialState(cpu=True)
    mine = slice(4 * state.process_index, 4 * state.process_index + 4)
    results, worked = {{}}, []
    for name, students in dict(two=make_students(), one=[make_student()]).items():
        reward, columns = DPGReward(students, METRIC, CONFIG, replay=Replay(["w5 w6", "w8"])), {{}}
        reward(PROMPTS[mine], TEXTS[mine], log_extra=columns.__setitem__)
        results[name] = columns["dpg_score"]
        results[name + " worked"] = [s in reward.metric_state._starts for s in reward.students]
    pathlib.Path({out!r}, f"{{state.process_index}}.json").write_text(json.dumps(results))
"""


@pytest.mark.faults
def test_two_ranks_have_a_student_each_and_find_what_one_finds(tmp_path):
    both = on_two_ranks(RANKS, tmp_path)
    for name, students in dict(two=make_students(), one=[make_student()]).items():
        columns = {}
        reward = DPGReward(students, METRIC, CONFIG, replay=Replay(["w5 w6", "w8"]))
        reward(PROMPTS, TEXTS, log_extra=columns.__setitem__)
        assert both[0][name] + both[1][name] == pytest.approx(columns["dpg_score"], rel=1e-4, abs=1e-7)
    assert [rank["two worked"] for rank in both] == [[True, False], [False, True]]
    assert [rank["one worked"] for rank in both] == [[True], [True]]


def test_each_student_has_its_own_draw_of_the_metrics_texts():
    """The two tokenizers count tokens in other ways, so that a long text is drawn more often for one of them."""
    texts = ["w1 w2 w3 w4 w5 w6 w7 w8 w9 w10", *(f"w{k} w{k + 1}" for k in range(6))]
    found, names = {}, student_names(make_students())
    reward = DPGReward(make_students(), LanguageModelingMetric(texts), CONFIG, metric_samples=4)
    reward(PROMPTS, TEXTS, log_metric=found.__setitem__)
    for student, name in zip(make_students(), names, strict=True):
        alone = {}
        own = DPGReward(student, LanguageModelingMetric(texts), CONFIG, metric_samples=4)
        own(PROMPTS, TEXTS, log_metric=alone.__setitem__)
        assert found[f"dpg/metric_noise/{name}"] == pytest.approx(alone["dpg/metric_noise"])


def refuse(message, error=ValueError, student=None, config=CONFIG, **kwargs):
    with pytest.raises(error, match=message):
        DPGReward(student or make_students(), METRIC, config, **kwargs)


def test_what_several_students_cannot_share_is_named():
    student = make_student()
    refuse("2 students share a model", student=[student, student])
    refuse(
        "`learning_rate` 'auto' would be chosen for one", SettingsError, config=InnerLoopConfig(learning_rate="auto")
    )
    naive = InnerLoopConfig(attribution="dataset")
    refuse("by the metric of one student", config=naive, cross_group_batching=False, num_generations=2)
    refuse("Unknown student_aggregation 'best'", student_aggregation="best")
    refuse(r"`replay_dataset` has token ids \(`input_ids`\)", replay=Replay([{"input_ids": [5, 6, 7]}], ratio=1))
    with pytest.raises(ValueError, match="A student is required"):
        DPGReward([], METRIC, CONFIG)


IDS = LanguageModelingMetric([{"input_ids": [5, 6, 7]}])


@pytest.mark.parametrize("metric", [IDS, LanguageModelingMetric(Dataset.from_list(IDS.dataset))])
def test_a_metric_of_token_ids_is_refused_if_the_students_read_them_by_other_vocabularies(metric):
    named = r"The metric 'ids' has token ids .* 2 students \(LlamaForCausalLM, GPT2LMHeadModel\) .* Give texts"
    metric = CombinedMetric([METRIC, metric], names=["texts", "ids"])
    with pytest.raises(ValueError, match=named):
        DPGReward(make_students(), metric, CONFIG)
    of_one_family = [make_student(), Student(make_model(seed=3), processing_class=make_student().processing_class)]
    assert len(DPGReward(of_one_family, metric, CONFIG).students) == 2
    assert len(DPGReward(make_student(), metric, CONFIG).students) == 1


def test_a_part_of_the_metric_that_is_called_like_a_student_is_refused():
    with pytest.raises(ValueError, match="'GPT2LMHeadModel' is the name of a student and of a part of the metric"):
        DPGReward(make_students(), CombinedMetric([METRIC], names=["GPT2LMHeadModel"]), CONFIG)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/world/gpt2", "org/gpt2", "llama"], ["gpt2", "gpt2_1", "llama"]),
        (["a/model", "b/model/"], ["model", "model_1"]),
        (["model_2", "a/model", "b/model"], ["model_2", "model", "model_2_2"]),
        (["a/model", "b/model", "model_1"], ["model", "model_1", "model_1_2"]),
    ],
)
def test_names_are_those_of_folders_and_different(paths, names):
    assert student_names(paths) == names
    each = StudentArguments(student_models=paths).each_student()
    assert [own.student_model_name_or_path for own in each.values()] == paths and list(each) == names


# -- trainer and commands ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two students as files."""
    folder = tmp_path_factory.mktemp("students")
    for name, student in zip(("llama", "gpt2"), make_students(), strict=True):
        student.model.save_pretrained(folder / name)
        student.processing_class.save_pretrained(folder / name)
        assert isinstance(student.processing_class, PreTrainedTokenizerFast)
    return [str(folder / name) for name in ("llama", "gpt2")]


def test_a_trainer_takes_students_from_its_configuration(folders, tmp_path):
    trainer = make_trainer(
        dpg_config(tmp_path, student_models=folders, student_aggregation="worst"),
        student=None,
        student_processing_class=None,
    )
    assert trainer.dpg_reward.student_aggregation == "worst"
    trainer.train()
    logs = next(log for log in trainer.state.log_history if "dpg/metric_after" in log)
    assert logs["dpg/metric_after"] == pytest.approx(
        (logs["dpg/metric_after/llama"] + logs["dpg/metric_after/gpt2"]) / 2, rel=1e-5
    )
    both = trainer.dpg_reward.described()["student"]
    assert "llama" in both and "gpt2" in both


def test_a_trainer_refuses_two_ways_to_name_students(folders, tmp_path):
    args = dpg_config(tmp_path, student_models=folders, student_model_name_or_path=folders[0])
    with pytest.raises(ValueError, match="both name students"):
        make_trainer(args, student=None, student_processing_class=None)
    with pytest.raises(ValueError, match="tokenizer of one student, but there are 2"):
        make_trainer(dpg_config(tmp_path, student_models=folders), student=None)


def command(name, folders, *more):
    metric = ["--metric", "language_modeling", "--metric_kwargs", json.dumps({"texts": ["w1 w2 w3 w4"]})]
    inner_loop = ["--student_batch_size", "4", "--student_learning_rate", "1e-3", "--student_eps_root", "1e-6"]
    return [name, "--student_models", *folders, *metric, *inner_loop, *more]


def test_attribute_has_a_column_for_each_student_and_their_combination(folders, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    argv = command("attribute", folders, "--dataset_name", str(data), "--output_dir", str(tmp_path / "out"))
    cli.main(argv)
    scored = load_dataset(str(tmp_path / "out"), data_files="scored.parquet", split="train")
    each = scores_of_each(TEXTS)
    assert scored["dpg_score_llama"] == pytest.approx(each[0].tolist(), rel=1e-4, abs=1e-8)
    assert scored["dpg_score_gpt2"] == pytest.approx(each[1].tolist(), rel=1e-4, abs=1e-8)
    unit = each / each.std(axis=1, keepdims=True)
    assert scored["dpg_score"] == pytest.approx(unit.mean(axis=0).tolist(), rel=1e-3)
    assert set(json.loads((tmp_path / "out" / "summary.json").read_text())["students"]) == {"llama", "gpt2"}
    cli.main([*argv, "--student_aggregation", "worst"])  # from the journals
    again = load_dataset(str(tmp_path / "out"), data_files="scored.parquet", split="train")
    assert again["dpg_score"] == pytest.approx(unit.min(axis=0).tolist(), rel=1e-3)
    for flags, message in ((["--per_token", "true"], "--per_token"), (["--student_eps_root", "auto"], "tune")):
        with pytest.raises(SystemExit):
            cli.main([*argv, "--overwrite", *flags])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["attribute", "evaluate"])
def test_commands_refuse_token_ids_before_a_student_is_loaded(name, folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(StudentArguments, "load_student", None)
    texts, ids = tmp_path / "texts.jsonl", tmp_path / "ids.jsonl"
    texts.write_text(json.dumps({"text": "w1 w2"}) + "\n")
    ids.write_text(json.dumps({"input_ids": [5, 6, 7]}) + "\n")
    flag = {"attribute": "--dataset_name", "evaluate": "--datasets"}[name]
    metric = ["--metric_kwargs", json.dumps({"dataset": str(ids)})]
    for more, message in (
        ([flag, str(texts), *metric], "The metric 'language_modeling' has token ids"),
        ([flag, str(texts), "--replay_dataset", str(ids)], "--replay_dataset has token ids"),
        ([flag, str(ids)], "--dataset_name has token ids" if name == "attribute" else f"`{ids}` has token ids"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(command(name, folders, *more, "--output_dir", str(tmp_path / "out")))
        error = " ".join(capsys.readouterr().err.split())
        assert stopped.value.code == 2 and message in error and "2 students (llama, gpt2)" in error


@pytest.mark.faults
def test_evaluate_has_a_table_for_each_student(folders, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    out = ["--datasets", str(data), "--seeds", "0", "--output_dir", str(tmp_path), "--replay_dataset", str(data)]
    cli.main(command("evaluate", folders, *out, "--replay_ratio", "0.5"))
    figures = json.loads((tmp_path / "evaluation.json").read_text())["students"]
    assert set(figures) == {"llama", "gpt2"}
    assert figures["llama"]["before"] != figures["gpt2"]["before"]
    assert "Student llama" in capsys.readouterr().out


def test_to_each_family_of_the_toy_world_one_dialect_is_the_language_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "pretrain", lambda *args, **kwargs: None)
    arguments = ToyWorldArguments(toy_world="families")
    student_args = StudentArguments(student_models=["llama", "gpt2", "neox"], replay_dataset="benchmark.jsonl")
    with toy_world(arguments, 0, student_args, output_dir=str(tmp_path / "run")):
        ids = {}
        for name, own in student_args.each_student().items():
            student = own.load_student()
            ids[name] = [example.input_ids for example in student.tokenize(["lan len", "LAN LEN", "lán lén"], 99)]
        assert len(student_args.replay().rows) == 64 and list(ids) == ["llama", "gpt2", "neox"]
    b, capitals, accents = zip(*ids.values(), strict=True)
    assert [x == y for x, y in zip(b, capitals, strict=True)] == [True, False, False]
    assert [x == y for x, y in zip(b, accents, strict=True)] == [False, True, False]


@pytest.mark.parametrize("name", ["audit", "serve", "tune", "verify"])
def test_commands_of_one_student_say_how_to_name_it(name, folders, capsys):
    with pytest.raises(SystemExit):
        cli.main(command(name, folders, *(["--port", "0"] if name == "serve" else ["--dataset_name", "none.jsonl"])))
    message = capsys.readouterr().err
    assert f"trl-dpg {name} takes one student, but --student_models has 2" in message
    assert f"--student_model_name_or_path {folders[0]}" in message
