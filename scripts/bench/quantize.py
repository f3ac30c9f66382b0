"""What each way to quantize costs and leaves, alone and on pruned, sparse and low-rank models.

    python scripts/bench/quantize.py MODEL --output scripts/bench/quantize.json [--only NAME …] [--samples 64]

Protocol, options and results as `compress.py`, which runs the recipes.
"""

from typing import Any

from compress import main

INT4 = {"bits": 4, "group_size": 64}
ZEROS = {**INT4, "symmetric": False}
FLOATING_ZEROS = {**ZEROS, "zero_point_dtype": "float16"}
BEST = {"method": "coordinate_descent"}
FOURTH = {"quantize": {**FLOATING_ZEROS, "method": "gptq"}}
# No linear is left for these: the embedding alone.
EMBEDDING_INT8 = {"quantize": {"bits": 8, "group_size": 64, "embeddings": True, "exclude": ["*"]}}
EMBEDDING_INT4 = {
    "quantize": {**FLOATING_ZEROS, "group_size": 32, "method": "hqq", "embeddings": True, "exclude": ["*"]}
}
RECIPES: dict[str, list[Any]] = {
    "int8 g64, rtn": [{"quantize": {"bits": 8, "group_size": 64}}],
    "int4 g64, rtn": [{"quantize": INT4}],
    "int4 g64, rtn, searched scales": [{"quantize": {**INT4, "scale_search": True}}],
    "int4 g64, GPTQ as in the paper": [
        {"quantize": {**INT4, "method": "gptq", "act_order": False, "scale_search": False}}
    ],
    "int4 g64, GPTQ": [{"quantize": {**INT4, "method": "gptq"}}],
    "int4 g64, coordinate descent": [{"quantize": {**INT4, **BEST}}],
    "int4 g64 + zeros, rtn": [{"quantize": ZEROS}],
    "int4 g64 + zeros, GPTQ": [{"quantize": {**ZEROS, "method": "gptq"}}],
    "int4 g64 + zeros, coordinate descent": [{"quantize": {**ZEROS, **BEST}}],
    "int4 g64 + fp16 zeros, HQQ": [{"quantize": {**FLOATING_ZEROS, "method": "hqq"}}],
    "int4 g64 + fp16 zeros, GPTQ": [{"quantize": {**FLOATING_ZEROS, "method": "gptq"}}],
    "int4 g64 + fp16 zeros, coordinate descent": [{"quantize": {**FLOATING_ZEROS, **BEST}}],
    "int4 g64 + fp16 zeros, AWQ, GPTQ": [{"quantize": {**FLOATING_ZEROS, "method": "gptq", "fold": "awq"}}],
    "int4 g64 + fp16 zeros, AWQ, coordinate descent": [{"quantize": {**FLOATING_ZEROS, **BEST, "fold": "awq"}}],
    "int4 g64 + fp16 zeros, coordinate descent, refit": ["refit", {"quantize": {**FLOATING_ZEROS, **BEST}}],
    # Whole models near a quarter of the bf16 bytes: the embedding is a fifth of the parameters.
    "int4 g64 + fp16 zeros, GPTQ, embedding int8": [FOURTH, EMBEDDING_INT8],
    "int4 g64 + fp16 zeros, GPTQ, embedding int4": [FOURTH, EMBEDDING_INT4],
    "FFN -12.5 %, refit, int4 GPTQ, embedding int4": [
        {"prune_ffn": {"ratio": 0.125}}, "refit", FOURTH, EMBEDDING_INT4
    ],
    "FFN -25 % global, refit, int4 GPTQ, embedding int4": [
        {"prune_ffn": {"ratio": 0.25, "method": "flap", "allocation": "global"}}, "refit", FOURTH, EMBEDDING_INT4
    ],
    "2:4": [{"sparsify": {"pattern": "2:4"}}],
    "2:4 + int4 g64": [{"sparsify": {"pattern": "2:4"}}, {"quantize": {**INT4, **BEST}}],
    "50 % + int8 g64": [{"sparsify": {"sparsity": 0.5}}, {"quantize": {"bits": 8, "group_size": 64}}],
    "FFN -25 % + int4 g64": [{"prune_ffn": {"ratio": 0.25}}, {"quantize": {**FLOATING_ZEROS, **BEST}}],
    "rank -20 % + int4 g64": [{"factorize": {"ratio": 0.2}}, {"quantize": {**FLOATING_ZEROS, **BEST}}],
}

if __name__ == "__main__":
    main(RECIPES, __doc__)
