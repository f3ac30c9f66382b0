"""A checkpoint folder of this family, one part at a time: what walks over a model too large for memory reads.

Reading order: names -> stored tensors -> modules that compute in fp32 with exactly the values that are stored.
"""

import copy
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from ..model.configuration_llm_kernel import LinearForm, LLMKernelConfig
from ..model.linear_llm_kernel import build_embedding, build_linear
from ..model.modeling_llm_kernel import LLMKernelDecoderLayer, LLMKernelRMSNorm, LLMKernelRotaryEmbedding
from .bitsandbytes import BitsAndBytes, encoded_linears
from .header import StoredTensor
from .reader import CheckpointReader

EXACT_SUFFIXES = ("scales", "zero_points")  # keep the dtype of their form, whatever the model's


class ModelFolder:
    """The configuration and the tensors of a checkpoint of this family.

    Args:
        folder: with `config.json` and safetensors.

    Raises:
        ValueError: a damaged checkpoint, or tensors of layers that the configuration does not have.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.reader = CheckpointReader(folder)
        self.config = LLMKernelConfig.from_pretrained(folder)
        self.config._attn_implementation = "sdpa"
        self.quantization = BitsAndBytes.of(self.config)
        keys = self.reader.keys()
        if self.quantization is None and (encoded := encoded_linears(keys)):
            raise ValueError(
                f"{next(iter(encoded))}: is stored as bitsandbytes does, and config.json does not ask for that in its "
                "quantization_config; it and the weights must be of one checkpoint."
            )
        self.prefix = "model." if any(key.startswith("model.layers.") for key in keys) else ""
        self._blocks, self.others = _group_by_block(keys, f"{self.prefix}layers.")
        if stray := sorted(set(self._blocks) - set(range(self.config.num_hidden_layers))):
            raise ValueError(
                f"{self._blocks[stray[0]][0]}: config.json has {self.config.num_hidden_layers} layers only; it and the "
                "weights must be of one checkpoint."
            )
        self._sources = list(range(self.config.num_hidden_layers))  # the layer of the files that is layer i here

    def restricted(self, config: LLMKernelConfig, kept: list[int]) -> "ModelFolder":
        """The same checkpoint with only the layers `kept`, numbered anew, as `config` says."""
        fewer = copy.copy(self)
        fewer.config = config
        fewer.config._attn_implementation = "sdpa"
        fewer._sources = [self._sources[index] for index in kept]
        return fewer

    @property
    def has_head(self) -> bool:
        """Whether there is a language-model head, tied or not."""
        tied = self.config.tie_word_embeddings and bool(self.prefix)
        return tied or any(name.startswith("lm_head.") for name in self.others)

    @property
    def dtype(self) -> torch.dtype:
        """Of what is stored floating."""
        if isinstance(self.config.dtype, torch.dtype):
            return self.config.dtype
        dtypes = map(self.reader.dtype, self.reader.keys())
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)

    def block_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """`{name inside the block: tensor as stored}` of layer `index`, as in `self_attn.q_proj.weight`."""
        source = self._sources[index]
        path = f"{self.prefix}layers.{source}."
        return {name.removeprefix(path): self.reader.tensor(name) for name in self._blocks.get(source, [])}

    def stored_block(self, index: int) -> dict[str, StoredTensor]:
        """Where the same tensors lie."""
        source = self._sources[index]
        path = f"{self.prefix}layers.{source}."
        return {name.removeprefix(path): self.reader.stored(name) for name in self._blocks.get(source, [])}

    def layer_config(self, index: int) -> LLMKernelConfig:
        """A layer's own configuration, a copy."""
        return cast(LLMKernelConfig, copy.deepcopy(self.config.per_layer_config[index]))

    def block(self, index: int) -> LLMKernelDecoderLayer:
        """Layer `index` as a module in fp32."""
        return block_module(self.layer_config(index), index, self.block_tensors(index), self.quantization)

    def embedding(self) -> nn.Module:
        """The token embedding in fp32."""
        form = LinearForm.from_dict(self.config.embed_tokens_form)
        return embedding_module(self.config, form, self._stored(f"{self.prefix}embed_tokens"))

    def norm(self) -> LLMKernelRMSNorm:
        """The norm before the head, in fp32."""
        with torch.device("meta"):
            norm = LLMKernelRMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        norm.load_state_dict(in_fp32(self._stored(f"{self.prefix}norm")), assign=True)
        return norm

    def head(self) -> nn.Module:
        """The language-model head in fp32, the embedding's own tensors where it is tied."""
        tied = self.config.tie_word_embeddings
        form = LinearForm.from_dict(self.config.embed_tokens_form if tied else self.config.lm_head_form)
        stored = self._stored(f"{self.prefix}embed_tokens" if tied else "lm_head")
        if not stored:
            raise ValueError(f"{self.folder}: has no language-model head, so no perplexity; use a causal model.")
        with torch.device("meta"):
            head = build_linear(self.config.hidden_size, self.config.vocab_size, form)
        if self.quantization is not None and not {"weight.absmax", "SCB"}.isdisjoint(stored):
            return self.quantization.linear("embed_tokens" if tied else "lm_head", cast(nn.Linear, head), stored)
        head.load_state_dict(in_fp32(stored), assign=True)
        return head.eval()

    def _stored(self, module: str) -> dict[str, torch.Tensor]:
        path = f"{module}."
        return {name.removeprefix(path): self.reader.tensor(name) for name in self.others if name.startswith(path)}


class Positions:
    """What the blocks of a model are given beside hidden states, for whole sequences of one length without padding."""

    def __init__(self, config: LLMKernelConfig, length: int, device: torch.device | str = "cpu"):
        self._kinds = config.layer_types or []
        positions = torch.arange(length, device=device).unsqueeze(0)
        probe = torch.empty(1, length, config.hidden_size, device=device)
        self._embeddings = LLMKernelRotaryEmbedding(config).to(device)(probe, positions)
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        given = {"attention_mask": None, "past_key_values": None, "position_ids": positions}
        self._masks = {
            kind: makers[kind](config=config, inputs_embeds=probe, **given) for kind in set(self._kinds)
        }

    def arguments(self, index: int) -> dict[str, Any]:
        """Arguments of block `index` or of its attention."""
        return {"position_embeddings": self._embeddings, "attention_mask": self._masks[self._kinds[index]]}


def block_module(
    layer: LLMKernelConfig, index: int, tensors: dict[str, torch.Tensor], quantization: BitsAndBytes | None = None
) -> LLMKernelDecoderLayer:
    """A decoder layer that computes in fp32 with the values of its stored tensors, or as bitsandbytes computes."""
    with torch.device("meta"):
        module = LLMKernelDecoderLayer(layer, index)
    quantized = {} if quantization is None else encoded_linears(tensors)
    apart = {key for keys in quantized.values() for key in keys}
    others = {name: tensor for name, tensor in tensors.items() if name not in apart}
    left = module.load_state_dict(in_fp32(others), assign=True, strict=not quantized)
    if odd := {*left.unexpected_keys, *left.missing_keys} ^ {f"{name}.weight" for name in quantized}:
        raise ValueError(f"layers.{index}.{min(odd)}: missing or unknown; config.json and the weights must be of one.")
    for name, keys in quantized.items():
        own = {key.removeprefix(f"{name}."): tensors[key] for key in keys}
        plain = cast(nn.Linear, module.get_submodule(name))
        linear = cast(BitsAndBytes, quantization).linear(f"layers.{index}.{name}", plain, own)
        module.set_submodule(name, linear)
    return module.eval()


def embedding_module(config: LLMKernelConfig, form: LinearForm, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """A token embedding that looks up fp32 rows of its stored tensors."""
    with torch.device("meta"):
        embedding = build_embedding(config.vocab_size, config.hidden_size, form)
    embedding.load_state_dict(in_fp32(tensors), assign=True)
    return embedding.eval()


def in_fp32(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stored tensors with their floating values in fp32."""
    return {name: stored_as(name, tensor, torch.float32) for name, tensor in tensors.items()}


def stored_as(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in the model's dtype, but for integers, and scales and zero points, which have their own.

    Raises:
        ValueError: values beyond the range of the dtype.
    """
    if not tensor.is_floating_point() or name.rpartition(".")[2] in EXACT_SUFFIXES:
        return tensor
    cast = tensor.to(dtype)
    if cast.dtype != tensor.dtype and not cast.isfinite().all():
        largest = f"{float(tensor.abs().max()):.4g}"
        raise ValueError(
            f"dtype={str(dtype)[6:]}: {name} has values beyond its range, up to {largest}; choose bfloat16 or float32."
        )
    return cast


def _group_by_block(names: list[str], prefix: str) -> tuple[dict[int, list[str]], list[str]]:
    """Names of a checkpoint's tensors by the layer they belong to, and those that belong to none."""
    blocks: dict[int, list[str]] = {}
    others = []
    for name in names:
        number, _, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and number.isdigit() and rest:
            blocks.setdefault(int(number), []).append(name)
        else:
            others.append(name)
    return blocks, others
