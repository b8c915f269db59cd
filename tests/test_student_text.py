"""What a student reads of a thinking generator's completions: in the reward, in training, and in the commands."""

import dataclasses
import json

import pytest
import torch
from datasets import Dataset
from tokenizers import AddedToken

from tests.small_runs import CONFIG, METRIC, TOKENIZER, dpg_config, make_student, make_trainer
from tests.test_thinking import GPT_OSS, tokenizer_with
from tests.tiny import make_model, make_tokenizer
from trl_dpg import DPGConfig, DPGReward, Student, cli, metagradient
from trl_dpg.metrics import LanguageModelingMetric
from trl_dpg.scripts.fresh_students import judge
from trl_dpg.student_text import Piece, StudentText, read_dataset


THOUGHT, ANSWER = "<think>\nw7 w8\n</think>\n\n", "w1 w2"
QUESTION = [{"role": "user", "content": "w3"}]


def read(completion, student_text="answer", unfinished="empty", prompt="w3", ids=None, **kwargs):
    (reading,) = StudentText(student_text, unfinished, **kwargs).read([prompt], [completion], ids)
    return reading


@pytest.mark.parametrize(
    ("student_text", "text"), [("answer", ANSWER), ("reasoning", "w7 w8"), ("all", THOUGHT + ANSWER)]
)
def test_the_choices_of_a_text(student_text, text):
    reading = read(THOUGHT + ANSWER, student_text)
    assert reading.completion == text
    assert reading[2:] == ("w7 w8", True)
    assert "".join(piece.text for piece in reading.pieces) == THOUGHT + ANSWER
    assert "".join(piece.text for piece in reading.pieces if piece.read) == text
    message = {"role": "assistant", "content": THOUGHT + ANSWER}
    assert read([message], student_text).completion == [message | {"content": text}]
    fields = {"role": "assistant", "content": ANSWER, "reasoning_content": "w7 w8"}
    assert read([fields], student_text).completion == [message | {"content": text}]


@pytest.mark.parametrize("student_text", ["answer", "reasoning", "all"])
def test_an_unfinished_thought_is_empty_or_as_it_is(student_text):
    assert read("<think>\nw7 ", student_text)[::3] == ("", False)
    assert read("<think>\nw7 ", student_text, "as_is")[::3] == ("<think>\nw7 ", False)
    assert read("w7 ", student_text, prompt="w3<think>\n")[::3] == ("", False)


def test_a_text_without_reasoning_is_all_answer():
    assert read("w1", "answer") == ("w1", [Piece("w1", True)], None, True)
    assert read("w1", "all").completion == "w1"
    assert read("w1", "reasoning").completion == ""


def test_the_template_tells_whether_the_prompt_opens_a_thought():
    tokenizer = tokenizer_with("qwen3_5_think")
    assert read("w7", prompt=QUESTION, tokenizer=tokenizer)[::3] == ("", False)
    without = {"enable_thinking": False}
    assert read("w1", prompt=QUESTION, tokenizer=tokenizer, chat_template_kwargs=without)[::3] == ("w1", True)
    prefilled = [*QUESTION, {"role": "assistant", "content": "<think>\n"}]
    assert read("w7", prompt=prefilled)[::3] == ("", False)


def test_sentinels_that_are_special_tokens_are_read_from_the_ids():
    tokenizer = tokenizer_with("gptoss")
    names = ["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|return|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    ids = tokenizer("".join(GPT_OSS))["input_ids"]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert text == "analysis2 + 2assistantfinalFour."
    assert read(text, ids=[ids], tokenizer=tokenizer).completion == "Four."
    assert read(text, "reasoning", ids=[ids], tokenizer=tokenizer).completion == "2 + 2"
    assert read(text, "all", ids=[ids], tokenizer=tokenizer).completion == text
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    ids = tokenizer("<think> w7 </think> w1 <eos>")["input_ids"]
    assert read("w7 w1", ids=[ids], tokenizer=tokenizer).completion.strip() == "w1"


def test_unknown_choices_raise():
    with pytest.raises(ValueError, match="Unknown student_text 'thoughts'"):
        StudentText("thoughts")
    with pytest.raises(ValueError, match="Unknown unfinished_thoughts 'drop'"):
        DPGReward(make_student(), METRIC, unfinished_thoughts="drop")


@pytest.mark.parametrize("student_text", ["answer", "reasoning"])
def test_a_dataset_is_read_as_a_completion_is(student_text):
    text = ANSWER if student_text == "answer" else "w7 w8"
    message = {"role": "assistant", "content": THOUGHT + ANSWER}
    fields = {"role": "assistant", "content": ANSWER, "reasoning_content": "w7 w8"}
    for row, expected in [
        ({"text": THOUGHT + ANSWER}, {"text": text}),
        ({"prompt": "w3", "completion": THOUGHT + ANSWER}, {"prompt": "w3", "completion": text}),
        ({"completion": ANSWER, "reasoning": "w7 w8"}, {"completion": text, "reasoning": "w7 w8"}),
        ({"messages": [*QUESTION, message]}, {"messages": [*QUESTION, message | {"content": text}]}),
        ({"messages": [*QUESTION, fields]}, {"messages": [*QUESTION, message | {"content": text}]}),
    ]:
        dataset, reasoned, unfinished = read_dataset(Dataset.from_list([row]), student_text)
        (read_row,) = dataset
        for message in read_row.get("messages", []):
            message.pop("reasoning_content", None)  # Arrow gives all messages the fields of any of them
        assert (read_row, reasoned, unfinished) == (expected, 1, 0)


def test_a_dataset_that_is_read_in_full_stays_as_it_is():
    dataset = Dataset.from_dict({"text": [THOUGHT + ANSWER, "w1", "<think>w7"]})
    assert list(read_dataset(dataset, "all")[0]["text"]) == [THOUGHT + ANSWER, "w1", ""]
    assert read_dataset(dataset, "all", "as_is")[1:] == (2, 1)
    assert list(read_dataset(dataset, "all", "as_is")[0]["text"]) == list(dataset["text"])
    assert list(read_dataset(dataset, "reasoning")[0]["text"]) == ["w7 w8", "", ""]


@pytest.mark.parametrize(("student_text", "reasoning"), [("answer", "w7"), ("all", "w7"), ("reasoning", None)])
def test_messages_without_one_of_the_assistant_are_an_error_with_the_row(student_text, reasoning):
    answered = {"messages": [*QUESTION, {"role": "assistant", "content": "w1"}], "reasoning": "w7"}
    dataset = Dataset.from_list([answered, {"messages": QUESTION, "reasoning": reasoning}])
    with pytest.raises(ValueError, match=r"Row 1 has `messages`.* no message of the assistant.*leave the row out"):
        read_dataset(dataset, student_text)


# -- in the reward --------------------------------------------------------------------------------------------------


ANSWERS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w2 w2"]
TEXTS = [f"<think> w9 w8 </think> {answer}" for answer in ANSWERS]


def thinking_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")])
    return tokenizer


def thinking_student():
    tokenizer = thinking_tokenizer()
    return Student(make_model(scale=1.0, vocab_size=len(tokenizer)), processing_class=tokenizer)


@pytest.mark.parametrize("train_on", ["completion", "prompt_completion"])
def test_the_reward_is_the_score_of_what_the_student_reads(train_on):
    prompts, logged = ["w1", "w1", "w2", "w2"], {}
    reward = DPGReward(thinking_student(), METRIC, CONFIG, train_on=train_on)
    rewards = reward(prompts, TEXTS, log_metric=logged.__setitem__)
    assert rewards == DPGReward(thinking_student(), METRIC, CONFIG, train_on=train_on)(prompts, ANSWERS)
    whole = DPGReward(thinking_student(), METRIC, CONFIG, train_on=train_on, student_text="all")
    assert whole(prompts, TEXTS) != rewards
    assert {name: value for name, value in logged.items() if "thinking" in name} == {
        "dpg/thinking/share": 1.0,
        "dpg/thinking/unfinished": 0.0,
        "dpg/thinking/mean_length": 5.0,
    }
    assert reward.last_batch.completions == TEXTS


def test_unfinished_thoughts_are_counted_and_score_zero():
    prompts, texts, logged = ["w1", "w1", "w2", "w2"], [*TEXTS[:3], "<think> w9 w8"], {}
    rewards = DPGReward(thinking_student(), METRIC, CONFIG)(prompts, texts, log_metric=logged.__setitem__)
    assert rewards[3] == 0 and all(rewards[:3])
    assert logged["dpg/thinking/unfinished"] == 1 and logged["dpg/num_empty"] == 1
    as_is = DPGReward(thinking_student(), METRIC, CONFIG, unfinished_thoughts="as_is")
    assert as_is(prompts, texts)[3] != 0


@pytest.mark.parametrize("train_on", ["completion", "prompt_completion"])
def test_the_tokens_of_the_reasoning_score_zero_and_those_of_the_answer_their_own(train_on):
    """The answer's words are in the reasoning, too, and the student's template writes tags before the answer."""
    config = dataclasses.replace(CONFIG, per_token=True)
    answers = ["w1 w2 w3", "w4 w5", "w6 w7", "w2 w2"]
    texts = [f"<think> {answer} w9 </think> {answer}" for answer in answers]
    tokenizer = thinking_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} w20 {% else %}"
        "<think> </think> {{ m.content }}<eos>{% endif %}{% endfor %}"
    )
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    student = thinking_student()
    student.processing_class.chat_template = tokenizer.chat_template
    prompts = [[{"role": "user", "content": f"w{k}"}] for k in (1, 1, 2, 2)]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    reward = DPGReward(student, METRIC, config, train_on=train_on, processing_class=tokenizer)
    columns = {}
    reward(prompts, completions, completion_ids=ids, log_extra=columns.__setitem__)
    for row, answer, score in zip(reward.last_token_scores, answers, columns["dpg_score"], strict=True):
        length = len(answer.split())
        assert row[: -length - 1].tolist() == [0] * (length + 3)  # the tags, the answer's words, and w9
        assert row[-length:].abs().min() > 0
        assert row.sum().item() == pytest.approx(score, rel=1e-4)
    if train_on == "completion":
        alone = metagradient(thinking_student(), answers, METRIC, config).token_scores
        for row, own, answer in zip(reward.last_token_scores, alone, answers, strict=True):
            length = len(answer.split()) + 1
            torch.testing.assert_close(row[-length:], own[:length], rtol=1e-4, atol=1e-9)


def test_an_answer_that_is_a_word_of_the_tag_gets_its_own_scores():
    config = dataclasses.replace(CONFIG, per_token=True, batch_size=2)
    tokenizer = tokenizer_with("qwen3")
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")])
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    texts = ["<think>\nk\n</think>\n\nthink", "<think>\nthe café\n</think>\n\ncafé"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    student = Student(make_model(scale=1.0, vocab_size=len(tokenizer)), processing_class=tokenizer)
    reward = DPGReward(student, METRIC, config, processing_class=tokenizer)
    reward(["a", "a"], texts, completion_ids=ids)
    for row, answer in zip(reward.last_token_scores, ("think", "café"), strict=True):
        length = len(tokenizer(answer)["input_ids"])
        assert (row[:-length] == 0).all() and row[1 - length :].abs().min() > 0


def test_figures_of_thinking_are_left_out_without_thinking():
    logged = {}
    DPGReward(make_student(), METRIC, CONFIG, processing_class=TOKENIZER)(
        ["w1"] * 4, ANSWERS, log_metric=logged.__setitem__
    )
    assert not any("thinking" in name for name in logged)


# -- in training ----------------------------------------------------------------------------------------------------


def parted(text):
    """Thoughts, answer and whether the last thought ended, word by word: the tags are tokens of their own."""
    words = text.split()
    inside = next((word == "</think>" for word in words if "think>" in word), False)
    thoughts, answer = [[]] if inside else [], []
    for word in words:
        if word == ("</think>" if inside else "<think>"):
            inside = not inside
            thoughts += [[]] * inside
        elif inside:
            thoughts[-1] = [*thoughts[-1], word]
        else:
            answer.append(word)
    return [" ".join(thought) for thought in thoughts], " ".join(answer), not inside


@pytest.mark.parametrize("unfinished", ["empty", "as_is"])
def test_a_thinking_generator_is_trained_on_what_its_answers_do_to_the_student(unfinished, tmp_path):
    tokenizer = qwen3_tokenizer()
    seen, read = [], []

    def watch(completions, **kwargs):
        seen.extend(completions)
        return [0.0] * len(completions)

    trainer = make_trainer(
        dpg_config(tmp_path, max_steps=2, max_completion_length=10, unfinished_thoughts=unfinished, seed=1),
        model=make_model(seed=1, scale=1.0, vocab_size=len(tokenizer)),
        reward_funcs=watch,
        train_dataset=Dataset.from_dict(
            {"prompt": [[{"role": "user", "content": f"w{k % 3 + 1}"}] for k in range(16)]}
        ),
        processing_class=tokenizer,
    )
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    score, batches = trainer.dpg_reward.score, []

    def watched(datasets):
        read.extend(sample.example for sample in datasets[0])
        scored = score(datasets)
        batches.append(scored[0].output.scores)
        return scored

    trainer.dpg_reward.score = watched
    trainer.train()
    texts = [message["content"] for (message,) in seen]
    parts = [parted(text) for text in texts]
    kinds = {(bool(thoughts), finished) for thoughts, _, finished in parts}
    assert len(texts) == len(read) == 32 and kinds == {(True, True), (True, False), (False, True)}
    # What the student read
    whole = {"empty": lambda text: "", "as_is": lambda text: text}[unfinished]
    expected = [answer if ended else whole(text) for text, (_, answer, ended) in zip(texts, parts, strict=True)]
    assert [" ".join(text.split()) for text in read] == expected
    scores = torch.cat(batches)
    empty = torch.tensor([not text.strip() for text in read])
    assert (scores[empty] == 0).all() and (scores[~empty] != 0).all() and empty.any()
    assert any(not torch.equal(*pair) for pair in zip(before, trainer.model.parameters(), strict=True))
    # The log
    logs = [log for log in trainer.state.log_history if "dpg/metric_after" in log]
    records = [json.loads(line) for line in (tmp_path / "dpg_log.jsonl").read_text().splitlines()]
    records = [record for record in records if "samples" in record]
    assert len(logs) == len(records) == 2
    for step, (log, record) in enumerate(zip(logs, records, strict=True)):
        mine = slice(16 * step, 16 * step + 16)
        lengths = [sum(map(len, thoughts)) for thoughts, *_ in parts[mine] if thoughts]
        assert log["dpg/thinking/share"] == pytest.approx(len(lengths) / 16)
        assert log["dpg/thinking/unfinished"] == sum(not finished for *_, finished in parts[mine])
        assert log["dpg/thinking/mean_length"] == pytest.approx(sum(lengths) / len(lengths))
        assert log["dpg/num_empty"] == empty[mine].sum()
        assert {name: record["scalars"][name] for name in log if "thinking" in name} == {
            name: value for name, value in log.items() if "thinking" in name
        }
        assert {sample["completion"] for sample in record["samples"]} <= set(texts[mine])


def qwen3_tokenizer():
    """A tokenizer of few words with Qwen3's template. A generator that knows no better often writes its tags."""
    tokenizer = make_tokenizer(["user", "assistant", "w1", "w2", "w3"])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = tokenizer_with("qwen3").chat_template
    return tokenizer


# -- in the commands ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """A generator that often writes tags, because it knows few words, and its prompts."""
    folder = tmp_path_factory.mktemp("thinker")
    tokenizer = make_tokenizer(["<think>", "</think>", "w1", "w2", "w3"])
    make_model(scale=1.0, vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    Dataset.from_dict({"prompt": ["w1", "w2", "w3", "w1 w2"] * 8}).to_json(folder / "prompts.jsonl")
    return folder


def run(command, folder, output_dir, *flags):
    sizes = ["--max_completion_length", "8"] if command == "generate" else []
    named = ["--dataset_name", str(folder / "prompts.jsonl"), "--model_name_or_path", str(folder / "model")]
    cli.main([command, *named, *sizes, "--output_dir", str(output_dir), *flags])


def test_generate_writes_what_the_student_reads_and_counts_the_rest(thinker, tmp_path, capsys):
    run("generate", thinker, tmp_path / "all", "--student_text", "all", "--unfinished_thoughts", "as_is")
    whole = Dataset.from_parquet(str(tmp_path / "all" / "train.parquet"))
    assert whole.column_names == ["text", "source_prompt"] and len(whole) == 32
    capsys.readouterr()
    run("generate", thinker, tmp_path / "answers")
    written = Dataset.from_parquet(str(tmp_path / "answers" / "train.parquet"))
    readings = StudentText().read(list(whole["source_prompt"]), list(whole["text"]))
    finished = [reading for reading in readings if reading.finished]
    assert 0 < len(finished) < 32
    assert list(written["text"]) == [reading.completion for reading in finished]
    assert list(written["reasoning"]) == [reading.reasoning for reading in finished]
    reasoned = sum(reading.reasoning is not None for reading in readings)
    said = f"{reasoned} of 32 texts have reasoning; the student reads their answers."
    left = 32 - len(finished)
    said += f" {left} thoughts have no end; it reads nothing of them. {left} texts were left out."
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "answers" / "README.md").read_text()


TEXTS_OF_THREE = [f"<think> w3 w2 </think> {answer}" for answer in ("w1 w2", "w2 w3", "w3", "w1 w1")]
METRIC_OF_THREE = LanguageModelingMetric(["w1 w2 w3"])


def test_fresh_students_read_answers_as_in_the_training(thinker, tmp_path):
    rows = Dataset.from_dict({"prompt": ["w1"] * 4})
    figures = {}
    for name, texts in (
        ("tagged", TEXTS_OF_THREE),
        ("plain", [text.split("</think> ")[-1] for text in TEXTS_OF_THREE]),
    ):
        args = DPGConfig(
            output_dir=str(tmp_path),
            student_model_name_or_path=str(thinker / "model"),
            student_batch_size=4,
            per_device_train_batch_size=16,
            report_to="none",
        )
        figures[name] = judge(texts, rows, args, METRIC_OF_THREE, [])
    assert figures["tagged"]["metric"] == figures["plain"]["metric"]
    assert figures["tagged"]["thinking/share"] == 1.0 and "thinking/share" not in figures["plain"]


def test_attribute_and_evaluate_read_what_they_are_told(thinker, tmp_path, capsys):
    Dataset.from_dict({"text": ["w1 w2 w3"]}).to_json(tmp_path / "benchmark.jsonl")
    Dataset.from_dict({"text": TEXTS_OF_THREE}).to_json(tmp_path / "tagged.jsonl")
    plain = [text.split("</think> ")[-1] for text in TEXTS_OF_THREE]
    Dataset.from_dict({"text": plain}).to_json(tmp_path / "plain.jsonl")
    metric = ["--metric", "language_modeling", "--metric_kwargs"]
    metric += [json.dumps({"dataset": str(tmp_path / "benchmark.jsonl")})]
    metric += ["--student_model_name_or_path", str(thinker / "model"), "--student_batch_size", "4"]

    def scores(name, *flags):
        where = tmp_path / f"{name}{len(flags)}"
        data = ["--dataset_name", str(tmp_path / f"{name}.jsonl"), "--output_dir", str(where)]
        cli.main(["attribute", *data, *metric, *flags])
        return list(Dataset.from_parquet(str(where / "scored.parquet"))["dpg_score"])

    answers = scores("tagged", "--student_text", "answer")
    assert "4 of 4 texts have reasoning; the student reads their answers." in capsys.readouterr().out
    assert answers == scores("plain") != scores("tagged")
    assert "4 of 4 texts have reasoning; the student reads all of them." in capsys.readouterr().out
    Dataset.from_list([{"messages": QUESTION, "reasoning": "w7"}]).to_json(tmp_path / "asked.jsonl")
    with pytest.raises(SystemExit):
        scores("asked", "--student_text", "answer", "--unfinished_thoughts", "empty")
    assert "--dataset_name" in (shown := capsys.readouterr().err) and "Row 0 has `messages`" in shown
    files = [str(tmp_path / f"{name}.jsonl") for name in ("tagged", "plain")]
    figures_file = tmp_path / "figures.json"
    to = ["--seeds", "0", "--output_file", str(figures_file), "--student_text", "answer"]
    cli.main(["evaluate", "--datasets", *files, *metric, *to])
    tagged, plain = json.loads(figures_file.read_text())["datasets"].values()
    assert tagged["metric"] == plain["metric"]


@pytest.mark.parametrize("command", ["generate", "attribute"])
def test_an_unknown_choice_is_a_usage_error(command, thinker, tmp_path, capsys):
    flags = [] if command == "generate" else ["--metric", "weight_norm"]
    names = ["--dataset_name", str(thinker / "prompts.jsonl"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, *names, *flags, "--student_text", "thoughts"])
    assert stopped.value.code != 0
    assert "--student_text 'thoughts'. Choose one of ('answer', 'reasoning', 'all')." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
