"""Which layers a model predicts text best without, one at a time.

A round tries every candidate in one walk over the blocks: hidden states fork where a candidate is left out, and all
forks go on side by side, so that each block is read once and what candidates share is computed once.

Shapes: S samples, T tokens, H hidden_size.
"""

import json
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ... import processes
from ...checkpoint.model_folder import Positions
from ...evaluate.quality import summed_nll
from ...model.modeling_llm_kernel import LLMKernelDecoderLayer
from ..disk import write_json
from ..walk import accelerator, fast_products

if TYPE_CHECKING:
    from ..survey import Survey

Part = tuple[int, str]  # a layer, and "layer", "attention" or "mlp"
SEARCH_TOKENS = 4096  # of the calibration text, at most: forks are held in memory


def drop_by_perplexity(
    survey: "Survey", candidates: list[Part], count: int
) -> tuple[list[Part], list[dict[str, Any]]]:
    """The parts to leave out, in the order in which they were chosen, and the loss of every one that was tried.

    In each round that part goes without which the calibration text has the least loss, given those gone before; tried
    are those of least influence on the hidden states, twice as many as are to go and some.
    """
    unit = "layer" if candidates[0][1] == "layer" else "sublayer"
    influences = survey.influences(unit)
    ranked = sorted(candidates, key=lambda part: influences[part[0]][part[1]])
    shortlist = sorted(ranked[: 2 * count + 6])
    file = survey.folder / "rounds.json"
    rounds: list[dict[str, Any]] = processes.on_first(lambda: json.loads(file.read_text()) if file.is_file() else [])
    while len(rounds) < count:
        dropped = [tuple(entry["dropped"]) for entry in rounds]
        tried = [part for part in shortlist if part not in dropped]
        losses = losses_without(survey, dropped, tried)
        best = min(tried, key=lambda part: losses[part])
        rounds.append({"dropped": best, "losses": [[*part, losses[part]] for part in tried]})
        if processes.is_first():
            write_json(file, rounds)
    dropped = [tuple(entry["dropped"]) for entry in rounds]
    scores = [
        {"round": number, "layer": layer, "part": kind, "loss": loss}
        for number, entry in enumerate(rounds)
        for layer, kind, loss in entry["losses"]
    ]
    return dropped, scores


@torch.no_grad()
def losses_without(survey: "Survey", dropped: list[Part], tried: list[Part]) -> dict[Part, float]:
    """Mean loss in nats of the calibration text without `dropped` and one more part, for each of `tried`."""
    assert survey.ids is not None
    searched = survey.ids[: max(SEARCH_TOKENS // survey.ids.shape[1], 1)]
    ids = processes.own(searched)
    totals = summed_losses(survey, ids, dropped, tried) if len(ids) else {}
    tokens = searched.numel() - len(searched)
    return {part: total / tokens for part, total in processes.summed(totals).items()}


def summed_losses(
    survey: "Survey", ids: torch.Tensor, dropped: list[Part], tried: list[Part]
) -> dict[Part, float]:
    """The same, summed over the tokens of some samples `[S, T]`."""
    device = accelerator()
    source, positions = survey.source, Positions(survey.config, ids.shape[1], device)
    shared = source.embedding()(ids).to(device)  # [S, T, H]
    forks: dict[Part, torch.Tensor] = {}
    rounds = tqdm(range(len(survey.layers)), f"leaving out {len(dropped) + 1}", disable=not survey.progress)
    for index in rounds:
        block, given = source.block(index).to(device), positions.arguments(index)
        gone = {kind for layer, kind in dropped if layer == index}
        for part, states in forks.items():
            forks[part] = _run(block, states, given, gone)
        for part in tried:
            if part[0] == index:
                forks[part] = _run(block, shared, given, gone | {part[1]})
        if any(layer > index for layer, _ in tried):
            shared = _run(block, shared, given, gone)
    norm, head = source.norm().to(device), source.head().to(device)
    totals: dict[Part, float] = {}
    with fast_products():
        for part, states in forks.items():
            pairs = zip(states, ids.to(device), strict=True)
            totals[part] = sum(summed_nll(norm(sample), sample_ids, head) for sample, sample_ids in pairs)
    return totals


def _run(
    block: LLMKernelDecoderLayer, states: torch.Tensor, given: dict[str, Any], gone: set[str]
) -> torch.Tensor:
    """States after a block without some of its parts; those before it where all of it is gone."""
    if "layer" in gone:
        return states
    attends, feeds = block.attends, block.feeds
    block.attends, block.feeds = attends and "attention" not in gone, feeds and "mlp" not in gone
    with fast_products():
        after = torch.cat([block(sample, **given) for sample in states.split(4)])
    block.attends, block.feeds = attends, feeds
    return after
