"""First contact with Trainer: a preset on real text, saved half way, resumed, as two processes, checkpointed gradients.

    python scripts/runs/trainer_first_contact.py [--text bbc] [--steps 20] [--output FILE.json]

Every run is a process of its own, or two under torchrun. The result says whether the resumed runs repeat the logged
losses and end in the same weights bit for bit, and how far two processes and checkpointed gradients are from one.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PRESET = "tiny"
BATCH = 8  # sequences a step over all processes
SEED = 0
# Name: processes, and what it changes. A run that resumes does so from the checkpoint of the run it names.
RUNS = {
    "one process": {"processes": 1},
    "one process, resumed": {"processes": 1, "resumes": "one process"},
    "checkpointed gradients": {"processes": 1, "gradient_checkpointing": True},
    "two processes": {"processes": 2},
    "two processes, resumed": {"processes": 2, "resumes": "two processes"},
}


def prepare(text: str, folder: Path, context: int, steps: int) -> int:
    """Writes a tokenizer of the text, and its first windows `[BATCH * steps, context]`; returns how many there are."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    from hf_llmkernel.data import load_documents, split_documents, token_windows
    from hf_llmkernel.presets import preset_config

    documents, _ = split_documents(load_documents(text), seed=SEED)
    tokenizer = ByteLevelBPETokenizer()
    vocab_size = preset_config(PRESET).vocab_size
    tokenizer.train_from_iterator(documents, vocab_size=vocab_size, special_tokens=["<s>", "</s>"], show_progress=False)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)
    windows = token_windows(wrapped, documents, context, context * BATCH * steps, vocab_size)
    torch.save(windows, folder / "windows.pt")
    return len(windows)


def train(name: str, folder: Path, steps: int) -> dict:
    """One run in this process, which may be one of several; what it logged and where it ended."""
    import torch
    from transformers import Trainer, TrainingArguments, default_data_collator, set_seed

    from hf_llmkernel.model.modeling_llm_kernel import LLMKernelForCausalLM
    from hf_llmkernel.presets import preset_config

    run = RUNS[name]
    # A resumed run starts from other weights, so that it can only agree by what it restores.
    set_seed(SEED + ("resumes" in run))
    model = LLMKernelForCausalLM(preset_config(PRESET))
    arguments = TrainingArguments(
        output_dir=str(folder / name),
        max_steps=steps,
        save_steps=steps // 2,
        logging_steps=1,
        per_device_train_batch_size=BATCH // run["processes"],
        gradient_checkpointing=run.get("gradient_checkpointing", False),
        learning_rate=1e-3,
        seed=SEED,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    rows: Any = [{"input_ids": window, "labels": window} for window in torch.load(folder / "windows.pt")]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator)
    source = run.get("resumes")
    trainer.train(resume_from_checkpoint=source and str(folder / source / f"checkpoint-{steps // 2}"))
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    return {"losses": losses, "weights_sha256": weights_digest(model), "rank": arguments.process_index}


def weights_digest(model) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def launch(names: list[str], folder: Path, steps: int) -> dict[str, dict]:
    """Runs, one after the other, in a process or processes of their own. Raises `RuntimeError` where they fail."""
    processes = RUNS[names[0]]["processes"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), __file__]
    started = time.perf_counter()
    finished = subprocess.run(
        [*command, "--job", *names, "--folder", str(folder), "--steps", str(steps)], capture_output=True, text=True
    )
    if finished.returncode:
        raise RuntimeError(f"runs={names}: failed with\n{finished.stderr}")
    print(f"{', '.join(names)}: {time.perf_counter() - started:.1f} s", file=sys.stderr)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in names}


def compare(results: dict[str, dict], steps: int) -> dict:
    """What the runs were made to show."""
    late = [str(step) for step in range(steps // 2 + 1, steps + 1)]

    def repeats(name: str) -> bool:
        resumed, whole = results[name], results[RUNS[name]["resumes"]]
        same_losses = all(resumed["losses"][step] == whole["losses"][step] for step in late)
        return same_losses and resumed["weights_sha256"] == whole["weights_sha256"]

    def distance(name: str) -> float:
        reference = results["one process"]["losses"]
        return max(abs(loss - reference[step]) for step, loss in results[name]["losses"].items())

    return {
        "resumed_is_identical": {name: repeats(name) for name, run in RUNS.items() if "resumes" in run},
        "largest_loss_difference_from_one_process": {
            name: distance(name) for name in ("two processes", "checkpointed gradients")
        },
    }


def describe(text: str, context: int, steps: int, sequences: int) -> dict:
    """What is needed to run this again: the settings, the machine, the versions, the commit."""
    from hf_llmkernel.evaluate.machine import describe_commit, describe_machine, describe_versions

    settings = {"preset": PRESET, "text": text, "context": context, "batch": BATCH, "steps": steps, "seed": SEED}
    return {
        **settings,
        "sequences": sequences,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).parent),
    }


def run_all(text: str, context: int, steps: int, output: Path) -> dict:
    with tempfile.TemporaryDirectory() as workspace:
        folder = Path(workspace)
        sequences = prepare(text, folder, context, steps)
        results: dict[str, dict] = {}
        for name in RUNS:
            results |= launch([name], folder, steps)
    report = {**describe(text, context, steps, sequences), "runs": results, "shows": compare(results, steps)}
    output.write_text(json.dumps(report, indent=2) + "\n")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="bbc")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--job", choices=list(RUNS), nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job is None:
        report = run_all(arguments.text, arguments.context, arguments.steps, arguments.output)
        print(json.dumps(report["shows"], indent=2))
    for name in arguments.job or []:
        result = train(name, arguments.folder, arguments.steps)
        if result.pop("rank") == 0:
            (arguments.folder / f"{name}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
