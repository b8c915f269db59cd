"""
What is known of common teachers: address, id, parameters, prices. All of it can be overridden.

Ids and prices age. Prices are in dollars per million tokens; where none stands here, give your own.
"""

from typing import Any, NamedTuple


class Preset(NamedTuple):
    """
    A teacher's usual settings.

    Attributes:
        base_url (`str`): The address of its API.
        model (`str` or `None`): Its id. `None`: the one model that the server has.
        parameters (`dict[str, Any]`): Fields of each request.
        api_key_env (`str` or `None`): The environment variable with the key. `None`: it needs none.
        prices (`dict[str, float]` or `None`): `input`, `cached` and `output`, in dollars per million tokens.
        stream (`bool`): Whether answers come in parts. A long answer then keeps its connection alive.
    """

    base_url: str
    model: str | None = None
    parameters: dict[str, Any] = {}
    api_key_env: str | None = None
    prices: dict[str, float] | None = None
    stream: bool = False


_KIMI_PRICES = {"input": 0.60, "cached": 0.10, "output": 3.00}
_MOONSHOT = "https://api.moonshot.ai/v1"
_LOCAL = "http://localhost:8000/v1"

PRESETS: dict[str, Preset] = {
    # The official API fixes the sampling of Kimi, so no temperature is sent
    "kimi-k2.5": Preset(_MOONSHOT, "kimi-k2.5", {"max_tokens": 32768}, "MOONSHOT_API_KEY", _KIMI_PRICES, True),
    "kimi-k2.5-instant": Preset(
        _MOONSHOT,
        "kimi-k2.5",
        {"max_tokens": 8192, "thinking": {"type": "disabled"}},
        "MOONSHOT_API_KEY",
        _KIMI_PRICES,
        True,
    ),
    "kimi-k2.5-self-hosted": Preset(
        _LOCAL, "moonshotai/Kimi-K2.5", {"max_tokens": 32768, "temperature": 1.0, "top_p": 0.95}, stream=True
    ),
    "kimi-k2.5-instant-self-hosted": Preset(
        _LOCAL,
        "moonshotai/Kimi-K2.5",
        {
            "max_tokens": 8192,
            "temperature": 0.6,
            "top_p": 0.95,
            "chat_template_kwargs": {"thinking": False},
        },
        stream=True,
    ),
    "deepseek": Preset(
        "https://api.deepseek.com",
        "deepseek-reasoner",
        {"max_tokens": 32768},
        "DEEPSEEK_API_KEY",
        stream=True,
    ),
    "glm": Preset(
        "https://api.z.ai/api/paas/v4",
        "glm-4.6",
        {"max_tokens": 32768, "temperature": 1.0, "thinking": {"type": "enabled"}},
        "ZAI_API_KEY",
        stream=True,
    ),
    "qwen3": Preset(
        "https://dashscope-intl.aliyuncs.com/compatible-mode/v1",
        "qwen3-235b-a22b-thinking-2507",
        {"max_tokens": 32768, "temperature": 0.6, "top_p": 0.95},
        "DASHSCOPE_API_KEY",
        stream=True,
    ),
    "qwen3-self-hosted": Preset(
        _LOCAL,
        None,
        {
            "max_tokens": 32768,
            "temperature": 0.6,
            "top_p": 0.95,
            "top_k": 20,
            "chat_template_kwargs": {"enable_thinking": True},
        },
        stream=True,
    ),
    "gpt-oss": Preset(
        _LOCAL,
        "openai/gpt-oss-120b",
        {"max_tokens": 32768, "temperature": 1.0, "reasoning_effort": "high"},
        stream=True,
    ),
    "vllm": Preset(_LOCAL, stream=True),
    "sglang": Preset("http://localhost:30000/v1", stream=True),
    # Without do_sample it answers greedily where the model's own generation config does not say otherwise
    "transformers-serve": Preset(_LOCAL, None, {"generation_config": '{"do_sample": true}'}),
    "llama.cpp": Preset("http://localhost:8080/v1", stream=True),
}
