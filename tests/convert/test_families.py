"""The table of families: defaults are the stock classes' own, and there and back is where one started."""

from typing import Any

import pytest

from hf_llmkernel.convert.families import FAMILIES, fields_without_meaning, parse_stock_config, to_llm_kernel, to_stock

SMALL: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}


def there(**fields: Any):
    return to_llm_kernel(parse_stock_config(fields, "config.json"), "config.json")


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_the_stock_classes_own(family):
    stock = FAMILIES[family].config_class(dtype="float32")
    ours = there(model_type=family, dtype="float32")
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_key_value_heads", "max_position_embeddings")
    for name in (*shared, "rms_norm_eps", "rope_parameters", "eos_token_id", "sliding_window", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(stock, name, None), name
    assert to_stock(ours, FAMILIES[family]).to_dict() == stock.to_dict()


@pytest.mark.parametrize(
    ("family", "bias", "out_bias", "qk_norm"),
    [
        ("llama", False, False, False),
        ("mistral", False, False, False),
        ("qwen2", True, False, False),
        ("qwen3", False, False, True),
    ],
)
def test_what_a_family_has_built_in(family, bias, out_bias, qk_norm):
    ours = there(model_type=family, **SMALL)
    assert (ours.attention_bias, ours.attention_out_bias, ours.qk_norm) == (bias, out_bias, qk_norm)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_biases_of_all_four_linears(family):
    ours = there(model_type=family, attention_bias=True, **SMALL)
    assert ours.attention_bias and ours.attention_out_bias


def test_windows():
    slides, full = "sliding_attention", "full_attention"
    assert there(model_type="mistral", sliding_window=9, **SMALL).layer_types == [slides] * 3
    assert there(model_type="mistral", sliding_window=None, **SMALL).layer_types == [full] * 3
    qwen = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, **SMALL}
    assert there(**qwen, max_window_layers=2).layer_types == [full, full, slides]
    assert there(**qwen, layer_types=[slides, full, slides]).layer_types == [slides, full, slides]
    unused = there(**{**qwen, "use_sliding_window": False}, max_window_layers=0)
    assert (unused.sliding_window, unused.layer_types) == (None, [full] * 3)


@pytest.mark.parametrize("layer_types", [["sliding_attention", "full_attention", "sliding_attention"], None])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_windows_of_single_layers_come_back(family, layer_types):
    fields = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "layer_types": layer_types}
    stock = parse_stock_config({"model_type": family, **SMALL, **fields}, "config.json")
    back = to_stock(to_llm_kernel(stock, "config.json"), FAMILIES[family])
    assert (back.layer_types, back.sliding_window, back.use_sliding_window) == (stock.layer_types, 9, True)


def test_what_the_shared_code_reads_is_carried():
    labels = {"id2label": {"0": "a"}, "label2id": {"a": 0}}
    ours = there(model_type="llama", is_causal=False, classifier_dropout=0.3, **labels, **SMALL)
    assert (ours.is_causal, ours.classifier_dropout, ours.id2label) == (False, 0.3, {0: "a"})
    assert ours.num_labels == 1


def test_an_attention_dropout_of_null():
    assert there(model_type="llama", attention_dropout=None, **SMALL).attention_dropout == 0.0


def test_parsing_does_not_change_the_fields():
    fields = {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5.0}
    copy = {**fields, "rope_scaling": dict(fields["rope_scaling"])}
    parse_stock_config(fields, "config.json")
    assert fields == copy


def test_fields_that_no_class_reads():
    fields = {"model_type": "llama", "mup_scale": 2, "torch_dtype": "float32", "num_labels": 3, "rope_theta": 1.0}
    assert fields_without_meaning(fields, parse_stock_config(fields, "config.json")) == ["mup_scale"]
