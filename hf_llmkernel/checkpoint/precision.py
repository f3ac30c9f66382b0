"""Values in another floating dtype, and what that loses."""

import torch


def cast_values(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, int]]:
    """Values in a dtype, those beyond its range as its largest number, and how many lost what."""
    range_ = torch.finfo(dtype)
    rounded = values.to(dtype)
    overflowed = rounded.isinf()
    clamped = values.clamp(range_.min, range_.max).to(dtype) if overflowed.any() else rounded
    small = rounded.abs() < range_.smallest_normal
    gone = (rounded == 0) & (values != 0)
    kept = small & (rounded != 0)
    return clamped, {
        "overflowed": int(overflowed.sum()),
        "underflowed": int(gone.sum()),
        "subnormal": int((kept & (rounded.to(values.dtype) != values)).sum()),
    }
