"""Exit codes, the one line of an error, and one JSON document on standard output, whatever libraries print."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Annotated, Any

import numpy
import pytest
import typer

from hf_llmkernel import cli

ROOT = Path(__file__).resolve().parents[1]
FAULTS = {
    "value": ValueError("ratio=2: must be below 1;\n choose less"),
    "no_file": FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "model.safetensors"),
    "no_folder": NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), "file"),
    "folder": IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), "folder"),
    "read_only": OSError(errno.EROFS, os.strerror(errno.EROFS), "folder"),
    "forbidden": PermissionError(errno.EACCES, os.strerror(errno.EACCES), "folder"),
    "library": OSError("name is not a local folder and is not a valid model identifier"),
    "disk": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out"),
    "disk_input_output": OSError(errno.EIO, os.strerror(errno.EIO)),
    "memory": MemoryError(),
    "network": ConnectionError("no route"),
    "interrupt": KeyboardInterrupt(),
    "program": KeyError("weight"),
}


def work(
    size: Annotated[int, typer.Argument(help="Of the work.")],
    fault: Annotated[str | None, typer.Option(help="What goes wrong.")] = None,
    folder: Path = Path("here"),
) -> dict[str, Any]:
    """Work of a size.

    Raises:
        ValueError: on demand.
    """
    print("python prints")
    os.write(1, b"native code prints\n")
    subprocess.run([sys.executable, "-S", "-c", "print('a child prints')"], check=True)
    if fault:
        raise FAULTS[fault]
    return {"size": size, "folder": folder, "loss": float("nan"), "count": numpy.int64(3), "rows": [(1, None)]}


def render_work(result: dict[str, Any]) -> str:
    return f"worked {result['size']}"


@pytest.fixture(autouse=True)
def one_command(monkeypatch):
    module = types.ModuleType("module_of_work")
    vars(module).update(work=work, render_work=render_work)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.COMMANDS, "work", cli.Command("module_of_work:work", "Work."))
    monkeypatch.delenv("LLMKERNEL_TRACEBACK", raising=False)


def test_text_for_people(capfd):
    assert cli.main(["work", "3"]) == 0
    out, err = capfd.readouterr()
    assert set(out.splitlines()) == {"python prints", "native code prints", "a child prints", "worked 3"}
    assert err == ""


def test_json_is_all_of_standard_output(capfd):
    assert cli.main(["work", "3", "--json"]) == 0
    out, err = capfd.readouterr()
    expected = {"size": 3, "folder": "here", "loss": None, "count": 3, "rows": [[1, None]]}
    assert json.loads(out) == expected
    assert set(err.splitlines()) == {"python prints", "native code prints", "a child prints"}


def test_a_tilde_is_the_home_folder(capfd, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/someone")
    assert cli.main(["work", "3", "--folder=~/out", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["folder"] == "/home/of/someone/out"


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_of_several_processes_the_first_speaks(capfd, monkeypatch, options):
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["work", "3", *options]) == 0
    assert "worked 3" not in (out := capfd.readouterr().out) and "loss" not in out
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["work", "3", *options]) == 0
    assert ("worked 3" in (out := capfd.readouterr().out)) != ("loss" in out)


@pytest.mark.parametrize(
    ("shared_with", "options", "message"),
    [
        (None, [], "error: work: is done by one process, and WORLD_SIZE=2; start it without torchrun."),
        ("fault", [], "error: work: is done by one process, and WORLD_SIZE=2; give --fault, which they share"),
        ("fault", ["--fault", "value"], "error: ratio=2"),
        ("", [], None),
    ],
)
def test_several_processes_at_the_work_of_one_are_refused_by_the_first(
    capfd, monkeypatch, shared_with, options, message
):
    monkeypatch.setitem(cli.COMMANDS, "work", cli.COMMANDS["work"]._replace(shared_with=shared_with))
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["work", "3", *options]) == (2 if message else 0)
    out, err = capfd.readouterr()
    assert (message or "") in err and ("python prints" in out) == (message is None or "ratio" in message)
    monkeypatch.setenv("RANK", "1")
    cli.main(["work", "3", *options])
    assert "one process" not in capfd.readouterr().err


def test_what_processes_share():
    shared = {name: command.shared_with for name, command in cli.COMMANDS.items() if command.shared_with is not None}
    assert shared == {"compress": "", "generate": "prompts"}


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("value", 2, "ratio=2: must be below 1; choose less"),
        ("no_file", 2, "model.safetensors: No such file or directory; check the path"),
        ("no_folder", 2, "file: Not a directory"),
        ("folder", 2, "folder: Is a directory"),
        ("forbidden", 2, "folder: Permission denied"),
        ("read_only", 2, "folder: Read-only file system; choose a path that can be written"),
        ("library", 2, "is not a valid model identifier"),
        ("disk", 1, "out: No space left on device; free space"),
        ("disk_input_output", 1, "Input/output error"),
        ("memory", 1, "out of memory"),
        ("network", 1, "no route; check the network"),
        ("interrupt", 130, "interrupted"),
        ("program", 1, "unexpected KeyError: 'weight'; set LLMKERNEL_TRACEBACK=1"),
    ],
)
def test_fault_is_one_line(capfd, fault, code, words):
    assert cli.main(["work", "3", "--json", "--fault", fault]) == code
    out, err = capfd.readouterr()
    errors = [line for line in err.splitlines() if "prints" not in line]
    assert out == ""
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert words in errors[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bogus"], "'bogus'"),
        (["--bogus"], "--bogus"),
        (["work"], "size"),
        (["work", "3", "--bogus"], "--bogus"),
        (["work", "three"], "size"),
    ],
)
def test_bad_usage_is_one_line_with_the_remedy(capfd, arguments, words):
    assert cli.main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
    assert "--help`" in err


def test_traceback_on_demand(capfd, monkeypatch):
    monkeypatch.setenv("LLMKERNEL_TRACEBACK", "1")
    assert cli.main(["work", "3", "--fault", "program"]) == 1
    assert "Traceback (most recent call last)" in capfd.readouterr().err


def test_help_lists_every_command_and_cuts_sections_for_readers_of_code(capfd):
    assert cli.main([]) == cli.main(["--help"]) == 0
    listed = capfd.readouterr().out
    assert all(f"\n  {name} " in listed for name in cli.COMMANDS)
    assert cli.main(["work", "--help"]) == 0
    shown = capfd.readouterr().out
    assert "Work of a size." in shown
    assert "--json" in shown
    assert "Raises" not in shown


def test_version(capfd):
    assert cli.main(["--version"]) == 0
    assert capfd.readouterr().out == "llmkernel 0.1.0\n"


@pytest.mark.parametrize("name", [*cli.COMMANDS])
def test_every_command_has_function_help_and_renderer(capfd, name):
    assert cli.main([name, "--help"]) == 0
    assert "--json" in capfd.readouterr().out
    function, render = cli.load(cli.COMMANDS[name])
    assert cli.help_of(function)
    assert callable(render)


def test_help_imports_nothing_heavy(run_python):
    code = """
from hf_llmkernel.cli import main
main(["--help"])
print([name for name in ("torch", "transformers", "numpy", "huggingface_hub", "rich.console") if name in sys.modules])
"""
    assert run_python(code).splitlines()[-1] == "[]"


def test_module_runs():
    command = [sys.executable, "-m", "hf_llmkernel", "--version"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("llmkernel 0.1.0\n", "")


def test_reader_who_leaves_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        [sys.executable, "-m", "hf_llmkernel", "--help"], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_termination_runs_finally_clauses(tmp_path):
    code = """
import sys, time, types
from hf_llmkernel import cli
module = types.ModuleType("module_of_wait")
def wait() -> dict:
    "Wait."
    folder = __import__("pathlib").Path(sys.argv[1])
    try:
        folder.mkdir()
        time.sleep(60)
    finally:
        folder.rmdir()
    return {}
module.wait, module.render_wait = wait, str
sys.modules["module_of_wait"] = module
cli.COMMANDS["wait"] = cli.Command("module_of_wait:wait", "Wait.")
sys.exit(cli.main(["wait"]))
"""
    folder = tmp_path / "half-written"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=ROOT)
    for _ in range(600):
        if folder.exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert not folder.exists()


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_stream_that_is_closed_leads_nowhere(tmp_path, closed):
    script = tmp_path / "closed.py"
    script.write_text(
        "import os, sys, types\n"
        "from hf_llmkernel import cli\n"
        "def work():\n"
        '    """Work."""\n'
        "    handle = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)\n"
        "    os.write(handle, str(handle).encode())\n"
        "    return {}\n"
        'sys.modules["closed"] = types.SimpleNamespace(work=work, render_work=lambda result: "worked")\n'
        'cli.COMMANDS = {"work": cli.Command("closed:work", "Work.")}\n'
        'sys.exit(cli.main(["work"]))\n'
    )
    redirections = " ".join(f"{number}>&-" for number in closed)
    line = f'exec "$0" "$1" "$2" {redirections}'
    command = ["sh", "-c", line, sys.executable, str(script), str(tmp_path / "opened")]
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert ended.stdout == (b"" if 1 in closed else b"worked\n")
    assert int((tmp_path / "opened").read_text()) > 2
