"""Reasoning and answer of a text: by tags, by a tokenizer's response template, and in a dataset's row."""

from pathlib import Path

import pytest
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_dpg.thinking import Thought, row_thinking, split_thinking, thinking_parts


TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def tokenizer_with(template):
    """A tokenizer of bytes with one of the chat templates that TRL has."""
    words = {character: place for place, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(words, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    return tokenizer


def generation_prompt(tokenizer):
    question = [{"role": "user", "content": "2 + 2?"}]
    return tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize(
    ("text", "thought"),
    [
        ("<think>\n2 + 2\n</think>\n\nFour.\n", Thought("2 + 2", "Four.\n", True)),
        (" <think>2 + 2</think>Four.", Thought("2 + 2", "Four.", True)),
        ("2 + 2\n</think>\n\nFour.", Thought("2 + 2", "Four.", True)),  # the prompt has opened it
        ("Four.", Thought(None, "Four.", True)),
        ("", Thought(None, "", True)),
        ("<think>\n\n</think>\n\nFour.", Thought("", "Four.", True)),  # Qwen3 without thinking
        ("<think>\n2 + ", Thought("2 +", "", False)),
        ("<think>", Thought("", "", False)),
        ("<think>2 + 2</think>", Thought("2 + 2", "", True)),
        ("<think>a</think>b<think>c</think> d", Thought("ac", "bd", True)),
        ("<think>a</think>b <think>c", Thought("ac", "b ", False)),
        ("<think>a <think> b</think>c </think> d", Thought("a <think> b", "c </think> d", True)),
    ],
)
def test_tags_part_reasoning_and_answer(text, thought):
    assert split_thinking(text) == thought
    assert split_thinking(text, tokenizer_with("qwen3")) == thought
    parts, finished = thinking_parts(text)
    assert "".join(part.text for part in parts) == text
    assert finished == thought.finished


@pytest.mark.parametrize("template", ["deepseek_r1_distill", "nemotron_3_nano", "qwen3_5_think"])
def test_a_prompt_that_opens_the_thought(template):
    tokenizer = tokenizer_with(template)
    prompt = generation_prompt(tokenizer)
    assert prompt.endswith("<think>\n")
    assert split_thinking("\n2 + 2</think>\n\nFour.", tokenizer, prompt) == Thought("2 + 2", "Four.", True)
    assert split_thinking("2 + ", tokenizer, prompt) == Thought("2 +", "", False)
    assert split_thinking("Four.", tokenizer) == Thought(None, "Four.", True)  # nothing says that it was opened


def test_a_prompt_without_thinking_opens_none():
    tokenizer = tokenizer_with("qwen3")
    question = [{"role": "user", "content": "2 + 2?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False, enable_thinking=False)
    assert prompt.endswith("<think>\n\n</think>\n\n")
    assert split_thinking("Four.", tokenizer, prompt) == Thought(None, "Four.", True)


GPT_OSS = "<|channel|>analysis<|message|>2 + 2", "<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>"
GEMMA = "<|channel>thought\n2 + 2", "<channel|>Four.<turn|>"


@pytest.mark.parametrize(("template", "halves"), [("gptoss", GPT_OSS), ("gemma4", GEMMA)])
def test_sentinels_of_other_templates_are_read_by_their_response_template(template, halves):
    tokenizer = tokenizer_with(template)
    thought, answer = halves
    prompt = generation_prompt(tokenizer)
    assert split_thinking(thought + answer, tokenizer, prompt) == Thought("2 + 2", "Four.", True)
    assert split_thinking(thought, tokenizer, prompt) == Thought("2 + 2", "", False)
    assert split_thinking("Four.", tokenizer, prompt) == Thought(None, "Four.", True)
    assert tokenizer.response_template is None  # TRL parses messages differently if it is set


def test_a_closing_sentinel_at_the_end_finishes_a_thought():
    assert split_thinking(GPT_OSS[0] + "<|end|>", tokenizer_with("gptoss")) == Thought("2 + 2", "", True)


def test_the_tokenizers_own_response_template_comes_first():
    tokenizer = tokenizer_with("smolvlm")
    tokenizer.response_template = {
        "start_anchor": "A:",
        "fields": {
            "thinking": {"open": "[", "close": "]", "content": "text"},
            "tool_calls": {"open": "{", "close": "}", "content": "json"},
            "content": {"content": "text"},
        },
    }
    assert split_thinking("[2 + 2]Four. {no JSON}", tokenizer) == Thought("2 + 2", "Four. {no JSON}", True)
    assert split_thinking("2 + 2]Four.", tokenizer, "Q: 2 + 2? A:[") == Thought("2 + 2", "Four.", True)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_messages_with_a_field_for_the_reasoning(field):
    question = {"role": "user", "content": "2 + 2?"}
    answer = {"role": "assistant", "content": "Four.", field: "2 + 2"}
    assert row_thinking({"messages": [question, answer]}) == Thought("2 + 2", "Four.", True)
    assert row_thinking({"prompt": [question], "completion": [answer]}) == Thought("2 + 2", "Four.", True)
    assert row_thinking({"completion": [answer | {"content": ""}]}) == Thought("2 + 2", "", False)
    calls = answer | {"content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    assert row_thinking({"completion": [calls]}) == Thought("2 + 2", "", True)
    empty = {"role": "assistant", "content": "<think>2 + 2</think>Four.", field: None}  # as Arrow tables have it
    assert row_thinking({"messages": [question, empty]}) == Thought("2 + 2", "Four.", True)


@pytest.mark.parametrize(
    ("row", "thought"),
    [
        ({"prompt": "2 + 2?", "completion": "Four.", "reasoning": "2 + 2"}, Thought("2 + 2", "Four.", True)),
        ({"completion": "", "reasoning": "2 + 2"}, Thought("2 + 2", "", False)),
        ({"completion": "Four.", "reasoning": None}, Thought(None, "Four.", True)),
        ({"completion": "<think>2 + 2</think>Four.", "reasoning": None}, Thought("2 + 2", "Four.", True)),
        ({"text": "<think>2 + 2"}, Thought("2 + 2", "", False)),
        ({"prompt": "2 + 2?<think>\n", "completion": "2 + "}, Thought("2 +", "", False)),
    ],
)
def test_columns_of_a_row(row, thought):
    assert row_thinking(row) == thought


def test_a_row_without_a_text_raises():
    with pytest.raises(ValueError, match="This one has only prompt, answer"):
        row_thinking({"prompt": "2 + 2?", "answer": "Four."})
