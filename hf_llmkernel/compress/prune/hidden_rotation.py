"""A narrower residual stream: which directions of it stay, and what becomes of every weight that reads or writes it.

Every matrix of the model reads the stream h `[H]` through an RMSNorm, or writes into it. With Q `[H, K]` of orthonormal
columns and `s = sqrt(K / H)`, the new stream is `z = s Qᵀ h`. Where h lies in the span of Q,

    mean(z²) + ε  =  s² |h|² / K + ε  =  |h|² / H + ε  =  mean(h²) + ε

so the norm of width K divides by the same root, ε included, and `W diag(g) norm(h) = (W diag(g) Q / s) norm(z)`: exact
but for rounding. The scale s is in what writes (embedding, o_proj, down_proj and their biases), so that neither ε nor
the norms inside of heads change; 1/s is in what reads. Components outside of the span are lost, and the norm raises
what stays to the size of the whole.

A `Rotation` takes any Q, the same for the whole model, for the stream runs through all of it (SliceGPT, Ashkboos et al.
2024, arXiv 2401.15024, has one a block, and a matrix in every skip connection for it). A scale g of its own for each
channel does not go through a rotation: it moves into the linears that read, and the norm is left with ones. A
`Selection` (Minitron, Muralidharan et al. 2024, arXiv 2407.14679) keeps channels, and each its scale.

A head that is the embedding E cannot take in the last norm's scale g: it would be `E diag(g) Q`, the embedding `E Q`,
and what is between them, `Qᵀ diag(g) Q`, is not diagonal as a norm's weight is. It nearly is where Q turns only
channels among themselves whose g are alike: `alike_channels` and `balanced_scales`.

Shapes: H channels of the stream, K of them kept, O out_features, I in_features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .width import select


def normalized(hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states `[..., H]` with a root mean square of one each; zeros stay zeros."""
    smallest = torch.finfo(hidden.dtype).tiny
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True).clamp(min=smallest))


class Directions(NamedTuple):
    """Orthonormal columns Q, fp32 `[H, K]`; the share of the energy along them; the group of each, int64 `[K]`."""

    columns: torch.Tensor
    share: float
    groups: torch.Tensor


def principal_directions(gram: torch.Tensor, width: int, groups: Sequence[torch.Tensor] | None = None) -> Directions:
    """The orthonormal directions that keep most of a stream's energy: its first uncentred principal components.

    Args:
        gram: `XᵀX` `[H, H]` of what enters norms, every token at a root mean square of one.
        width: K.
        groups: channels that directions may mix, int64, a partition of all H; by default one group.
    """
    groups = [torch.arange(len(gram))] if groups is None else groups
    columns = gram.new_zeros(gram.shape, dtype=torch.float64)
    energies = gram.new_zeros(len(gram), dtype=torch.float64)
    for channels in groups:
        values, vectors = torch.linalg.eigh(gram[channels][:, channels].double())
        columns[channels[:, None], channels] = vectors
        energies[channels] = values.clamp(min=0)
    numbers = torch.empty(len(gram), dtype=torch.int64)
    for number, channels in enumerate(groups):
        numbers[channels] = number
    kept = select(energies, width)
    return Directions(columns[:, kept].float(), float(energies[kept].sum() / energies.sum()), numbers[kept])


def alike_channels(gain: torch.Tensor, spread: float) -> list[torch.Tensor]:
    """Channels `[H]` in groups, each of scales within `spread`, relative to it, of the median of what was left."""
    groups, left = [], torch.arange(len(gain))
    while len(left):
        median = gain[left].median()
        near = (gain[left] - median).abs() <= spread * median.abs()
        groups.append(left[near])
        left = left[~near]
    return groups


def balanced_scales(gain: torch.Tensor, groups: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What lets a rotated embedding be its own head: of channels r `[H]` for the embedding, of groups ḡ for the norm.

    With `r = sqrt(g / ḡ)` the embedding is `E diag(r) Q`, off by r, and the head `E diag(r) Q diag(ḡ)`, which is
    `E diag(g / r) Q`, off by 1/r: the spread of g in its group is shared between both.

    Args:
        gain: g `[H]`, the last norm's weight.
        groups: of `alike_channels`, with a spread below 1.
    """
    means = torch.stack([gain[channels].mean() for channels in groups])
    balance = torch.ones_like(gain)
    for channels, mean in zip(groups, means, strict=True):
        if mean:
            balance[channels] = (gain[channels] / mean).sqrt()
    return balance, means


def channel_scores(mean_magnitude: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Mean absolute value of every channel that a norm puts out, fp32 `[H]` (Minitron, section 2.2); norms add up.

    Args:
        mean_magnitude: `[H]`, of what enters the norm, every token at a root mean square of one.
        gain: `[H]`, the norm's weight.
    """
    return gain.float().abs() * mean_magnitude


@dataclass(frozen=True)
class Rotation:
    """The stream along the columns of Q, `directions` `[H, K]`."""

    directions: torch.Tensor

    @property
    def scale(self) -> float:
        """s, of what writes."""
        channels, kept = self.directions.shape
        return (kept / channels) ** 0.5

    def read(self, weight: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        """A weight `[O, H]` behind a norm of weight `gain` `[H]`: `[O, K]`."""
        return weight @ ((gain / self.scale)[:, None] * self.directions.to(weight.device))

    def norm(self, gain: torch.Tensor) -> torch.Tensor:
        """The norm's weight `[K]`."""
        return gain.new_ones(self.directions.shape[1])

    def write(self, written: torch.Tensor) -> torch.Tensor:
        """A weight `[H, I]` or a bias `[H]` whose outputs are added to the stream: `[K, I]` or `[K]`."""
        return self.scale * self.directions.T.to(written.device) @ written


@dataclass(frozen=True)
class Selection:
    """The channels `kept`, int64 `[K]`, of a stream of `channels` H."""

    kept: torch.Tensor
    channels: int

    @property
    def scale(self) -> float:
        """s, of what writes."""
        return (len(self.kept) / self.channels) ** 0.5

    def read(self, weight: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        """A weight `[O, H]` behind a norm, whatever the norm's weight: `[O, K]`."""
        return weight[:, self.kept.to(weight.device)]

    def norm(self, gain: torch.Tensor) -> torch.Tensor:
        """The norm's weight `[K]` from that before, `[H]`."""
        return gain[self.kept.to(gain.device)] / self.scale

    def write(self, written: torch.Tensor) -> torch.Tensor:
        """A weight `[H, I]` or a bias `[H]` whose outputs are added to the stream: `[K, I]` or `[K]`."""
        return self.scale * written[self.kept.to(written.device)]
