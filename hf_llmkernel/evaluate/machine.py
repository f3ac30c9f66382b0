"""What a measurement ran on, as a report states it: nothing that names the machine or its user."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil


def describe_machine() -> dict[str, Any]:
    """Processor, cores, threads, memory and system."""
    import torch

    return {
        "cpu": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide the figures."""
    import torch
    import transformers

    from .. import __version__

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_llmkernel": __version__,
    }


def describe_commit(folder: Path) -> str | None:
    """Commit of the git work tree that `folder` lies in, with `-dirty` where its files differ; None outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        described = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:  # git is not installed
        return None
    return described.stdout.strip() or None


def available_bytes() -> int:
    """Bytes of memory that programs can still take without pushing others out."""
    return psutil.virtual_memory().available


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
