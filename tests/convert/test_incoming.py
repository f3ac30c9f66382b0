"""Conversion of stock checkpoints: equal logits and tokens, every head, and what travels with the weights."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_llmkernel.checkpoint import CheckpointReader
from hf_llmkernel.convert import convert_checkpoint

from .sources import CASES, PREFIXES, edit_config, hashes, padded_batch, save_stock, stock_model

HEADS = {
    "base": ("Model", "AutoModel", "last_hidden_state"),
    "causal-lm": ("ForCausalLM", "AutoModelForCausalLM", "logits"),
    "sequence-classification": ("ForSequenceClassification", "AutoModelForSequenceClassification", "logits"),
    "token-classification": ("ForTokenClassification", "AutoModelForTokenClassification", "logits"),
    "question-answering": ("ForQuestionAnswering", "AutoModelForQuestionAnswering", "start_logits"),
}


def one_file(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_logits_and_generation_equal_the_stock_class(tmp_path, case):
    family, changes = CASES[case]
    stock = save_stock(tmp_path / "source", family, **changes)
    before = hashes(tmp_path / "source")
    report = convert_checkpoint(tmp_path / "source", tmp_path / "output")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "output").eval()
    assert type(model).__name__ == report.architecture == "LLMKernelForCausalLM"
    assert report.family == family
    assert report.parameters == sum(parameter.numel() for parameter in stock.parameters())
    for side in ("left", "right"):
        ids, mask = padded_batch(side)
        with torch.no_grad():
            expected, actual = (each(ids, attention_mask=mask).logits for each in (stock, model))
        assert expected.abs().max() > 1
        assert ((expected - actual).abs() * mask[..., None]).max() <= 1e-4
    ids, mask = padded_batch("left")
    expected, actual = (
        each.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False) for each in (stock, model)
    )
    assert torch.equal(expected, actual)
    assert hashes(tmp_path / "source") == before


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", PREFIXES)
def test_every_head(tmp_path, family, head):
    suffix, auto_class, output = HEADS[head]
    labels = {"id2label": {0: "no", 1: "yes", 2: "maybe"}, "label2id": {"no": 0, "yes": 1, "maybe": 2}}
    labels = labels if "classification" in head else {}
    stock = save_stock(tmp_path / "source", family, head=suffix, **labels)
    report = convert_checkpoint(tmp_path / "source", tmp_path / "output")
    assert report.architecture == f"LLMKernel{suffix}"
    model, loading = getattr(transformers, auto_class).from_pretrained(tmp_path / "output", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    ids, mask = padded_batch("left")
    with torch.no_grad():
        expected, actual = (getattr(each.eval()(ids, attention_mask=mask), output) for each in (stock, model))
    assert ((expected - actual).abs()).max() <= 1e-4
    if labels:
        assert model.config.id2label == labels["id2label"] and model.config.label2id == labels["label2id"]


def test_a_chosen_head_leaves_the_sources_own_behind(tmp_path):
    stock = save_stock(tmp_path / "source")
    report = convert_checkpoint(tmp_path / "source", tmp_path / "output", head="base")
    assert report.dropped == ["lm_head.weight"]
    model = transformers.AutoModel.from_pretrained(tmp_path / "output").eval()
    ids, mask = padded_batch("left")
    with torch.no_grad():
        expected = stock.model(ids, attention_mask=mask).last_hidden_state
        assert torch.equal(model(ids, attention_mask=mask).last_hidden_state, expected)


def test_a_tied_base_model_becomes_a_causal_one(tmp_path):
    base = save_stock(tmp_path / "source", head="Model", tie_word_embeddings=True)
    convert_checkpoint(tmp_path / "source", tmp_path / "output", head="causal-lm")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "output")
    assert torch.equal(model.lm_head.weight, base.embed_tokens.weight)


def test_the_head_is_read_from_the_tensors_where_the_config_is_silent(tmp_path):
    for suffix in ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification"):
        source = tmp_path / f"source{suffix}"
        save_stock(source, head=suffix)
        edit_config(source, architectures=...)
        assert convert_checkpoint(source, tmp_path / suffix).architecture == f"LLMKernel{suffix}"


def test_tensors_keep_their_dtypes_unless_one_is_chosen(tmp_path):
    stock = stock_model("llama").bfloat16()
    stock.model.norm.float()
    stock.save_pretrained(tmp_path / "source")
    report = convert_checkpoint(tmp_path / "source", tmp_path / "same")
    assert report.dtype == json.loads((tmp_path / "same/config.json").read_text())["dtype"] == "bfloat16"
    kept, original = one_file(tmp_path / "same"), one_file(tmp_path / "source")
    assert kept["model.norm.weight"].dtype == torch.float32
    assert {name: tensor.dtype for name, tensor in kept.items()} == {name: t.dtype for name, t in original.items()}
    assert all(torch.equal(kept[name], tensor) for name, tensor in original.items())
    convert_checkpoint(tmp_path / "source", tmp_path / "half", dtype="float16")
    assert all(torch.equal(tensor, original[name].half()) for name, tensor in one_file(tmp_path / "half").items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.float16


def test_the_dtype_is_written_where_the_source_is_silent(tmp_path):
    stock_model("llama").bfloat16().save_pretrained(tmp_path / "source")
    edit_config(tmp_path / "source", dtype=...)
    assert convert_checkpoint(tmp_path / "source", tmp_path / "output").dtype == "bfloat16"
    assert json.loads((tmp_path / "output/config.json").read_text())["dtype"] == "bfloat16"


def with_head(folder: Path, head: torch.Tensor | None) -> None:
    """Adds an `lm_head.weight` to the file of a tied model; `None` copies the embedding."""
    tensors = one_file(folder)
    head = tensors["model.embed_tokens.weight"].clone() if head is None else head
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_tied_head_that_equals_the_embedding_is_left_out(tmp_path):
    save_stock(tmp_path / "source", shards="1GB", tie_word_embeddings=True)
    with_head(tmp_path / "source", None)
    report = convert_checkpoint(tmp_path / "source", tmp_path / "output")
    assert report.dropped == ["lm_head.weight"]
    assert "lm_head.weight" not in one_file(tmp_path / "output")


def test_a_tied_head_that_differs_is_an_error_or_untied_as_in_the_library(tmp_path):
    save_stock(tmp_path / "source", shards="1GB", tie_word_embeddings=True)
    with_head(tmp_path / "source", torch.randn(97, 48))
    with pytest.raises(ValueError, match=r"lm_head\.weight: differs from model\.embed_tokens\.weight .*--untie"):
        convert_checkpoint(tmp_path / "source", tmp_path / "output")
    assert not (tmp_path / "output").exists()
    convert_checkpoint(tmp_path / "source", tmp_path / "output", untie=True)
    stock, model = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("source", "output"))
    assert model.config.tie_word_embeddings is False
    ids, mask = padded_batch("left")
    with torch.no_grad():
        assert torch.equal(stock(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)


def test_old_inverse_frequencies_are_dropped(tmp_path):
    save_stock(tmp_path / "source", shards="1GB")
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = {**one_file(tmp_path / "source"), old: torch.ones(4)}
    save_file(tensors, tmp_path / "source/model.safetensors", metadata={"format": "pt"})
    report = convert_checkpoint(tmp_path / "source", tmp_path / "output")
    assert report.dropped == [old]


def test_old_spellings_of_rope_and_dtype(tmp_path):
    stock = save_stock(tmp_path / "source")
    scaling = {"type": "linear", "factor": 2.0}
    edit_config(tmp_path / "source", rope_parameters=..., rope_theta=500.0, rope_scaling=scaling)
    edit_config(tmp_path / "source", dtype=..., torch_dtype="float32")
    report = convert_checkpoint(tmp_path / "source", tmp_path / "output")
    stock, model = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("source", "output"))
    assert model.config.rope_parameters["rope_theta"] == 500.0
    assert report.ignored_fields == []
    ids, mask = padded_batch("left")
    with torch.no_grad():
        assert torch.equal(stock(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)


def test_fields_that_no_class_reads_are_reported(tmp_path):
    save_stock(tmp_path / "source")
    edit_config(tmp_path / "source", unsloth_version="1", qk_norm=True, sliding_window=3, linear_forms={"q_proj": {}})
    report = convert_checkpoint(tmp_path / "source", tmp_path / "output")
    assert report.ignored_fields == ["linear_forms", "qk_norm", "sliding_window", "unsloth_version"]
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "output").config
    assert (config.qk_norm, config.sliding_window, config.linear_forms) == (False, None, {})


def test_generation_defaults_of_an_old_config_are_kept(tmp_path):
    save_stock(tmp_path / "source")
    (tmp_path / "source/generation_config.json").unlink()
    edit_config(tmp_path / "source", temperature=0.3, do_sample=True, repetition_penalty=1.2)
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "source").generation_config
    report = convert_checkpoint(tmp_path / "source", tmp_path / "output")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "output").generation_config
    assert report.ignored_fields == []
    for name in ("temperature", "do_sample", "repetition_penalty", "eos_token_id", "bos_token_id", "pad_token_id"):
        assert getattr(ours, name) == getattr(stock, name)


def write_tokenizer(folder: Path, **settings: object) -> None:
    """A word-level tokenizer with two chat templates."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "hello", "world"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }} é"}
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_tokenizer_templates_and_generation_config_travel_byte_for_byte(tmp_path):
    source, output = tmp_path / "source", tmp_path / "output"
    save_stock(source)
    write_tokenizer(source)
    (source / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [2, 5] }')
    (source / "LICENSE").write_text("terms")
    (source / "README.md").write_text("a card about another model")
    report = convert_checkpoint(source, output)
    assert report.tokenizer
    carried = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE", "chat_template.jinja"]
    for name in [*carried, "additional_chat_templates/tool_use.jinja"]:
        assert (output / name).read_bytes() == (source / name).read_bytes(), name
    assert not (output / "README.md").exists()
    ours, stock = (AutoTokenizer.from_pretrained(folder) for folder in (output, source))
    assert ours("hello world x").input_ids == stock("hello world x").input_ids
    assert ours.chat_template == stock.chat_template
    assert AutoModelForCausalLM.from_pretrained(output).generation_config.eos_token_id == [2, 5]


@pytest.mark.parametrize(
    ("family", "declared", "changed"),
    [
        ("llama", None, False),
        ("qwen2", None, False),
        ("qwen2", "LlamaTokenizer", True),
        ("mistral", "LlamaTokenizer", True),
    ],
)
def test_the_tokenizer_class_does_not_depend_on_the_lost_model_type(tmp_path, family, declared, changed):
    source, output = tmp_path / "source", tmp_path / "output"
    save_stock(source, family)
    write_tokenizer(source)
    path = source / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": declared}
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))
    convert_checkpoint(source, output)
    ours, stock = (AutoTokenizer.from_pretrained(folder) for folder in (output, source))
    assert type(ours) is type(stock)
    assert ours("hello world x").input_ids == stock("hello world x").input_ids
    assert ((output / "tokenizer_config.json").read_bytes() != path.read_bytes()) == changed


def test_a_source_without_tokenizer_says_so(tmp_path):
    save_stock(tmp_path / "source")
    assert convert_checkpoint(tmp_path / "source", tmp_path / "output").tokenizer is False


def test_shards_have_standard_names_and_load(tmp_path):
    stock = save_stock(tmp_path / "source", shards="1GB")
    report = convert_checkpoint(tmp_path / "source", tmp_path / "output", shard_bytes=50_000)
    count = len(report.files)
    assert count > 3
    assert report.files == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "output")
    loaded, expected = model.state_dict(), stock.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_a_folder_in_the_current_directory_and_an_empty_output(tmp_path, monkeypatch):
    save_stock(tmp_path / "source")
    (tmp_path / "output").mkdir()
    monkeypatch.chdir(tmp_path)
    convert_checkpoint("source", "output/")
    assert CheckpointReader("output").keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "source"]
