"""Other families' checkpoints in: Llama, Mistral, Qwen2 and Qwen3 become this family, tensor by tensor.

Nothing is computed but a cast where one is asked for, so logits stay what they were. Memory holds one piece of one
tensor at a time.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..checkpoint import CheckpointReader, check_output, output_folder
from ..checkpoint.precision import check_products
from ..checkpoint.writer import SHARD_BYTES
from ..model import modeling_llm_kernel
from ..model.configuration_llm_kernel import LLMKernelConfig
from .compressed_folder import open_compressed
from .compressed_tensors import METHOD, QuantizationConfig
from .conversion import Conversion, check_dtype, count_parameters, write_tensors
from .families import FAMILIES, fields_without_meaning, parse_stock_config, to_llm_kernel
from .gguf_config import gguf_config, gguf_layers
from .gguf_file import GGUFFile
from .gguf_integers import open_integers
from .gguf_metadata import INTERLEAVED
from .matrices import Matrix, matrices
from .names import (
    HEADS,
    Plan,
    Tensors,
    check_head,
    equal_tensors,
    head_of,
    plan_copies,
    tensors_of,
    whole_tensor,
)
from .own_dequantized import dequantize_own
from .source import (
    Source,
    check_companions,
    copy_companions,
    has_tokenizer,
    keep_generation_defaults,
    legacy_generation,
    locate_source,
    read_config_fields,
)
from .tokenizer import keep_tokenizer_class, save_gguf_tokenizer


def convert_checkpoint(
    source: str | Path,
    output_dir: str | Path,
    head: str | None = None,
    dtype: str | torch.dtype | None = None,
    gguf_file: str | None = None,
    revision: str | None = None,
    untie: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
    keep_integers: bool | None = None,
) -> Conversion:
    """Turns a Llama, Mistral, Qwen2 or Qwen3 checkpoint into one of this family, with equal logits.

    Args:
        source: a folder with config.json and safetensors, a `.gguf` file, or a Hub id.
        output_dir: a new or empty folder; it appears when everything in it is complete.
        head: `"base"`, `"causal-lm"`, `"sequence-classification"`, `"token-classification"` or `"question-answering"`;
            by default the source's. Another one leaves the source's own head behind.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; by default every tensor keeps its own (those of a
            GGUF file only beside `keep_integers`, else they become float32).
        gguf_file: name of a GGUF file in the folder or repository.
        revision: branch, tag or commit of a Hub repository.
        untie: where the config ties the head but the file holds another one, keep both instead of raising.
        shard_bytes: most bytes of one file written.
        progress: whether to show a bar on stderr.
        keep_integers: of a quantized source, keep the codes in this family's integer forms, bit-equal, or dequantize
            them. By default those of a compressed-tensors folder are kept, for it is made from a floating checkpoint
            that can be had instead; a GGUF file is often the only one, and what compresses and trains starts from
            floating weights, so it is dequantized. `False` makes floating weights of this family's own integers too:
            masks, ranks and whatever layers have of their own stay, and the result trains.

    Raises:
        ValueError: bad input, naming the file, key or field and the remedy.
        OSError: no space, or the Hub cannot be reached.
    """
    started = time.monotonic()
    output_dir = Path(output_dir).expanduser()
    check_output(output_dir)
    if keep_integers is False and (folder := _own_folder(source, gguf_file, revision, head, untie)):
        made = dequantize_own(folder, output_dir, check_dtype(dtype), shard_bytes, progress)
        return replace(made, source=str(source))
    job = _prepare(source, head, dtype, gguf_file, revision, untie, keep_integers)
    with output_folder(output_dir) as folder:
        files, precision = write_tensors(job.tensors, job.plan, folder, job.cast, shard_bytes, progress, "converting")
        tokenizer = _carry_over(job, folder)
        job.config.save_pretrained(folder)
    return Conversion(
        source=str(source),
        output=str(output_dir),
        family=job.stock.model_type,
        architecture=(job.config.architectures or [""])[0],
        dtype=str(job.config.dtype).removeprefix("torch."),
        parameters=count_parameters(job.tensors, job.plan, job.config),
        bytes=sum((Path(output_dir) / name).stat().st_size for name in files),
        files=files,
        tokenizer=tokenizer,
        dropped=job.plan.dropped,
        ignored_fields=sorted(set(fields_without_meaning(job.fields, job.stock)) - set(legacy_generation(job.fields))),
        notes=job.notes,
        precision=precision,
        seconds=round(time.monotonic() - started, 2),
    )


def _own_folder(
    source: str | Path, gguf_file: str | None, revision: str | None, head: str | None, untie: bool
) -> Path | None:
    """The folder of a source of this family, else `None`. Raises `ValueError` for options of other families."""
    found = locate_source(source, gguf_file, revision)
    if found.gguf is not None:
        return None
    where = found.folder / "config.json"
    if read_config_fields(where).get("model_type") != LLMKernelConfig.model_type:
        return None
    for name, value in (("head", head), ("untie", untie or None)):
        if value is not None:
            raise ValueError(f"{name}={value}: {where} is of this family already; leave it out.")
    check_companions(found.folder)
    return found.folder


def converted_config(source: str | Path) -> tuple[LLMKernelConfig, bool]:
    """The configuration that `convert_checkpoint` would write, its dtype decided, and whether of a causal model.

    Raises:
        ValueError: what `convert_checkpoint` would refuse before it writes.
    """
    config = _prepare(source, head=None, dtype=None, gguf_file=None, revision=None, untie=False, keep=None).config
    return config, (config.architectures or [""])[0].endswith(HEADS["causal-lm"].suffix)


@dataclass(frozen=True)
class _Job:
    """A source that has been read and found sound, and what becomes of it; nothing is written yet."""

    found: Source
    fields: dict[str, Any]
    tensors: Tensors
    stock: PreTrainedConfig
    config: LLMKernelConfig
    plan: Plan
    cast: torch.dtype | None
    notes: list[str]


def _prepare(
    source: str | Path,
    head: str | None,
    dtype: str | torch.dtype | None,
    gguf_file: str | None,
    revision: str | None,
    untie: bool,
    keep: bool | None,
) -> _Job:
    check_head(head)
    cast = check_dtype(dtype)
    found = locate_source(source, gguf_file, revision)
    fields, tensors, where, kept, notes = _open_source(found, keep)
    stock = parse_stock_config(fields, where)
    layers = [] if found.gguf is None else gguf_layers(GGUFFile(found.gguf))
    config = to_llm_kernel(stock, where, {matrix.path: matrix.form for matrix in kept}, layers)
    _check_shapes(config, kept, where)
    prefix = FAMILIES[stock.model_type].prefix
    kind = head or head_of(stock.architectures, prefix, tensors.keys(), where)
    if config.tie_word_embeddings and kind == "causal-lm":
        _settle_tying(config, tensors, untie, where)
    model_class = getattr(modeling_llm_kernel, f"LLMKernel{HEADS[kind].suffix}")
    config.architectures = [model_class.__name__]
    config.dtype = cast or config.dtype or (_first_dtype(tensors) if found.gguf is None else torch.float32)
    plan = plan_copies(tensors, *tensors_of(model_class, config), head is not None, where)
    if config.dtype == torch.float16:  # the others reach as far as scales do
        for matrix in kept:
            read = partial(whole_tensor, tensors, matrix.label)
            check_products(matrix.label, matrix.form, matrix.shape, torch.float16, read)
    return _Job(found, fields, tensors, stock, config, plan, cast, notes)


def _open_source(found: Source, keep: bool | None) -> tuple[dict[str, Any], Tensors, str, list[Matrix], list[str]]:
    """The fields of its config.json, its tensors, what messages call the configuration, what is kept packed, notes."""
    if found.gguf is not None:
        file = GGUFFile(found.gguf)
        fields = gguf_config(file)
        if file.metadata["general.architecture"] in INTERLEAVED:
            file.undo_permutation(*_heads_of_layers(fields, gguf_layers(file)))
        tensors, kept, notes = open_integers(file) if keep else (file, [], [])
        return fields, tensors, str(found.gguf), kept, notes
    path = found.folder / "config.json"
    check_companions(found.folder)
    fields, reader = read_config_fields(path), CheckpointReader(found.folder)
    quantization = fields.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        return fields, reader, str(path), [], []
    del fields["quantization_config"]
    tensors, kept = open_compressed(reader, QuantizationConfig(quantization, str(path)), keep is not False)
    return fields, tensors, str(path), kept, []


def _heads_of_layers(fields: dict[str, Any], layers: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Heads, and key/value heads, of every layer; `layers` have their own, as `gguf_layers` says."""
    heads = fields["num_attention_heads"]
    usual = {"num_attention_heads": heads, "num_key_value_heads": fields.get("num_key_value_heads", heads)}
    all_layers = [usual | layer for layer in layers or [{}] * fields["num_hidden_layers"]]
    own = [(layer["num_attention_heads"], layer["num_key_value_heads"]) for layer in all_layers]
    return [heads for heads, _ in own], [heads for _, heads in own]


def _check_shapes(config: LLMKernelConfig, kept: list[Matrix], where: str) -> None:
    """Packed tensors of several widths have one shape: their matrix must be as wide as the configuration makes it."""
    shapes = {matrix.path: matrix.shape for matrix in matrices(config)}
    for matrix in kept:
        if shapes.get(matrix.path, matrix.shape) != matrix.shape:
            raise ValueError(
                f"{matrix.label}: is packed as {list(matrix.shape)}, but {where} makes it "
                f"{list(shapes[matrix.path])}; use the config.json and the weights of one checkpoint."
            )


def _settle_tying(config: LLMKernelConfig, tensors: Tensors, untie: bool, where: str) -> None:
    """Where a tied source holds a head too: equal to the embedding it is left out, and else a matter of choice."""
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if not {embedding, head} <= set(tensors.keys()) or equal_tensors(tensors, embedding, head):
        return
    if not untie:
        raise ValueError(
            f"{head}: differs from {embedding} in {tensors.file(head)}, though {where} says tie_word_embeddings; pass "
            "untie (--untie) to keep both, or correct the config."
        )
    config.tie_word_embeddings = False


def _first_dtype(tensors: Tensors) -> torch.dtype:
    dtypes = map(tensors.dtype, tensors.keys())
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def _carry_over(job: _Job, folder: Path) -> bool:
    """Tokenizer, templates and generation defaults; whether there is a tokenizer."""
    if job.found.gguf is not None:
        return save_gguf_tokenizer(job.found.gguf, job.stock, folder)
    copy_companions(job.found.folder, folder)
    keep_generation_defaults(job.fields, folder)
    if not has_tokenizer(folder):
        return False
    keep_tokenizer_class(job.found.folder, folder, job.config)
    return True
