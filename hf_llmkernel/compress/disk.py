"""Files that are there whole or not at all, whenever the process is killed."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file that is there whole or not at all."""
    part = path.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata={"format": "pt"})
    part.replace(path)


def write_json(path: Path, content: Any) -> None:
    """A JSON file that is there whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content), encoding="utf-8")
    part.replace(path)
