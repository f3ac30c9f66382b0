"""What is measured, and what calibrates, is computed without the kernels, which round activations."""

import pytest
import torch

from hf_llmkernel import LLMKernelConfig, LLMKernelForCausalLM
from hf_llmkernel.compress import compress, run
from hf_llmkernel.evaluate.quality import perplexity, streamed_perplexity, summed_nll
from hf_llmkernel.kernels import disabled, is_enabled

WINDOWS = torch.randint(0, 96, (2, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    forms = dict.fromkeys(("q_proj", "up_proj", "down_proj"), {"bits": 8, "group_size": 32})
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = LLMKernelConfig(**sizes, num_attention_heads=4, initializer_range=0.2, linear_forms=forms)
    folder = tmp_path_factory.mktemp("integers")
    LLMKernelForCausalLM(config).save_pretrained(folder)
    return folder


def test_perplexity_is_torchs(folder):
    model = LLMKernelForCausalLM.from_pretrained(folder).eval()
    with disabled(), torch.no_grad():
        plain = model(WINDOWS).logits
        expected = [summed_nll(logits, tokens, None) / 31 for logits, tokens in zip(plain, WINDOWS, strict=True)]
    with torch.no_grad():
        assert not torch.equal(model(WINDOWS).logits, plain)  # the kernels serve here
    for found in (perplexity(model, WINDOWS, progress=False), streamed_perplexity(folder, WINDOWS, progress=False)):
        assert found.window_nlls == pytest.approx(expected, rel=1e-6)


def test_a_recipe_is_run_on_torch(folder, tmp_path, monkeypatch):
    seen, phases = [], run.phases
    monkeypatch.setattr(run, "phases", lambda stages: [seen.append(is_enabled()), phases(stages)][1])
    stages = [{"quantize": {"bits": 4, "group_size": 32, "include": ["k_proj"]}}]
    compress(folder, {"stages": stages}, tmp_path / "out", progress=False)
    assert is_enabled() and seen == [False]
