"""Minitron's activation scores against loops over tokens."""

import torch

from hf_llmkernel.compress.prune.minitron import minitron_head_scores, minitron_neuron_scores
from tests.compress.prune.conftest import HEAD_DIM, IN, TOKENS


def test_a_neuron_scores_its_mean_absolute_activation(layer):
    expected = [sum(abs(value) for value in column) / TOKENS for column in layer.inputs.T.tolist()]
    scores = minitron_neuron_scores(layer.inputs.abs().sum(0), TOKENS)
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-5, atol=0)


def test_a_head_scores_the_root_mean_square_of_its_output_norm(layer):
    norms = [layer.inputs[:, h : h + HEAD_DIM].norm(dim=1) for h in range(0, IN, HEAD_DIM)]
    expected = torch.stack([(norm**2).mean().sqrt() for norm in norms])
    scores = minitron_head_scores(layer.gram.diagonal(), HEAD_DIM, TOKENS)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=0)
