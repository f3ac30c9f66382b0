"""Gradual pruning in Trainer: schedules and thresholds against naive ones, zeros after every step, resumed and shared
between processes; the trained zeros packed, and packed models that train on."""

import gc
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_llmkernel import GradualPruning, pack_zeros
from hf_llmkernel.compress.sparsify.gradual import prunable_linears, removal_scores, shared_counts, sparsity_at
from hf_llmkernel.model.configuration_llm_kernel import LinearForm, LLMKernelConfig
from hf_llmkernel.model.linear_llm_kernel import unpack_weight
from hf_llmkernel.model.modeling_llm_kernel import LLMKernelForCausalLM, LLMKernelForSequenceClassification

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
STEPS = 8
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module", autouse=True)
def frozen_libraries():
    """Trainer collects garbage before it starts; what is imported by now need not be looked through each time."""
    gc.freeze()
    yield
    gc.unfreeze()


def family(**fields) -> Any:
    torch.manual_seed(0)
    return LLMKernelForCausalLM(LLMKernelConfig(**{**SMALL, **fields}))


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL))


def tokens(rows: int = 2) -> torch.Tensor:
    return torch.randint(0, 61, (rows, 9), generator=torch.Generator().manual_seed(7))


def trainer_for(model, folder, *callbacks, optimizer=None, **arguments) -> Any:
    defaults = {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 2e-2, "weight_decay": 0.1}
    settings = {"save_strategy": "no", "logging_steps": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    rows: Any = [{"input_ids": row, "labels": row} for row in tokens(64)]
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **{**defaults, **settings, **arguments}),
        train_dataset=rows,
        eval_dataset=rows[:2],
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
    )


class Recorder(TrainerCallback):
    """Positions of zeros in every linear after every step, and at what positions gradients are before it."""

    def __init__(self):
        self.zeros: dict[int, dict[str, torch.Tensor]] = {}
        self.grads: dict[int, dict[str, torch.Tensor]] = {}

    def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs):
        self.grads[state.global_step + 1] = {name: w.grad != 0 for name, w in matrices(model).items()}

    def on_step_end(self, args, state, control, *, model, **kwargs):
        self.zeros[state.global_step] = {name: w == 0 for name, w in matrices(model).items()}


def matrices(model) -> dict[str, Any]:
    """Weights of the linears in the blocks."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".layers." in name and parameter.ndim == 2 and name.endswith("weight")
    }


# The schedule


@pytest.mark.parametrize("initial", [0.0, 0.2])
def test_growth_follows_the_formulas(initial):
    target, steps = 0.8, 7
    kept = 1 - initial
    for step in range(steps + 1):
        u = step / steps
        paper = target + (initial - target) * (1 - u) ** 3  # equation 1
        assert sparsity_at(u, initial, target, "cubic") == pytest.approx(paper, abs=1e-12)
        assert sparsity_at(u, initial, target, "linear") == pytest.approx(initial * (1 - u) + target * u, abs=1e-12)
        late = initial + (target - initial) * (1 - math.cos(u * math.pi / 2))
        assert sparsity_at(u, initial, target, "cos") == pytest.approx(late, abs=1e-12)
        cube = initial + (target - initial) * u**3
        assert sparsity_at(u, initial, target, "cube") == pytest.approx(cube, abs=1e-12)
        assert sparsity_at(u, initial, target, "exp") == pytest.approx(1 - kept, abs=1e-12)
        kept *= ((1 - target) / (1 - initial)) ** (1 / steps)
    for decay in ("cubic", "linear", "cos", "cube", "exp"):
        assert sparsity_at(1.0, initial, target, decay) == target


def test_weights_go_at_the_steps_of_the_frequency_and_at_the_last():
    pruning = GradualPruning(0.5, start_step=3, end_step=14, pruning_frequency=4)
    assert [step for step in range(20) if pruning.last_update(step) == step] == [3, 7, 11, 14]
    assert [pruning.last_update(step) for step in (0, 2, 6, 13, 19)] == [None, None, 3, 11, 14]
    assert pruning.sparsity_of(14) == 0.5 and pruning.sparsity_of(3) == 0
    assert GradualPruning(0.5, start_step=2, end_step=2).sparsity_of(2) == 0.5


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"target_sparsity": 1.0}, "target_sparsity=1.0: must be above 0 and below 1"),
        ({}, "target_sparsity=None"),
        ({"target_sparsity": 0.6, "pattern": "2:4"}, "target_sparsity=0.6: .* removes 0.5; leave target_sparsity out"),
        ({"target_sparsity": 0.5, "pattern": "4x1"}, "pattern='4x1': must be 'unstructured' or 'N:M'"),
        ({"target_sparsity": 0.5, "start_step": 11}, "end_step=10: must be an integer of at least 11"),
        ({"target_sparsity": 0.5, "pruning_frequency": 0}, "pruning_frequency=0"),
        ({"target_sparsity": 0.5, "sparsity_decay_type": "cosine"}, "sparsity_decay_type='cosine': .*'cubic'"),
        ({"target_sparsity": 0.5, "pruning_scope": "row"}, "pruning_scope='row': .*'global'"),
        ({"target_sparsity": 0.5, "initial_sparsity": 0.6}, "initial_sparsity=0.6: must be from 0 to 0.5"),
        ({"target_sparsity": 0.5, "min_sparsity_ratio_per_op": 0.7}, "min_sparsity_ratio_per_op=0.7"),
        ({"target_sparsity": 0.99}, "max_sparsity_ratio_per_op=0.98: must be from 0.99 to 1"),
        ({"target_sparsity": 0.5, "include": "q_proj"}, "include='q_proj': must be a list"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, fault):
    with pytest.raises(ValueError, match=fault):
        GradualPruning(**settings, end_step=10)


# The choice


def test_blocks_alone_are_pruned_in_models_of_any_family():
    names = set(prunable_linears(llama(), ["*"], [], False))
    assert names == {name.removesuffix(".weight") for name in matrices(llama())} and len(names) == 14
    bert = BertForSequenceClassification(
        BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    )
    found = prunable_linears(bert, ["*"], [], False)
    assert "bert.encoder.layer.0.output.dense" in found and "classifier" not in found
    assert "classifier" in prunable_linears(bert, ["*"], [], True)


def test_low_rank_factors_are_linears_and_packed_ones_are_not():
    model = family(linear_forms={"up_proj": {"rank": 8}, "o_proj": {"sparsity": "2:4"}, "k_proj": {"bits": 8}})
    names = {name.partition("layers.0.")[2] for name in prunable_linears(model, ["layers.0"], [], False)}
    assert names == {
        *("self_attn.q_proj", "self_attn.v_proj"),
        *("mlp.gate_proj", "mlp.up_proj.a", "mlp.up_proj.b", "mlp.down_proj"),
    }


def test_patterns_choose_by_names_and_their_ends():
    model = family(linear_forms={"up_proj": {"rank": 8}})

    def chosen(include, exclude=()):
        found = prunable_linears(model, include, exclude, False)
        return sorted(name.partition("layers.1.")[2] for name in found if "layers.1." in name)

    assert chosen(["up_proj"]) == ["mlp.up_proj.a", "mlp.up_proj.b"]
    assert chosen(["mlp"], ["up_proj.a", "gate*"]) == ["mlp.down_proj", "mlp.up_proj.b"]
    assert chosen(["self_attn.?_proj"], ["layers.1.self_attn.[kv]_proj"]) == ["self_attn.o_proj", "self_attn.q_proj"]
    with pytest.raises(ValueError, match=r"'fc1': matches no dense linear; .*'model.layers.\*.mlp.down_proj'"):
        chosen(["fc1"])
    with pytest.raises(ValueError, match="no linear is left"):
        chosen(["lm_head"])


def test_what_shares_an_embedding_counts_as_a_head_and_a_shared_weight_once():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.first = nn.Embedding(10, 4), nn.Linear(4, 4)
            self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 10)
            self.second.weight, self.head.weight = self.first.weight, self.embed.weight

    assert list(prunable_linears(Plain(), ["*"], [], False)) == ["first"]
    assert list(prunable_linears(Plain(), ["*"], [], True)) == ["first", "head"]


def test_a_sharded_weight_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    with pytest.raises(ValueError, match="0.weight: is sharded"):
        prunable_linears(model, ["*"], [], False)


# The masks


def test_n_of_m_protects_the_largest_of_every_group():
    weight = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    scores = removal_scores(weight, "2:4")
    for row in range(5):
        for begin in range(0, 11, 4):
            group = weight[row, begin : begin + 4].abs().tolist()
            safe = sorted(range(len(group)), key=lambda i: -group[i])[:2]
            for offset, size in enumerate(group):
                assert scores[row, begin + offset] == (math.inf if offset in safe else size)


def naive_shared_counts(scores, total, lowest, highest):
    """Weights go one at a time, first what the lower bounds ask for, then the smallest of all that may go."""
    counts = list(lowest)
    rows = [sorted(matrix.flatten().tolist()) for matrix in scores]
    while sum(counts) < total:
        open_rows = [i for i in range(len(rows)) if counts[i] < highest[i]]
        counts[min(open_rows, key=lambda i: rows[i][counts[i]])] += 1
    return counts


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["spread", "equal", "near"])
def test_one_threshold_over_all_is_the_naive_one(seed, kind):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 5), (4, 4), (2, 9), (6, 3)]
    scores = [torch.randn(shape, generator=generator).abs() * 10.0 ** (i - 1) for i, shape in enumerate(shapes)]
    if kind == "equal":
        scores = [(matrix * 2).round() / 2 for matrix in scores]
    if kind == "near":  # alike in their first bits
        scores = [1 + torch.rand(shape, generator=generator) / 1000 for shape in shapes]
    sizes = [matrix.numel() for matrix in scores]
    for least, most in ((0.0, 1.0), (0.2, 0.7)):
        lowest, highest = [int(least * size) for size in sizes], [int(most * size) for size in sizes]
        for total in (*range(sum(lowest), sum(highest), 11), sum(highest)):
            counts = shared_counts([lambda m=m: m for m in scores], total, lowest, highest)
            assert counts == naive_shared_counts(scores, total, lowest, highest)
    with pytest.raises(ValueError, match="total=1000"):
        shared_counts([lambda: scores[0]], 1000, [0], [15])


@pytest.mark.parametrize("bounds", [(0.0, 0.98), (0.3, 0.6)])
def test_global_scope_removes_the_smallest_of_all_within_bounds(bounds):
    model = llama()
    with torch.no_grad():
        for index, weight in enumerate(matrices(model).values()):
            weight.mul_(1 + index)
    before = {name: weight.detach().abs().clone() for name, weight in matrices(model).items()}
    low, high = bounds
    pruning = GradualPruning(
        0.5, end_step=0, pruning_scope="global", min_sparsity_ratio_per_op=low, max_sparsity_ratio_per_op=high
    )
    pruning.on_train_begin(None, SimpleNamespace(global_step=0, max_steps=1), None, model=model)
    removed = {name: weight == 0 for name, weight in matrices(model).items()}
    shares = {name: float(mask.float().mean()) for name, mask in removed.items()}
    assert pruning.sparsity == pytest.approx(0.5, abs=1e-4)
    assert {name.removesuffix(".weight"): share for name, share in shares.items()} == pytest.approx(pruning.sparsities)
    assert max(shares.values()) - min(shares.values()) > 0.2  # or the bounds would have nothing to do
    free = [name for name, share in shares.items() if low + 0.01 < share < high - 0.01]
    threshold = max(before[name][removed[name]].max() for name in free)
    assert threshold <= min(before[name][~removed[name]].min() for name in free)
    for name, share in shares.items():
        assert low - 0.01 <= share <= high
        if name not in free:  # a bound of its own holds it
            assert before[name][removed[name]].max() <= before[name][~removed[name]].min()


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_weight_stored_by_columns_is_pruned_like_any_other(scope):
    model = nn.Sequential(nn.Linear(6, 4))
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).T
    model[0].weight = nn.Parameter(weight)
    expected = weight.abs() > weight.abs().flatten().sort().values[11]
    pruning = GradualPruning(0.5, end_step=0, pruning_scope=scope)
    pruning.on_train_begin(None, SimpleNamespace(global_step=0, max_steps=1), None, model=model)
    assert torch.equal(model[0].weight != 0, expected)


# Training


RUNS = {
    "local": ({}, {}),
    "global": ({"pruning_scope": "global", "initial_sparsity": 0.3, "min_sparsity_ratio_per_op": 0.4}, {}),
    "2:4": ({"target_sparsity": None, "pattern": "2:4"}, {}),
    "accumulated": ({}, {"gradient_accumulation_steps": 3}),
    "bf16": ({}, {"bf16": True}),
    "plain Adam": ({}, {"optim": "adamw_torch"}),
    "adafactor": ({}, {"optim": "adafactor"}),
    "checkpointed": ({}, {"activation_checkpointing": True}),
}


@pytest.mark.parametrize("run", [*RUNS, "momentum", "stored in bf16", "low rank"])
def test_zeros_are_those_of_the_schedule_after_every_step(run, tmp_path):
    model = family(linear_forms={"up_proj": {"rank": 8}}) if run == "low rank" else llama()
    model = model.bfloat16() if run == "stored in bf16" else model
    settings, arguments = RUNS.get(run, ({}, {}))
    momentum = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    pruning = GradualPruning(
        **{"target_sparsity": 0.6, "start_step": 2, "end_step": 7, "pruning_frequency": 2, **settings}
    )
    recorder = Recorder()
    trainer = trainer_for(
        model, tmp_path, pruning, recorder, optimizer=momentum if run == "momentum" else None, **arguments
    )
    before = {name: weight.detach().clone() for name, weight in matrices(model).items()}
    trainer.train()
    sizes = {name: weight.numel() for name, weight in matrices(model).items()}
    target, initial = settings.get("target_sparsity", 0.6) or 0.5, settings.get("initial_sparsity", 0.0)
    shares = {1: None, 2: 0, 3: 0, 4: 2 / 5, 5: 2 / 5, 6: 4 / 5, 7: 1, 8: 1}
    for step, zeros in recorder.zeros.items():
        u = shares[step]
        sparsity = 0 if u is None else initial + (target - initial) * (1 - (1 - u) ** 3)
        counts = {name: int(mask.sum()) for name, mask in zeros.items()}
        if run == "global":
            assert sum(counts.values()) == pytest.approx(sparsity * sum(sizes.values()), abs=1)
        else:
            assert counts == pytest.approx({name: sparsity * size for name, size in sizes.items()}, abs=0.51)
        if step > 1:
            held = recorder.zeros[step - 1]
            assert all((zeros[name] | ~held[name]).all() for name in zeros)  # what is gone stays gone
            assert not any((recorder.grads[step][name] & held[name]).any() for name in zeros)
    if run == "2:4":
        assert all((weight.view(-1, 4) != 0).sum(-1).eq(2).all() for weight in matrices(model).values())
    assert all(not torch.equal(weight, before[name]) for name, weight in matrices(model).items())
    assert not (model.get_output_embeddings().weight == 0).any()
    logged = [entry["sparsity"] for entry in trainer.state.log_history]
    assert len(logged) == STEPS + 1 and logged[-1] == pytest.approx(target, abs=1e-3)
    assert pruning.sparsity == pytest.approx(target, abs=1e-3)
    assert not any(weight._backward_hooks for weight in matrices(model).values())  # nothing is left behind
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(weight.grad.ne(0).double().mean() > 0.9 for weight in matrices(model).values())


@pytest.mark.parametrize(
    ("settings", "resumed_at"),  # at an update, or between two
    [({}, 4), ({"pruning_scope": "global"}, 5), ({"target_sparsity": None, "pattern": "2:4"}, 5)],
    ids=["local", "global", "2:4"],
)
def test_resumed_training_is_identical(settings, resumed_at, tmp_path):
    settings = {"target_sparsity": 0.6, "end_step": 7, "pruning_frequency": 2, **settings}

    def train(folder, seed, **resume):
        set_seed(seed)
        model, recorder = llama(), Recorder()
        for parameter in model.parameters():
            parameter.data += 0.01 * seed
        saving = {"save_strategy": "steps", "save_steps": resumed_at}
        trainer_for(model, folder, GradualPruning(**settings), recorder, **saving).train(**resume)
        return model, recorder

    whole, recorder = train(tmp_path / "whole", 0)
    resumed, again = train(
        tmp_path / "resumed", 1, resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{resumed_at}")
    )
    assert list(again.zeros) == list(range(resumed_at + 1, STEPS + 1))
    for step, zeros in again.zeros.items():
        assert all(torch.equal(mask, recorder.zeros[step][name]) for name, mask in zeros.items())
    pairs = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_clipping_sees_the_gradients_that_are_left(tmp_path):
    model, norms = llama(), []

    class Norm(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs):
            norms.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())

    pruning = GradualPruning(0.9, end_step=0)
    trainer_for(model, tmp_path, pruning, Norm(), max_steps=3, max_grad_norm=1e-3).train()
    assert norms == pytest.approx([1e-3] * 3, rel=1e-2)


def test_a_schedule_beyond_the_training_is_refused_and_an_early_end_is_told(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="end_step=9: training ends at step 8"):
        trainer_for(llama(), tmp_path, GradualPruning(0.5, end_step=9)).train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    told = []
    monkeypatch.setattr("hf_llmkernel.compress.sparsify.gradual.logger.warning", told.append)
    pruning = GradualPruning(0.5, end_step=6, pruning_frequency=1, sparsity_decay_type="linear")
    trainer_for(llama(), tmp_path, pruning, Stop()).train()
    assert len(told) == 1
    assert "sparsity=0.2500 at the end, target_sparsity=0.5000: training stopped at step 3" in told[0]


def test_an_earlier_best_model_is_told(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("hf_llmkernel.compress.sparsify.gradual.logger.warning", told.append)
    saving = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    trainer = trainer_for(
        llama(), tmp_path, GradualPruning(0.95, end_step=4), load_best_model_at_end=True, max_steps=4, **saving
    )
    trainer.train()
    assert len(told) == 1 and "the best model is an earlier one" in told[0]


def train_as_one_of_two(folder) -> None:
    """One of two processes, which sees its own half of every batch; saves the zeros after every step."""
    set_seed(0)
    recorder = Recorder()
    pruning = GradualPruning(0.6, end_step=5, pruning_frequency=2, pruning_scope="global")
    trainer = trainer_for(llama(), folder, pruning, recorder, max_steps=6)
    trainer.train()
    assert torch.distributed.get_world_size() == 2
    torch.save((recorder.zeros, trainer.model.state_dict()), f"{folder}/{torch.distributed.get_rank()}.pt")


def test_two_processes_have_the_same_masks(run_python, tmp_path):
    run_python(
        "import sys\n"
        "from accelerate import debug_launcher\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.compress.sparsify.test_gradual import train_as_one_of_two\n"
        f"debug_launcher(train_as_one_of_two, ({str(tmp_path)!r},), num_processes=2)\n"
    )
    (zeros, weights), (other_zeros, other_weights) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert list(zeros) == [1, 2, 3, 4, 5, 6]
    for step, masks in zeros.items():
        assert all(torch.equal(mask, other_zeros[step][name]) for name, mask in masks.items())
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    total = sum(mask.numel() for mask in zeros[6].values())
    assert sum(int(mask.sum()) for mask in zeros[6].values()) == pytest.approx(0.6 * total, abs=1)


# What is trained, packed


def dense_weights(model) -> dict[str, torch.Tensor]:
    """The dense weight of every linear and factor in the blocks, whatever it is stored as."""
    found = {}
    for name, module in model.named_modules():
        if ".layers." in name and isinstance(module, nn.Linear) and not hasattr(module, "a"):
            form = getattr(module, "form", LinearForm())
            found[name] = unpack_weight(module.state_dict(), form, module.in_features, torch.float32)
    return found


def forms(model, name: str) -> list:
    return [layer.linear_form(name).to_dict() for layer in model.config.per_layer_config]


def stored_bytes(folder) -> int:
    return sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())


def test_integers_stay_as_they_are_beside_packed_zeros(tmp_path):
    model = family(linear_forms={"v_proj": {"bits": 8}}).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.view(-1, 4)[:, 1:3] = 0.0
    packed = pack_zeros(model, "2:4")
    assert all(form["sparsity"] == "2:4" for form in forms(packed, "q_proj"))
    assert all(form["bits"] == 8 and "sparsity" not in form for form in forms(packed, "v_proj"))
    packed.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(tokens()).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens()).logits, expected)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_packed_zeros_load_with_auto_model_and_give_the_same_logits(pattern, tmp_path):
    model = family(linear_forms={"up_proj": {"rank": 16}}, attention_bias=True).eval()
    target, exclude = None if pattern == "2:4" else 0.7, ["gate_proj", "v_proj"]
    pruning = GradualPruning(target, end_step=4, pattern=pattern, pruning_scope="global", exclude=exclude)
    trainer_for(model, tmp_path, pruning, max_steps=5).train()
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packed = pack_zeros(model, pattern)
    packed.save_pretrained(tmp_path / "packed")
    model.save_pretrained(tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        expected = model(tokens()).logits
        assert torch.equal(loaded(tokens()).logits, expected) and torch.equal(packed(tokens()).logits, expected)
    kind = "bitmask" if pattern == "unstructured" else "2:4"
    for name in ("q_proj", "o_proj", "down_proj"):
        assert all(form["sparsity"] == kind for form in forms(loaded, name))
    assert all(form["a"]["sparsity"] == form["b"]["sparsity"] == kind for form in forms(loaded, "up_proj"))
    assert not any("sparsity" in form for name in ("gate_proj", "v_proj") for form in forms(loaded, name))
    for name, weight in dense_weights(loaded).items():
        if kind == "bitmask" and "gate" not in name and "v_proj" not in name:
            module: Any = loaded.get_submodule(name)
            assert module.form.nnz == module.values.numel() == int((weight != 0).sum())
    gone = sum(int((w == 0).sum()) for n, w in dense_weights(model).items() if "v_proj" not in n)
    masks = sum(t.nbytes for k, t in load_file(tmp_path / "packed" / "model.safetensors").items() if "mask" in k)
    assert stored_bytes(tmp_path / "packed") == stored_bytes(tmp_path / "dense") - 4 * gone + masks
    with torch.no_grad():  # what was packed has tensors of its own
        for parameter in packed.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_and_its_embedding_pack_too(tied, tmp_path):
    model = family(tie_word_embeddings=tied).bfloat16()
    pruning = GradualPruning(0.5, end_step=0, heads=True, include=["lm_head"])
    trainer_for(model, tmp_path, pruning, max_steps=1).train()
    model.eval().generation_config.max_new_tokens = 3
    packed = pack_zeros(model)
    assert packed.dtype == torch.bfloat16 and not packed.training and packed.generation_config.max_new_tokens == 3
    packed.save_pretrained(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    form = loaded.config.embed_tokens_form if tied else loaded.config.lm_head_form
    assert form["sparsity"] == "bitmask" and form["nnz"] == 61 * 32 // 2
    assert loaded.config.linear_forms == {} and (loaded.config.embed_tokens_form is None) != tied
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_a_classifier_packs_and_another_family_is_refused():
    torch.manual_seed(0)
    model: Any = LLMKernelForSequenceClassification(LLMKernelConfig(**SMALL, pad_token_id=0)).eval()
    model.model.layers[1].mlp.down_proj.weight.data[:, ::2] = 0
    packed = pack_zeros(model, "2:4")
    assert [form.get("sparsity") for form in forms(packed, "down_proj")] == [None, "2:4"]
    assert torch.equal(packed(tokens()).logits, model(tokens()).logits)
    with pytest.raises(ValueError, match="model=LlamaForCausalLM: is not of this family.*convert_checkpoint"):
        pack_zeros(llama())
    with pytest.raises(ValueError, match="pattern='4x1'"):
        pack_zeros(model, "4x1")


def test_masks_ranks_and_widths_stay_under_training_and_reload(tmp_path):
    """Packed and low-rank forms of unequal layers through Trainer, resumed and reloaded."""
    layer_forms = {
        "q_proj": {"sparsity": "2:4"},
        "o_proj": {"sparsity": "bitmask", "nnz": 300},
        "up_proj": {"rank": 8, "a": {"sparsity": "2:4"}},
        "down_proj": {"rank": 12},
    }
    per_layer = {1: {"intermediate_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1, "linear_forms": {}}}
    model = family(linear_forms=layer_forms, per_layer_config=per_layer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    zeros = {name: weight == 0 for name, weight in dense_weights(model).items()}
    saving = {"save_strategy": "steps", "save_steps": 4}
    trainer_for(model, tmp_path, optimizer=None, **saving).train()
    resumed = family(linear_forms=layer_forms, per_layer_config=per_layer)
    trainer_for(resumed, tmp_path, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{STEPS}")
    for name in layer_forms:
        assert forms(loaded, name) == forms(family(linear_forms=layer_forms, per_layer_config=per_layer), name)
    after = loaded.state_dict()
    assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in before.items()}
    for name, tensor in before.items():
        assert torch.equal(after[name], model.state_dict()[name])
        assert torch.equal(after[name], resumed.state_dict()[name])
        assert torch.equal(after[name], tensor) == name.endswith("mask")
    for name, weight in dense_weights(loaded).items():
        assert not weight[zeros[name]].any() and weight.ne(0).sum() == (~zeros[name]).sum()
    assert sum(int(mask.sum()) for mask in zeros.values()) > 1000
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model.eval()(tokens()).logits)


def test_a_packed_model_trains_on_with_the_zeros_it_came_with(tmp_path):
    model = family()
    trainer_for(model, tmp_path, GradualPruning(0.6, end_step=2), max_steps=3).train()
    zeros = {name: weight == 0 for name, weight in dense_weights(model).items()}
    packed = pack_zeros(model)
    assert packed.training
    trainer_for(packed, tmp_path, max_steps=3).train()
    for name, weight in dense_weights(packed).items():
        assert torch.equal(weight == 0, zeros[name])
        assert not torch.equal(weight, dense_weights(model)[name])
