"""The configuration: forms are validated, stored shapes follow from them, and everything survives JSON."""

import json
import math
import re

import pytest

from hf_llmkernel.model.configuration_llm_kernel import AUTO_MAP, PAYLOAD_FILES, LinearForm, LLMKernelConfig

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("form", "fault"),
    [
        ({"rang": 8}, "unknown keys ['rang']"),
        ({"bits": 5}, "bits=5"),
        ({"bits": 8.0}, "bits=8.0"),
        ({"version": True}, "version=True"),
        ({"rank": 0}, "rank=0"),
        ({"rank": True}, "rank=True"),
        ({"rank": 4, "bits": 8}, "belong to the factors"),
        ({"a": {"bits": 8}}, "set rank"),
        ({"rank": 4, "a": {"rank": 2}}, "a.rank=2"),
        ({"rank": 4, "b": {"bias": True}}, "b.bias"),
        ({"sparsity": "4:2"}, "sparsity='4:2'"),
        ({"sparsity": "2:4:8"}, "sparsity='2:4:8'"),
        ({"sparsity": "bitmask"}, "nnz=None"),
        ({"sparsity": "2:4", "nnz": 8}, "nnz=8"),
        ({"nnz": -1, "sparsity": "bitmask"}, "nnz=-1"),
        ({"group_size": 32}, "set bits to 8 or 4"),
        ({"symmetric": False}, "set bits to 8 or 4"),
        ({"bits": 8, "symmetric": "no"}, "symmetric='no'"),
        ({"bits": 8, "group_size": 0}, "group_size=0"),
        ({"bits": 8, "scale_dtype": "int8"}, "scale_dtype='int8'"),
        ({"version": 2}, "version=2"),
        ({"bias": 1.5}, "bias=1.5"),
        ("dense", "must be a dictionary"),
    ],
)
def test_form_refuses_what_has_no_meaning(form, fault):
    with pytest.raises(ValueError) as error:
        LinearForm.from_dict(form)
    assert fault in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"bias": True},
        {"rank": 8, "a": {"bits": 8, "group_size": 32}, "b": {"sparsity": "2:4"}},
        {"sparsity": "bitmask", "nnz": 100, "bits": 4, "group_size": 32, "symmetric": False},
    ],
)
def test_form_survives_json(form):
    read = LinearForm.from_dict(json.loads(json.dumps(form)))
    assert LinearForm.from_dict(json.loads(json.dumps(read.to_dict()))) == read
    assert read.to_dict()["version"] == 1
    assert {**form, "version": 1}.items() <= {**read.to_dict(), **form}.items()


def test_stored_shapes_follow_from_the_form_by_hand():
    out_features, in_features = 40, 61
    cases = {
        (): {"weight": ((40, 61), None)},
        (("bias", True),): {"weight": ((40, 61), None), "bias": ((40,), None)},
        (("sparsity", "2:4"),): {"values": ((40, 31), None), "mask": ((40, 8), "uint8")},
        (("sparsity", "bitmask"), ("nnz", 77), ("bits", 4), ("group_size", 32)): {
            "values": ((39,), "uint8"),
            "mask": ((40, 8), "uint8"),
            "scales": ((40, 2), "float16"),
        },
        (("bits", 8), ("symmetric", False), ("zero_point_dtype", "float16")): {
            "values": ((40, 61), "uint8"),
            "scales": ((40, 1), "float16"),
            "zero_points": ((40, 1), "float16"),
        },
    }
    for form, expected in cases.items():
        assert LinearForm(**dict(form)).stored_tensors(out_features, in_features) == expected


def test_two_of_four_bf16_takes_at_most_057_of_its_dense_bytes():
    for form in (LinearForm(sparsity="2:4"), LinearForm(sparsity="bitmask", nnz=512 * 256)):
        stored = form.stored_tensors(512, 512).values()
        size = sum(math.prod(shape) * (2 if dtype is None else 1) for shape, dtype in stored)
        assert size <= 0.57 * 512 * 512 * 2


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"init_scheme": "magic"}, "init_scheme='magic'"),
        ({"hidden_act": "magic"}, "hidden_act='magic'"),
        ({"num_attention_heads": 3}, "layer 0: num_attention_heads=3"),
        ({"linear_forms": {"qkv_proj": {}}}, "names 'qkv_proj'"),
        ({"linear_forms": {"q_proj": {"rang": 1}}}, "unknown keys ['rang']"),
        ({"linear_forms": {"q_proj": {"rank": 65}}}, "layer 0, q_proj: linear form: rank=65"),
        ({"linear_forms": {"gate_proj": {}}, "mlp_gated": False}, "names 'gate_proj'"),
        (
            {"per_layer_config": {1: {"linear_forms": {"k_proj": {"sparsity": "bitmask", "nnz": 9999}}}}},
            "layer 1, k_proj",
        ),
        ({"per_layer_config": {2: {"intermediate_size": 0}}}, "layer 2: intermediate_size=0"),
        ({"per_layer_config": {1: {"skip": ["norm"]}}}, "layer 1: skip=['norm']"),
        ({"per_layer_config": {1: {"hidden_size": 32}}}, "per_layer_config[1]: 'hidden_size' is not a layer's own"),
        ({"per_layer_config": {1: {"mlp_gated": False}}}, "per_layer_config[1]: 'mlp_gated' is not a layer's own"),
        ({"per_layer_config": {"1": {"width": 32}}}, "per_layer_config[1]: 'width' is not a layer's own"),
        # transformers' view of a layer would take the global one for nothing.
        ({"per_layer_config": {1: {"intermediate_size": 32}}, "skip": ["mlp"]}, "skip=['mlp']: is read in per_layer_c"),
        ({"head_dim": 1}, "layer 0: head_dim=1 must be even"),
        ({"initializer_range": -0.1}, "initializer_range=-0.1: must be a finite number"),
        ({"sliding_window": 0}, "sliding_window=0: must be at least 1"),
        ({"pad_token_id": 10**6}, "pad_token_id=1000000: must be below vocab_size="),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0: must be at least 1"),
        ({"hidden_size": -64}, "hidden_size=-64: must be at least 1"),
        ({"skip": ["attention"]}, "no layer attends"),
        ({"embed_tokens_form": {"rank": 65}}, "embed_tokens_form"),
        ({"lm_head_form": {"bits": 8}, "tie_word_embeddings": True}, "lm_head_form"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_window=None"),
        ({"layer_types": ["wide"] * 3}, "`layer_types` entries must be in"),  # the library's own rule
    ],
)
def test_config_names_layer_and_value_of_what_is_wrong(fields, fault):
    with pytest.raises(ValueError) as error:
        LLMKernelConfig(**{**SMALL, **fields})
    assert fault in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"linear_forms": [1]}, "linear_forms=[1]: must be dict[str, dict] or null; correct it."),
        ({"linear_forms": {"q_proj": [1]}}, "linear_forms={'q_proj': [1]}: must be dict[str, dict] or null;"),
        ({"embed_tokens_form": "int8"}, "embed_tokens_form='int8': must be dict or null; correct it."),
        ({"hidden_size": "64"}, "hidden_size='64': must be int; correct it."),
        ({"hidden_size": 64.0}, "hidden_size=64.0: must be int; correct it."),
        ({"rms_norm_eps": None}, "rms_norm_eps=None: must be float; correct it."),
        ({"skip": "mlp"}, "skip='mlp': must be list[str] or null; correct it."),
        ({"per_layer_config": [{}]}, "per_layer_config=[{}]: must be a dictionary from numbers of layers, 0 to 2;"),
        ({"per_layer_config": {"all": {}}}, "per_layer_config={'all': {}}: must be a dictionary from numbers"),
        ({"per_layer_config": {"1": ["mlp"]}}, "per_layer_config[1]=['mlp']: must be a dictionary; correct it."),
        (
            {"per_layer_config": {"1": {"linear_forms": [1]}}},
            "per_layer_config[1]: linear_forms=[1]: must be dict[str, dict] or null; correct it.",
        ),
        ({"per_layer_config": {"1": {"skip": "mlp"}}}, "per_layer_config[1]: skip='mlp': must be list[str] or null;"),
    ],
)
def test_fields_of_another_type_are_named_with_theirs(fields, fault, tmp_path):
    LLMKernelConfig(**SMALL).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, **fields}))
    with pytest.raises(ValueError, match=f"^{re.escape(fault)}") as error:
        LLMKernelConfig.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_other_errors_of_a_field_are_not_taken_for_its_type():
    config = LLMKernelConfig(**SMALL)
    with pytest.raises(ValueError, match="^hidden_size='64': must be int"):
        config.hidden_size = "64"
    assert config.hidden_size == 64
    heterogeneous = LLMKernelConfig(**SMALL, per_layer_config={1: {"intermediate_size": 32}})
    with pytest.raises(RuntimeError, match="intermediate_size"):
        _ = heterogeneous.intermediate_size


def test_defaults_of_old_forms_follow_the_model():
    config = LLMKernelConfig(**SMALL, attention_bias=True, attention_out_bias=False, mlp_bias=True)
    assert [config.linear_form(name).bias for name in ("q_proj", "o_proj", "up_proj")] == [True, False, True]
    forms = {"o_proj": {"bias": True}}
    assert LLMKernelConfig(**SMALL, linear_forms=forms).linear_form("o_proj").bias is True
    assert LLMKernelConfig(**SMALL).head_dim == 16
    assert LLMKernelConfig(**SMALL, sliding_window=8).layer_types == ["sliding_attention"] * 3


def test_layer_forms_replace_the_global_ones_whole():
    config = LLMKernelConfig(
        **SMALL,
        linear_forms={"q_proj": {"bits": 8}},
        per_layer_config={1: {"linear_forms": {"up_proj": {"rank": 4}}}},
    )
    assert config.per_layer_config[0].linear_form("q_proj").bits == 8
    assert config.per_layer_config[1].linear_form("q_proj").bits == 16
    assert config.per_layer_config[1].linear_form("up_proj").rank == 4


def test_parallel_plan_splits_one_factor_of_a_low_rank():
    config = LLMKernelConfig(**SMALL, linear_forms={"q_proj": {"rank": 4}, "down_proj": {"rank": 4}})
    plan = config.base_model_tp_plan
    assert plan["layers.*.self_attn.q_proj.b"] == "colwise"
    assert plan["layers.*.mlp.down_proj.a"] == "rowwise"
    assert plan["layers.*.self_attn.o_proj"] == "rowwise"
    mixed = LLMKernelConfig(**SMALL, per_layer_config={1: {"linear_forms": {"q_proj": {"rank": 4}}}})
    # The library asks for a layer by `*` alone; an entry with a number would match nothing.
    assert mixed.base_model_tp_plan["layers.*.self_attn.q_proj"] == "colwise"
    assert mixed.base_model_tp_plan["layers.*.self_attn.q_proj.b"] == "colwise"
    assert not any(part.isdigit() for name in mixed.base_model_tp_plan for part in name.split("."))


def test_saved_config_is_the_same_and_carries_payload_and_map(tmp_path):
    config = LLMKernelConfig(
        **SMALL,
        linear_forms={"q_proj": {"rank": 4}},
        embed_tokens_form={"bits": 8},
        per_layer_config={0: {"skip": ["attention"]}, 2: {"intermediate_size": 64, "num_key_value_heads": 1}},
    )
    config.save_pretrained(tmp_path)
    read = LLMKernelConfig.from_pretrained(tmp_path)
    assert read.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert sorted(path.name for path in tmp_path.glob("*.py")) == sorted(PAYLOAD_FILES)
    assert read.kv_sharing_modes == ["reuse", "own", "own"]
    assert "kv_sharing_modes" not in config.to_dict()
