"""Ranks of a test as processes on this machine's CPU, talking over gloo.

transformers' tensor-parallel and FSDP tests import a module of this name, which its source distribution does not carry.
"""

import functools
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing as torch_multiprocessing

# Ranks are forked from a process that has imported these and done nothing else, so that each starts at once.
PRELOADED = [
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "transformers.testing_utils",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "hf_llmkernel.model.modeling_llm_kernel",
]
multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)


def run_distributed(world_size: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes `function(rank, ...)` a function `(...)` that calls it in `world_size` ranks of one process group."""

    def distribute(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            # The store lives as long as the ranks, so its port, free now, stays theirs.
            store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            _start_rank_processes(_run_rank, (world_size, store.port, function, args, kwargs), world_size)

        return run

    return distribute


def _run_rank(rank: int, world_size: int, port: int, function: Callable[..., None], args: tuple, kwargs: dict) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    store = dist.TCPStore("localhost", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    function(rank, *args, **kwargs)
    dist.destroy_process_group()


def _start_rank_processes(function: Callable[..., None], args: tuple, nprocs: int) -> None:
    """Calls `function(rank, *args)` in `nprocs` processes; raises where one of them does."""
    torch_multiprocessing.start_processes(function, args, nprocs, start_method="forkserver")


def _get_distributed_backend() -> str:
    return "gloo"


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    torch.set_num_threads(1)  # ranks share the cores
