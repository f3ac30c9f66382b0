"""`llmkernel generate MODEL --prompts FILE --output FILE`: a text for every prompt of a file, in batches.

Under `torchrun` the prompts are shared among the processes. Each writes what it has to a file of its own beside the
output, line by line: interrupted, the same command goes on where it was. The first one joins them in the end.

Reading order: `generate_prompts` -> prompts of a file -> what is done already -> the batch -> the output.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from .. import processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompt = str | list[dict[str, Any]]  # a text, or the messages of a conversation


def generate_prompts(
    model: str,
    prompts: Path,
    output: Path,
    batch: int,
    chat: bool | None,
    seed: int,
    dtype: str,
    **options: Any,
) -> dict[str, Any]:
    """Writes one line of JSON a prompt, in their order: `{"index", "prompt", "text", "tokens", "context_full"}`.

    Args:
        model: folder or Hub id.
        prompts: a `.txt` file of one prompt a line, or `.jsonl` with `prompt` or `messages` in every line.
        output: a new file.
        batch: sequences that are decoded together.
        chat: whether texts go through the chat template; `None`: where there is one.
        seed: of the sampling, another one for every prompt.
        dtype: to compute in.
        options: `max_new_tokens` and what `generate()` samples by.

    Raises:
        ValueError: a file that is none of these, a prompt that leaves no room in the context, an output in the way, or
            in a folder that is not there.
    """
    asked = read_prompts(prompts)
    if output.exists():
        raise ValueError(f"output={output}: exists; choose another file or remove it.")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        fault = "cannot be written to" if output.parent.is_dir() else "is no folder"
        raise ValueError(f"output={output}: {output.parent} {fault}; make it, or choose another.")
    started = time.monotonic()
    processes.join()
    run = {"model": model, "prompts": asked, "batch": batch, "chat": chat, "seed": seed, "dtype": dtype, **options}
    done = finished(output, run)
    mine = [index for index in processes.share(len(asked)) if index not in done]
    if mine:
        _generate(model, dtype, {index: asked[index] for index in mine}, _part(output, processes.rank()), run)
    tokens, full = processes.on_first(lambda: _gather_lines(output, run))
    seconds = time.monotonic() - started
    return {
        "model": model, "output": str(output), "prompts": len(asked), "new_tokens": tokens, "context_full": full,
        "seconds": round(seconds, 2), "taken_up": len(done), "processes": processes.world_size(), "batch": batch,
    }  # fmt: skip


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file. Raises `ValueError` naming the line that has none."""
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"prompts={path}: must end in .txt (one a line) or .jsonl (prompt or messages); rename it.")
    if not path.is_file():
        raise ValueError(f"prompts={path}: no such file.")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"prompts={path}: is not UTF-8; write it as UTF-8.") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"prompts={path}: has no prompt.")
    return [line for _, line in lines] if path.suffix == ".txt" else [_prompt(path, *entry) for entry in lines]


def _prompt(path: Path, number: int, line: str) -> Prompt:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"prompts={path}: line {number} has half a character (\\ud800 to \\udfff alone).") from None
    except (ValueError, RecursionError):
        row = None
    if isinstance(row, dict) and isinstance(row.get("prompt"), str) and row["prompt"]:
        return row["prompt"]
    messages = row.get("messages") if isinstance(row, dict) else None
    if isinstance(messages, list) and messages:
        from .checks import check_messages

        try:
            check_messages(messages)
        except ValueError as error:
            raise ValueError(f"prompts={path}: line {number}: {error}.") from None
        return messages
    raise ValueError(f"prompts={path}: line {number} is no JSON object with a text 'prompt' or a list 'messages'.")


# What is done already


def _part(output: Path, rank: int) -> Path:
    return output.with_name(f"{output.name}.part-{rank}")


def finished(output: Path, run: dict[str, Any]) -> set[int]:
    """Indices of the prompts that an interrupted run has answered. Raises `ValueError` where it was another run."""
    return {entry["index"] for part in _parts(output) for entry in _entries(part, run)}


def _parts(output: Path) -> list[Path]:
    return sorted(output.parent.glob(f"{output.name}.part-*"))


def _entries(part: Path, run: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Whole lines behind the first, which says what run it is; what a killed process left of one is no line."""
    first, *lines = part.read_text("utf-8").split("\n")[:-1] or [""]
    if first and json.loads(first) != run:
        raise ValueError(f"output={part}: is of a run with other prompts or settings; give the same, or remove it.")
    yield from map(json.loads, lines)


def _opened(part: Path, run: dict[str, Any]) -> TextIO:
    """The file to go on writing, without half a line at its end."""
    whole = part.read_text("utf-8") if part.is_file() else ""
    whole = whole[: whole.rfind("\n") + 1]
    part.write_text(whole or json.dumps(run) + "\n", encoding="utf-8")
    return part.open("a", encoding="utf-8")


# The batch


class _Line:
    """Collects the tokens of a prompt, and writes them when they have ended, after `room` at the latest."""

    ended = False

    def __init__(self, index: int, prompt: Prompt, room: int, write: Any):
        self.index, self.prompt, self.room, self.write = index, prompt, room, write
        self.tokens: list[int] = []

    def put(self, value: Any) -> None:
        self.tokens += value.tolist()

    def end(self) -> None:
        self.write(self)

    def fail(self, error: Exception) -> None:
        raise error


def _generate(model: str, dtype: str, prompts: dict[int, Prompt], part: Path, run: dict[str, Any]) -> None:
    from transformers import GenerationConfig

    from .batch import Batch, Request
    from .command import load, room_after

    network, tokenizer = load(model, dtype)
    encoded = {index: _encoded(network, tokenizer, prompt, run["chat"]) for index, prompt in prompts.items()}
    rooms = {i: room_after(network, len(ids), f"prompts: the one of index {i}") for i, ids in encoded.items()}
    names = ("do_sample", "temperature", "top_p", "top_k")
    sampling = {name: run[name] for name in names if run.get(name) is not None}
    bar = tqdm(total=len(prompts), desc="prompts", disable=not processes.is_first())
    with _opened(part, run) as file, bar:

        def write(line: _Line) -> None:
            text = tokenizer.decode(line.tokens, skip_special_tokens=True)
            entry = {"index": line.index, "prompt": line.prompt, "text": text, "tokens": len(line.tokens)}
            entry["context_full"] = len(line.tokens) == line.room
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
            bar.update()

        together = Batch(network, run["batch"])
        for index, ids in encoded.items():
            line = _Line(index, prompts[index], rooms[index], write)
            config = GenerationConfig(max_new_tokens=min(run["max_new_tokens"], line.room), **sampling)
            together.waiting.append(Request(network, ids, config, line, run["seed"] + index))
        while together.is_busy():
            together.step()


def _encoded(
    network: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, chat: bool | None
) -> list[int]:
    """Tokens of a prompt."""
    from .command import check_tokens, encode_messages, encode_prompt

    is_text = isinstance(prompt, str)
    inputs = encode_prompt(tokenizer, prompt, chat) if is_text else encode_messages(tokenizer, prompt)
    check_tokens(network, inputs["input_ids"])
    return inputs["input_ids"][0].tolist()


# The output, and the other processes


def _gather_lines(output: Path, run: dict[str, Any]) -> tuple[int, int]:
    """Joins what all processes wrote, in the prompts' order; returns how many tokens there are, and full contexts."""
    parts = _parts(output)
    entries = sorted((entry for part in parts for entry in _entries(part, run)), key=lambda entry: entry["index"])
    whole = output.with_name(f"{output.name}.part")
    whole.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), encoding="utf-8")
    os.replace(whole, output)
    for part in parts:
        part.unlink()
    return sum(entry["tokens"] for entry in entries), sum(entry["context_full"] for entry in entries)
