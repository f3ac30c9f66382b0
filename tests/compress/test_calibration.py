"""Calibration ids from text and conversations, and text that does not do."""

import json

import pytest
import torch

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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no text; name a source that has some"),
        (" \n\n\n \f", "has no text; name a source that has some"),
        ("w1 w2 w3 w4", r"samples=2, length=8: need 16 tokens, the text has 2; lower either or give a longer text"),
    ],
)
def test_text_that_is_empty_or_shorter_than_a_window_is_refused(tmp_path, content, message):
    (tmp_path / "text.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        calibration = Calibration(source=str(tmp_path / "text.txt"), samples=2, length=8)
        calibration_ids(calibration, word_tokenizer(), LLMKernelConfig(**TINY))


@pytest.fixture
def chat(tmp_path):
    """A set of 30 conversations of eight words."""
    rows = [[{"from": "human", "value": f"w{n} " * 5}, {"from": "gpt", "value": f"w{n} " * 3}] for n in range(1, 31)]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps({"conversations": row}) + "\n" for row in rows))
    return Calibration(source=str(file), samples=3, length=20)


def test_conversations_run_through_the_template_packed_and_seeded(chat):
    tokenizer, config = word_tokenizer(), LLMKernelConfig(**TINY)
    mark = "{% if m.role == 'user' %}w88 {% else %}w89 {% endif %}"
    tokenizer.chat_template = f"{{% for m in messages %}}{mark}{{{{ m.content }}}}{{% endfor %}}"
    ids = calibration_ids(chat, tokenizer, config)
    assert ids.shape == (3, 20) and torch.equal(ids, calibration_ids(chat, tokenizer, config))
    for conversation in ids.flatten().split(10):  # two marks and eight words
        user, *words = conversation.tolist()
        assert user == 89 and words[5] == 90 and len({*words[:5], *words[6:]}) == 1


def test_conversations_need_a_template(chat):
    with pytest.raises(ValueError, match="no template for them; set tokenizer.chat_template, take a chat model's"):
        calibration_ids(chat, word_tokenizer(), LLMKernelConfig(**TINY))
