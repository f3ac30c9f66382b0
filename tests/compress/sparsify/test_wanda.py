"""Wanda scores against the loss that they stand for."""

import torch

from hf_llmkernel.compress.sparsify.wanda import wanda_scores


def test_a_score_is_the_size_of_what_the_weight_adds_to_its_output(layer):
    scores = wanda_scores(layer.weight, layer.gram.diagonal().sqrt())
    for row, column in ((0, 0), (3, 7), (11, 35)):
        contribution = layer.inputs[:, column].double() * layer.weight[row, column].double()
        torch.testing.assert_close(scores[row, column].double(), contribution.norm(), rtol=1e-5, atol=0)
    assert scores.dtype == torch.float32
