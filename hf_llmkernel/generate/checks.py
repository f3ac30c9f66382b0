"""What a request may hold. Whatever is neither served nor without effect is refused by name, with 400."""

from collections.abc import Callable
from typing import Any


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= least


def _stop(value: Any) -> bool:
    strings = [value] if isinstance(value, str) else value
    return isinstance(strings, list) and all(isinstance(string, str) and string for string in strings)


# Field: what it must be, in words and as a test.
SERVED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "model": ("a text", lambda value: isinstance(value, str)),
    "prompt": ("a text", lambda value: isinstance(value, str)),
    "messages": ("a list of messages", lambda value: isinstance(value, list) and bool(value)),
    "max_tokens": ("a whole number above 0", _whole(1)),
    "max_completion_tokens": ("a whole number above 0", _whole(1)),
    "temperature": ("a number from 0 to 2", _number(0, 2)),
    "top_p": ("a number above 0 and at most 1", _number(1e-9, 1)),
    "stop": ("a text that is not empty, or a list of these", _stop),
    "seed": ("a whole number", lambda value: type(value) is int and abs(value) < 2**63),
    "stream": ("true or false", lambda value: isinstance(value, bool)),
    "tools": ("a list", lambda value: isinstance(value, list)),
    "chat_template_kwargs": ("an object", lambda value: isinstance(value, dict)),
}
IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "stream_options",  # the last event always has the usage
    "user",
}
WITHOUT_EFFECT: dict[str, Any] = {
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "modalities": ["text"],
    "n": 1,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "suffix": "",
    "tool_choice": "auto",
    "top_logprobs": 0,
}
PARTS = ("text", "input_text", "output_text")


def check_fields(body: dict[str, Any], most_tokens: int) -> None:
    """Removes what is ignored. Raises `ValueError` for a field that is not served, or not what it must be."""
    for name in [name for name, value in body.items() if value is None or name in IGNORED]:
        del body[name]
    for name, value in list(body.items()):
        if name in SERVED:
            words, holds = SERVED[name]
            if not holds(value):
                raise ValueError(f"{name}={_short(value)}: must be {words}")
        elif name in WITHOUT_EFFECT and value == WITHOUT_EFFECT[name]:
            del body[name]
        else:
            raise ValueError(f"{name}={_short(value)}: is not served; leave it out")
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name, 1) > most_tokens:
            raise ValueError(f"{name}={body[name]}: this server gives at most {most_tokens}")


def check_completion(body: dict[str, Any]) -> None:
    """Raises `ValueError` for a request of `/v1/completions` without a prompt, or with what only a chat has."""
    _needs(body, "prompt", ("messages", "tools", "chat_template_kwargs", "max_completion_tokens"))


def check_chat(body: dict[str, Any]) -> None:
    """Raises `ValueError` for a request of `/v1/chat/completions` whose messages are none."""
    _needs(body, "messages", ("prompt",))
    for index, message in enumerate(body["messages"]):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{index}]: must be an object with a role")
        if not _is_content(message.get("content"), "tool_calls" in message):
            raise ValueError(f"messages[{index}].content: must be a text, or a list of parts of type text")
        for call in message.get("tool_calls") or ():
            function = call.get("function") if isinstance(call, dict) else None
            if not isinstance(function, dict) or "arguments" not in function:
                raise ValueError(f"messages[{index}].tool_calls: each must have a function with arguments")


def _needs(body: dict[str, Any], field: str, foreign: tuple[str, ...]) -> None:
    if field not in body:
        raise ValueError(f"{field}: is missing")
    for name in foreign:
        if name in body:
            raise ValueError(f"{name}: is no field of this endpoint")


def _is_content(content: Any, calls_tools: bool) -> bool:
    if content is None:
        return calls_tools
    if isinstance(content, str):
        return True
    return isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") in PARTS and isinstance(part.get("text"), str) for part in content
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
