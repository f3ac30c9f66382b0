"""Calibration text that does not do."""

import pytest

from hf_llmkernel.compress.calibration import calibration_ids
from hf_llmkernel.compress.recipe import Calibration
from hf_llmkernel.model.configuration_llm_kernel import LLMKernelConfig

from .conftest import TINY, word_tokenizer


@pytest.mark.parametrize(
    ("calibration", "fields", "message"),
    [
        ({"samples": 1000, "length": 64}, {}, r"samples=1000, length=64: need 64000 tokens, the text has \d+"),
        ({"samples": 2, "length": 129}, {}, "calibration.length=129: is above .*max_position_embeddings=128"),
        ({"samples": 8, "length": 64}, {"vocab_size": 80}, "vocab_size=80: the tokenizer made token"),
    ],
)
def test_text_that_does_not_do_is_refused(text, calibration, fields, message):
    config = LLMKernelConfig(**{**TINY, **fields})
    with pytest.raises(ValueError, match=message):
        calibration_ids(Calibration(source=str(text), **calibration), word_tokenizer(), config)
