"""Architectures by name, to build from scratch: `LLMKernelForCausalLM(preset_config("tiny", vocab_size=8000))`."""

from typing import Any

from hf_llmkernel.model.configuration_llm_kernel import LLMKernelConfig

PRESETS: dict[str, dict[str, Any]] = {
    # The example model of the article this project grew out of: embedding, one block with a ReLU feed-forward, output.
    "article": {
        "vocab_size": 10000,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "hidden_act": "relu",
        "mlp_gated": False,
        "mlp_bias": True,
        "max_position_embeddings": 1024,
    },
    # Seconds a hundred steps on a CPU: tests, and first trials of a method.
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
    # SmolLM2-135M (Allal et al. 2025, arXiv 2502.02737): deep and narrow.
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    # TinyLlama-1.1B (Zhang et al. 2024, arXiv 2401.02385).
    "1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
    },
    # Llama 2 (Touvron et al. 2023, arXiv 2307.09288), 7B and 70B.
    "7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "70b": {
        "vocab_size": 32000,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
}


def preset_config(name: str, **overrides: Any) -> LLMKernelConfig:
    """The configuration of a preset.

    Args:
        name: one of `PRESETS`.
        overrides: any field of `LLMKernelConfig`, in place of the preset's own.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"preset={name!r}: unknown; choose one of {sorted(PRESETS)}.")
    return LLMKernelConfig(**{**PRESETS[name], **overrides})
