"""Wanda's column scores against the matrices that columns add to the outputs."""

import torch

from hf_llmkernel.compress.prune.wanda import wanda_scores


def test_a_score_is_the_size_of_what_the_column_adds_to_the_outputs(layer):
    expected = [
        torch.outer(x.double(), w.double()).square().sum().sqrt()
        for x, w in zip(layer.inputs.T, layer.weight.T, strict=True)
    ]
    scores = wanda_scores(layer.weight, layer.inputs.norm(dim=0))
    torch.testing.assert_close(scores, torch.stack(expected).float(), rtol=1e-5, atol=0)
