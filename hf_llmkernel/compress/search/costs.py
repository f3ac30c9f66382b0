"""What a layer costs in a form: bytes and stored values from its configuration, or measured milliseconds a token."""

import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from ...checkpoint.model_folder import Positions
from ...model.configuration_llm_kernel import LAYER_FIELDS, LLMKernelConfig
from ...model.modeling_llm_kernel import LLMKernelModel
from ..plan import layer_sizes

ROUNDS = 15
EVICTING_BYTES = 256 << 20  # read before each sample, so that weights come from memory as they do in a whole model


def layer_costs(unit: str, layers: Sequence[LLMKernelConfig], dtype: torch.dtype) -> list[float]:
    """The cost of each layer, from its own configuration.

    Layers of the same shapes and forms cost the same: each kind is looked at once.

    Args:
        unit: `"bytes"`, `"parameters"`, or `"latency"` in milliseconds.
        layers: each layer's own configuration.
        dtype: of what is floating.
    """
    kinds = {_kind(layer): layer for layer in layers}
    costs = dict(zip(kinds, UNITS[unit](list(kinds.values()), dtype), strict=True))
    return [costs[_kind(layer)] for layer in layers]


def _kind(layer: LLMKernelConfig) -> str:
    return json.dumps({name: getattr(layer, name) for name in LAYER_FIELDS}, sort_keys=True)


def decode_milliseconds(layers: Sequence[LLMKernelConfig], dtype: torch.dtype) -> list[float]:
    """Median milliseconds of one token through a block of each configuration, of random weights, on the CPU.

    The blocks take turns, round by round, so that a slow moment meets all. It is what this machine and the modules as
    they are take: a form that is computed as a dense product is timed as one.
    """
    blocks = [_decoding(layer, dtype) for layer in layers]
    evicting = torch.zeros(EVICTING_BYTES // 4)
    seconds: list[list[float]] = [[] for _ in blocks]
    with torch.inference_mode(False), torch.no_grad():
        for number in range(ROUNDS + 1):
            for samples, decode in zip(seconds, blocks, strict=True):
                evicting.sum()
                started = time.perf_counter()
                decode()
                if number:  # the first round unpacks what is kept unpacked
                    samples.append(time.perf_counter() - started)
    return [1000 * statistics.median(samples) for samples in seconds]


def _decoding(layer: LLMKernelConfig, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """One token through a random block of a configuration."""
    config = copy.deepcopy(layer)
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 1, None
    config.layer_types = (config.layer_types or ["full_attention"])[:1]
    config._attn_implementation = "sdpa"
    block = LLMKernelModel(config).layers[0].to(dtype).eval()
    given = Positions(config, 1).arguments(0)
    given["position_embeddings"] = tuple(tensor.to(dtype) for tensor in given["position_embeddings"])
    states = torch.randn(1, 1, config.hidden_size).to(dtype)
    return lambda: block(states, **given)


UNITS: dict[str, Callable[[list[LLMKernelConfig], torch.dtype], list[float]]] = {
    "bytes": lambda layers, dtype: [layer_sizes(layer, dtype)[1] for layer in layers],
    "parameters": lambda layers, dtype: [layer_sizes(layer, dtype)[0] for layer in layers],
    "latency": decode_milliseconds,
}
