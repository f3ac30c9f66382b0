"""A dense model moved off the 4-bit grid that its weights may lie on, so that methods of 4 bits can be compared on it.

    python scripts/bench/perturb.py MODEL OUTPUT [--seed 0]

MODEL is a folder that `llmkernel convert` wrote. Every weight of a linear moves by less than half a step of a grid of 4
bits in groups of 32, at random, as if rounding to that grid were undone: nothing of the old grid is left. The result is
a model of its own, worse than MODEL; what quantizing it costs is relative to it.
"""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GROUP = 32
STEPS = 7.5  # of a 4-bit grid on one side of zero


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shutil.copytree(arguments.model, arguments.output)
    generator = torch.Generator().manual_seed(arguments.seed)
    for file in sorted(arguments.output.glob("*.safetensors")):
        tensors = load_file(file)
        moved = {name: move(tensor, generator) if "_proj." in name else tensor for name, tensor in tensors.items()}
        save_file(moved, file, metadata={"format": "pt"})


def move(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A weight `[O, I]` with a uniform part of each group's step added."""
    if weight.dim() != 2 or weight.shape[1] % GROUP:
        return weight
    groups = weight.float().view(len(weight), -1, GROUP)
    step = groups.abs().amax(-1, keepdim=True) / STEPS
    moved = groups + step * (torch.rand(groups.shape, generator=generator) - 0.5)
    return moved.view_as(weight).to(weight.dtype)


if __name__ == "__main__":
    main()
