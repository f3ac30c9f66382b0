"""The inventory as text: layers that are alike share a line."""

import re
from collections.abc import Iterable

from .inventory import Entry, Inventory
from .table import count, size, text_table

HEADER = ("module", "shape", "form", "parameters", "bytes", "sparsity", "rank")
LAYER = re.compile(r"\.(\d+)\.")


def render_inventory(inventory: Inventory, full: bool = False) -> str:
    """A table of modules with a line of totals.

    Args:
        inventory: of `inspect`.
        full: a line a module; otherwise modules that differ in their layer's number alone share one, with the range of
            layers in the name and the sums of their parameters and bytes.
    """
    groups = [[entry] for entry in inventory.entries] if full else _group(inventory.entries)
    rows = [_row(group) for group in groups]
    return f"{text_table(HEADER, rows, 'lllrrrr')}\n\n{summarize(inventory)}"


def summarize(inventory: Inventory) -> str:
    """The totals in a line or two."""
    lines = [
        f"{inventory.model_type}: {count(inventory.parameters)} parameters stored of "
        f"{count(inventory.dense_parameters)} in {len(inventory.entries)} modules, {inventory.compressed} of them "
        f"compressed; {size(inventory.bytes)} of tensors"
    ]
    if inventory.bytes_on_disk is not None:
        lines[0] += f", {size(inventory.bytes_on_disk)} on disk"
    if inventory.verified:
        lines.append("verified: all weights are finite, every mask keeps what its form says")
    return "\n".join(lines)


def _group(entries: Iterable[Entry]) -> list[list[Entry]]:
    groups: dict[tuple, list[Entry]] = {}
    for entry in entries:
        groups.setdefault((LAYER.sub(".*.", entry.name, count=1), entry.shape, entry.form), []).append(entry)
    return list(groups.values())


def _row(group: list[Entry]) -> tuple[str, ...]:
    first = group[0]
    ranks = [entry.rank for entry in group if entry.rank is not None]
    sparsity = sum(entry.sparsity * entry.dense_parameters for entry in group) / max(
        sum(entry.dense_parameters for entry in group), 1
    )
    return (
        first.name if len(group) == 1 else LAYER.sub(f".{_ranges(group)}.", first.name, count=1),
        " x ".join(map(str, first.shape)),
        first.form,
        count(sum(entry.parameters for entry in group)),
        size(sum(entry.bytes for entry in group)),
        f"{sparsity:.1%}" if sparsity else "",
        str(ranks[0]) if ranks else "",
    )


def _ranges(group: list[Entry]) -> str:
    """Layer numbers as `0-3,5`."""
    numbers = sorted(int(match[1]) for entry in group if (match := LAYER.search(entry.name)))
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)
