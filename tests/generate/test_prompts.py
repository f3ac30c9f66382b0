"""A file of prompts: the texts that `generate` gives each alone, whoever shares the work and whenever it stopped."""

import json
import os
import socket

import pytest
import torch
from torch import multiprocessing

from hf_llmkernel import cli
from hf_llmkernel.generate import prompts as module
from hf_llmkernel.generate.command import generate, render_generate

TEXTS = ["w1 w2 w3", "w9", "w4 w5 w6 w7 w8", "w10 w11", "w20 w21 w22", "w1 w1 w1"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(TEXTS) + "\n\n")
    return path


def run(model, file, output, **options):
    return generate(str(model), prompts=file, output=output, **{"max_new_tokens": 6, "chat": False, **options})


def lines(output):
    return [json.loads(line) for line in output.read_text().splitlines()]


def alone(model, prompt, **options):
    return generate(str(model), prompt, max_new_tokens=6, **{"chat": False, **options})["text"]


def test_every_prompt_gets_its_text(tmp_path, tiny_checkpoint, file, capsys):
    result = run(tiny_checkpoint, file, tmp_path / "out.jsonl", batch=3)
    written = lines(tmp_path / "out.jsonl")
    assert [entry["index"] for entry in written] == list(range(6)) and [entry["prompt"] for entry in written] == TEXTS
    assert [entry["text"] for entry in written] == [alone(tiny_checkpoint, text) for text in TEXTS]
    assert result["new_tokens"] == sum(entry["tokens"] for entry in written) and result["prompts"] == 6
    assert "6 texts" in render_generate(result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.txt"]


def test_a_text_ends_with_the_context(tmp_path, tiny_checkpoint):
    (tmp_path / "prompts.txt").write_text("w1 w2\n" + "w1 w2 " * 61)
    result = run(tiny_checkpoint, tmp_path / "prompts.txt", tmp_path / "out", max_new_tokens=50)
    short, long = lines(tmp_path / "out")
    assert (short["context_full"], long["context_full"], long["tokens"]) == (False, True, 6)
    assert long["text"] == alone(tiny_checkpoint, "w1 w2 " * 61)
    assert "2 texts (1 until the model's context was full), " in render_generate(result)


def test_messages_and_samples(tmp_path, tiny_checkpoint):
    rows = [{"prompt": "w1 w2"}, {"messages": [{"role": "user", "content": "w1 w2"}]}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(tiny_checkpoint, tmp_path / "p.jsonl", tmp_path / name, chat=None, temperature=2.0, seed=seed)
    first, again, other = (lines(tmp_path / name) for name in "abc")
    assert first == again != other and first[0]["text"] != first[1]["text"]  # seeds of their own
    run(tiny_checkpoint, tmp_path / "p.jsonl", tmp_path / "greedy", chat=None)
    texts = [entry["text"] for entry in lines(tmp_path / "greedy")]
    assert texts[0] == texts[1] == alone(tiny_checkpoint, "w1 w2", chat=True)


def test_an_interrupted_run_goes_on(tmp_path, tiny_checkpoint, file, monkeypatch):
    run(tiny_checkpoint, file, tmp_path / "whole.jsonl")
    end, ended = module._Line.end, []

    def stop(line):
        if len(ended) == 2:
            raise KeyboardInterrupt
        ended.append(line.index)
        end(line)

    monkeypatch.setattr(module._Line, "end", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_checkpoint, file, tmp_path / "out.jsonl")
    monkeypatch.undo()
    part = tmp_path / "out.jsonl.part-0"
    with part.open("a") as opened:
        opened.write('{"index": 5, "te')  # as a kill leaves it
    with pytest.raises(ValueError, match="is of a run with other prompts or settings; give the same, or remove it"):
        run(tiny_checkpoint, file, tmp_path / "out.jsonl", max_new_tokens=7)
    assert run(tiny_checkpoint, file, tmp_path / "out.jsonl")["taken_up"] == 2
    assert lines(tmp_path / "out.jsonl") == lines(tmp_path / "whole.jsonl")


def _work(rank, port, model, file, output):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    result = run(model, file, output)
    assert result["processes"] == 2
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(120)
def test_processes_share_the_prompts(tmp_path, tiny_checkpoint, file):
    run(tiny_checkpoint, file, tmp_path / "one.jsonl")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    given = (port, tiny_checkpoint, file, tmp_path / "two.jsonl")
    multiprocessing.start_processes(_work, given, 2, start_method="fork")
    assert lines(tmp_path / "two.jsonl") == lines(tmp_path / "one.jsonl")
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.parametrize(
    ("name", "content", "more", "message"),
    [
        ("p.md", "w1", [], "must end in .txt"),
        ("p.txt", "\n \n", [], "has no prompt"),
        ("p.jsonl", '{"prompt": "w1"}\n{"text": 1}', [], "line 2 is no JSON object with a text 'prompt' or"),
        ("p.jsonl", '{"prompt": "\\ud800"}', [], "line 1 has half a character"),
        ("p.jsonl", '{"messages": [{"role": "w1", "content": "w1"}]}', [], "line 1: messages[0].role='w1': must be"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}', [], "line 1: messages[0].content: must be a text"),
        ("p.txt", b"\xff\n", [], "p.txt: is not UTF-8"),
        ("p.txt", "w1 " * 150, [], "prompts: the one of index 0 has 152 tokens, the model's context ends at 128"),
        ("p.txt", "w1", ["--memory", "1GB"], "prompts: goes without memory"),
        ("p.txt", "w1", ["w2"], "prompts: goes without PROMPT"),
    ],
)
def test_bad_input_is_one_line(tmp_path, tiny_checkpoint, capsys, name, content, more, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    given = ["generate", str(tiny_checkpoint), "--prompts", str(tmp_path / name), "--output", str(tmp_path / "out")]
    assert cli.main([*given, *more]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and message in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_to_write_to_is_needed_before_the_model_is_loaded(tmp_path, file, capsys):
    for folder, fault in ((tmp_path / "absent", "is no folder"), (file, "is no folder")):
        given = ["generate", str(tmp_path / "model"), "--prompts", str(file), "--output", str(folder / "out.jsonl")]
        assert cli.main(given) == 2
        expected = f"error: output={folder / 'out.jsonl'}: {folder} {fault}; make it, or choose another.\n"
        assert capsys.readouterr().err == expected


def test_something_to_write_to_and_to_read_is_needed(tmp_path, tiny_checkpoint, file):
    with pytest.raises(ValueError, match="output: is missing"):
        generate(str(tiny_checkpoint), prompts=file)
    with pytest.raises(ValueError, match="PROMPT: is missing"):
        generate(str(tiny_checkpoint))
    (tmp_path / "out.jsonl").write_text("")
    with pytest.raises(ValueError, match="exists; choose another file or remove it"):
        run(tiny_checkpoint, file, tmp_path / "out.jsonl")
