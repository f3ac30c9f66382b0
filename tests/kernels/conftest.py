"""Native kernels under test, each instruction set of this processor in turn."""

import pytest

from hf_llmkernel.kernels import library, step

LEVELS = ("avx512", "avx2", "portable")


@pytest.fixture(autouse=True)
def kernels_in_use(monkeypatch):
    """The rest of the suite runs on torch; here the native library serves, where it could be built."""
    if library.NATIVE is None:
        pytest.skip("the native library is not built: there is no compiler")
    monkeypatch.setenv("LLMKERNEL_KERNELS", "on")


@pytest.fixture(params=LEVELS)
def level(request):
    """The name of an instruction set, forced while the test runs."""
    before = library.isa()
    if library.NATIVE.llmk_set_isa(request.param.encode()) is not None:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    library.NATIVE.llmk_set_isa(before.encode())


@pytest.fixture
def native_calls(monkeypatch):
    """A list that grows with every native step."""
    calls, call = [], step._call
    monkeypatch.setattr(step, "_call", lambda *arguments, **named: (calls.append(1), call(*arguments, **named)))
    return calls
