"""Tables of text, and quantities as people read them."""

from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """Columns under a header; `align` has a letter a column, `l` or `r`."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [_line(header, widths, align), "  ".join("-" * width for width in widths)]
    return "\n".join(lines + [_line(row, widths, align) for row in rows])


def _line(cells: Sequence[str], widths: Sequence[int], align: str) -> str:
    padded = (
        cell.rjust(width) if side == "r" else cell.ljust(width)
        for cell, width, side in zip(cells, widths, align, strict=True)
    )
    return "  ".join(padded).rstrip()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """A Markdown table; `align` as in `text_table`."""
    marks = ["---:" if side == "r" else "---" for side in align]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [header, marks, *rows]]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def count(value: int | float) -> str:
    """A count with a unit: `134.5 M`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{_three_digits(value / size)} {unit}"
    return f"{value:.0f}"


def size(value: int | float) -> str:
    """A number of bytes in decimal units, as disks and downloads count: `269.1 MB`."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{_three_digits(value / factor)} {unit}"
    return f"{value:.0f} B"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
