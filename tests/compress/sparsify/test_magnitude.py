"""Magnitude scores."""

import torch

from hf_llmkernel.compress.sparsify.magnitude import magnitude_scores


def test_a_score_is_the_size_of_the_weight():
    scores = magnitude_scores(torch.tensor([[-2.0, 0.5], [0.0, -0.25]], dtype=torch.bfloat16))
    assert scores.dtype == torch.float32
    assert scores.tolist() == [[2.0, 0.5], [0.0, 0.25]]
