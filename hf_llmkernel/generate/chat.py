"""`llmkernel chat MODEL`: a conversation in the terminal, or of the lines of a pipe.

Reading order: `chat` -> lines and commands -> a conversation: history to tokens, answer, the cache kept between turns.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .command import check_place, check_tokens, check_unicode, load, room_after
from .sampling import CacheKind, Drafts, Dtype, Seed, Temperature, TopP, cache_bits, check_draft, sampling_options

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COMMANDS = "/exit ends, /reset forgets the conversation"


def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a model with a chat template.")],
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    cache: CacheKind = "full",
    draft: Drafts = None,
) -> dict[str, Any]:
    """Talk with a model: every line is a message, the answer is streamed.

    /exit or the end of the input ends, /reset forgets the conversation, Ctrl-C stops an answer. Messages may come from
    a pipe, a line each.

    Raises:
        ValueError: a tokenizer without chat template, sampling options outside their range.
        OSError: no such checkpoint.
    """
    sampling, bits = sampling_options(temperature, top_p), cache_bits(cache)
    check_draft(draft, temperature=temperature, cache=bits)
    check_unicode("system", system)
    for each in draft or ():
        check_place("draft", each)
    network, tokenizer = load(model, dtype)
    if draft:
        from .command import encode_messages
        from .drafts import chosen_draft

        inputs = encode_messages(tokenizer, [{"role": "user", "content": "Tell me about yourself."}])
        sampling["assistant_model"] = chosen_draft(network, tokenizer, draft, inputs)
    conversation = Conversation(network, tokenizer, system, bits, seed, max_new_tokens=max_new_tokens, **sampling)
    for line in messages():
        if line == "/exit":
            break
        if line == "/reset":
            conversation.reset()
        elif line.startswith("/") and " " not in line:
            _say(f"{line}: is no command; {COMMANDS}")
        else:
            _answer(conversation, line)
    return {
        "model": model,
        "messages": conversation.messages,
        "turns": conversation.turns,
        "dtype": str(network.dtype).removeprefix("torch."),
    }


def render_chat(result: dict[str, Any]) -> str:
    """Nothing: the answers were streamed."""
    return ""


def _piped_lines() -> Iterator[str]:
    try:
        for line in sys.stdin:
            line.encode()  # Python may have let other bytes pass
            yield line
    except UnicodeError:
        raise ValueError("standard input: is not UTF-8; give it as UTF-8.") from None


def messages() -> Iterator[str]:
    """Lines of standard input, without empty ones, asked for where it is a terminal; Ctrl-C there asks anew."""
    if not sys.stdin.isatty():
        yield from filter(None, map(str.strip, _piped_lines()))
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (lines can then be edited and called back)
    _say(COMMANDS)
    while True:
        try:
            line = input("> ").strip()
        except KeyboardInterrupt:
            _say(f"\n{COMMANDS}")
            continue
        except EOFError:
            _say("")
            return
        if line:
            yield line


def _answer(conversation: "Conversation", line: str) -> None:
    """Streams an answer; a conversation beyond the context is told about and goes on."""
    try:
        turn = conversation.ask(line)
    except ContextEnd as error:
        _say(str(error))
        return
    ending = ", stopped" if turn["stopped"] else ", the model's context is full" if turn["context_full"] else ""
    _say(f"({turn['tokens']} tokens, {turn['tokens_per_second']:.1f} a second{ending})")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class ContextEnd(ValueError):
    """A conversation that has no room for an answer."""


class Conversation:
    """Messages so far, and the keys and values of their tokens, so that a turn computes what is new.

    Args:
        system: the first message, or `None`.
        bits: of the cache, `None` for the full one.
        seed: of the sampling, set at the start and by `reset`.
        options: of `generate()`.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    def __init__(
        self,
        network: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        system: str | None,
        bits: int | None,
        seed: int,
        **options: Any,
    ):
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("chat: the tokenizer has no chat template; use `llmkernel generate --no-chat`.")
        self.network: Any = network
        self.tokenizer: Any = tokenizer
        self.system = system
        self.bits = bits
        self.seed = seed
        self.options = options
        self.turns: list[dict[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Forgets all messages but the system's."""
        from transformers import set_seed

        set_seed(self.seed)
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self._cache: Any = None
        self._cached: list[int] = []  # tokens whose keys and values the cache holds

    def ask(self, text: str) -> dict[str, Any]:
        """Streams the answer to a message to standard output, and keeps both. Ctrl-C ends the answer where it is.

        Returns:
            `tokens`, `seconds`, `tokens_per_second`, `prompt_tokens`, `computed_tokens` (of the prompt, those that
            were not in the cache), and whether it was `stopped`, or ended with the context (`context_full`).

        Raises:
            ContextEnd: there is no room for an answer; the message is not kept.
        """
        ids = self._encode([*self.messages, {"role": "user", "content": text}])
        try:
            room = room_after(self.network, ids.shape[1], "the conversation", "/reset forgets it")
        except ValueError as error:
            raise ContextEnd(error) from None
        cache, known = self._cache_for(ids[0].tolist())
        tokens, seconds, stopped = self._generate(ids, cache, room)
        self._cache, self._cached = (None, []) if stopped else (cache, [*ids[0].tolist(), *tokens][:-1])
        answer = self.tokenizer.decode(tokens, skip_special_tokens=True)
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        turn = {
            "tokens": len(tokens),
            "seconds": seconds,
            "tokens_per_second": len(tokens) / seconds,
            "prompt_tokens": ids.shape[1],
            "computed_tokens": ids.shape[1] - known,
            "stopped": stopped,
            "context_full": len(tokens) == room,
        }
        self.turns.append(turn)
        return turn

    def _encode(self, history: list[dict[str, str]]) -> "torch.Tensor":
        """Token ids `[1, T]`."""
        encoded = self.tokenizer.apply_chat_template(
            history, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        check_tokens(self.network, encoded["input_ids"])
        return encoded["input_ids"].to(self.network.device)

    def _cache_for(self, ids: list[int]) -> tuple[Any, int]:
        """A cache of the first of these tokens, and of how many: of all that the last turn left, but the last one."""
        known = _common(self._cached, ids[:-1])
        if not known:
            return self._new_cache(), 0
        if known < len(self._cached):
            if any(getattr(layer, "is_sliding", False) for layer in self._cache.layers):
                return self._new_cache(), 0
            self._cache.crop(known - len(self._cached))
        return self._cache, known

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        from .cache import IntegerCache

        config = self.network.config
        return DynamicCache(config=config) if self.bits is None else IntegerCache(config, self.bits)

    def _generate(self, ids: "torch.Tensor", cache: Any, room: int) -> tuple[list[int], float, bool]:
        """Tokens of the answer, seconds, and whether Ctrl-C ended it."""
        import torch

        words, stopped = Words(self.tokenizer), False
        options = {**self.options, "max_new_tokens": min(self.options["max_new_tokens"], room)}
        started = time.perf_counter()
        try:
            self.network.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, streamer=words, **options
            )
        except KeyboardInterrupt:
            stopped = True
            words.end()
        return words.tokens, time.perf_counter() - started, stopped


class Words:
    """A streamer that prints words to standard output as they come, and keeps the tokens."""

    def __init__(self, tokenizer: Any):
        from transformers import TextStreamer

        self.tokens: list[int] = []
        self._printer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def put(self, value: "torch.Tensor") -> None:
        if not self._printer.next_tokens_are_prompt:
            self.tokens += value.tolist()
        self._printer.put(value)

    def end(self) -> None:
        self._printer.end()


def _common(first: list[int], second: list[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(first), len(second)))
