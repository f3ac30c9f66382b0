"""Minitron (Muralidharan et al. 2024, arXiv 2407.14679): how strong activations are, whatever the weights.

The paper compares ways to aggregate over batch and sequence. Here it is the mean of absolute values over all tokens for
neurons, and for heads the root mean square of the output norm over all tokens, which sums of squares suffice for.

Shapes: I in_features, N heads, D head_dim.
"""

import torch


def minitron_neuron_scores(absolute_sums: torch.Tensor, count: int) -> torch.Tensor:
    """Mean |activation| of every neuron, fp32 `[I]`.

    Args:
        absolute_sums: `[I]`, sums over the tokens of what enters down_proj, its signs dropped.
        count: tokens.
    """
    return absolute_sums.float() / count


def minitron_head_scores(squares: torch.Tensor, head_dim: int, count: int) -> torch.Tensor:
    """Root mean square over the tokens of the norm of every head's output, fp32 `[N]`.

    Args:
        squares: `[N * D]`, sums of squares over the tokens of what enters o_proj.
        head_dim: D.
        count: tokens.
    """
    return (squares.float().view(-1, head_dim).sum(dim=1) / count).sqrt()
