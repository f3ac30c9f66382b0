"""Conversations: chat data as documents. They become text by the chat template of whichever tokenizer reads them.

Reading order: a row of a source -> `Conversation` -> text.
"""

from dataclasses import dataclass
from typing import Any

CHAT_COLUMNS = ("messages", "conversations")
MESSAGE_KEYS = (("role", "content"), ("from", "value"))  # OpenAI's, ShareGPT's
SHAREGPT_ROLES = {"human": "user", **dict.fromkeys(("gpt", "chatgpt", "bing", "bard"), "assistant")}


@dataclass(frozen=True)
class Conversation:
    """A document of messages.

    Args:
        messages: each with `role`, `content`, and whatever else templates know, such as `tool_calls`.
    """

    messages: tuple[dict[str, Any], ...]

    @property
    def text(self) -> str:
        """What was said, whoever said it."""
        return "\n".join(message["content"] for message in self.messages)

    def render(self, tokenizer: Any) -> str:
        """The text that a model reads, special tokens written out.

        Raises:
            ValueError: a tokenizer without a chat template, or one whose template refuses these messages.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "chat_template=null: the text has conversations and the tokenizer no template for them; set "
                "tokenizer.chat_template, take a chat model's tokenizer, or give plain text."
            )
        try:
            return tokenizer.apply_chat_template(list(self.messages), tokenize=False)
        except Exception as error:  # templates are programs that raise what they like
            reason = " ".join(str(error).split())
            raise ValueError(
                f"chat_template: refuses the conversation that begins {self.text[:40]!r} ({reason}); correct it or "
                "leave it out."
            ) from error


def read_conversation(messages: Any, where: str) -> Conversation:
    """A conversation from a list of `{role, content}` or `{from, value}`.

    Args:
        messages: of a row; `None` has none.
        where: what an error begins with, such as the line of a file.

    Raises:
        ValueError: messages of another shape.
    """
    if messages is not None and not isinstance(messages, list | tuple):
        raise ValueError(f"{where}: its conversation is no list of messages; correct it.")
    return Conversation(tuple(_read_message(message, where) for message in messages or ()))


def _read_message(message: Any, where: str) -> dict[str, Any]:
    # Rows of one table have the same keys: those that a message does not use are null.
    given = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
    if "from" in given and "role" not in given:
        given = {"role": given["from"], "content": given.get("value")}
    elif "tool_calls" in given:
        given.setdefault("content", "")
    if not isinstance(given.get("role"), str) or not isinstance(given.get("content"), str):
        raise ValueError(f"{where}: a message has no text as 'role' and 'content', or 'from' and 'value'; correct it.")
    return {**given, "role": SHAREGPT_ROLES.get(given["role"], given["role"])}


def is_conversation(kind: Any) -> bool:
    """Whether a feature of `datasets` is a list of messages."""
    element = kind[0] if isinstance(kind, list) and kind else getattr(kind, "feature", None)
    return isinstance(element, dict) and any(element.keys() >= set(keys) for keys in MESSAGE_KEYS)
