"""How tokens are chosen: the options that every command which writes text has, and what they mean to `generate()`."""

from typing import Annotated, Any

import typer

CACHES = {"full": None, "int8": 8, "int4": 4}
DTYPES = ("auto", "float32", "bfloat16", "float16")

Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token, above 0 samples.")]
TopP = Annotated[
    float, typer.Option(help="Sample among the likeliest tokens of this total probability; needs --temperature.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the sampling.")]
Dtype = Annotated[str, typer.Option(help=f"Compute dtype: {', '.join(DTYPES)}; auto is the checkpoint's.")]
Drafts = Annotated[
    list[str] | None,
    typer.Option(
        "--draft",
        help="A compressed copy that writes ahead of the model; of several the one that pays. Not with --temperature "
        "or --cache.",
    ),
]
CacheKind = Annotated[str, typer.Option(help=f"Keys and values of past tokens: {', '.join(CACHES)}.")]

LEAST_TEMPERATURE = 1e-6  # below, logits divided by it may overflow; what is left to sample is the likeliest token

# Sampling settings of a checkpoint's own generation config would be warned about beside do_sample=False.
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def sampling_options(temperature: float, top_p: float) -> dict[str, Any]:
    """Arguments of `generate()`. Raises `ValueError` for a `top_p` outside its range, or without sampling."""
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p={top_p}: must be above 0 and at most 1; 1 keeps every token.")
    if top_p < 1.0 and temperature == 0.0:
        raise ValueError(f"top_p={top_p}: only sampling uses it; set a temperature above 0 as well.")
    if temperature < LEAST_TEMPERATURE:
        return dict(GREEDY)
    return {"temperature": float(temperature), "top_p": top_p, "do_sample": True}


def check_draft(drafts: list[str] | None, **others: Any) -> None:
    """Raises `ValueError` where a draft is asked for beside what it does not go with: any of the others that is set."""
    if drafts and (given := [name for name, value in others.items() if value]):
        raise ValueError(f"draft: goes without {given[0]}; leave one of the two out.")


def cache_bits(cache: str) -> int | None:
    """Bits of the cache of a name, `None` of the full one. Raises `ValueError` for a name that there is not."""
    if cache not in CACHES:
        raise ValueError(f"cache={cache}: must be one of {', '.join(CACHES)}.")
    return CACHES[cache]
