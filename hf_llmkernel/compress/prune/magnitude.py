"""Magnitude: the weights alone, without calibration.

Shapes: O out_features, I in_features of the pruned linear, H in_features of the linears that feed it.
"""

import torch


def magnitude_scores(weight: torch.Tensor, *feeding: torch.Tensor) -> torch.Tensor:
    """`‖w_j‖₂` times the norms of the rows j that make input j: gate_proj's and up_proj's, or v_proj's of a head.

    A product and not a sum, so that the score stays when a neuron's up row is scaled and its down column divided by
    the same factor, which changes nothing in the network.

    Args:
        weight: `[O, I]`, down_proj or o_proj.
        feeding: each `[I, H]`; for o_proj v_proj's rows as `heads.value_rows` orders them.

    Returns:
        fp32 `[I]`.
    """
    scores = weight.float().norm(dim=0)
    for rows in feeding:
        scores = scores * rows.float().norm(dim=1)
    return scores
