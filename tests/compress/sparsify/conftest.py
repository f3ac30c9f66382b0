"""A linear over inputs that are correlated and of very different sizes, as real ones are."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

TOKENS, IN, OUT = 400, 36, 12


class Layer(NamedTuple):
    inputs: torch.Tensor  # [TOKENS, IN]
    weight: torch.Tensor  # [OUT, IN]

    @property
    def gram(self):
        return self.inputs.T @ self.inputs

    def loss(self, weight):
        """Share of the outputs' energy that a changed weight loses, from the outputs themselves."""
        inputs, exact = self.inputs.double(), self.weight.double()
        return float((inputs @ (weight.double() - exact).T).square().sum() / (inputs @ exact.T).square().sum())

    def damped_hessian(self, dampening):
        """fp64 XᵀX + dampening · mean(diag) · I."""
        gram = self.gram.double().numpy()
        return gram + dampening * np.diag(gram).mean() * np.eye(len(gram))


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(IN, IN, generator=generator) / IN**0.5 + torch.eye(IN)
    sizes = torch.randn(IN, generator=generator).exp()
    inputs = torch.randn(TOKENS, IN, generator=generator) @ mixing * sizes
    return Layer(inputs, torch.randn(OUT, IN, generator=generator))
