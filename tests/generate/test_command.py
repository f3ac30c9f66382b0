"""`generate` gives what the model's own greedy decoding gives, and streams it."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_llmkernel import cli
from hf_llmkernel.generate.command import generate, render_generate


@pytest.fixture
def greedy_text(tiny_checkpoint):
    """Twelve greedy tokens by argmax over whole forwards, without generate() or a cache."""

    def decode(text: str) -> str:
        model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
        tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
        tokens = tokenizer(text, return_tensors="pt").input_ids
        first = tokens.shape[1]
        for _ in range(12):
            following = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, following], dim=1)
            if following.item() == tokenizer.eos_token_id:
                break
        return tokenizer.decode(tokens[0, first:], skip_special_tokens=True)

    return decode


def test_continues_greedily_and_streams(tiny_checkpoint, greedy_text, capsys):
    result = generate(str(tiny_checkpoint), "w1 w2 w3", max_new_tokens=12, chat=False)
    assert result["text"] == greedy_text("w1 w2 w3") != ""
    assert capsys.readouterr().out.strip() == result["text"]
    assert result["tokens_per_second"] == pytest.approx(result["tokens"] / result["seconds"])
    assert (result["prompt_tokens"], result["dtype"]) == (3, "float32")
    assert render_generate(result) == ""


def test_chat_template_is_used_where_there_is_one(tiny_checkpoint, greedy_text, capsys):
    result = generate(str(tiny_checkpoint), "w1 w2", max_new_tokens=12)
    assert result["prompt_tokens"] == 4
    assert result["text"] == greedy_text("user w1 w2 assistant")


def test_same_seed_same_sample(tiny_checkpoint, capsys):
    model = str(tiny_checkpoint)
    texts = [generate(model, "w1", max_new_tokens=12, temperature=3.0, seed=seed)["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_json_holds_the_text_and_standard_output_nothing_else(tiny_checkpoint, capfd):
    assert cli.main(["generate", str(tiny_checkpoint), "w1 w2", "--max-new-tokens", "4", "--json", "--no-chat"]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert result["tokens"] <= 4
    assert result["text"] in err


def test_a_text_ends_with_the_context(tiny_checkpoint, capsys):
    """As if no more had been asked for, and that is said; a prompt that leaves no room is refused."""
    model, prompt = str(tiny_checkpoint), "w1 w2 " * 61  # 122 of 128 tokens
    asked = generate(model, prompt, max_new_tokens=5, chat=False)
    cut = generate(model, prompt, max_new_tokens=50, chat=False)
    assert (cut["tokens"], cut["context_full"], asked["context_full"]) == (6, True, False)
    assert cut["text"].startswith(asked["text"])
    render_generate(asked), render_generate(cut)
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert "context" not in first and second.endswith("a second, the model's context is full")
    with pytest.raises(ValueError, match="the prompt has 128 tokens, the model's context ends at 128; shorten it"):
        generate(model, "w1 w2 " * 64, chat=False)


def test_bad_input_says_what_to_do(tiny_checkpoint, tmp_path):
    model = str(tiny_checkpoint)
    with pytest.raises(ValueError, match="top_p=1.5"):
        generate(model, "w1", top_p=1.5)
    with pytest.raises(ValueError, match="set a temperature"):
        generate(model, "w1", top_p=0.5)
    with pytest.raises(ValueError, match="dtype=int3: must be one of auto"):
        generate(model, "w1", dtype="int3")
    with pytest.raises(ValueError, match="prompt='': has no tokens"):
        generate(model, "", chat=False)
    with pytest.raises(ValueError, match="PROMPT: is not UTF-8; give it as UTF-8"):
        generate(model, "w1 \udc80")
    with pytest.raises(ValueError, match="output=text: is for the texts of --prompts; leave it out"):
        generate(model, "w1", output=Path("text"))
    with pytest.raises(ValueError, match="no such folder"):
        generate(str(tmp_path / "absent"), "w1")
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no readable tokenizer"):
        generate(str(tmp_path), "w1")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="use --no-chat"):
        generate(str(tmp_path), "w1", chat=True)


def test_with_little_memory_the_text_is_the_same(tmp_path, tiny_checkpoint, greedy_text, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="is no folder of this family, which memory takes; use llmkernel convert"):
        generate(str(tmp_path), "w1", memory="4GB")
    ours = str(tiny_checkpoint)
    with pytest.raises(ValueError, match=r"memory=1.00 MB: the interpreter with .* need \d+0MB; allow that") as error:
        generate(ours, "w1", memory="1MB")
    assert generate(ours, "w1", 2, memory=re.search(r"need (\d+MB)", str(error.value))[1])["tokens"]
    with pytest.raises(ValueError, match="dtype=float32: with memory the checkpoint's own is computed in"):
        generate(ours, "w1", memory="4GB", dtype="float32")
    monkeypatch.setattr("hf_llmkernel.generate.paging.pinned_blocks", lambda *sizes: 0)
    result = generate(ours, "w1 w2 w3", max_new_tokens=12, chat=False, memory="4GB")
    assert result["text"] == greedy_text("w1 w2 w3") != ""


def test_a_damaged_or_foreign_folder_is_told_by_name(tiny_checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "intermediate_size": 96}))
    assert_fails(folder, r"layers\.0\.mlp\.\w+_proj\.weight: is \[\d+, \d+\] in the weights and .* by config\.json")
    (folder / "config.json").write_text(json.dumps(fields))
    os.truncate(folder / "model.safetensors", 2000)
    assert_fails(folder, r"model/model\.safetensors: .*; fetch this file again")


def test_a_tokenizer_of_a_larger_model_is_refused(tiny_checkpoint, tmp_path):
    config = AutoConfig.from_pretrained(tiny_checkpoint, vocab_size=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path)
    assert_fails(tmp_path, "vocab_size=8: the tokenizer made token 63, which the model does not have", prompt="w59")


def test_a_classifier_does_not_generate(tiny_checkpoint, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path)
    assert_fails(tmp_path, "is a LLMKernelForSequenceClassification, without a language-model head")


def assert_fails(folder, message, prompt="w1"):
    with pytest.raises(ValueError, match=message):
        generate(str(folder), prompt, chat=False)
