"""Compression on an accelerator, which a process pretends to have: no stage mixes devices, the result is the CPU's."""

import pytest
import torch
from torch import multiprocessing

from hf_llmkernel.compress import compress
from hf_llmkernel.compress.walk import accelerator

from . import pretended_device
from .test_processes import assert_same, recipe_for

pytestmark = pytest.mark.timeout(120)
ZEROS = {"bits": 4, "group_size": 16, "symmetric": False, "zero_point_dtype": "float16"}
STAGES = {
    "structure": [
        {"prune_heads": {"ratio": 0.5, "method": "minitron"}},
        {"prune_ffn": {"ratio": 0.25, "align": 16, "method": "obs", "update": "least_squares_bias"}},
        {"factorize": {"ratio": 0.2, "align": 4}},
    ],
    "sparse": [{"sparsify": {"sparsity": 0.5, "method": "sparsegpt"}}],
    "packed": [
        {"sparsify": {"sparsity": 0.5, "method": "magnitude", "update": "none"}},
        {"quantize": {"bits": 4, "group_size": 16, "symmetric": False, "embeddings": True}},
    ],
    "rounded": [
        {"sparsify": {"pattern": "2:4", "method": "magnitude", "include": ["up_proj"]}},
        {"quantize": {"bits": 4, "group_size": 16, "method": "coordinate_descent", "include": ["mlp.*"]}},
        {"quantize": {**ZEROS, "method": "gptq", "fold": "awq", "include": ["?_proj"], "exclude": ["o_proj"]}},
        {"quantize": {**ZEROS, "method": "hqq", "fold": "smoothquant", "include": ["o_proj"]}},
    ],
    "owl_and_admm": [{"sparsify": {"sparsity": 0.5, "method": "wanda", "update": "admm", "allocation": "owl"}}],
    "depth": [{"drop_layers": {"count": 2, "metric": "perplexity", "unit": "sublayer"}}, {"refit": {}}],
    "width": [{"prune_hidden": {"ratio": 0.25, "align": 8}}],
}


def start(rank: int, work) -> None:
    torch.set_num_threads(1)
    with pretended_device.install():
        assert accelerator().type == pretended_device.NAME
        work()


def test_every_kind_of_stage_stays_on_the_accelerator(tmp_path, tiny, text):
    def work() -> None:
        for name, stages in STAGES.items():
            compress(tiny, recipe_for(text, stages, 6), tmp_path / f"there-{name}", progress=False)

    multiprocessing.start_processes(start, (work,), 1, start_method="fork")
    for name, stages in STAGES.items():
        compress(tiny, recipe_for(text, stages, 6), tmp_path / name, progress=False)
        assert_same(tmp_path / f"there-{name}", tmp_path / name)


def test_the_pretended_device_refuses_tensors_of_another():
    def work() -> None:
        ones = torch.ones(3, device=accelerator())
        assert (ones + 1).tolist() == [2, 2, 2] and (ones + 1).cpu().device.type == "cpu"
        with pytest.raises(RuntimeError, match="on two devices"):
            ones + torch.ones(3)

    multiprocessing.start_processes(start, (work,), 1, start_method="fork")


def test_an_accelerator_without_fp64_is_not_used(monkeypatch):
    for kind, expected in (("mps", "cpu"), ("cuda", "cuda")):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda kind=kind: torch.device(kind))
        assert accelerator().type == expected
