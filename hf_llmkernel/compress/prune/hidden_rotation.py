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

Shapes: H channels of the stream, K of them kept, O out_features, I in_features, V vocabulary, T tokens.
"""

from dataclasses import dataclass

import torch


def normalized(hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states `[..., H]` with a root mean square of one each; zeros stay zeros."""
    smallest = torch.finfo(hidden.dtype).tiny
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True).clamp(min=smallest))


def principal_directions(gram: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The orthonormal directions that keep most of a stream's energy: its first uncentred principal components.

    Args:
        gram: `XᵀX` `[H, H]` of what enters norms, every token at a root mean square of one.
        width: K.

    Returns:
        Q, fp32 `[H, K]`, and the shares of the energy along all H directions, fp64 `[H]`, the largest first.
    """
    values, vectors = torch.linalg.eigh(gram.double())  # ascending
    values = values.flip(0).clamp(min=0)
    return vectors.flip(1)[:, :width].float().contiguous(), values / values.sum()


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
