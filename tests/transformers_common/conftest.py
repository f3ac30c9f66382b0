"""Settings that transformers' own test files expect of the run they are part of, and a guard on what they skip."""

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent

# Marks that its tests carry; this project selects nothing by them.
MARKERS = (
    "accelerate_tests",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "generate",
    "is_fsdp_test",
    "is_pipeline_test",
    "is_tensor_parallel_test",
    "is_training_test",
    "slow",
    "torch_compile_test",
    "torch_export_test",
)

# What its tests may skip, as `test name: reason`. They skip by themselves where a model declares too little; a family
# that lost a feature would then lose its tests unseen, so every other reason is a failure.
LEGAL_SKIPS = (
    r"[Tt]est requires ",  # of hardware or of a package that is not here
    r": test is slow$",
    r": Need at least [48] FSDP workers",
    # Of other architectures.
    r"sequence-to-sequence",
    r"composite|No subconfigs",
    r"^test_sdpa_can_dispatch_composite_models: ",
    r"MoE|sparse experts|grouped_mm|router_logits|expert parallel",
    r"partial rope|axial RoPE|have position embeddings",
    r": .*_keep_in_fp32_modules",
    r": No conversion found for ",  # checkpoint keys of this family are those of its parameters
    r"^test_sliding_window_mask: ",  # wants a `use_sliding_window` switch; here `layer_types` says it
    # Wants an argument `output_attentions` of `forward` itself, which since transformers 5 no model has.
    r"^test_eager_matches_sdpa_inference_.*_output_attentions: ",
)


def pytest_configure(config: pytest.Config) -> None:
    for name in MARKERS:
        config.addinivalue_line("markers", f"{name}: of transformers' own tests")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.skipped and FOLDER in item.path.parents:
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not any(re.search(pattern, f"{item.name}: {reason}") for pattern in LEGAL_SKIPS):
            report.outcome = "failed"
            report.longrepr = f"skipped for a reason that LEGAL_SKIPS does not list: {reason}"
    return report
