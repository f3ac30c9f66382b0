"""The commands `convert` and `export`."""

import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import typer


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Folder, .gguf file, or Hub id of a Llama, Mistral, Qwen2 or Qwen3.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="New folder to write.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the source's.")] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="base, causal-lm, sequence-classification, token-classification or question-answering; "
            "default: the source's."
        ),
    ] = None,
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file in the folder or repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
    untie: Annotated[bool, typer.Option(help="Keep a head that differs from the embedding it is tied to.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Most bytes of one file, such as 5GB or 500MB.")] = "5GB",
    keep_integers: Annotated[
        bool | None,
        typer.Option(
            "--keep-integers/--dequantize",
            help="Of a quantized source, keep the integers or make floating weights; default: keep those of a "
            "compressed-tensors folder, dequantize a GGUF file. --dequantize takes folders of this family too.",
        ),
    ] = None,
) -> dict[str, Any]:
    """Convert a checkpoint of a known family into an LLMKernel one; logits stay equal."""
    from .incoming import convert_checkpoint

    shard_bytes = parse_size(max_shard_size)
    return convert_checkpoint(
        source, output, head, dtype, gguf_file, revision, untie, shard_bytes, True, keep_integers
    ).to_dict()


def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of an LLMKernel checkpoint.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="New folder to write.")],
    to: Annotated[str, typer.Option(help="llama, mistral, qwen2, qwen3, compressed-tensors or gguf.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16, of what is floating; default: the checkpoint's.")
    ] = None,
    type: Annotated[
        str | None,
        typer.Option(
            help="Of the matrices of a GGUF file: Q8_0, Q4_0, Q4_1, F16, BF16 or F32; default: that of their own forms."
        ),
    ] = None,
    embedding_type: Annotated[str | None, typer.Option(help="The same for embedding and head alone.")] = None,
    dequantize: Annotated[
        bool,
        typer.Option(
            "--dequantize",
            help="To llama, mistral, qwen2 or qwen3: floating weights of what is integer, sparse or low-rank.",
        ),
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="Most bytes of one file, such as 5GB or 500MB.")] = "5GB",
) -> dict[str, Any]:
    """Export an LLMKernel checkpoint to a format of other tools, bit-equal, where its shapes and forms allow."""
    from .outgoing import export_checkpoint

    shard_bytes = parse_size(max_shard_size)
    return export_checkpoint(model, output, to, shard_bytes, True, dtype, type, embedding_type, dequantize).to_dict()


def render_convert(result: dict[str, Any]) -> str:
    """What a conversion did, for people."""
    lines = [
        f"{result['source']} ({result['family']}) -> {result['output']}: {result['architecture']}, "
        f"{result['parameters'] / 1e6:.1f} M parameters in {result['dtype']}, {result['bytes'] / 1e6:.1f} MB, "
        f"{result['seconds']:.1f} s"
    ]
    if not result["tokenizer"]:
        lines.append("The source has no tokenizer, so the output has none.")
    if result["dropped"]:
        lines.append(f"Not written, for the model does not need them: {', '.join(result['dropped'])}")
    lines += [f"Note: {note}." for note in result["notes"]]
    if lost := result["precision"]:
        counts = f"{lost['underflowed']} underflowed, {lost['subnormal']} subnormal"
        lines.append(f"{lost['dtype']}: of {lost['values']} values that were cast {counts}")
    if result["ignored_fields"]:
        lines.append(f"Fields of config.json that its classes do not read: {', '.join(result['ignored_fields'])}")
    return "\n".join(lines)


render_export = render_convert


def parse_size(size: str, name: str = "max_shard_size") -> int:
    """Bytes of a size such as `5GB`, `1.5 GB` or `123`. Raises `ValueError`, with the option's name, for other text."""
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3, "": 1}
    text = size.strip().upper()
    number = text.rstrip("GMKB")
    unit = text[len(number) :]
    is_number = re.fullmatch(r"[0-9]+(\.[0-9]+)? ?", number) is not None
    if not is_number or unit not in units or (found := int(Decimal(number) * units[unit])) < 1:
        raise ValueError(f"{name}={size}: is not a size; give one such as 5GB or 500MB.")
    return found
