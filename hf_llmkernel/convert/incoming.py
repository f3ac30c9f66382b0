"""Other families' checkpoints in: Llama, Mistral, Qwen2 and Qwen3 become this family, tensor by tensor.

Nothing is computed but a cast where one is asked for, so logits stay what they were. Memory holds one piece of one
tensor at a time.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedConfig

from ..checkpoint import (
    CheckpointReader,
    CheckpointWriter,
    check_disk_space,
    check_output,
    is_finite,
    output_folder,
)
from ..checkpoint.writer import SHARD_BYTES
from ..model import modeling_llm_kernel
from ..model.configuration_llm_kernel import LLMKernelConfig
from .families import FAMILIES, fields_without_meaning, parse_stock_config, to_llm_kernel
from .gguf_config import gguf_config
from .gguf_file import GGUFFile
from .names import HEADS, Plan, Tensors, check_head, equal_tensors, head_of, plan_copies, tensors_of
from .source import (
    Source,
    check_companions,
    copy_companions,
    has_tokenizer,
    keep_generation_defaults,
    legacy_generation,
    locate_source,
)
from .tokenizer import keep_tokenizer_class, save_gguf_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL_FILES_BYTES = 64 << 20  # what a tokenizer and the payload take at most


@dataclass(frozen=True)
class Conversion:
    """What a conversion did; `to_dict` is what the command prints."""

    source: str
    output: str
    family: str
    architecture: str
    dtype: str
    parameters: int
    bytes: int
    files: list[str]
    tokenizer: bool
    dropped: list[str] = field(default_factory=list)
    ignored_fields: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


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
) -> Conversion:
    """Turns a Llama, Mistral, Qwen2 or Qwen3 checkpoint into one of this family, with equal logits.

    Args:
        source: a folder with config.json and safetensors, a `.gguf` file, or a Hub id.
        output_dir: a new or empty folder; it appears when everything in it is complete.
        head: `"base"`, `"causal-lm"`, `"sequence-classification"`, `"token-classification"` or `"question-answering"`;
            by default the source's. Another one leaves the source's own head behind.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; by default every tensor keeps its own (GGUF gives float32).
        gguf_file: name of a GGUF file in the folder or repository.
        revision: branch, tag or commit of a Hub repository.
        untie: where the config ties the head but the file holds another one, keep both instead of raising.
        shard_bytes: most bytes of one file written.
        progress: whether to show a bar on stderr.

    Raises:
        ValueError: bad input, naming the file, key or field and the remedy.
        OSError: no space, or the Hub cannot be reached.
    """
    started = time.monotonic()
    output_dir = Path(output_dir).expanduser()
    check_output(output_dir)
    job = _prepare(source, head, dtype, gguf_file, revision, untie)
    with output_folder(output_dir) as folder:
        files = write_tensors(job.tensors, job.plan, folder, job.cast, shard_bytes, progress, "converting")
        tokenizer = _carry_over(job, folder)
        job.config.save_pretrained(folder)
    return Conversion(
        source=str(source),
        output=str(output_dir),
        family=job.stock.model_type,
        architecture=(job.config.architectures or [""])[0],
        dtype=str(job.config.dtype).removeprefix("torch."),
        parameters=sum(count_values(job.tensors, key) for key in job.plan.copies.values()),
        bytes=sum((Path(output_dir) / name).stat().st_size for name in files),
        files=files,
        tokenizer=tokenizer,
        dropped=job.plan.dropped,
        ignored_fields=sorted(set(fields_without_meaning(job.fields, job.stock)) - set(legacy_generation(job.fields))),
        seconds=round(time.monotonic() - started, 2),
    )


def converted_config(source: str | Path) -> tuple[LLMKernelConfig, bool]:
    """The configuration that `convert_checkpoint` would write, its dtype decided, and whether of a causal model.

    Raises:
        ValueError: what `convert_checkpoint` would refuse before it writes.
    """
    config = _prepare(source, head=None, dtype=None, gguf_file=None, revision=None, untie=False).config
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


def _prepare(
    source: str | Path,
    head: str | None,
    dtype: str | torch.dtype | None,
    gguf_file: str | None,
    revision: str | None,
    untie: bool,
) -> _Job:
    check_head(head)
    cast = _dtype(dtype)
    found = locate_source(source, gguf_file, revision)
    fields, tensors, where = _open_source(found)
    stock = parse_stock_config(fields, where)
    config = to_llm_kernel(stock, where)
    prefix = FAMILIES[stock.model_type].prefix
    kind = head or head_of(stock.architectures, prefix, tensors.keys(), where)
    if config.tie_word_embeddings and kind == "causal-lm":
        _settle_tying(config, tensors, untie, where)
    model_class = getattr(modeling_llm_kernel, f"LLMKernel{HEADS[kind].suffix}")
    config.architectures = [model_class.__name__]
    config.dtype = cast or config.dtype or _first_dtype(tensors)
    plan = plan_copies(tensors, *tensors_of(model_class, config), head is not None, where)
    return _Job(found, fields, tensors, stock, config, plan, cast)


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and name not in DTYPES:
        raise ValueError(f"dtype={name}: is not one of {list(DTYPES)}; choose one, or leave it to the source.")
    return None if name is None else DTYPES[name]


def _open_source(found: Source) -> tuple[dict[str, Any], Tensors, str]:
    """The fields of its config.json, its tensors, and what messages call the configuration."""
    if found.gguf is not None:
        file = GGUFFile(found.gguf)
        fields = gguf_config(file)
        if file.metadata["general.architecture"] == "llama":
            heads = fields["num_attention_heads"]
            file.undo_permutation(heads, fields.get("num_key_value_heads", heads))
        return fields, file, str(found.gguf)
    path = found.folder / "config.json"
    check_companions(found.folder)
    return read_config_fields(path), CheckpointReader(found.folder), str(path)


def read_config_fields(path: Path) -> dict[str, Any]:
    """The fields of a config.json. Raises `ValueError` where it is missing or is no table."""
    if not path.is_file():
        raise ValueError(f"{path}: missing; give the folder of a checkpoint, with its config.json.")
    try:
        fields = json.loads(path.read_bytes())
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: is not valid JSON; fetch this file again.")
    return fields


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


def count_values(tensors: Tensors, key: str) -> int:
    """How many values a tensor of a source has."""
    return torch.Size(tensors.shape(key)).numel()


def write_tensors(
    tensors: Tensors,
    plan: Plan,
    folder: Path,
    dtype: torch.dtype | None,
    shard_bytes: int,
    progress: bool,
    verb: str,
) -> list[str]:
    """Copies the tensors of a plan piece by piece, cast if a dtype is given, and returns the names of the files.

    Raises:
        ValueError: a tensor that is not finite, before or after the cast.
        OSError: no space for all of it, found out before the first byte.
    """
    sizes = {key: count_values(tensors, key) * (dtype or tensors.dtype(key)).itemsize for key in plan.copies.values()}
    check_disk_space(folder, sum(sizes.values()) + SMALL_FILES_BYTES)
    writer = CheckpointWriter(folder, shard_bytes)
    bar = tqdm(total=sum(sizes.values()), desc=verb, unit="B", unit_scale=True, mininterval=0.5, disable=not progress)
    with bar, writer:
        for name, key in plan.copies.items():
            kept = dtype or tensors.dtype(key)
            blocks = _cast(tensors.blocks(key), key, kept, tensors.file(key), bar.update)
            writer.add_blocks(name, kept, tensors.shape(key), blocks)
    return sorted(path.name for path in folder.glob("*.safetensors"))


def _cast(
    blocks: Iterator[torch.Tensor], key: str, dtype: torch.dtype, file: Path, advance: Callable[[int], Any]
) -> Iterator[torch.Tensor]:
    for block in blocks:
        cast = block.to(dtype)
        if block.dtype != dtype and not is_finite(cast):
            name = str(dtype).removeprefix("torch.")
            raise ValueError(f"dtype={name}: {key} in {file} has values beyond its range; choose bfloat16 or float32.")
        yield cast
        advance(cast.nbytes)


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
