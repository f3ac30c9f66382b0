"""Perplexity against a computation of its own, written token by token."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from hf_llmkernel import LLMKernelConfig, LLMKernelForCausalLM
from hf_llmkernel.evaluate import perplexity, quality
from hf_llmkernel.evaluate.quality import streamed_perplexity

from .conftest import FORMS, SHAPE


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(260, (5, 40), generator=torch.Generator().manual_seed(0))


def naive_nlls(model, windows: torch.Tensor) -> list[float]:
    """Mean nll a window from the probability of each next token, in fp64."""
    nlls = []
    for window in windows:
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0].double()
        losses = []
        for position in range(len(window) - 1):
            weights = torch.exp(logits[position] - logits[position].max())
            losses.append(-math.log(weights[window[position + 1]] / weights.sum()))
        nlls.append(sum(losses) / len(losses))
    return nlls


@pytest.mark.parametrize("name", ["llama", "compressed"])
def test_equals_a_naive_computation(name, windows, request):
    model = request.getfixturevalue(name)
    expected = naive_nlls(model, windows)
    result = perplexity(model, windows, progress=False)
    assert result.window_nlls == pytest.approx(expected, rel=1e-5)
    assert result.nll == pytest.approx(sum(expected) / 5, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(sum(expected) / 5), rel=1e-5)
    assert (result.tokens, result.windows, result.context) == (200, 5, 40)
    mean = sum(expected) / 5
    deviation = math.sqrt(sum((nll - mean) ** 2 for nll in expected) / 4)
    assert result.standard_error == pytest.approx(result.perplexity * deviation / math.sqrt(5), rel=1e-4)


def test_rows_of_logits_in_pieces_and_batches_change_nothing(llama, windows, monkeypatch):
    whole = perplexity(llama, windows, progress=False)
    monkeypatch.setattr(quality, "LOGIT_ROWS", 7)
    pieces = perplexity(llama, windows, batch_size=2, progress=False)
    assert pieces.window_nlls == pytest.approx(whole.window_nlls, rel=1e-5)


def test_the_whole_rows_of_logits_never_exist_at_once(llama, windows, monkeypatch):
    monkeypatch.setattr(quality, "LOGIT_ROWS", 8)
    monkeypatch.setattr(quality, "PROBE_TOKENS", 4)
    rows = []
    handle = llama.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[-2]))
    perplexity(llama, windows, progress=False)
    handle.remove()
    assert max(rows) == 8 and sum(rows) > 5 * 39


def test_families_that_do_more_to_their_logits_are_measured_by_their_own_forward(windows):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, final_logit_softcapping=0.05,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    assert perplexity(model, windows, progress=False).window_nlls == pytest.approx(naive_nlls(model, windows), rel=1e-5)


def test_low_precision_logits_are_normalized_in_fp32(llama, windows, monkeypatch):
    seen = []
    original = quality.F.cross_entropy

    def watched(logits, *args, **options):
        seen.append(logits.dtype)
        return original(logits, *args, **options)

    monkeypatch.setattr(quality.F, "cross_entropy", watched)
    low = perplexity(copy.deepcopy(llama).to(torch.bfloat16), windows, progress=False)
    full = perplexity(llama, windows, progress=False)
    assert set(seen) == {torch.float32}
    assert low.nll == pytest.approx(full.nll, rel=0.02)


def test_the_training_mode_comes_back_and_no_gradients_are_kept(llama, windows):
    llama.train()
    perplexity(llama, windows[:1], progress=False)
    assert llama.training
    llama.eval()
    assert perplexity(llama, windows[:1], progress=False).standard_error is None
    assert all(parameter.grad is None for parameter in llama.parameters())


def test_values_that_are_not_finite_are_traced_to_their_weight(llama, windows):
    weight = llama.model.layers[1].mlp.up_proj.weight
    kept = weight[3, 4].item()
    with torch.no_grad():
        weight[3, 4] = torch.nan
    try:
        with pytest.raises(ValueError, match=r"logits of window 0 .*model.layers.1.mlp.up_proj.weight holds 1 values"):
            perplexity(llama, windows, progress=False)
    finally:
        with torch.no_grad():
            weight[3, 4] = kept


def test_overflowing_activations_are_told_from_broken_weights(llama, windows, monkeypatch):
    head = llama.lm_head
    monkeypatch.setattr(head, "forward", lambda states: nn.functional.linear(states, head.weight) * torch.inf)
    with pytest.raises(ValueError, match="all weights are finite: the activations overflow"):
        perplexity(llama, windows, progress=False)


def test_bad_windows(llama, windows):
    with pytest.raises(ValueError, match="context=200: is above the model's max_position_embeddings=128"):
        perplexity(llama, torch.zeros(1, 200, dtype=torch.int64), progress=False)
    with pytest.raises(ValueError, match=r"windows=\[5\]"):
        perplexity(llama, windows[:, 0], progress=False)
    with pytest.raises(ValueError, match="batch_size=0"):
        perplexity(llama, windows, batch_size=0, progress=False)


STREAMED = {
    "dense_untied": {"tie_word_embeddings": False},
    "dense_tied": {"tie_word_embeddings": True},
    "packed": {"linear_forms": FORMS, "embed_tokens_form": {"bits": 8, "group_size": 16}},
    "packed_tied": {
        "linear_forms": FORMS,
        "embed_tokens_form": {"bits": 8, "group_size": 16},
        "tie_word_embeddings": True,
    },
    "low_rank": {"linear_forms": {"q_proj": {"rank": 4}, "up_proj": {"rank": 8, "a": {"bits": 8}}}, "qk_norm": True},
    "low_rank_head": {"lm_head_form": {"rank": 8}, "attention_bias": True, "mlp_bias": True},
    "sliding": {"sliding_window": 7, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "skipped": {"per_layer_config": {0: {"skip": ["attention"]}, 1: {"intermediate_size": 48}, 2: {"skip": ["mlp"]}}},
}


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_by_block_is_the_same(name, dtype, windows, tmp_path):
    torch.manual_seed(0)
    config = LLMKernelConfig(**{**SHAPE, **STREAMED[name]}, head_dim=8, initializer_range=0.2)
    LLMKernelForCausalLM(config).to(dtype).save_pretrained(tmp_path / "model")
    whole = perplexity(LLMKernelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32), windows, 1, False)
    streamed = streamed_perplexity(tmp_path / "model", windows, progress=False)
    assert streamed.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert streamed.window_nlls == pytest.approx(whole.window_nlls, rel=1e-6)
    assert streamed.standard_error == pytest.approx(whole.standard_error, rel=1e-4)
    counts = ("tokens", "windows", "context")
    assert [getattr(streamed, name) for name in counts] == [getattr(whole, name) for name in counts] == [200, 5, 40]


def test_block_by_block_names_logits_that_are_not_finite_and_a_missing_head(windows, tmp_path):
    torch.manual_seed(0)
    model = LLMKernelForCausalLM(LLMKernelConfig(**SHAPE, head_dim=8))
    model.model.save_pretrained(tmp_path / "body")
    with pytest.raises(ValueError, match="body: has no language-model head"):
        streamed_perplexity(tmp_path / "body", windows, progress=False)
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "overflows")
    with pytest.raises(ValueError, match="the logits of window 0 are not finite; check the weights"):
        streamed_perplexity(tmp_path / "overflows", windows, progress=False)
