"""Which path takes a product, the native kernels or torch: a table measured once on a machine and kept.

An entry belongs to a kind of matrix, a size and a number of rows: the seconds of both paths, the best of a few turns,
measured where they are first asked for. Entries are kept in `paths.json` of the cache folder (`HF_LLMKERNEL_CACHE`), by
processor, instruction set, threads and versions. With AVX512 or AVX2 the kernels win throughout; in plain C++ they win
where few rows share the reading of the weights.

Torch is taken where it was `MARGIN` times as fast: a machine that others use too is never quite sure. With
LLMKERNEL_PATHS=native all is left to the kernels, and nothing measured.

Reading order: the table -> its file -> a measurement. Shapes: M rows of activations, O rows of a matrix, I its columns.
"""

import contextlib
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from . import library
from .layout import dense_layout, packed_layout

SIDES = (256, 1024)  # of the square matrices that are measured
ROWS = (1, 4, 16, 64, 256)
TURNS = 5
DOUBTFUL_TURNS = 30  # before torch is believed, which an hour with much else running would decide for all others
MARGIN = 2.0
CLEAR = 4  # times as fast as torch, and no more turns are needed
LAYER_SECONDS = 3e-4  # of torch's own operations around the products of a decoder layer
FORMS: dict[int, dict[str, Any]] = {
    library.INT8: {"bits": 8, "group_size": 64},
    library.INT4: {"bits": 4, "group_size": 64},
    library.SPARSE_INT8: {"bits": 8, "group_size": 64, "sparsity": "2:4"},
    library.SPARSE_INT4: {"bits": 4, "group_size": 64, "sparsity": "2:4"},
    library.SPARSE_BF16: {"sparsity": "2:4"},
}

Seconds = tuple[float, float]  # of the kernels, of torch


class Paths:
    """The table of this machine, as it is now and in the file."""

    def __init__(self) -> None:
        self._tables: dict[str, dict[str, Seconds]] = {}

    def takes(self, kind: int, out_features: int, in_features: int, rows: int) -> bool:
        """Whether the kernels take a product of M rows with a matrix `[O, I]` of a kind (`llmk_kind`)."""
        if not library.measures_paths():
            return True
        native, plain = self.seconds(kind, out_features * in_features, rows)
        return native <= MARGIN * plain

    def takes_step(self, matrices: Iterable[tuple[int, int]], layers: int, rows: int) -> bool:
        """Whether they take M rows through a whole model, of matrices given as kind and number of weights."""
        if not library.measures_paths():
            return True
        every = [self.seconds(kind, weights, rows) for kind, weights in matrices]
        native, plain = (sum(entry[path] for entry in every) for path in (0, 1))
        return native <= MARGIN * (plain + layers * LAYER_SECONDS)

    def seconds(self, kind: int, weights: int, rows: int) -> Seconds:
        """About what a product of M rows with so many weights takes each path."""
        side = min(SIDES, key=lambda side: abs(side * side - weights))
        measured_rows = max(count for count in ROWS if count <= max(rows, 1))
        entry, table = f"{kind} {side} {measured_rows}", self._table()
        if entry not in table:
            table[entry] = measure(kind, side, measured_rows)
            self._save()
        scale = weights / (side * side) * (rows / measured_rows)
        return table[entry][0] * scale, table[entry][1] * scale

    def _table(self) -> dict[str, Seconds]:
        key = _surroundings()
        if key not in self._tables:
            self._tables[key] = {name: (entry[0], entry[1]) for name, entry in self._read().get(key, {}).items()}
        return self._tables[key]

    def _read(self) -> dict[str, Any]:
        """What the file holds; nothing where it cannot be read, and then all is measured anew."""
        try:
            content = json.loads(_file().read_text())
            return content if _is_table(content) else {}
        except (OSError, ValueError):
            return {}

    def _save(self) -> None:
        """The file with what other processes have added to it; where it cannot be written, this process alone knows."""
        content = {**self._read()}
        for key, table in self._tables.items():
            content[key] = {**content.get(key, {}), **table}
        with contextlib.suppress(OSError):
            _file().parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=_file().parent, delete=False) as file:
                json.dump(content, file)
            try:
                os.replace(file.name, _file())
            except OSError:  # a folder is in its place
                os.unlink(file.name)
                raise


def _is_table(content: Any) -> bool:
    return isinstance(content, dict) and all(
        isinstance(table, dict)
        and all(isinstance(entry, list) and len(entry) == 2 and all(map(_is_time, entry)) for entry in table.values())
        for table in content.values()
    )


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _file() -> Path:
    from ..data.fetch import cache_folder

    return cache_folder() / "paths.json"


def _surroundings() -> str:
    inputs = "int8" if library.rounds_inputs() else "float32"
    threads = f"{library.threads()} threads"
    return f"{_processor()}, {library.isa()}, {inputs}, {threads}, torch {torch.__version__}, {library.ABI}"


@functools.cache
def _processor() -> str:
    from ..evaluate.machine import describe_machine

    return describe_machine()["cpu"]


def measure(kind: int, side: int, rows: int) -> Seconds:
    """Seconds of M rows times a square matrix in the kernels and in torch, in turns, the best of each."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if kind == library.F32 else torch.bfloat16
    x = torch.randn(rows, side, generator=generator).to(dtype)
    weight = torch.randn(side, side, generator=generator).to(dtype)
    return _best_seconds(*_products(kind, x, weight))


def _best_seconds(native: Callable[[], Any], plain: Callable[[], Any]) -> Seconds:
    best = [float("inf")] * 2
    for turn in range(DOUBTFUL_TURNS + 1):
        for index, product in enumerate((native, plain)):
            start = time.perf_counter()
            product()
            if turn:  # the first one wakes threads and fills caches
                best[index] = min(best[index], time.perf_counter() - start)
        if best[0] * CLEAR < best[1] or (turn >= TURNS and best[0] <= MARGIN * best[1]):
            break
    return best[0], best[1]


def _products(kind: int, x: torch.Tensor, weight: torch.Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """What is timed: of packed matrices torch unpacks the weight first, which it does where kernels keep it packed."""
    from ..model.configuration_llm_kernel import LinearForm
    from ..model.linear_llm_kernel import largest_mask, pack_weight, unpack_weight

    if kind in (library.F32, library.BF16):
        layout, plain = dense_layout(weight), lambda: F.linear(x, weight)
    else:
        form = LinearForm(**FORMS[kind])
        stored = pack_weight(weight * largest_mask(weight, form) if form.sparsity else weight, form)
        layout = packed_layout(stored, form, *weight.shape)
        plain = lambda: F.linear(x, unpack_weight(stored, form, weight.shape[1], x.dtype))  # noqa: E731
    assert layout is not None
    return lambda: torch.ops.llmkernel.linear(x, layout.data, layout.description, None), plain


PATHS = Paths()
