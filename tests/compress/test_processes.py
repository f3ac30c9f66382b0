"""Several processes, as `torchrun` starts them, against one."""

import json
import os
import socket

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import multiprocessing

from hf_llmkernel import processes
from hf_llmkernel.compress import compress, pipeline, sweep
from hf_llmkernel.compress.block import Block
from hf_llmkernel.compress.inputs import InputStatistic
from hf_llmkernel.compress.walk import Walk
from hf_llmkernel.model.configuration_llm_kernel import LLMKernelConfig
from hf_llmkernel.model.modeling_llm_kernel import LLMKernelDecoderLayer

pytestmark = pytest.mark.timeout(120)  # a process that fails leaves the others waiting
FFN = {"prune_ffn": {"ratio": 0.25, "align": 16, "method": "wanda"}}
FACTORIZE = {"factorize": {"ratio": 0.2, "align": 4}}
GLOBAL = {"prune_ffn": {**FFN["prune_ffn"], "method": "flap", "allocation": "global", "update": "least_squares_bias"}}
RECIPES = {
    "ffn_and_rank": [FFN, FACTORIZE],
    "global_ffn": [GLOBAL, {"quantize": {"bits": 8, "group_size": 16}}],
    "influence": [{"drop_layers": {"count": 1, "metric": "block_influence"}}],
    "perplexity": [{"drop_layers": {"count": 2, "metric": "perplexity", "unit": "sublayer"}}],
    "refit": [{"drop_layers": {"count": 1, "metric": "block_influence"}}, {"refit": {}}],
    "sparse": [{"sparsify": {"sparsity": 0.5, "method": "wanda"}}],
    "hidden": [{"prune_hidden": {"ratio": 0.25, "align": 8}}],
    "search": [{"search": {"choices": [[], [FFN]], "parameters": 0.9, "tokens": 96}}],
    "without_data": [{"quantize": {"bits": 8, "group_size": 16}}],
}


def run_processes(count: int, work, *given) -> None:
    """Calls `work(*given)` in processes with the environment that `torchrun` gives."""
    # The first one keeps the store: threads of one here would be forked in the middle of what they do, locks held.
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(_start, (count, port, work, given), count, start_method="fork")


def _start(rank: int, count: int, port: int, work, given: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), GROUP_RANK="0")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    processes.join()
    assert (processes.rank(), processes.world_size()) == (rank, count)
    work(*given)
    dist.destroy_process_group()


def recipe_for(text, stages, samples: int) -> dict:
    return {"calibration": {"source": str(text), "samples": samples, "length": 48}, "stages": stages}


def assert_same(folder, expected) -> None:
    """Equal configurations; tensors within 1e-5 of their size, of a low rank the products of its factors.

    These within 5e-5: to cut a spectrum turns rounding into more, one process with another batch size is 2e-5 off.
    """
    assert (folder / "config.json").read_text() == (expected / "config.json").read_text()
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if name.endswith(".a.weight"):
            second = name.replace(".a.", ".b.")
            assert distance(ours[second] @ tensor, theirs[second] @ theirs[name]) < 5e-5, name
        elif not tensor.is_floating_point():
            assert torch.equal(tensor, theirs[name]), name
        elif not name.endswith(".b.weight"):
            assert distance(tensor, theirs[name]) < 1e-5, name


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def assert_close(ours, theirs) -> None:
    """Equal JSON but for floats, which are decisions' scores."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs = [*ours.values()], [theirs[key] for key in ours]
    if isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_close(one, other)
    else:
        assert ours == (pytest.approx(theirs, rel=1e-4, abs=1e-5) if isinstance(theirs, float) else theirs)


@pytest.mark.parametrize(("count", "samples"), [(2, 13), (3, 2)])
def test_several_processes_end_with_the_result_of_one(tmp_path, tiny, text, count, samples):
    def work() -> None:
        for name, stages in RECIPES.items():
            result = compress(tiny, recipe_for(text, stages, samples), tmp_path / f"shared-{name}", progress=False)
            assert (tmp_path / f"shared-{name}").is_dir()
            (tmp_path / f"{name}-{processes.rank()}.json").write_text(json.dumps(result.stages))

    run_processes(count, work)
    for name, stages in RECIPES.items():
        result = compress(tiny, recipe_for(text, stages, samples), tmp_path / name, progress=False)
        for rank in range(count):
            assert_close(json.loads((tmp_path / f"{name}-{rank}.json").read_text()), result.stages)
        assert_same(tmp_path / f"shared-{name}", tmp_path / name)
        assert not (tmp_path / f"shared-{name}.part").exists()
        names = [{path.name for path in (tmp_path / folder).iterdir()} for folder in (name, f"shared-{name}")]
        assert names[0] == names[1]


def test_the_first_process_measures_and_all_have_the_report(tmp_path, tiny, text, monkeypatch):
    monkeypatch.setattr(pipeline, "measure", lambda *given: {"measured_by": processes.rank()})

    def work() -> None:
        result = compress(tiny, recipe_for(text, [FFN], 4), tmp_path / "out", progress=False)
        assert result.report == {"measured_by": 0}
        assert result.stages[0]["result"][0]["neurons"] == 48

    run_processes(2, work)


@pytest.mark.parametrize(
    ("lost", "again"),
    [("nothing", ["2"]), ("newest states of one", ["1", "2"]), ("all states of one", ["0", "1", "2"])],
)
def test_an_interrupted_run_goes_on(tmp_path, tiny, text, lost, again):
    recipe, log = recipe_for(text, [FFN], 5), tmp_path / "log"

    def work(out, last: int) -> None:
        """A run that is killed when it has written block `last`, and still has the states before it."""
        load, write = sweep.load_block, sweep.write_json

        def load_block(source, index, origin):
            if processes.is_first():
                with log.open("a") as file:
                    file.write(f"{index} ")
            return load(source, index, origin)

        def write_json(path, content):
            write(path, content)
            if path.name == f"layer-{last:05d}.json":
                os._exit(1)

        sweep.load_block, sweep.write_json = load_block, write_json
        compress(tiny, recipe, out, progress=False)

    run_processes(2, work, tmp_path / "whole", -1)
    log.unlink()
    with pytest.raises(multiprocessing.ProcessExitedException):
        run_processes(2, work, tmp_path / "out", 1)
    states = sorted((tmp_path / "out.part").rglob("process-1-of-2/states-*"))
    assert [path.name for path in states] == ["states-00001", "states-00002"]
    for path in {"nothing": [], "newest states of one": states[1:], "all states of one": states}[lost]:
        path.unlink()
    run_processes(2, work, tmp_path / "out", -1)
    assert log.read_text().split() == ["0", "1", *again]
    assert load_bytes(tmp_path / "out") == load_bytes(tmp_path / "whole")


def load_bytes(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_bad_input_ends_all_processes_with_the_same_error(tmp_path, tiny, text):
    def work() -> None:
        faults = (({"samples": 1000}, "need 48000 tokens"), ({"length": 500}, "max_position_embeddings"))
        for settings, message in faults:
            recipe = recipe_for(text, [FFN], 4)
            with pytest.raises(ValueError, match=message):
                compress(tiny, {**recipe, "calibration": {**recipe["calibration"], **settings}}, tmp_path / "out")
            processes.wait()
            assert not (tmp_path / "out.part").exists()

    run_processes(2, work)


def test_activations_that_overflow_in_one_share_end_all(tmp_path):
    config = LLMKernelConfig(**{"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})

    def work() -> None:
        layer = config.per_layer_config[0]
        layer.skip = ["attention", "mlp"]
        block = Block(0, layer, dict(LLMKernelDecoderLayer(layer, 0).state_dict()))
        walk = Walk(config, tmp_path, 2, 4)
        values = torch.ones(2, 4, 16)
        values[1] = float("nan")
        walk.take_up(0, lambda begin, end: processes.own(values)[begin:end])
        with pytest.raises(ValueError, match="model.layers.0: its outputs are not finite"):
            walk.run(block, {}, lambda site, inputs: None, advance=True)

    run_processes(2, work)


@pytest.mark.parametrize("needs", ["moments", "gram"])
def test_statistics_are_sums_over_processes(needs):
    x = torch.randn(5, 7, 12, generator=torch.Generator().manual_seed(0)) + 0.5

    def work() -> None:
        whole, part = InputStatistic(needs), InputStatistic(needs)
        whole.add(x)
        mine = [slice(0, 0), slice(0, 2), slice(2, 5)][processes.rank()]
        part.add(x[mine])
        part.all_reduce()
        assert part.count == 35 and part.needs == needs
        for name in ("norm", "mean", "mean_magnitude", "variance"):
            torch.testing.assert_close(getattr(part, name), getattr(whole, name), rtol=1e-5, atol=1e-6)
        if needs == "gram":
            torch.testing.assert_close(part.gram, whole.gram, rtol=1e-5, atol=1e-5)

    run_processes(3, work)


def test_what_processes_say_to_each_other(tmp_path):
    def work() -> None:
        rank = processes.rank()
        assert processes.gather(rank) == [0, 1, 2]
        assert processes.summed({"all": 1.0, rank: 2.0}) == {"all": 3.0, 0: 2.0, 1: 2.0, 2: 2.0}
        assert processes.on_first(processes.rank) == 0
        assert processes.own_folder(tmp_path) == tmp_path / f"process-{rank}-of-3"

        def fail() -> None:
            raise OSError(28, "full")

        with pytest.raises(OSError, match="full") as raised:
            processes.on_first(fail)
        assert raised.value.errno == 28
        for count in range(8):
            assert processes.own(torch.arange(count)).tolist() == list(processes.share(count))
            shares = processes.gather(processes.share(count))
            assert sorted(index for share in shares for index in share) == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            assert {index for share in shares for index in share[:1]} == set(range(min(count, 3)))

    run_processes(3, work)


def test_a_process_alone_has_no_group(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # of another launcher, or left over: no address of a first process
    processes.join()
    assert not dist.is_initialized()
    assert processes.share(5) == range(5) and processes.own_folder(tmp_path) == tmp_path
    assert processes.on_first(lambda: 3) == 3 and processes.summed({"a": 1.0}) == {"a": 1.0}
