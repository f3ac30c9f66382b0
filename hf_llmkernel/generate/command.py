"""`llmkernel generate MODEL PROMPT`: stream the text of any causal language model.

Reading order: `generate` -> load -> prompt to tokens -> stream and time.
"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..registration import MODEL_TYPE
from .sampling import (
    DTYPES,
    CacheKind,
    Drafts,
    Dtype,
    Seed,
    Temperature,
    TopP,
    cache_bits,
    check_draft,
    sampling_options,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a causal language model.")],
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="The text to continue, or the message to answer.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to generate.")] = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template. Default: if there is one.")
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    cache: CacheKind = "full",
    draft: Drafts = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Most that the process may take, as in 1.5GB: what does not fit is read again. Not with --dtype or "
            "--prompts; with one --draft at most."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Instead of PROMPT: a .txt file of one a line, or .jsonl of prompt or messages. Not with --memory, "
            "--cache or --draft."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="With --prompts: the new .jsonl file, a line a prompt.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="With --prompts: sequences that are decoded together.")] = 8,
) -> dict[str, Any]:
    """Continue a prompt, or answer it where the model has a chat template, and stream the text.

    A text ends with the model's context at the latest. With `--prompts` a text for each is written to a file; the same
    command goes on where it was interrupted, and under `torchrun` the processes share the prompts.

    Raises:
        ValueError: `top_p`, `dtype` or `cache` outside their range, `chat` without a template, a prompt that leaves no
            room in the context, a `draft` of another vocabulary or beside what it does not go with, or less `memory`
            than two blocks of the model need.
        OSError: no such checkpoint.
    """
    sampling, bits = sampling_options(temperature, top_p), cache_bits(cache)
    check_draft(draft, temperature=temperature, cache=bits, prompts=prompts)
    for each in draft or ():
        check_place("draft", each)
    if prompts is not None:
        refused = {"PROMPT": prompt, "memory": memory, "cache": None if cache == "full" else cache}
        if given := [name for name, value in refused.items() if value is not None]:
            raise ValueError(f"prompts: goes without {given[0]}; leave one of the two out.")
        if output is None:
            raise ValueError("output: is missing; name the file that --prompts writes.")
        from .prompts import generate_prompts

        options = {"max_new_tokens": max_new_tokens, **sampling}
        return generate_prompts(model, prompts, output, batch, chat, seed, dtype, **options)
    if output is not None:
        raise ValueError(f"output={output}: is for the texts of --prompts; leave it out, or send the text there by >.")
    if prompt is None:
        raise ValueError("PROMPT: is missing; give a text, or a file of them with --prompts and --output.")
    check_unicode("PROMPT", prompt)
    if draft and memory is not None:
        from .drafts import load_beside

        network, tokenizer, sampling["assistant_model"] = load_beside(model, dtype, memory, draft)
    else:
        network, tokenizer = load(model, dtype) if memory is None else load_within(model, dtype, memory)
    inputs = encode_prompt(tokenizer, prompt, chat)
    check_tokens(network, inputs["input_ids"])
    room = room_after(network, inputs["input_ids"].shape[1])
    if bits is not None:
        from .cache import IntegerCache

        sampling["past_key_values"] = IntegerCache(network.config, bits)
    if draft and memory is None:
        from .drafts import chosen_draft

        sampling["assistant_model"] = chosen_draft(network, tokenizer, draft, inputs)
    tokens, seconds = stream(network, tokenizer, inputs, seed, max_new_tokens=min(max_new_tokens, room), **sampling)
    return {
        "model": model,
        "prompt": prompt,
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
        "tokens": len(tokens),
        "tokens_per_second": len(tokens) / seconds,
        "seconds": seconds,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "context_full": len(tokens) == room,
        "dtype": str(network.dtype).removeprefix("torch."),
        "cache": cache,
        "draft": draft,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }


def render_generate(result: dict[str, Any]) -> str:
    """Nothing: the text was streamed. Its measure goes to standard error, so that a pipe gets the text alone."""
    if "prompts" in result:
        rate = result["new_tokens"] / max(result["seconds"], 1e-9)
        full = f" ({result['context_full']} until the model's context was full)" if result["context_full"] else ""
        texts = f"{result['prompts']} texts{full}"
        return f"{result['output']}: {texts}, {result['new_tokens']} tokens, {rate:.1f} a second"
    full = ", the model's context is full" if result["context_full"] else ""
    print(f"{result['tokens']} tokens, {result['tokens_per_second']:.1f} a second{full}", file=sys.stderr)
    return ""


def load(model: str, dtype: str = "auto") -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Model and tokenizer of a folder or Hub id. Raises `ValueError` or `OSError` where there is none."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: must be one of {', '.join(DTYPES)}.")
    check_place("model", model)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_weights(Path(model))
    # The model first: a folder that holds nothing fails with a message about the model.
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    try:
        return network, AutoTokenizer.from_pretrained(model)
    except ValueError as error:
        raise ValueError(f"model={model}: has no readable tokenizer ({error}); put its files there.") from error


def load_within(model: str, dtype: str, memory: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The same, of a folder of this family, with weights that do not fit in memory read at every token."""
    from transformers import AutoTokenizer

    from ..convert.command import parse_size
    from ..evaluate.source import read_config
    from .paging import load_paged

    size = parse_size(memory, "memory")
    if dtype != "auto":
        raise ValueError(f"dtype={dtype}: with memory the checkpoint's own is computed in; leave it out.")
    if not Path(model).is_dir() or read_config(Path(model)).get("model_type") != MODEL_TYPE:
        raise ValueError(f"model={model}: is no folder of this family, which memory takes; use llmkernel convert.")
    check_weights(Path(model))
    return load_paged(model, size), AutoTokenizer.from_pretrained(model)


def check_place(name: str, model: str) -> None:
    """Raises `ValueError` for a path at which there is nothing, and that is no Hub id either."""
    if not Path(model).exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise ValueError(f"{name}={model}: no such folder; check the path, or give a Hub id.")


def check_weights(folder: Path) -> None:
    """Raises `ValueError`, naming file or tensor, where a folder of this family cannot be what generates text."""
    from ..evaluate import inspect
    from ..evaluate.source import read_config

    config = read_config(folder) if (folder / "config.json").is_file() else {}
    if config.get("model_type") != MODEL_TYPE:
        return
    inspect(folder)
    architectures = config.get("architectures") or []
    if architectures and not any(str(name).endswith("ForCausalLM") for name in architectures):
        # Loaded all the same, it would have a head of random values.
        raise ValueError(f"{folder}: is a {architectures[0]}, without a language-model head; use a causal model.")


def check_unicode(name: str, text: str | None) -> None:
    """Raises `ValueError` for a text that no tokenizer takes: the command line lets bytes pass that are no UTF-8."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: is not UTF-8; give it as UTF-8.") from None


def check_tokens(network: "PreTrainedModel", ids: "torch.Tensor") -> None:
    """Raises `ValueError` where the tokenizer has made a token that the model does not have."""
    if (highest := int(ids.max())) >= network.config.vocab_size:
        raise ValueError(
            f"vocab_size={network.config.vocab_size}: the tokenizer made token {highest}, which the model does not "
            "have; use the model's own tokenizer."
        )


def room_after(
    network: "PreTrainedModel", tokens: int, what: str = "the prompt", remedy: str = "shorten it"
) -> int:
    """How many tokens the model's context has room for after a prompt. Raises `ValueError` where there is none."""
    context = getattr(network.config, "max_position_embeddings", None) or sys.maxsize
    if tokens >= context:
        raise ValueError(f"{what} has {tokens} tokens, the model's context ends at {context}; {remedy}.")
    return context - tokens


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str, chat: bool | None) -> "dict[str, torch.Tensor]":
    """Token ids and mask `[1, T]` of a prompt, through the chat template where wanted (`None`: where there is one)."""
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if chat and not has_template:
        raise ValueError("chat=True: the tokenizer has no chat template; use --no-chat.")
    if has_template if chat is None else chat:
        return encode_messages(tokenizer, [{"role": "user", "content": prompt}])
    return _inputs(tokenizer(prompt, return_tensors="pt"))


def encode_messages(
    tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, Any]]
) -> "dict[str, torch.Tensor]":
    """Token ids and mask `[1, T]` of a conversation that the model is to answer."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("messages: the tokenizer has no chat template; give texts.")
    options: dict[str, Any] = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    return _inputs(tokenizer.apply_chat_template(messages, **options))


def _inputs(encoded: Any) -> "dict[str, torch.Tensor]":
    # Token types, which some tokenizers give, are no input of a decoder.
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("prompt='': has no tokens; give a text.")
    return inputs


def stream(
    network: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    inputs: "dict[str, torch.Tensor]",
    seed: int,
    **options: Any,
) -> tuple[list[int], float]:
    """Generates, printing words to standard output as they come. Returns the new token ids and the seconds taken."""
    from transformers import TextStreamer, set_seed

    set_seed(seed)
    inputs = {name: tensor.to(network.device) for name, tensor in inputs.items()}
    words = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    started = time.perf_counter()
    output = network.generate(**inputs, streamer=words, **options)  # type: ignore[operator]
    seconds = time.perf_counter() - started
    return output[0, inputs["input_ids"].shape[1] :].tolist(), seconds
