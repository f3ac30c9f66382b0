"""The native library's file: one that cannot be used is told of once, where it would have served, and torch serves."""

import pytest
import torch

from hf_llmkernel.kernels import library

from .test_step import forms, prompt, random_model

HEADER_ALONE = 64


@pytest.fixture
def said(monkeypatch, tmp_path):
    """What is warned of where there is no library; the fault is of this test alone."""
    monkeypatch.setattr(library, "NATIVE", None)
    monkeypatch.setattr(library, "_fault", f"{tmp_path} is missing")
    said: list[str] = []
    monkeypatch.setattr(library.logger, "warning", said.append)
    return said


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (lambda whole: None, "was not built with the package; install a C.. compiler and run `python -m"),
        (lambda whole: b"damaged", "does not load .*; remove it and run `python -m"),
        (lambda whole: whole[:HEADER_ALONE], "ends early; remove it"),
        (lambda whole: whole[:-1], "ends early; remove it"),
        (lambda whole: whole[:18] + b"\0\0" + whole[20:], "does not load .*; remove it"),  # of another processor
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_remedy(content, fault, tmp_path, monkeypatch):
    written = content(library.LIBRARY.read_bytes())
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "libllmkernel.so")
    if written is not None:
        library.LIBRARY.write_bytes(written)
    with pytest.raises(library.Unusable, match=fault):
        library.load()


def test_a_library_of_another_version_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(library, "ABI", 99)
    with pytest.raises(library.Unusable, match=r"another version of the package \(ABI \d+, not 99\); remove it"):
        library.load()


@pytest.mark.parametrize("fields", [{}, forms(bits=8)], ids=["dense", "int8"])
def test_a_missing_library_is_told_of_once_where_it_would_have_served(said, fields):
    model, ids = random_model(**fields), prompt(1, 5)
    model.get_input_embeddings().requires_grad_(True)
    model.train()(ids, labels=ids).loss.backward()
    assert said == []  # which they do not in training
    for _ in range(2):
        model.eval().generate(ids, max_new_tokens=3, do_sample=False)
    assert len(said) == 1 and library._fault in said[0] and "LLMKERNEL_KERNELS=off" in said[0]


def test_nothing_is_told_where_the_kernels_are_off(said, monkeypatch):
    model, ids = random_model(**forms(bits=8)), prompt(1, 5)
    with library.disabled(), torch.no_grad():
        model(ids)
    monkeypatch.setenv("LLMKERNEL_KERNELS", "off")
    model.generate(ids, max_new_tokens=3, do_sample=False)
    assert said == [] and not library.is_enabled()
