"""Folders of this family with floating weights in place of their integers: same values, same forms, and they train."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_llmkernel import LLMKernelConfig, kernels
from hf_llmkernel.checkpoint import CheckpointReader, CheckpointWriter
from hf_llmkernel.cli import main
from hf_llmkernel.convert import convert_checkpoint
from hf_llmkernel.convert.matrices import matrices
from hf_llmkernel.model import modeling_llm_kernel
from hf_llmkernel.model.configuration_llm_kernel import LinearForm
from hf_llmkernel.model.linear_llm_kernel import PackedWeight, unpack_mask

from .sources import BASE, edit_config, hashes, padded_batch
from .test_incoming import write_tokenizer

INT8 = {"bits": 8, "group_size": 16}
INT4 = {"bits": 4, "group_size": 16, "symmetric": False}
MASKED = {"sparsity": "bitmask", "nnz": 999}
# name: (what differs from BASE, the one note)
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "integers": (
        {"linear_forms": {"up_proj": INT8, "q_proj": {**INT4, "zero_point_dtype": "float16"}}, "mlp_bias": True},
        "6 matrices of integers are dequantized (layer 0, q_proj: int4, groups of 16, zero points of float16)",
    ),
    "sparse integers": (
        {"linear_forms": {
            "up_proj": {"sparsity": "2:4", "bits": 8}, "o_proj": {**MASKED, **INT4}, "v_proj": {**MASKED, "nnz": 77},
        }},
        "6 matrices of integers are dequantized (layer 0, o_proj: sparse (bitmask) int4, groups of 16, zero points of "
        "uint8)",
    ),
    "low-rank factors": (
        {"linear_forms": {
            "q_proj": {"rank": 8, "b": INT8}, "down_proj": {"rank": 8, "a": {"sparsity": "2:4", "bits": 4}},
        }},
        "6 matrices of integers are dequantized (layer 0, q_proj.b: int8, groups of 16)",
    ),
    "ends": (
        {"embed_tokens_form": INT8, "lm_head_form": {**INT4, "sparsity": "2:4"}},
        "2 matrices of integers are dequantized (embed_tokens: int8, groups of 16)",
    ),
    "tied ends": (
        {"embed_tokens_form": {"rank": 8, "a": INT8, "b": INT4}, "tie_word_embeddings": True},
        "2 matrices of integers are dequantized (embed_tokens.a: int8, groups of 16)",
    ),
    # Dense then in layer 0 and dense all along in layer 1, among layers that stay sparse.
    "forms of layers": (
        {"linear_forms": {"up_proj": {**INT8, "sparsity": "2:4"}},
         "per_layer_config": {0: {"linear_forms": {"up_proj": {**INT4, "bias": True}}, "num_attention_heads": 4},
                              1: {"linear_forms": {}, "intermediate_size": 64}}},
        "2 matrices of integers are dequantized (layer 0, up_proj: int4, groups of 16, zero points of uint8)",
    ),
}  # fmt: skip


def save_own(folder: Path, head: str = "ForCausalLM", shards: str = "5GB", **changes: Any):
    """A random model of this family whose biases and zero points matter, saved."""
    torch.manual_seed(0)
    model = getattr(modeling_llm_kernel, f"LLMKernel{head}")(LLMKernelConfig(**{**BASE, **changes})).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("zero_points"):
                tensor.copy_(torch.randint(4, 12, tensor.shape) + (0.25 if tensor.is_floating_point() else 0))
            elif name.endswith("bias") or "norm" in name:
                tensor.normal_(1.0 if "norm" in name else 0.0, 0.3)
    model.to(model.config.dtype or torch.float32).save_pretrained(folder, max_shard_size=shards)
    return model


def load(folder: Path, head: str = "ForCausalLM"):
    model_class = getattr(modeling_llm_kernel, f"LLMKernel{head}")
    model, loading = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def outputs(model) -> torch.Tensor:
    ids, mask = padded_batch("right")
    with torch.no_grad(), kernels.disabled():
        return model(ids, attention_mask=mask)[0].float()[mask.bool()]


def forms_of(model) -> dict[str, LinearForm]:
    """The form of every matrix of a model, the factors of a low-rank one apart, by name."""
    return {part.path: part.form for matrix in matrices(model.config) for part in matrix.parts()}


def count_weights(model) -> int:
    """Parameters of a model, a sparse matrix counted as the dense one that it stands for."""
    packed = [module for module in model.modules() if isinstance(module, PackedWeight)]
    of_packed = {id(tensor) for module in packed for name, tensor in module.named_parameters() if name != "bias"}
    dense = sum(tensor.numel() for tensor in model.parameters() if id(tensor) not in of_packed)
    return dense + sum(module.in_features * module.out_features for module in packed)


@pytest.mark.parametrize("case", CASES)
def test_the_same_model_in_floating_forms(tmp_path, monkeypatch, case):
    monkeypatch.setattr("hf_llmkernel.convert.own_checkpoint.BLOCK_BYTES", 1000)  # five rows at a time
    changes, note = CASES[case]
    ours = save_own(tmp_path / "ours", **changes)
    before = hashes(tmp_path / "ours")
    report = convert_checkpoint(tmp_path / "ours", tmp_path / "out", keep_integers=False)
    assert (report.notes, report.family, hashes(tmp_path / "ours")) == ([note], "llm_kernel", before)
    model = load(tmp_path / "out")
    for path, form in forms_of(ours).items():
        kept = LinearForm(bias=form.bias, sparsity=form.sparsity, nnz=form.nnz)
        assert forms_of(model)[path] == kept, path
    assert model.config.tie_word_embeddings == ours.config.tie_word_embeddings
    expected = outputs(ours)
    assert (outputs(model) - expected).abs().max() <= 1e-5 and expected.std() > 0.1
    assert report.parameters == count_weights(model) and report.bytes == stored_bytes(tmp_path / "out")


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_masks_and_what_floats_stay_bit_equal(tmp_path):
    ours = save_own(tmp_path / "ours", shards="20KB", **CASES["sparse integers"][0], dtype="bfloat16")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    convert_checkpoint(tmp_path / "ours", tmp_path / "out", keep_integers=False)
    before, after = CheckpointReader(tmp_path / "ours"), CheckpointReader(tmp_path / "out")
    integers = {name.removesuffix(".scales") for name in before if name.endswith(".scales")}
    assert len(integers) == 6 and not [name for name in after if name.endswith(("scales", "zero_points"))]
    for name in after:
        path, _, suffix = name.rpartition(".")
        if path not in integers or suffix == "mask":
            assert torch.equal(after.tensor(name), before.tensor(name)), name
            continue
        mask = unpack_mask(after.tensor(f"{path}.mask"), ours.get_submodule(path).in_features)
        assert torch.equal(after.tensor(name).flatten(), ours.get_submodule(path).dense_weight()[mask]), name


def test_shards_dtypes_and_what_travels(tmp_path, capfd):
    ours = save_own(tmp_path / "ours", linear_forms={"up_proj": {**INT8, "scale_dtype": "float32"}})
    write_tokenizer(tmp_path / "ours")
    command = ["convert", str(tmp_path / "ours"), str(tmp_path / "out"), "--dequantize", "--json"]
    assert main([*command, "--dtype", "bfloat16", "--max-shard-size", "40KB"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["dtype"] == "bfloat16" and len(report["files"]) > 2 and report["tokenizer"]
    assert report["precision"]["dtype"] == "bfloat16" and report["source"] == str(tmp_path / "ours")
    model = load(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
    weight = ours.get_submodule("model.layers.2.mlp.up_proj").dense_weight(torch.float32).bfloat16()
    assert torch.equal(model.get_submodule("model.layers.2.mlp.up_proj").weight, weight)


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
def test_other_heads(tmp_path, head):
    # A form of the head that these classes do not have counts for nothing.
    changes = {"linear_forms": {"down_proj": INT4}, "lm_head_form": INT8, "num_labels": 3}
    ours = save_own(tmp_path / "ours", head, **changes)
    report = convert_checkpoint(tmp_path / "ours", tmp_path / "out", keep_integers=False)
    model = load(tmp_path / "out", head)
    assert report.architecture == f"LLMKernel{head}" and report.parameters == count_weights(model)
    ids, mask = padded_batch("right")
    with torch.no_grad(), kernels.disabled():
        assert torch.allclose(model(ids, attention_mask=mask)[0], ours(ids, attention_mask=mask)[0], atol=1e-5)


def test_the_result_trains_with_its_zeros(tmp_path):
    forms = {"up_proj": {"sparsity": "2:4", **INT8}, "q_proj": {"rank": 8, "b": INT4}, "down_proj": INT4}
    save_own(tmp_path / "ours", linear_forms=forms)
    convert_checkpoint(tmp_path / "ours", tmp_path / "out", keep_integers=False)
    model, ids = load(tmp_path / "out").train(), padded_batch("right")[0]
    mlp, attention = model.model.layers[0].mlp, model.model.layers[0].self_attn
    watched = mlp.up_proj.values, attention.q_proj.b.weight, mlp.down_proj.weight
    before, mask = [tensor.detach().clone() for tensor in watched], mlp.up_proj.mask.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    first = model(ids, labels=ids).loss
    first.backward()
    optimizer.step()
    assert not any(torch.equal(tensor, old) for tensor, old in zip(watched, before, strict=True))
    assert torch.equal(mlp.up_proj.mask, mask) and model(ids, labels=ids).loss < first


FAULTS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "no integers": ({"linear_forms": {"up_proj": {"rank": 4}}}, r"ours: stores no integers, so there is nothing", {}),
    "a head": ({"lm_head_form": INT8}, r"^head=base: .*config\.json is of this family already; ", {"head": "base"}),
    "untie": ({"lm_head_form": INT8}, r"^untie=True: .*is of this family already; leave it out", {"untie": True}),
    "a dtype": ({"lm_head_form": INT8}, r"^dtype=int8: is not one of", {"dtype": "int8"}),
    "kept": ({"lm_head_form": INT8}, r"is of this family already; .* or pass --dequantize\.$", {"keep_integers": None}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input(tmp_path, fault):
    changes, message, options = FAULTS[fault]
    save_own(tmp_path / "ours", **changes)
    with pytest.raises(ValueError, match=message) as raised:
        convert_checkpoint(tmp_path / "ours", tmp_path / "out", **{"keep_integers": False, **options})
    assert "\n" not in str(raised.value) and [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_damaged_folders(tmp_path):
    model = save_own(tmp_path / "ours", linear_forms={"up_proj": {**INT8, "scale_dtype": "float32"}})
    model.model.layers[2].mlp.up_proj.scales[3, 1] = 3e4
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"^dtype=float16: model\.layers\.2\.mlp\.up_proj\.weight .* beyond its range"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "out", dtype="float16", keep_integers=False)
    model.model.layers[2].mlp.up_proj.scales[3, 1] = float("nan")
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.up_proj\.scales: holds NaN in"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "out", keep_integers=False)
    edit_config(tmp_path / "ours", linear_forms={"up_proj": INT8, "q_proj": INT8})
    with pytest.raises(ValueError, match=r"q_proj\.weight: unexpected in .*; use the config\.json and the weights of"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "out", keep_integers=False)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    save_own(tmp_path / "ours", linear_forms={"up_proj": INT8})
    add = CheckpointWriter.add_blocks

    def add_and_stop(self, name, *rest):
        add(self, name, *rest)
        if name.endswith("layers.1.mlp.up_proj.weight"):
            raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointWriter, "add_blocks", add_and_stop)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(tmp_path / "ours", tmp_path / "out", keep_integers=False)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
