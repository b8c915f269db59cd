"""What a student reads of a thinking generator's completions: in the reward, in training, and in the commands."""

import dataclasses

import pytest
import torch
from datasets import Dataset
from tokenizers import AddedToken

from tests.small_runs import CONFIG, METRIC, TOKENIZER, make_student
from tests.test_thinking import GPT_OSS, tokenizer_with
from tests.tiny import make_model, make_tokenizer
from trl_dpg import DPGReward, Student, metagradient
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
