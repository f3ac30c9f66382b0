"""`chat` answers what `generate` answers to the same history, whatever is kept of it between the turns."""

import io
import json
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_llmkernel import cli
from hf_llmkernel.generate import chat as module
from hf_llmkernel.generate.chat import Conversation, chat, messages
from hf_llmkernel.generate.sampling import GREEDY


@pytest.fixture
def type_in(monkeypatch):
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint), AutoTokenizer.from_pretrained(tiny_checkpoint)


def conversation(loaded, system=None, bits=None, **options) -> Conversation:
    return Conversation(*loaded, system, bits, 0, **{"max_new_tokens": 6, **GREEDY, **options})


def greedy(loaded, history: list[dict], tokens: int = 6) -> str:
    """By argmax over whole forwards, without generate() or a cache."""
    model, tokenizer = loaded
    text = " ".join(f"{message['role']} {message['content']}" for message in history)
    ids = tokenizer(f"{text} assistant", return_tensors="pt").input_ids
    first = ids.shape[1]
    for _ in range(tokens):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, first:], skip_special_tokens=True)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_lines_that_are_no_text_are_refused(errors, monkeypatch):
    piped = io.TextIOWrapper(io.BytesIO(b"one\n\xff two\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr("sys.stdin", piped)
    with pytest.raises(ValueError, match="standard input: is not UTF-8"):
        list(messages())


def test_what_cannot_be_is_refused_before_the_model_is_loaded():
    with pytest.raises(ValueError, match="system: is not UTF-8; give it as UTF-8"):
        chat("/absent", system="\udc80")
    with pytest.raises(ValueError, match="draft=/nowhere: no such folder; check the path"):
        chat("/absent", draft=["/nowhere"])


def test_every_turn_answers_the_whole_history(tiny_checkpoint, loaded, type_in, capsys):
    type_in("w1 w2\n\n  w7 \n/exit\nw9\n")
    result = chat(str(tiny_checkpoint), max_new_tokens=6)
    history = []
    for text in ("w1 w2", "w7"):
        history.append({"role": "user", "content": text})
        history.append({"role": "assistant", "content": greedy(loaded, history)})
    assert result["messages"] == history
    out, err = capsys.readouterr()
    assert out.split() == " ".join(message["content"] for message in history[1::2]).split()
    assert "tokens, " in err and "> " not in out


def test_what_the_cache_holds_is_not_computed_again(loaded, capsys):
    talk = conversation(loaded)
    talk.ask("w1 w2 w3")
    turn = talk.ask("w4")
    assert turn["computed_tokens"] == 4  # the last token of the answer, and "user w4 assistant"
    assert talk.messages[-1]["content"] == greedy(loaded, talk.messages[:-1])


def test_a_history_that_reads_otherwise_is_computed_from_where_it_differs(loaded, capsys):
    talk = conversation(loaded)
    talk.ask("w1 w2 w3")
    talk.messages[-1]["content"] = "w5 w6"  # as a template that drops a part of the answer
    turn = talk.ask("w4")
    assert turn["computed_tokens"] == 2 + 3
    assert talk.messages[-1]["content"] == greedy(loaded, talk.messages[:-1])


def test_an_integer_cache_lasts_from_turn_to_turn(loaded, capsys):
    talk = conversation(loaded, bits=8)
    talk.ask("w1 w2 w3")
    assert talk.ask("w4")["computed_tokens"] == 4


def test_reset_keeps_the_system_message_and_the_seed(tiny_checkpoint, loaded, type_in, capsys):
    type_in("w1\n/reset\nw1\nw2\n")
    result = chat(str(tiny_checkpoint), system="w30", max_new_tokens=6, temperature=3.0)
    assert [message["role"] for message in result["messages"]] == ["system", *("user", "assistant") * 2]
    answers = capsys.readouterr().out.splitlines()
    assert answers[0] == answers[1] != answers[2]


def test_an_interruption_ends_the_answer_and_not_the_program(tiny_checkpoint, loaded, type_in, capsys, monkeypatch):
    class Interrupted(module.Words):
        def put(self, value):
            super().put(value)
            if len(self.tokens) == 3 and not interrupted:
                interrupted.append(True)
                signal.raise_signal(signal.SIGINT)

    interrupted = []
    monkeypatch.setattr(module, "Words", Interrupted)
    type_in("w1 w2\nw7\n")
    result = chat(str(tiny_checkpoint), max_new_tokens=6)
    first, second = result["turns"]
    assert (first["tokens"], first["stopped"], second["stopped"]) == (3, True, False)
    history = result["messages"]
    assert greedy(loaded, history[:1], tokens=3) == history[1]["content"]
    assert greedy(loaded, history[:3]) == history[3]["content"]
    assert "stopped)" in capsys.readouterr().err


def test_commands_that_are_none_and_the_end_of_the_context_are_told(tiny_checkpoint, type_in, capsys):
    type_in("/quit\n" + "w1 " * 130 + "\nw2\n")
    result = chat(str(tiny_checkpoint), max_new_tokens=2)
    assert len(result["messages"]) == 2
    err = capsys.readouterr().err
    assert "/quit: is no command; /exit ends" in err
    assert "the conversation has 132 tokens, the model's context ends at 128; /reset forgets it" in err


def test_an_answer_ends_with_the_context(loaded, capsys):
    turn = conversation(loaded, max_new_tokens=50, min_new_tokens=4).ask("w1 " * 122)
    assert (turn["tokens"], turn["context_full"]) == (4, True)
    module._answer(conversation(loaded, max_new_tokens=50, min_new_tokens=4), "w1 " * 122)
    assert ", the model's context is full)" in capsys.readouterr().err


def test_a_terminal_is_asked(tiny_checkpoint, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def typed(prompt):
        print(prompt, end="")
        answer = answers.pop(0)
        if answer in (KeyboardInterrupt, EOFError):
            raise answer
        return answer

    answers = [KeyboardInterrupt, "w1", "", EOFError]
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed)
    assert len(chat(str(tiny_checkpoint), max_new_tokens=2)["turns"]) == 1
    out, err = capsys.readouterr()
    assert out.count("> ") == 4 and err.count("/exit ends") == 2


def test_json_has_the_conversation(tiny_checkpoint, type_in, capfd):
    type_in("w1\n")
    assert cli.main(["chat", str(tiny_checkpoint), "--max-new-tokens", "2", "--json"]) == 0
    out, _ = capfd.readouterr()
    assert [message["role"] for message in json.loads(out)["messages"]] == ["user", "assistant"]


def test_a_tokenizer_without_chat_template_is_one_line(tiny_checkpoint, tmp_path, capfd):
    for loader in (AutoModelForCausalLM, AutoTokenizer):
        loader.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    assert cli.main(["chat", str(tmp_path)]) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: chat: the tokenizer has no chat template; use")
    assert cli.main(["chat", str(tmp_path), "--top-p", "0.5"]) == 2
    assert "set a temperature" in capfd.readouterr().err
