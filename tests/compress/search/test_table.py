"""The loss table against each choice made in one layer of a whole model."""

import copy
import json

import pytest
import torch

from hf_llmkernel.checkpoint.model_folder import ModelFolder
from hf_llmkernel.compress import Recipe
from hf_llmkernel.compress.block import Block
from hf_llmkernel.compress.search import table as measuring
from hf_llmkernel.compress.search.table import applied, choice_needs, loss_table
from hf_llmkernel.compress.survey import Survey
from hf_llmkernel.model.modeling_llm_kernel import LLMKernelForCausalLM

from ..conftest import save_tiny

CHOICES = [
    [],
    [{"sparsify": {"sparsity": 0.5, "method": "wanda"}}],
    [{"sparsify": {"sparsity": 0.25, "method": "magnitude"}}, {"quantize": {"bits": 4, "group_size": 16}}],
    [{"prune_ffn": {"ratio": 0.25, "align": 16, "update": "none"}}, {"quantize": {"bits": 8, "group_size": 16}}],
]
IDS = torch.randint(96, (6, 48), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint one of whose layers has no attention."""
    folder = tmp_path_factory.mktemp("skips")
    save_tiny(folder, per_layer_config={1: {"skip": ["attention"]}}, tie_word_embeddings=False)
    return folder


def stages(*choices):
    search = {"search": {"bytes": 0.5, "choices": list(choices or CHOICES)}}
    return Recipe.load({"calibration": {"source": "text"}, "stages": [search]}).stages[0].choices


def survey_of(folder, work) -> Survey:
    work.mkdir(exist_ok=True)
    return Survey(ModelFolder(folder), IDS, torch.float32, work, progress=False)


@torch.no_grad()
def reference(folder) -> torch.Tensor:
    """Divergence at every token `[layer, choice, S, T]`: the choice's weights, as dense ones, in one layer."""
    dense = LLMKernelForCausalLM.from_pretrained(folder).eval()
    expected = dense(IDS).logits.double().softmax(-1)
    nats = []
    for index in range(3):
        for choice in CHOICES:
            model = copy.deepcopy(dense)
            change(model, index, choice)
            found = model(IDS).logits.double().softmax(-1)
            nats.append((expected * (expected / found).log()).sum(-1))
    return torch.stack(nats).view(3, len(CHOICES), *nats[0].shape)


def change(model, index: int, choice) -> None:
    """Wanda or magnitude masks by row, weak neurons left out, and rounding, written out."""
    layer = model.model.layers[index]
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
    inputs: dict[str, torch.Tensor] = {}
    for name, module in linears.items():
        module.register_forward_pre_hook(
            lambda _, given, name=name: inputs.update({name: inputs.get(name, given[0].flatten(0, 1))})
        )
    model(IDS)
    for entry in choice:
        ((kind, settings),) = entry.items()
        for name, module in linears.items():
            weight = module.weight
            if kind == "sparsify":
                norms = inputs[name].norm(dim=0) if settings["method"] == "wanda" else 1
                scores, gone = weight.abs() * norms, round(weight.shape[1] * settings["sparsity"])
                weight[scores <= scores.sort(dim=1).values[:, gone - 1 : gone]] = 0
            elif kind == "quantize":
                groups, kept = weight.unflatten(1, (-1, 16)), weight != 0
                scale = groups.abs().amax(-1, keepdim=True) / (2 ** (settings["bits"] - 1) - 1)
                scale = scale.half().float()
                weight.copy_((torch.where(scale == 0, 0, (groups / scale).round()) * scale).flatten(1) * kept)
            elif name == "mlp.down_proj":
                keep = (inputs[name].norm(dim=0) * weight.norm(dim=0)).argsort()[16:].sort().values
                module.weight = torch.nn.Parameter(weight[:, keep])
                for leaf in ("gate_proj", "up_proj"):
                    linears[f"mlp.{leaf}"].weight = torch.nn.Parameter(linears[f"mlp.{leaf}"].weight[keep])


def test_losses_are_those_of_the_whole_model(folder, tmp_path):
    rows = loss_table(survey_of(folder, tmp_path / "survey"), range(3), stages(), tokens=4 * 48)
    expected = reference(folder)[:, :, :4].mean((2, 3))  # of four samples
    found = torch.tensor([row["losses"] for row in rows])
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)
    assert expected[:, 1:].min() > 1e-3 and found[:, 0].eq(0).all()
    assert [row["layer"] for row in rows] == [0, 1, 2]


def test_standard_error_is_that_of_pieces(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "PIECE_TOKENS", 48)  # one piece a sample
    rows = loss_table(survey_of(folder, tmp_path / "survey"), [1], stages(), tokens=10_000)
    means = reference(folder)[1].mean(-1)  # [choice, S]
    expected = means.std(-1) / 6**0.5
    torch.testing.assert_close(torch.tensor(rows[0]["standard_errors"]).double(), expected, rtol=1e-3, atol=1e-6)


def test_groups_of_forks_give_the_same_table(folder, tmp_path, monkeypatch):
    together = loss_table(survey_of(folder, tmp_path / "together"), range(3), stages(), tokens=96)
    monkeypatch.setattr(measuring, "FORK_BYTES", 1)
    apart = loss_table(survey_of(folder, tmp_path / "apart"), range(3), stages(), tokens=96)
    assert together == apart
    assert not list((tmp_path / "apart").glob("forks-*"))


@pytest.mark.parametrize("fork_bytes", [1, 1 << 30])
@pytest.mark.parametrize("stops", [1, 2, 3, 5])
def test_interrupted_it_goes_on(folder, tmp_path, monkeypatch, fork_bytes, stops):
    monkeypatch.setattr(measuring, "FORK_BYTES", fork_bytes)
    whole = loss_table(survey_of(folder, tmp_path / "whole"), [0, 2], stages(), tokens=96)
    written = []

    def failing(path, content, write):
        if len(written) == stops:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, content)

    with monkeypatch.context() as patch:
        for name in ("write_json", "write_tensors"):
            write = getattr(measuring, name)
            patch.setattr(measuring, name, lambda path, content, write=write: failing(path, content, write))
        try:
            loss_table(survey_of(folder, tmp_path / "cut"), [0, 2], stages(), tokens=96)
        except KeyboardInterrupt:
            assert len(written) == stops < 4
    assert loss_table(survey_of(folder, tmp_path / "cut"), [0, 2], stages(), tokens=96) == whole
    assert json.loads((tmp_path / "cut" / "losses-00002.json").read_text()).keys() == {"1", "2", "3"}


def test_a_choice_is_made_on_a_copy(folder):
    source = ModelFolder(folder)
    block = Block(0, source.layer_config(0), source.block_tensors(0))
    before = {name: tensor.clone() for name, tensor in block.tensors.items()}
    changed = applied(block, stages()[3], {})
    assert changed.layer.intermediate_size == 48 and changed.form("up_proj").bits == 8
    assert block.layer.intermediate_size == 64 and block.form("up_proj").is_dense
    assert all(torch.equal(block.tensors[name], tensor) for name, tensor in before.items())


def test_needs_are_the_most_that_a_choice_wants(folder):
    layer = ModelFolder(folder).layer_config(0)
    exact = [{"factorize": {"ratio": 0.3, "align": 1, "include": ["q_proj"]}}]
    needs = choice_needs(stages(*CHOICES, exact), layer)
    assert needs == {
        "attention_input": "gram", "attention_output": "moments", "mlp_input": "moments", "mlp_output": "moments"
    }  # fmt: skip
    assert choice_needs(stages()[:1], layer) == {}
    first_factor = {"sparsify": {"sparsity": 0.5, "method": "wanda", "include": ["q_proj.a"]}}
    low_rank = {"factorize": {"ratio": 0.3, "align": 1, "method": "svd"}}
    assert choice_needs(stages([], [low_rank, first_factor]), layer) == {"attention_input": "moments"}
