"""Does vLLM read an export? `python vllm_reads_export.py FOLDER`, where vLLM can be imported; no GPU is needed.

vLLM's own class chooses a scheme for every linear of what `llmkernel export … --to compressed-tensors` wrote, fused as
its Llama fuses them; the parameters that the scheme makes are held against the tensors of the file.
"""

import json
import os
import sys
from pathlib import Path
from unittest import mock

os.environ["VLLM_BATCH_INVARIANT"] = "1"  # parameters without the kernels, which need a GPU

import torch
import vllm.model_executor.parameter as parameters  # type: ignore[import-not-found]
from safetensors.torch import load_file
from vllm.model_executor.layers.linear import ReplicatedLinear  # type: ignore[import-not-found]
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (  # type: ignore[import-not-found]
    CompressedTensorsConfig,
)

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def made(config: CompressedTensorsConfig, name: str, outputs: list[int], inputs: int, dtype: torch.dtype) -> dict:
    """Shape and dtype of the parameters that vLLM makes for a linear."""
    layer = ReplicatedLinear.__new__(ReplicatedLinear)
    torch.nn.Module.__init__(layer)
    arguments = {"params_dtype": dtype, "weight_loader": lambda *_: None}
    config.get_scheme(layer, name).create_weights(layer, sum(outputs), inputs, outputs, inputs, **arguments)
    return {key: (list(part.shape), part.dtype) for key, part in layer.named_parameters()}


def check(folder: Path) -> dict[str, str]:
    """`{linear: what does not fit}`."""
    fields = json.loads((folder / "config.json").read_text())
    config, dtype = CompressedTensorsConfig.from_config(fields["quantization_config"]), getattr(torch, fields["dtype"])
    config.packed_modules_mapping = FUSED
    tensors = {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
    quantized = {key.removesuffix(".weight_shape") for key in tensors if key.endswith(".weight_shape")}
    wholes = {part: whole for whole, parts in FUSED.items() for part in parts}
    faults = {}
    paths = [name.rpartition(".") for name in quantized]
    for path, leaf in sorted({(path, wholes.get(leaf, leaf)) for path, _, leaf in paths}):
        parts = [f"{path}.{part}" for part in FUSED.get(leaf, [leaf])]
        try:
            shapes = [tensors[f"{part}.weight_shape"].tolist() for part in parts if part in quantized]
            wanted = made(config, f"{path}.{leaf}", [rows for rows, _ in shapes], shapes[0][1], dtype)
            names = {name for key in tensors for path, _, name in [key.rpartition(".")] if path in parts} - {"bias"}
            found = {name: torch.cat([tensors[f"{part}.{name}"] for part in parts]) for name in names}
            found["weight_shape"] = found["weight_shape"][:2]
            found = {name: (list(tensor.shape), tensor.dtype) for name, tensor in found.items()}
            if found != wanted:
                faults[f"{path}.{leaf}"] = f"{found} in the file, {wanted} in vLLM"
        except (ValueError, KeyError, RuntimeError) as error:  # parts that are not alike
            faults[f"{path}.{leaf}"] = f"{type(error).__name__}: {error}"
    return faults


if __name__ == "__main__":
    ranks = {"get_tensor_model_parallel_rank": lambda: 0, "get_tensor_model_parallel_world_size": lambda: 1}
    supported = mock.patch.object(CompressedTensorsConfig, "_check_scheme_supported", lambda *_, **__: True)
    with mock.patch.multiple(parameters, **ranks), supported:
        faults = check(Path(sys.argv[1]))
    print(json.dumps(faults, indent=2) if faults else "every linear fits")
    sys.exit(bool(faults))
