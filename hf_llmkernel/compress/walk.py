"""The walk: hidden states go through a block site by site, and what enters a site is seen before it is computed.

In one forward of a block every linear is changed *after* its inputs were seen and *before* its outputs are computed:
each sees what the changed ones before it put out, and nothing is computed twice.

Under `torchrun` each process walks its share of the samples, and statistics are summed over all (`processes.py`).

Shapes: S samples of this process, T tokens a sample, H hidden_size, I inputs of a site.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from .. import processes
from ..checkpoint.model_folder import ModelFolder, Positions
from ..model.configuration_llm_kernel import LLMKernelConfig
from ..model.modeling_llm_kernel import LLMKernelDecoderLayer
from .block import SITES, SUBLAYER_MODULES, Block
from .inputs import InputStatistic, changed_inputs
from .states import States

BATCH_TOKENS = 2048
WITHOUT_FP64 = ("mps",)
# Of each sublayer: the site it begins with, that of its last linear, and that linear.
SUBLAYER_SITES = {
    "attention": ("attention_input", "attention_output", "o_proj"),
    "mlp": ("mlp_input", "mlp_output", "down_proj"),
}
Visit = Callable[[str, InputStatistic | None], torch.Tensor | None]


class Walk:
    """Hidden states that enter block `index`, in a folder of their own.

    Args:
        config: of the model, for positions and masks.
        folder: for the states; where it has those of an interrupted walk, they are taken up.
        samples, length: of all processes together, and T.
    """

    def __init__(self, config: LLMKernelConfig, folder: Path, samples: int, length: int):
        self.folder = processes.own_folder(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.index = 0
        self.statistic_seconds = 0.0
        # Called with "attention", "mlp" or "layer" and a batch of hidden states before and after it.
        self.watch: Callable[[str, torch.Tensor, torch.Tensor], None] | None = None
        # What hidden states should be after a sublayer: `(sublayer, begin, end)` to those of some samples.
        self.target: Callable[[str, int, int], torch.Tensor] | None = None
        self._shape = (len(processes.share(samples)), length)
        self._width = config.hidden_size
        self.device = accelerator()
        self._positions = Positions(config, length, self.device)
        self._states: States | None = None

    def take_up(self, done: int, embed: Callable[[int, int], torch.Tensor]) -> None:
        """Goes on after `done` blocks, or after the last one whose outputs all processes have; else from the first.

        `embed(begin, end)` gives the states of some samples of this process that enter the first block.
        """
        there = {index for index in range(done + 1) if self._path(index).is_file()}
        common = set.intersection(*processes.gather(there))
        self.index = max(common, default=0)
        if not common:
            with States(self.folder / "starting", *self._shape, self._width) as states:
                for begin, end in states.batches(self._batch_size):
                    states.write(begin, embed(begin, end))
                states.rename(self._path(0))
        self._states = States(self._path(self.index), *self._shape, self._width)
        self.settle()

    def settle(self) -> None:
        """Removes the states of earlier blocks: what was made of them is on the disk, the walk will not go back.

        All processes have come so far then: wherever they are stopped, there is a block whose outputs each still has.
        """
        processes.wait()
        for path in self.folder.glob("states-*"):
            if path != self.states.path:
                path.unlink()

    @property
    def states(self) -> States:
        if self._states is None:
            raise RuntimeError("the walk was not started")
        return self._states

    def close(self) -> None:
        """Ends the walk; its states are removed."""
        if self._states is not None:
            self._states.close(remove=True)
            self._states = None

    def run(self, block: Block, needs: Mapping[str, str], visit: Visit, advance: bool) -> None:
        """Takes the states through a block, stopping at every site.

        Args:
            block: whose linears `visit` may change.
            needs: `{site: what is to be known of its inputs}`, see `InputStatistic`; sites not named are only visited.
            visit: called with each site in order and the statistic of its inputs; returns what it did to the inputs, as
                `changed_inputs` takes it.
            advance: whether the states go on to the next block; else they stay, and nothing is computed beyond the
                last site that is named.

        Raises:
            ValueError: inputs or outputs that are not finite, naming the linear.
        """
        states = self.states
        for sublayer, (entry, exit, leaf) in SUBLAYER_SITES.items():
            if not block.has(sublayer):
                continue
            seen = self._entry_statistic(block, sublayer, states, needs[entry]) if entry in needs else None
            visit(entry, self._checked(block, entry, seen))
            goes_on = advance or (sublayer == "attention" and bool(needs.keys() & SITES.keys() - {entry, exit}))
            if not goes_on and exit not in needs:
                visit(exit, None)
                continue
            inner = self._exit_inputs(block, sublayer, leaf, states, needs.get(exit), goes_on)
            change = visit(exit, self._checked(block, exit, inner[0]))
            if goes_on and inner[1] is not None:
                states = self._add_residual(block, sublayer, leaf, states, inner[1], change)
        if advance:
            self._arrive(block, states)
        elif states is not self.states:
            states.close(remove=True)

    def _entry_statistic(self, block: Block, sublayer: str, states: States, needs: str) -> InputStatistic:
        norm = getattr(self._module(block), SUBLAYER_MODULES[sublayer][1])
        statistic = InputStatistic(needs)
        for begin, end in states.batches(self._batch_size):
            self._add(statistic, norm(states.read(begin, end).to(self.device)))
        self._sum_over_processes(statistic, self._width)
        return statistic

    def _add(self, statistic: InputStatistic, inputs: torch.Tensor, target: torch.Tensor | None = None) -> None:
        started = time.monotonic()
        statistic.add(inputs, target)
        self.statistic_seconds += time.monotonic() - started

    def _sum_over_processes(self, statistic: InputStatistic, width: int) -> None:
        if not self._shape[0]:
            target = torch.empty(0, self._width, device=self.device) if statistic.needs == "target" else None
            self._add(statistic, torch.empty(0, width, device=self.device), target)
        statistic.all_reduce()

    def _exit_inputs(
        self, block: Block, sublayer: str, leaf: str, states: States, needs: str | None, keep: bool
    ) -> tuple[InputStatistic | None, States | None]:
        """What enters the last linear of a sublayer: its statistic, and where they are used, the inputs themselves."""
        module = self._module(block)
        statistic = None if needs is None else InputStatistic(needs)
        kept = None
        for begin, end in states.batches(self._batch_size):
            hidden = states.read(begin, end).to(self.device)
            inputs = self._capture(module, sublayer, leaf, block.index, hidden)
            if statistic is not None:
                target = self.target(sublayer, begin, end) - hidden if self.target and needs == "target" else None
                self._add(statistic, inputs, target)
            if keep:
                kept = kept or States(self.folder / f"{sublayer}-inputs", *self._shape, inputs.shape[-1])
                kept.write(begin, inputs)
        if statistic is not None:
            self._sum_over_processes(statistic, block.layer.linear_shapes()[leaf][1])
        return statistic, kept

    def _capture(
        self, module: LLMKernelDecoderLayer, sublayer: str, leaf: str, index: int, hidden: torch.Tensor
    ) -> torch.Tensor:
        inner, norm = (getattr(module, name) for name in SUBLAYER_MODULES[sublayer])
        last = getattr(inner, leaf)
        arguments = self._positions.arguments(index) if sublayer == "attention" else {}
        with fast_products():
            return inputs_of(last, lambda: inner(norm(hidden), **arguments))

    def _add_residual(
        self, block: Block, sublayer: str, leaf: str, states: States, inputs: States, change: torch.Tensor | None
    ) -> States:
        """The states after a sublayer, in a new file; those before it are removed, unless they enter the block."""
        last = getattr(getattr(self._module(block), SUBLAYER_MODULES[sublayer][0]), leaf)
        after = States(self.folder / f"{sublayer}-outputs", *self._shape, self._width)
        for begin, end in states.batches(self._batch_size):
            values = inputs.read(begin, end).to(self.device)
            with fast_products():
                added = last(changed_inputs(values, change))
            hidden = states.read(begin, end).to(self.device)
            after.write(begin, hidden + added)
            if self.watch is not None:
                self.watch(sublayer, hidden, hidden + added)
        inputs.close(remove=True)
        if states is not self.states:
            states.close(remove=True)
        return after

    def _arrive(self, block: Block, states: States) -> None:
        """Makes the outputs of a block, which must be finite, the states that enter the next."""
        if states is self.states:  # a block without any sublayer, or a process without any sample
            states = self._copy()
        finite = True
        for begin, end in states.batches(self._batch_size):
            after = states.read(begin, end)
            finite = finite and bool(after.isfinite().all())
            if self.watch is not None:
                self.watch("layer", self.states.read(begin, end), after)
        if not all(processes.gather(finite)):
            path = f"model.layers.{block.origin}"
            raise ValueError(f"{path}: its outputs are not finite on the calibration text; check the weights.")
        self.states.close()  # its file stays until `settle`
        self.index += 1
        states.rename(self._path(self.index))
        self._states = states

    def _copy(self) -> States:
        copied = States(self.folder / "copied", *self._shape, self._width)
        for begin, end in copied.batches(self._batch_size):
            copied.write(begin, self.states.read(begin, end))
        return copied

    def _checked(self, block: Block, site: str, statistic: InputStatistic | None) -> InputStatistic | None:
        if statistic is not None and not statistic.is_finite():
            leaf = next(leaf for leaf in block.linears() if leaf in SITES[site])
            raise ValueError(
                f"{block.path(leaf)}: its inputs overflow or are NaN on the calibration text; check the weights."
            )
        return statistic

    def _module(self, block: Block) -> LLMKernelDecoderLayer:
        return block.module().to(self.device)

    def _path(self, index: int) -> Path:
        return self.folder / f"states-{index:05d}"

    @property
    def _batch_size(self) -> int:
        return max(BATCH_TOKENS // self._shape[1], 1)


class Captured(Exception):
    """Ends a forward whose outputs nobody waits for."""


def inputs_of(module: nn.Module, forward: Callable[[], object]) -> torch.Tensor:
    """What `forward` gives to `module`; nothing after it is computed."""
    seen: list[torch.Tensor] = []

    def observe(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise Captured

    hook = module.register_forward_pre_hook(observe)
    try:
        forward()
    except Captured:
        pass
    finally:
        hook.remove()
    return seen[0]


@contextmanager
def fast_products() -> Iterator[None]:
    """On a CPU with bf16 arithmetic, fp32 products take their factors in bf16 and add up in fp32: three times as fast.

    For the activations alone, which models of this size are made to have in bf16; statistics and solves stay in fp32.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    if torch.cpu._is_avx512_bf16_supported():
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def load_block(source: ModelFolder, index: int, origin: int | None = None) -> Block:
    """A layer with its weights on the accelerator: there its inputs are seen, and whatever stages make is made there.

    Its `origin` is as `Block` takes it. Files of activations and of weights are all that leaves it.
    """
    tensors = {name: tensor.to(accelerator()) for name, tensor in source.block_tensors(index).items()}
    return Block(index, source.layer_config(index), tensors, origin)


def accelerator() -> torch.device:
    """Where the work is done: the accelerator, where there is one that has fp64, which solves need."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None or found.type in WITHOUT_FP64 else found
