"""Chat data from every source to tokens, by templates that can be followed by eye."""

import json

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_llmkernel.data import Conversation, calibration_batches, load_documents, split_documents, token_windows

HELLO = [{"role": "user", "content": "hi you"}, {"role": "assistant", "content": "ho"}]
SHAREGPT = [{"from": "human", "value": "hi you"}, {"from": "gpt", "value": "ho"}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}<end>"
WORDS = ["<unk>", "<user>", "<assistant>", "<end>", "hi", "you", "ho", *(f"w{number}" for number in range(50))]


@pytest.fixture
def tokenizer():
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", chat_template=TEMPLATE)


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def words_of(ids) -> list[str]:
    return [WORDS[index] for index in ids.flatten()]


def test_json_lines_of_conversations_in_both_dialects_and_of_text(tmp_path):
    path = write_lines(tmp_path / "chat.jsonl", {"messages": HELLO}, {"conversations": SHAREGPT}, {"text": "plain"})
    assert load_documents(path) == [Conversation(tuple(HELLO)), Conversation(tuple(HELLO)), "plain"]


def test_columns_of_conversations(tmp_path):
    rows = {"prompt": ["hi", "x"], "messages": [HELLO, None], "turns": [HELLO[:1], HELLO]}
    Dataset.from_dict(rows).save_to_disk(str(tmp_path / "set"))
    assert load_documents(tmp_path / "set") == [Conversation(tuple(HELLO))]
    assert load_documents(f"{tmp_path / 'set'}:::prompt") == ["hi", "x"]
    assert load_documents(f"{tmp_path / 'set'}:::turns") == [Conversation(tuple(HELLO[:1])), Conversation(tuple(HELLO))]
    Dataset.from_dict({"id": ["a"], "conversations": [SHAREGPT]}).save_to_disk(str(tmp_path / "sharegpt"))
    assert load_documents(tmp_path / "sharegpt") == [Conversation(tuple(HELLO))]
    Dataset.from_dict({"text": ["plain"], "messages": [HELLO]}).save_to_disk(str(tmp_path / "both"))
    assert load_documents(tmp_path / "both") == ["plain"]


def test_what_a_template_knows_beyond_role_and_content_is_kept(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}], "name": None}
    path = write_lines(tmp_path / "tools.jsonl", {"messages": [HELLO[0], call]})
    (conversation,) = load_documents(path)
    assert conversation.messages[1] == {"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]}


def test_conversations_are_tokenized_as_the_template_writes_them(tokenizer):
    spoken = Conversation(tuple(HELLO))
    windows = token_windows(tokenizer, [spoken, "w1 w2", spoken], context=2, tokens=14)
    expected = "<user> hi you <assistant> ho <end> w1 w2 <user> hi you <assistant> ho <end>"
    assert words_of(windows) == expected.split()
    (batch,) = calibration_batches(tokenizer, [spoken], samples=1, length=6)
    assert words_of(batch) == expected.split()[:6]


def test_a_conversation_stays_on_its_side_whatever_the_dialect(tmp_path):
    texts = [f"w{number} said" for number in range(40)]
    ours = write_lines(tmp_path / "a.jsonl", *({"messages": [{"role": "user", "content": text}]} for text in texts))
    theirs = write_lines(
        tmp_path / "b.jsonl", *({"conversations": [{"from": "human", "value": f"{text} "}]} for text in reversed(texts))
    )
    sides = split_documents(load_documents(ours), 0.3)
    assert {document.text for document in sides[1]} == set(split_documents(texts, 0.3)[1])
    assert [document.text for document in sides[1]] == [
        document.text.strip() for document in split_documents(load_documents(theirs), 0.3)[1]
    ]


def test_tokenizers_that_cannot_say_what_to_do(tokenizer):
    spoken = Conversation(tuple(HELLO))
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="refuses the conversation that begins 'hi you.*roles must alternate"):
        token_windows(tokenizer, [spoken], context=2, tokens=4)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no template for them; set tokenizer.chat_template"):
        calibration_batches(tokenizer, [spoken], samples=1, length=2)
    with pytest.raises(ValueError, match="only one is a conversation, which is not cut"):
        split_documents([spoken])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hi"}, "line 2: its conversation is no list of messages"),
        ({"messages": ["hi"]}, "line 2: a message has no text as 'role' and 'content'"),
        ({"messages": [{"role": "user"}]}, "line 2: a message has no text as 'role' and 'content'"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "line 2: a message has no text"),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "line 2: a message has no text"),
        ({"dialog": HELLO}, "line 2 is no JSON object with a string 'text' or a list 'messages'"),
    ],
)
def test_lines_that_are_no_conversations_are_named(tmp_path, row, message):
    path = write_lines(tmp_path / "chat.jsonl", {"messages": HELLO}, row)
    with pytest.raises(ValueError, match=message):
        load_documents(path)


def test_conversations_in_which_nothing_is_said_are_left_out(tmp_path):
    empty = [{"messages": []}, {"messages": [{"role": "user", "content": " "}]}]
    path = write_lines(tmp_path / "chat.jsonl", *empty)
    with pytest.raises(ValueError, match="has no text"):
        load_documents(path)
    assert len(load_documents(write_lines(path, *empty, {"messages": HELLO}))) == 1
