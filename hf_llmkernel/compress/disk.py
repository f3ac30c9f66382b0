"""Files that are there whole or not at all, whenever the process is killed."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

FULL_DISK = f"os error {errno.ENOSPC}"


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file that is there whole or not at all. Raises `OSError` where the disk is full."""
    part = path.with_suffix(".part")
    try:
        here = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(here, part, metadata={"format": "pt"})
    except SafetensorError as error:  # the library's name for whatever happens, which would pass for bad input
        if FULL_DISK in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise
    part.replace(path)


def write_json(path: Path, content: Any) -> None:
    """A JSON file that is there whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content), encoding="utf-8")
    part.replace(path)
