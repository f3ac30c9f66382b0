"""The reference: the uncompressed model's hidden states beside those of a walk, what a block's outputs should be.

Shapes: T tokens a sample, H hidden_size.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from ..checkpoint.model_folder import ModelFolder
from .block import Block
from .inputs import InputStatistic
from .states import States
from .walk import Walk, load_block


class Reference:
    """A walk of the uncompressed model that keeps step with one over its compressed blocks.

    Args:
        source: the uncompressed checkpoint.
        layers: of each compressed block, the layer of the source that it was made of, ascending.
        folder: for its states.
        samples, length: as in `Walk`.
    """

    def __init__(self, source: ModelFolder, layers: list[int], folder: Path, samples: int, length: int):
        self.source = source
        self._ends = [*layers[1:], source.config.num_hidden_layers]
        self._layers = layers
        self._walk = Walk(source.config, folder, samples, length)
        self._middle: States | None = None
        self._last_sublayer = "mlp"

    def take_up(self, index: int, embed: Callable[[int, int], torch.Tensor]) -> None:
        """Goes to before block `index`."""
        self._walk.take_up(self._layers[index] if index < len(self._layers) else self._ends[-1], embed)
        while self._walk.index < self._layers[index]:
            self._advance(keep_middle=False)
            self._walk.settle()

    def compute(self, block: Block) -> None:
        """Runs the source's layer of a block, and those after it that were dropped."""
        end = self._ends[block.index]
        self._last_sublayer = "mlp" if block.has("mlp") else "attention"
        while self._walk.index < end:
            self._advance(keep_middle=self._walk.index == self._layers[block.index])

    def target(self, sublayer: str, begin: int, end: int) -> torch.Tensor:
        """What the states of some samples should be after a sublayer of the block, fp32 `[n, T, H]`.

        After its last one that is what enters the next block: it makes up for what was dropped, too.
        """
        states = self._walk.states if sublayer == self._last_sublayer else self._middle
        assert states is not None, "a source layer that attends has states after its attention"
        return states.read(begin, end).to(self._walk.device)

    def settle(self) -> None:
        """Removes the states of earlier blocks."""
        self._walk.settle()

    def close(self) -> None:
        """Ends the walk; its states are removed."""
        if self._middle is not None:
            self._middle.close(remove=True)
        self._walk.close()

    def _advance(self, keep_middle: bool) -> None:
        block = load_block(self.source, self._walk.index)
        middle = self._new_middle() if keep_middle and block.has("attention") else None
        begin = 0

        def watch(part: str, before: torch.Tensor, after: torch.Tensor) -> None:
            nonlocal begin
            if part == "attention" and middle is not None:
                middle.write(begin, after)
                begin += len(after)

        self._walk.watch = watch
        self._walk.run(block, {}, _nothing, advance=True)

    def _new_middle(self) -> States:
        if self._middle is not None:
            self._middle.close()
        states = self._walk.states
        path = self._walk.folder / "middle"
        self._middle = States(path, states.samples, states.length, states.width)
        return self._middle


def _nothing(site: str, inputs: InputStatistic | None) -> None:
    return None

