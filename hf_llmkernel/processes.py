"""Several processes at one piece of work, as `torchrun` starts them: each does its share of the samples or prompts.

Statistics are summed over all processes, so that each then solves the same equations and has the same weights. Only the
first one writes what belongs to all; what else is on disk is each one's own. A process alone does none of this.
"""

import datetime
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")
Key = TypeVar("Key")
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LONGEST_WAIT = datetime.timedelta(days=7)  # the others wait while the first one measures


def join() -> None:
    """Makes the group of the processes that `torchrun` started, unless there is one; gives each its accelerator."""
    if not is_launched():
        return
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())
    if not dist.is_initialized():
        dist.init_process_group(timeout=LONGEST_WAIT)


def is_launched() -> bool:
    """Whether `torchrun`, or what sets the same variables, started this process and others."""
    return all(name in os.environ for name in TORCHRUN_VARIABLES) and os.environ["WORLD_SIZE"] != "1"


def refuse_several(what: str, remedy: str) -> None:
    """Raises `ValueError` in the first of several processes at what one does; the others end, and leave it the word."""
    if is_launched():
        if os.environ["RANK"] != "0":
            raise SystemExit(0)  # were it an error, torchrun might end the first one before its line
        raise ValueError(f"{what}: is done by one process, and WORLD_SIZE={os.environ['WORLD_SIZE']}; {remedy}.")


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0 on."""
    return dist.get_rank() if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this is the one that writes."""
    return rank() == 0


def share(count: int) -> range:
    """Which of `count` samples are this process's: none, where there are fewer than processes.

    They take turns, so that the first few of all samples are the first ones of each process.
    """
    return range(rank(), count, world_size())


def own(samples: torch.Tensor) -> torch.Tensor:
    """Of samples `[S, …]` those of this process."""
    return samples[rank() :: world_size()]


def own_folder(folder: Path) -> Path:
    """A folder for files that are this process's own; a run by another number of processes does not find them."""
    return folder if world_size() == 1 else folder / f"process-{rank()}-of-{world_size()}"


def add_up(tensor: torch.Tensor) -> None:
    """Puts the sum of all processes' tensors into each."""
    if world_size() > 1:
        dist.all_reduce(tensor)


def gather(value: Result) -> list[Result]:
    """What each process has, in all; they wait for each other."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def summed(numbers: Mapping[Key, float]) -> dict[Key, float]:
    """Numbers of all processes added up by key, the same to the bit in each."""
    total: dict[Key, float] = {}
    for found in gather(dict(numbers)):
        for key, number in found.items():
            total[key] = total.get(key, 0.0) + number
    return total


def wait() -> None:
    """Until all processes have come here."""
    gather(None)


def on_first(work: Callable[[], Result]) -> Result:
    """What `work` returns, in all processes: the first does it when all have come here. Bad input is raised in all."""
    if world_size() == 1:
        return work()
    wait()
    outcome: list[Any] = [None, None]
    if is_first():
        try:
            outcome[0] = work()
        except (ValueError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
