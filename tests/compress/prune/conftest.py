"""A linear of heads over inputs that are correlated and not centred, as real ones are."""

from typing import NamedTuple

import pytest
import torch

TOKENS, IN, OUT, HEAD_DIM = 300, 24, 10, 4


class Layer(NamedTuple):
    inputs: torch.Tensor  # [TOKENS, IN]
    weight: torch.Tensor  # [OUT, IN]

    @property
    def gram(self):
        return self.inputs.T @ self.inputs

    @property
    def mean(self):
        return self.inputs.mean(0)

    def loss(self, weight, keep, bias=None):
        """Summed squared difference of the outputs of a pruned linear and of the whole one."""
        outputs = self.inputs[:, keep].double() @ weight.double().T
        if bias is not None:
            outputs = outputs + bias.double()
        return (outputs - self.inputs.double() @ self.weight.double().T).square().sum()


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(IN, IN, generator=generator) * torch.logspace(0, -1, IN).unsqueeze(1)
    inputs = torch.randn(TOKENS, IN, generator=generator) @ mixing + torch.randn(IN, generator=generator)
    return Layer(inputs, torch.randn(OUT, IN, generator=generator))
