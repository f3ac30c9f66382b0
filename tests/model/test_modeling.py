"""The family against transformers' own classes on the same weights, and the behaviour its forms and layers add."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

from hf_llmkernel.model.configuration_llm_kernel import INIT_SCHEMES, LinearForm, LLMKernelConfig
from hf_llmkernel.model.linear_llm_kernel import PackedWeight, unpack_weight
from hf_llmkernel.model.modeling_llm_kernel import (
    LLMKernelForCausalLM,
    LLMKernelForSequenceClassification,
    LLMKernelModel,
)

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
INT8 = {"bits": 8, "group_size": 32}
SPARSE = {"sparsity": "2:4"}
MIXED = {
    "q_proj": {"rank": 8, "a": INT8},
    "k_proj": INT8,
    "o_proj": {"sparsity": "2:4"},
    "up_proj": {"sparsity": "2:4", "bits": 4, "group_size": 32},
    "down_proj": {"rank": 16},
}
ROPES = {
    "default": {"rope_theta": 500.0},
    "linear": {"rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_theta": 1e4, "factor": 2.0},
    "yarn": {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 32,
        "factor": 4.0,
    },
    "llama3": {
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
WINDOW = {"sliding_window": 6}
PEERS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}, {}),
    "llama, biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}, None),
    "llama, tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}, None),
    "llama, head_dim": (LlamaConfig, LlamaForCausalLM, {"head_dim": 24}, None),
    "mistral, window": (MistralConfig, MistralForCausalLM, WINDOW, None),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}, {"attention_bias": True, "attention_out_bias": False}),
    "qwen2, window": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},
        {
            **WINDOW,
            "attention_bias": True,
            "attention_out_bias": False,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}, {"head_dim": 16, "qk_norm": True}),
    **{
        f"llama, {name} rope": (
            LlamaConfig,
            LlamaForCausalLM,
            {"rope_parameters": {"rope_type": name, **rope}},
            None,
        )
        for name, rope in ROPES.items()
    },
}


def build(model_class=LLMKernelForCausalLM, **fields):
    torch.manual_seed(0)
    return model_class(LLMKernelConfig(**{**SMALL, **fields})).eval()


def tokens(batch: int = 2, length: int = 17) -> torch.Tensor:
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(5))


def pair_of(name: str):
    """A stock model with random weights, norms and biases included, and ours with the same."""
    config_class, model_class, theirs, ours = PEERS[name]
    torch.manual_seed(0)
    peer = model_class(config_class(**{**SMALL, **theirs})).eval()
    for parameter in peer.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model = build(**{"rope_parameters": peer.config.rope_parameters, **(theirs if ours is None else ours)})
    model.load_state_dict(peer.state_dict())
    return peer, model


@pytest.mark.parametrize("name", PEERS)
def test_logits_and_tokens_equal_those_of_the_stock_class(name):
    peer, model = pair_of(name)
    ids = tokens(length=40)
    mask = torch.ones_like(ids)
    ids[0, :7], mask[0, :7] = 0, 0  # left padding
    with torch.no_grad():
        ours, theirs = model(ids, attention_mask=mask).logits, peer(ids, attention_mask=mask).logits
    assert (ours - theirs)[mask.bool()].abs().max() <= 1e-4
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), peer.generate(ids, **options))


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
@pytest.mark.parametrize("window", [{}, WINDOW], ids=["full", "window"])
def test_attention_implementations_agree(attention, window):
    model, ids = build(linear_forms=MIXED, **window), tokens(length=40)
    # Compiling flex attention takes a minute on a CPU, and its compiled sliding windows give NaN for stock Mistral too.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = model(ids).logits
        model.set_attn_implementation(attention)
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-4)
    assert all(layer.self_attn.config._attn_implementation == attention for layer in model.model.layers)


LAYERS = {
    0: {"skip": ["attention"]},
    1: {"intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "linear_forms": MIXED},
    2: {"skip": ["mlp"]},
}


def test_layers_have_the_shapes_of_their_own_config():
    model = build(per_layer_config=LAYERS)
    first, second, third = model.model.layers
    assert not hasattr(first, "self_attn") and not hasattr(first, "input_layernorm")
    assert not hasattr(third, "mlp") and not hasattr(third, "post_attention_layernorm")
    assert (second.mlp.up_proj.out_features, second.self_attn.q_proj.out_features) == (48, 32)
    assert second.self_attn.k_proj.out_features == 16


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_caches_count_past_a_first_layer_without_attention(cache):
    model, ids = build(per_layer_config=LAYERS), tokens(length=12)
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    state = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=16)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        for start, end in ((0, 5), (5, 6), (6, 12)):
            part = model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=state,
            ).logits
            assert (part - whole[:, start:end])[mask[:, start:end].bool()].abs().max() < 1e-5
            assert int(state.get_seq_length()) == end


@pytest.mark.parametrize("fields", [{"linear_forms": MIXED}, {"per_layer_config": LAYERS}, WINDOW])
def test_every_way_to_decode_gives_the_same_tokens(fields):
    model, ids = build(**fields), tokens(length=9)
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    prompt = ids[:1]
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **options), model.generate(prompt, **options))


def test_quantized_cache_decodes_nearly_the_same():
    model, ids = build(linear_forms=MIXED), tokens(length=9)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    exact = model.generate(ids, **options)
    rounded = model.generate(ids, cache_implementation="quantized", cache_config={"backend": "fp8"}, **options)
    assert (exact.logits[1] - rounded.logits[1]).abs().max() < 0.1 * exact.logits[1].abs().max()


@pytest.mark.parametrize("fields", [{}, {"linear_forms": MIXED}, {"per_layer_config": LAYERS}, WINDOW])
def test_packed_sequences_do_not_see_each_other(fields):
    model = build(**fields)
    one, two = tokens(1, 9), tokens(1, 6) + 0
    packed = torch.cat((one, two), dim=1)
    positions = torch.cat((torch.arange(9), torch.arange(6))).unsqueeze(0)
    with torch.no_grad():
        apart = torch.cat((model(one, use_cache=False).logits, model(two, use_cache=False).logits), dim=1)
        together = model(packed, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"per_layer_config": LAYERS}])
def test_gradient_checkpointing_gives_the_same_gradients(fields):
    ids, gradients = tokens(), []
    for checkpointed in (False, True):
        model = build(**fields).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient)


@pytest.mark.parametrize("scheme", INIT_SCHEMES)
def test_init_schemes_have_the_spread_they_promise(scheme):
    model = build(init_scheme=scheme, initializer_range=0.05, num_hidden_layers=2, hidden_size=256)
    up, down = model.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.down_proj.weight
    out_features, in_features = up.shape
    expected = {
        "normal": 0.05,
        "truncated_normal": 0.05 * 0.8796,  # of a normal cut at two standard deviations
        "uniform": 0.05,
        "xavier_uniform": (2 / (in_features + out_features)) ** 0.5,
        "xavier_normal": (2 / (in_features + out_features)) ** 0.5,
        "kaiming_uniform": (2 / in_features) ** 0.5,
        "kaiming_normal": (2 / in_features) ** 0.5,
        "orthogonal": (1 / max(in_features, out_features)) ** 0.5,
        "depth_scaled": 0.05,
    }[scheme]
    assert up.std().item() == pytest.approx(expected, rel=0.03)
    if scheme == "depth_scaled":
        assert down.std().item() == pytest.approx(0.05 / 2, rel=0.03)
    if scheme == "orthogonal":
        torch.testing.assert_close(up @ up.T, torch.eye(out_features), atol=1e-5, rtol=0)
    if scheme == "truncated_normal":
        assert up.abs().max() <= 0.1
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.05, rel=0.03)


@pytest.mark.parametrize(
    "form", [{"rank": 16}, INT8, {"sparsity": "2:4"}, {"sparsity": "bitmask", "nnz": 112 * 256}], ids=str
)
def test_compressed_forms_are_initialized_like_dense_ones(form):
    model = build(linear_forms={"up_proj": form}, hidden_size=256, embed_tokens_form={"bits": 8})
    up = model.model.layers[0].mlp.up_proj
    weight = unpack_weight(up.state_dict(), up.form, 256, torch.float32)
    assert weight[weight != 0].std().item() == pytest.approx(0.02, rel=0.35 if "sparsity" in form else 0.1)
    with torch.no_grad():
        assert model(tokens()).logits.isfinite().all()


@pytest.mark.parametrize("scheme", INIT_SCHEMES)
def test_a_low_rank_product_spreads_as_the_dense_weight(scheme):
    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 512, "init_scheme": scheme}
    forms = {"up_proj": {"rank": 64}, "down_proj": {"rank": 64, "a": {"bits": 8}}}
    dense, model = build(**sizes), build(**sizes, linear_forms=forms, embed_tokens_form={"rank": 64})
    for name in ("mlp.up_proj", "mlp.down_proj"):
        expected = dense.model.layers[1].get_submodule(name).weight.std().item()
        assert model.model.layers[1].get_submodule(name).weight.std().item() == pytest.approx(expected, rel=0.05)
    rows = model.model.embed_tokens(torch.arange(512))
    assert rows.std().item() == pytest.approx(dense.model.embed_tokens.weight.std().item(), rel=0.05)


@pytest.fixture
def saved(tmp_path):
    model = build(linear_forms=MIXED, tie_word_embeddings=True, embed_tokens_form=INT8)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.1.self_attn.k_proj.values",
        "model.layers.1.self_attn.k_proj.scales",
        "model.layers.0.mlp.up_proj.mask",
        "model.layers.0.mlp.down_proj.a.weight",
        "model.embed_tokens.values",
        "model.layers.2.input_layernorm.weight",
        "model.layers.0.self_attn.v_proj.weight",
    ],
)
def test_a_compressed_checkpoint_never_loads_with_a_tensor_missing(saved, key):
    _, folder = saved
    rewrite(folder, lambda tensors: tensors.pop(key))
    with pytest.raises(ValueError, match="missing or of another shape"):
        LLMKernelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("model_class", "fields", "key"),
    [
        (LLMKernelForCausalLM, {}, "lm_head.weight"),
        (LLMKernelForSequenceClassification, {"num_labels": 3}, "score.weight"),
    ],
)
def test_the_head_that_was_saved_never_loads_at_random(tmp_path, model_class, fields, key):
    model_class(build(linear_forms=MIXED, **fields).config).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop(key))
    with pytest.raises(ValueError, match=f"{key}: missing"):
        model_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("model_class", [LLMKernelForCausalLM, LLMKernelModel])
def test_layers_beyond_those_of_the_config_are_refused(saved, model_class):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2, "layer_types": None}))
    with pytest.raises(ValueError, match="layers.2.input_layernorm.weight: not of the config's form"):
        model_class.from_pretrained(folder)


def test_a_compressed_checkpoint_refuses_what_its_config_does_not_know(saved):
    _, folder = saved
    rewrite(folder, lambda tensors: tensors.update({"model.layers.1.self_attn.k_proj.weight": torch.zeros(32, 64)}))
    with pytest.raises(ValueError, match="k_proj.weight: not of the config's form"):
        LLMKernelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("forms", [MIXED, {"q_proj": {"rank": 8}}, {"up_proj": {"sparsity": "2:4"}}])
@pytest.mark.parametrize("model_class", [LLMKernelForCausalLM, LLMKernelModel, LLMKernelForSequenceClassification])
def test_a_config_that_lost_its_forms_is_refused(tmp_path, model_class, forms):
    LLMKernelForCausalLM(build(linear_forms=forms).config).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    lost = {name: value for name, value in config.items() if name not in ("linear_forms", "per_layer_config")}
    (tmp_path / "config.json").write_text(json.dumps(lost))
    with pytest.raises(ValueError, match="of a form that config.json does not have, in a compressed checkpoint"):
        model_class.from_pretrained(tmp_path)


def test_a_config_that_contradicts_its_weights_is_refused(saved):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    config["linear_forms"]["k_proj"]["group_size"] = 16
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="k_proj.scales: missing or of another shape"):
        LLMKernelForCausalLM.from_pretrained(folder)


def test_damaged_masks_and_scales_are_refused_by_name(saved):
    _, folder = saved
    name = "model.layers.0.mlp.up_proj"
    rewrite(folder, lambda tensors: tensors[f"{name}.mask"].bitwise_xor_(1))
    with pytest.raises(ValueError, match=f"{name}.mask"):
        LLMKernelForCausalLM.from_pretrained(folder)
    rewrite(folder, lambda tensors: tensors[f"{name}.mask"].bitwise_xor_(1))
    rewrite(folder, lambda tensors: tensors[f"{name}.scales"].fill_(float("nan")))
    with pytest.raises(ValueError, match=f"{name}.scales"):
        LLMKernelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.layers.0.self_attn.k_proj.values", torch.float32),
        ("model.layers.0.self_attn.k_proj.scales", torch.float32),
        ("model.layers.0.mlp.up_proj.mask", torch.float16),
        ("model.norm.weight", torch.int8),
    ],
)
@pytest.mark.parametrize("of", [LLMKernelForCausalLM, LLMKernelModel])
def test_a_tensor_of_another_type_than_its_form_is_refused(saved, name, dtype, of):
    _, folder = saved
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(ValueError, match=rf"model.safetensors: {name}: is stored as"):
        of.from_pretrained(folder)
    with pytest.raises(ValueError, match=f"^{name}: is stored as"):
        of.from_pretrained(
            None, config=of.config_class.from_pretrained(folder), state_dict=load_file(folder / "model.safetensors")
        )


def test_a_dense_tensor_that_is_not_finite_is_refused_in_a_compressed_checkpoint(saved):
    _, folder = saved
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(ValueError, match="model.norm.weight: has values that are not finite"):
        LLMKernelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\nsize 9\n", None])
def test_a_damaged_weight_file_is_named(saved, content):
    _, folder = saved
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9] if content is None else content)
    with pytest.raises(ValueError, match="model.safetensors: .*; the file is damaged"):
        LLMKernelForCausalLM.from_pretrained(folder)


def test_a_new_head_on_a_compressed_body_is_legal(saved):
    model, folder = saved
    classifier = LLMKernelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert classifier.score.weight.shape == (3, 64)
    body = LLMKernelModel.from_pretrained(folder)
    with torch.no_grad():
        expected = model.model(tokens()).last_hidden_state
        assert torch.equal(body(tokens()).last_hidden_state, expected)
        assert torch.equal(classifier.model(tokens()).last_hidden_state, expected)


def test_an_empty_state_dict_is_a_fresh_model():
    config = build(linear_forms=MIXED).config
    model = LLMKernelForCausalLM.from_pretrained(None, config=config, state_dict={})
    with torch.no_grad():
        assert model(tokens()).logits.isfinite().all()


def test_a_tied_packed_embedding_is_stored_once_and_shared(saved):
    _, folder = saved
    assert not [key for key in load_file(folder / "model.safetensors") if key.startswith("lm_head")]
    model = LLMKernelForCausalLM.from_pretrained(folder)
    assert model.lm_head.values is model.model.embed_tokens.values
    assert model.lm_head.scales is model.model.embed_tokens.scales
    with pytest.raises(ValueError, match="stored compressed"):
        model.resize_token_embeddings(120)


def test_a_dense_embedding_resizes_beside_compressed_linears():
    model = build(linear_forms=MIXED)
    model.resize_token_embeddings(120)
    assert model(tokens()).logits.shape[-1] == 120


def test_scales_and_integers_load_in_their_own_dtype(saved):
    _, folder = saved
    model = LLMKernelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for module in model.modules():
        if isinstance(module, PackedWeight) and module.form.bits < 16:
            assert module.scales.dtype == torch.float16
            assert not module.values.is_floating_point() and not module.values.requires_grad
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        assert model(tokens()).logits.dtype == torch.bfloat16


def test_another_quantizer_is_refused_on_packed_linears_alone():
    from transformers import BitsAndBytesConfig

    eight = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match="quantization_config: layers.0.q_proj"):
        build(linear_forms=MIXED, quantization_config=eight)
    build(linear_forms={"q_proj": {"rank": 4}}, quantization_config=eight)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"])
def test_adapters_attach_to_every_form_and_train(name):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build(linear_forms=MIXED), LoraConfig(r=4, target_modules=[name]))
    ids = tokens()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all("lora" in key for key, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("forms", "excluded"),
    [
        ({"linear_forms": {"q_proj": {"rank": 8}, "down_proj": {"rank": 8}}}, ["down_proj", "q_proj"]),
        (
            {"per_layer_config": {1: {"linear_forms": {"up_proj": {"rank": 8}}}}},
            ["model.layers.1.mlp.up_proj"],
        ),
    ],
)
def test_adapters_on_all_linears_want_the_low_rank_ones_left_out(forms, excluded):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match="_proj.a: an adapter is on .*, the low-rank linear") as refused:
        get_peft_model(build(**forms), LoraConfig(r=4, target_modules="all-linear"))
    assert f"exclude_modules={excluded})" in str(refused.value)
    model = get_peft_model(build(**forms), LoraConfig(r=4, target_modules="all-linear", exclude_modules=excluded))
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == sum(type(module) is nn.Linear for module in build(**forms).modules()) - 1  # the head
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.merge_and_unload()


def test_an_adapter_on_a_low_rank_linear_is_not_merged_and_one_on_its_factors_is():
    from peft import LoraConfig, get_peft_model

    form = {"q_proj": {"rank": 8}}
    model = get_peft_model(build(linear_forms=form), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"low-rank: .* as in target_modules=\['q_proj.a', 'q_proj.b'\]"):
        model.merge_and_unload()
    factors = LoraConfig(r=4, target_modules=["q_proj.a", "q_proj.b"], init_lora_weights=False)
    model = get_peft_model(build(linear_forms=form).eval(), factors)
    with torch.no_grad():
        before = model(tokens()).logits
        torch.testing.assert_close(model.merge_and_unload()(tokens()).logits, before, rtol=1e-4, atol=1e-4)


def test_relu_without_a_gate_is_two_linears():
    model = build(mlp_gated=False, hidden_act="relu", mlp_bias=True)
    mlp, x = model.model.layers[0].mlp, torch.randn(2, 3, 64)
    expected = nn.functional.relu(x @ mlp.up_proj.weight.T + mlp.up_proj.bias) @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x), expected + mlp.down_proj.bias)
    assert LinearForm() == LinearForm.from_dict(model.config.linear_forms.get("up_proj"))


@pytest.mark.parametrize(
    ("forms", "message"),
    [
        ({"o_proj": SPARSE, "q_proj": INT8}, r"layers.0.q_proj stores integers .*`llmkernel convert MODEL OUTPUT --d"),
        ({"o_proj": SPARSE, "down_proj": {"rank": 8, "b": INT8}}, r"layers.0.down_proj stores integers"),
        ({"o_proj": SPARSE}, r"layers.0.o_proj is stored sparse, and floating; it trains as it is"),
    ],
)
def test_forms_of_the_family_are_not_dequantized(forms, message):
    model = LLMKernelForCausalLM(LLMKernelConfig(**SMALL, linear_forms=forms))
    with pytest.raises(ValueError, match=f"^dequantize: {message}"):
        model.dequantize()
