"""The draft that pays, of several, by what is measured of each; and drafts in the terminal."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_llmkernel import cli
from hf_llmkernel.generate import drafts, paging, speculative
from hf_llmkernel.generate.chat import chat
from hf_llmkernel.generate.command import generate
from hf_llmkernel.generate.drafts import best_draft, load_draft, measure_draft


@pytest.fixture
def folders(tiny_checkpoint, tmp_path):
    """The model, a near copy and a random one, in folders."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    for name, noise in (("near", 0.02), ("random", 1.0)):
        model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(noise * weight.std() * torch.randn_like(weight))
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return {"model": str(tiny_checkpoint), "near": str(tmp_path / "near"), "random": str(tmp_path / "random")}


@pytest.fixture
def loaded(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders["model"])
    model = AutoModelForCausalLM.from_pretrained(folders["model"])
    return model, tokenizer, tokenizer("w1 w2 w3", return_tensors="pt")


@pytest.fixture
def seconds(monkeypatch, folders):
    """Steps take what they took: a tenth of the model's for the others, so that nothing of the clock decides."""
    measured = []

    def timed(model, cache, tokens):
        measured.append((cache.get_seq_length(), tokens.shape[1]))
        return 1 + 0.1 * tokens.shape[1] if model.name_or_path == folders["model"] else 0.1

    monkeypatch.setattr(drafts, "_seconds", timed)
    return measured


def test_acceptance_is_the_share_of_tokens_that_the_draft_would_have_written(loaded, folders, seconds):
    model, tokenizer, inputs = loaded
    draft = load_draft(model, tokenizer, folders["near"])
    sequence = model.generate(**inputs, max_new_tokens=30, do_sample=False, eos_token_id=None)
    hits = [draft(sequence[:, :end]).logits[0, -1].argmax() == sequence[0, end] for end in range(3, 33)]
    measure = measure_draft(model, draft, sequence, 3)
    assert measure.acceptance == pytest.approx(sum(hits).item() / 30) and 0.3 < measure.acceptance < 1
    assert (measure.step_seconds, measure.draft_seconds) == pytest.approx((1.1, 0.1))
    assert (measure.drafted, measure.speedup) == speculative.best_count(measure.acceptance, 0.1, lambda n: 1 + 0.1 * n)
    assert set(seconds) == {(25, 1), (25, 8)}


def test_steps_are_timed_and_taken_back(loaded):
    model, _, inputs = loaded
    sequence = model.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=None)
    cache = drafts._read(model, sequence)
    assert cache.get_seq_length() == 15
    assert drafts._seconds(model, cache, sequence[:, -8:]) > 0 and cache.get_seq_length() == 15


def test_the_best_of_several_or_none(loaded, folders, seconds, monkeypatch):
    model, tokenizer, inputs = loaded
    best, measures = best_draft(model, tokenizer, [folders["random"], folders["near"]], inputs)
    assert best.name_or_path == folders["near"] and list(measures) == [folders["random"], folders["near"]]
    assert measures[folders["near"]].speedup > measures[folders["random"]].speedup
    monkeypatch.setattr(drafts, "_seconds", lambda model, cache, tokens: 1.0)
    best, measures = best_draft(model, tokenizer, [folders["random"]], inputs)
    assert best is None and measures[folders["random"]].drafted == 0


def test_the_command_writes_the_same_text_and_says_why(folders, seconds, capsys, monkeypatch):
    expected = generate(folders["model"], "w1 w2 w3", max_new_tokens=30, chat=False)["text"]
    used, decode = [], speculative._decode
    monkeypatch.setattr(speculative, "_decode", lambda *arguments: (used.append(1), decode(*arguments)))
    options = {"max_new_tokens": 30, "chat": False}
    one = generate(folders["model"], "w1 w2 w3", draft=[folders["near"]], **options)
    assert "draft" not in capsys.readouterr().err
    two = generate(folders["model"], "w1 w2 w3", draft=[folders["random"], folders["near"]], **options)
    assert one["text"] == two["text"] == expected and len(used) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"draft {folders['near']}: ") and "of its tokens accepted, each at 0.09 of a step" in line
    monkeypatch.setattr(drafts, "_seconds", lambda model, cache, tokens: 1.0)
    options = ["generate", folders["model"], "w1 w2 w3", "--max-new-tokens", "30", "--no-chat", "--json"]
    assert cli.main([*options, "--draft", folders["random"], "--draft", folders["random"]]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["text"] == expected and len(used) == 2
    assert "no draft pays, not even" in captured.err


def test_a_model_that_is_read_at_every_step_is_read_less_often(folders, monkeypatch, capsys):
    monkeypatch.setattr(paging, "pinned_blocks", lambda *sizes: 0)
    monkeypatch.setattr(speculative.Pace, "wanted", lambda self, look: 4)
    read, enter = [], paging.Pages._enter
    monkeypatch.setattr(paging.Pages, "_enter", lambda self, index, *_: read.append(index) or enter(self, index))
    options = {"max_new_tokens": 30, "chat": False, "memory": "64GB"}
    expected = generate(folders["model"], "w1 w2 w3", **options)["text"]
    alone = len(read)
    assert generate(folders["model"], "w1 w2 w3", draft=[folders["near"]], **options)["text"] == expected
    assert 2 * len(read) < 3 * alone == 3 * 2 * 30


def test_a_conversation_keeps_what_the_draft_has_read(folders, monkeypatch, capsys):
    lines = ["w1 w2", "w3", "w4 w5 w6"]
    monkeypatch.setattr(speculative.Pace, "wanted", lambda self, look: 3)

    def talk(**options) -> list[dict]:
        monkeypatch.setattr("hf_llmkernel.generate.chat.messages", lambda: iter(lines))
        return chat(folders["model"], max_new_tokens=12, **options)["messages"]

    expected, read = talk(), []
    begin = speculative.Draft.begin
    monkeypatch.setattr(
        speculative.Draft, "begin", lambda self, written: (begin(self, written), read.append(self.read()))
    )
    assert talk(draft=[folders["near"]]) == expected
    assert len(read) == 3 and read[0] == 0 < read[1] < read[2]


def test_what_a_draft_does_not_go_with(folders, tmp_path, loaded):
    model, tokenizer, _ = loaded
    given = {"draft": [folders["near"]], "chat": False}
    for name, options in (
        ("temperature", {"temperature": 0.5}),
        ("cache", {"cache": "int8"}),
    ):
        with pytest.raises(ValueError, match=f"draft: goes without {name}; leave one of the two out"):
            generate(folders["model"], "w1", **given, **options)
    with pytest.raises(ValueError, match=r"draft=.*near: takes .* kB, memory=1.00 kB leaves 0 B beside"):
        generate(folders["model"], "w1", draft=[folders["near"]], memory="1KB", chat=False)
    with pytest.raises(ValueError, match="draft=/nowhere: no such folder; check the path"):
        generate("/absent", "w1", draft=["/nowhere"])
    with pytest.raises(ValueError, match="draft: with memory there is one, not 2; name the one"):
        generate(folders["model"], "w1", draft=[folders["near"]] * 2, memory="1GB", chat=False)
    with pytest.raises(ValueError, match="no such folder"):
        generate(folders["model"], "w1", draft=[str(tmp_path / "absent")], chat=False)
    other = AutoTokenizer.from_pretrained(folders["near"])
    other.add_tokens(["more"])
    other.save_pretrained(folders["near"])
    with pytest.raises(ValueError, match="draft=.*near: has another vocabulary than the model"):
        load_draft(model, tokenizer, folders["near"])
