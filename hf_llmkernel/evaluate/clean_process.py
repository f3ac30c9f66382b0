"""Run as a script in a fresh process: loads one model as any user would, and measures its speed and memory.

It imports only the standard library, torch and transformers: what it sees is what a user of plain
`AutoModelForCausalLM` sees, and its memory is the model's and theirs.

Reading order: the protocol -> libraries -> loading -> one measurement -> a sample -> memory.

Protocol: the settings are the only argument, a JSON object. Each line on stdin is a command (`load`, `measure` with a
case as JSON, or `sample`), each answer one JSON line on stdout: what was asked for, or `{"error": ..., "type": ...}`.
Whatever else is printed goes to stderr.
"""

import json
import os
import sys
import time
from importlib import import_module
from typing import Any


def main() -> None:
    settings = json.loads(sys.argv[1])
    commands = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # A library that prints must not answer, one that asks a question must not take a command for its reply.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    import_libraries()
    model = None
    for line in commands:
        command, _, case = line.strip().partition(" ")
        try:
            if command == "load":
                model, answer = load(settings)
            elif command == "measure":
                answer = measure(model, settings, json.loads(case))
            else:
                answer = sample(model, settings)
        except Exception as error:
            answer = {"error": str(error), "type": type(error).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def import_libraries() -> None:
    """What every model needs: its memory is the libraries' share, and processes started together import together."""
    for name in ("torch", "transformers.generation.utils", "transformers.modeling_utils"):
        import_module(name)


def load(settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model; seconds until it is there, and until it has made a first token."""
    import torch
    from transformers import AutoModelForCausalLM

    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    before = resident_bytes()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=getattr(torch, settings["dtype"]), trust_remote_code=settings["trust_remote_code"]
    ).eval()
    loaded = time.perf_counter() - start
    time_prefill(model, settings, {"tokens": settings["prompt_tokens"], "batch": 1})
    return model, {
        "library_bytes": before,
        "load_seconds": loaded,
        "first_token_seconds": time.perf_counter() - start,
    }


def measure(model: Any, settings: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a case (`kind`, `tokens`, `batch`), and the most memory so far."""
    seconds = {"prefill": time_prefill, "decode": time_decode}[case["kind"]](model, settings, case)
    return {"seconds": seconds, "peak_bytes": peak_bytes()}


def time_prefill(model: Any, settings: dict[str, Any], case: dict[str, Any]) -> float:
    """Seconds of the forward over `tokens` of each of `batch` prompts."""
    import torch

    ids = random_ids(model, case["batch"], case["tokens"], settings["seed"])
    with torch.inference_mode():
        start = time.perf_counter()
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start


def time_decode(model: Any, settings: dict[str, Any], case: dict[str, Any]) -> float:
    """Seconds from the first new token to the last one of `tokens`, in greedy `generate` of `batch` sequences."""
    import torch
    from transformers import GenerationConfig

    ids = random_ids(model, case["batch"], settings["prompt_tokens"], settings["seed"])
    clock = TokenClock()
    own = model.generation_config
    model.generation_config = GenerationConfig()  # without an end token: every run makes all tokens
    try:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=case["tokens"], pad_token_id=0, use_cache=True
            ),
            streamer=clock,
        )
    finally:
        model.generation_config = own
    made = clock.times[1:]  # the first entry is the prompt
    if len(made) != case["tokens"]:
        raise ValueError(f"generate made {len(made)} of {case['tokens']} tokens; its loop is not a plain one.")
    return made[-1] - made[0]


class TokenClock:
    """A streamer that notes when each token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def random_ids(model: Any, batch: int, length: int, seed: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator)


def sample(model: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Greedy text after the prompt, as a chat turn where the tokenizer has a chat template."""
    from transformers import AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(settings["model"], trust_remote_code=settings["trust_remote_code"])
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompt = settings["prompt"]
    chat = tokenizer.chat_template is not None
    result = generator(
        [{"role": "user", "content": prompt}] if chat else prompt,
        max_new_tokens=settings["sample_tokens"],
        do_sample=False,
        return_full_text=False,
    )
    text = result[0]["generated_text"]
    return {"prompt": prompt, "chat": chat, "text": text if isinstance(text, str) else text[-1]["content"]}


def resident_bytes() -> int:
    """Bytes of this process in memory now; where the system does not tell, its most so far."""
    return _status("VmRSS:") or peak_bytes()


def peak_bytes() -> int:
    """Most bytes that this process has had in memory."""
    peak = _status("VmHWM:")
    if peak is not None:
        return peak
    import resource

    # On Linux this figure is inherited from the process that started this one, hence the other way first.
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _status(name: str) -> int | None:
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
    except (OSError, StopIteration):
        return None


if __name__ == "__main__":
    main()
