"""What a request may hold. Whatever is neither served nor without effect is refused by name, with 400."""

import inspect
import json
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= least


def _stop(value: Any) -> bool:
    strings = [value] if isinstance(value, str) else value
    return isinstance(strings, list) and all(isinstance(string, str) and string for string in strings)


def _stream_options(value: Any) -> bool:
    return isinstance(value, dict) and set(value) <= {"include_usage"} and _flag(value.get("include_usage", False))


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _tools(value: Any) -> bool:
    tools = value if isinstance(value, list) else [None]
    functions = [tool.get("function") if isinstance(tool, dict) else None for tool in tools]
    return all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions)


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
    "seed": ("a whole number of at most 63 bits", lambda value: type(value) is int and abs(value) < 2**63),
    "stream": ("true or false", _flag),
    "stream_options": ("an object of include_usage, true or false", _stream_options),
    "tools": ("a list of objects, each of a function with a name", _tools),
    "chat_template_kwargs": ("an object", lambda value: isinstance(value, dict)),
}
IGNORED = {
    "metadata",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
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
    "parallel_tool_calls": True,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "suffix": "",
    "tool_choice": "auto",
    "top_logprobs": 0,
}
ROLES = ("system", "developer", "user", "assistant", "tool")
PARTS = ("text", "input_text", "output_text")
# What the tokenizer, and not the template, is told by a call; the server tells it.
TEMPLATE_SETTINGS = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {"documents"}
TEMPLATE_SETTINGS |= {"messages"}


def check_fields(body: dict[str, Any], most_tokens: int) -> None:
    """Removes what is ignored. Raises `ValueError` for a field that is not served, or not what it must be."""
    for name in [name for name, value in body.items() if value is None or name in IGNORED]:
        del body[name]
    for name, value in list(body.items()):
        if name in SERVED:
            words, holds = SERVED[name]
            if not holds(value):
                raise ValueError(f"{name}={_short(value)}: must be {words}")
        elif name in WITHOUT_EFFECT and _is_same(value, WITHOUT_EFFECT[name]):
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
    check_messages(body["messages"])
    if given := TEMPLATE_SETTINGS & body.get("chat_template_kwargs", {}).keys():
        raise ValueError(f"chat_template_kwargs.{min(given)}: is not served; leave it out")


def check_messages(messages: list[Any]) -> None:
    """Raises `ValueError` for a message of a conversation that is none."""
    for index, message in enumerate(messages):
        _check_message(f"messages[{index}]", message)


def _check_message(name: str, message: Any) -> None:
    """The same for one message, whose fields that say nothing are removed; a developer is the system to templates."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = f".role={_short(message['role'])}" if isinstance(message, dict) and "role" in message else ""
        raise ValueError(f"{name}{role}: must be an object with a role, one of {', '.join(ROLES)}")
    if message["role"] == "developer":
        message["role"] = "system"
    calls = message.get("tool_calls")
    if not _is_content(message.get("content"), "tool_calls" in message):
        raise ValueError(f"{name}.content: must be a text, or a list of parts of type text")
    if calls is not None and not (isinstance(calls, list) and all(map(_is_call, calls))):
        raise ValueError(f"{name}.tool_calls: each must have a function with arguments, the text of a JSON object")
    if not calls:
        message.pop("tool_calls", None)  # beside them transformers drops the content


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    return isinstance(function, dict) and _is_object(function.get("arguments"))


def uses_tools(body: dict[str, Any]) -> bool:
    """Whether a chat has tools, calls of tools, or what they gave."""
    spoken = (message["role"] == "tool" or "tool_calls" in message for message in body["messages"])
    return bool(body.get("tools")) or any(spoken)


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


def _is_same(value: Any, other: Any) -> bool:
    """Whether both are equal, and not as a number is to true or false."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _is_object(arguments: Any) -> bool:
    if not isinstance(arguments, str):
        return isinstance(arguments, dict)
    try:
        return isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
