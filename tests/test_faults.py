"""What exceptions of libraries mean: those of the operating system and of this package are in test_cli."""

import pytest
import requests
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors import SafetensorError
from yaml import YAMLError

from hf_llmkernel.faults import describe_fault, one_line


def test_input_that_libraries_refuse():
    strict = StrictDataclassClassValidationError("validate_architecture", ValueError("layer 0: rank=9 is above 8"))
    strict.__cause__ = ValueError("layer 0: rank=9 is above 8")
    assert describe_fault(strict, "") == (2, "layer 0: rank=9 is above 8")
    assert describe_fault(SafetensorError("header too small"), "") == (2, "header too small")
    assert describe_fault(YAMLError("bad\nindent"), "") == (2, "bad indent")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (requests.ConnectionError("no route"), "check the network"),
        (ModuleNotFoundError("No module named 'nncf'"), "install what is missing"),
    ],
)
def test_faults_of_the_machine(error, words):
    code, message = describe_fault(error, "")
    assert code == 1
    assert words in message


def test_message_is_never_empty():
    assert one_line(TimeoutError()) == "TimeoutError"
    assert one_line("a\n  b") == "a b"
