"""Documents of every kind of source, and their split."""

import csv
import gzip
import io
import json

import datasets
import pytest
from datasets import Dataset, DatasetDict

from hf_llmkernel.data import documents as module
from hf_llmkernel.data import load_documents, split_documents


def test_a_text_file_is_split_at_two_blank_lines_or_form_feeds_else_it_is_one(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one\n\nstill one\n\n\ntwo\n \n\n\nthree\ffour\n\n\n", encoding="utf-8")
    assert load_documents(path) == ["one\n\nstill one", "two", "three", "four"]
    path.write_bytes("\ufeffgrüß\r\n\r\ngott".encode())
    assert load_documents(path) == ["grüß\n\ngott"]


def test_json_lines(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "one\ntwo", "id": 1}) + "\n\n" + json.dumps({"text": "three"}) + "\n")
    assert load_documents(path) == ["one\ntwo", "three"]
    path.write_text('{"text": "one\u2028still one"}\r\n \n{"text": "two"}', encoding="utf-8")
    assert load_documents(path) == ["one\u2028still one", "two"]
    path.write_text('{"text": "one"}\n{"txt": "two"}\n')
    with pytest.raises(ValueError, match="line 2 is no JSON object with a string 'text'"):
        load_documents(path)


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_a_table_of_one_file(tmp_path, ending):
    path = tmp_path / f"text.{ending}"
    table = Dataset.from_dict({"text": ["one\ntwo", "three, four"], "title": ["a", "b"], "id": [1, 2]})
    getattr(table, f"to_{ending}")(str(path))
    assert load_documents(path) == ["one\ntwo", "three, four"]
    assert load_documents(f"{path}:title") == ["a", "b"]
    with pytest.raises(ValueError, match=r"column 'id' is not one of .*\['text', 'title'\]; name one as FILE:COLUMN"):
        load_documents(f"{path}:id")


def test_a_table_that_is_none_is_named(tmp_path):
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"text.parquet': is no parquet file that can be read \(") as error:
        load_documents(tmp_path / "text.parquet")
    assert "\n" not in str(error.value)


def test_a_folder_of_text_files_in_the_order_of_their_names(tmp_path):
    for name, text in (("b.txt", "two\n\n\nstill two"), ("a.txt", "one"), ("c.md", "not text")):
        (tmp_path / name).write_text(text)
    assert load_documents(tmp_path) == ["one", "two\n\n\nstill two"]


def test_datasets_on_disk_by_split_and_column(tmp_path):
    rows = {"text": ["one", "two"], "title": ["first", "second"], "label": [0, 1]}
    Dataset.from_dict(rows).save_to_disk(str(tmp_path / "plain"))
    assert load_documents(tmp_path / "plain") == ["one", "two"]
    assert load_documents(f"{tmp_path / 'plain'}:::title") == ["first", "second"]
    parts = {"test": Dataset.from_dict({"body": ["held out"]}), "train": Dataset.from_dict({"body": ["one", None]})}
    DatasetDict(parts).save_to_disk(str(tmp_path / "parts"))
    assert load_documents(tmp_path / "parts") == ["one"]
    assert load_documents(f"{tmp_path / 'parts'}::test") == ["held out"]
    with pytest.raises(ValueError, match=r"column 'label' is not one of its columns of text \['text', 'title'\]"):
        load_documents(f"{tmp_path / 'plain'}:::label")


def test_a_column_that_cannot_be_guessed_has_to_be_named(tmp_path):
    Dataset.from_dict({"question": ["a"], "answer": ["b"]}).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(ValueError, match=r"\['question', 'answer'\]; name one as NAME:CONFIG:SPLIT:COLUMN"):
        load_documents(tmp_path / "two")


def test_a_folder_that_datasets_itself_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert load_documents(tmp_path / "data") == ["one", "two"]


@pytest.mark.parametrize(
    ("source", "name", "config", "split"),
    [
        ("org/set", "org/set", None, None),
        ("set:small", "set", "small", None),
        ("org/set::validation", "org/set", None, "validation"),
        ("org/set:small:train[:10%]:title", "org/set", "small", "train[:10%]"),
    ],
)
def test_names_of_the_hub(monkeypatch, source, name, config, split):
    asked = []

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        return Dataset.from_dict({"text": ["one"], "title": ["one"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_documents(source) == ["one"]
    assert asked == [(name, config, split)]


def test_unknown_sources_name_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"text='wikitext': .*\['bbc', 'bible'\].*NAME:CONFIG:SPLIT"):
        load_documents("wikitext")
    with pytest.raises(ValueError, match="`datasets` cannot load it .*check NAME:CONFIG:SPLIT"):
        load_documents(f"{tmp_path}/missing:config:split")
    (tmp_path / "text.pdf").write_bytes(b"%PDF")
    with pytest.raises(ValueError, match="ends in .txt, .jsonl, .parquet or .csv"):
        load_documents(tmp_path / "text.pdf")


def test_text_that_is_empty_or_not_utf8_is_an_error(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n\n\n\t\n")
    with pytest.raises(ValueError, match="has no text"):
        load_documents(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes("abc £".encode("latin-1"))
    with pytest.raises(ValueError, match="byte 4 is not UTF-8"):
        load_documents(tmp_path / "latin.txt")


def test_bbc_decodes_the_odd_article_and_drops_repeated_ones(tmp_path, monkeypatch):
    contents = [b"cost \xa3600m", "cost £5".encode(), b"again", b"again\n"]
    files = [tmp_path / f"{index}.txt" for index in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    monkeypatch.setattr(module, "fetch_package_files", lambda *_: files)
    assert load_documents("bbc") == ["cost £600m", "cost £5", "again"]


def test_bible_chapters_without_footnotes(tmp_path, monkeypatch):
    buffer = io.StringIO()
    rows = csv.writer(buffer, quoting=csv.QUOTE_ALL)
    rows.writerow(["field"] * 5)
    rows.writerow(["1", "1", "1", "1", 'In the beginning God{the letters "Aleph Tav", marked} created.'])
    rows.writerow(["2", "1", "1", "2", 'God said, "Light."'])
    rows.writerow(["3", "1", "2", "1", "&gt; A psalm.  Selah."])
    path = tmp_path / "t_web.csv.gz"
    path.write_bytes(gzip.compress(buffer.getvalue().encode()))
    monkeypatch.setattr(module, "fetch_package_files", lambda *_: [path])
    assert load_documents("bible") == ['In the beginning God created. God said, "Light."', "A psalm. Selah."]


ARTICLES = [f"article {number} about subject {number * number}" for number in range(400)]


def test_the_split_is_a_partition_of_whole_documents_close_to_its_share():
    calibration, evaluation = split_documents(ARTICLES, evaluation_share=0.25, seed=3)
    assert sorted(calibration + evaluation) == sorted(ARTICLES)
    assert 75 <= len(evaluation) <= 125
    assert evaluation != sorted(evaluation)


def test_a_document_stays_on_its_side_whatever_surrounds_it():
    evaluation = set(split_documents(ARTICLES)[1])
    fewer = split_documents(list(reversed(ARTICLES[::3])))[1]
    assert set(fewer) == evaluation & set(ARTICLES[::3])
    assert set(split_documents(ARTICLES, seed=1)[1]) != evaluation


def test_a_larger_share_keeps_what_a_smaller_one_withheld():
    assert set(split_documents(ARTICLES, 0.1)[1]) < set(split_documents(ARTICLES, 0.3)[1])


def test_copies_that_differ_in_white_space_stay_together():
    copies = [article.replace(" ", "\n") for article in ARTICLES]
    calibration, evaluation = split_documents(ARTICLES + copies)
    assert {" ".join(text.split()) for text in calibration}.isdisjoint(" ".join(text.split()) for text in evaluation)


def test_few_documents_leave_no_side_empty_and_a_share_of_one_takes_all():
    for seed in range(20):
        calibration, evaluation = split_documents(["one", "two"], 0.1, seed)
        assert len(calibration) == len(evaluation) == 1
    assert split_documents(["only"], 1) == ([], ["only"])
    assert len(split_documents(ARTICLES, 1)[1]) == len(ARTICLES)


def test_a_single_document_is_halved_between_words_with_a_note(caplog):
    text = " ".join(f"word{number}" for number in range(100))
    (first,), (second,) = split_documents([text])
    assert f"{first} {second}" == text
    assert abs(len(first) - len(second)) < 20
    assert "first half is for calibration" in caplog.text


def test_bad_shares_and_nothing_to_split():
    for share in (0, -0.1, 1.5):
        with pytest.raises(ValueError, match="evaluation_share"):
            split_documents(ARTICLES, share)
    with pytest.raises(ValueError, match="nothing to split"):
        split_documents([])
    with pytest.raises(ValueError, match="no white space"):
        split_documents(["x" * 10])
