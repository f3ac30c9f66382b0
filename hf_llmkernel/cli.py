"""The command line, `llmkernel` and `python -m hf_llmkernel`: one table, `COMMANDS`, from a name to a function.

A command is a plain function that a script can call as well:

* its parameters are annotated for typer (`Annotated[Path, typer.Argument(help=...)]`), its docstring is its help;
* it returns its result as a dictionary that JSON can hold (`Path`, non-finite numbers and numpy or torch scalars are
  converted here), and prints at most what is worth seeing while it runs;
* `render_<function>(result) -> str` in the same module is the text for people, `""` if all was printed already;
* bad input raises `ValueError` (or `FileNotFoundError` and the like) with the remedy in its one-line message;
* its module imports torch, transformers and whatever else is heavy inside functions.

Every command gets `--json` from here: the function then runs with its standard output sent to standard error, and the
result is the one JSON document on standard output. Without it the rendered text is printed.

Exit codes: 0 done; 2 bad usage or input, 1 a fault of the machine or of the program, each with exactly one line
`error: ...` on standard error; 130 interrupted, 143 terminated. `LLMKERNEL_TRACEBACK=1` adds the traceback.
"""

import contextlib
import functools
import importlib
import inspect
import json as json_format
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

import hf_llmkernel
from hf_llmkernel.faults import describe_fault

PROGRAM = "llmkernel"


class Command(NamedTuple):
    """A command's function, as `module:function`, and its one line in `llmkernel --help`.

    `shared_with` is the option with which processes that `torchrun` starts share the work, `""` where they always do.
    """

    target: str
    summary: str
    shared_with: str | None = None


COMMANDS = {
    "quickstart": Command(
        "hf_llmkernel.quickstart:quickstart",
        "The main job end to end on a small real model: convert, compress, evaluate, generate, report.",
    ),
    "convert": Command(
        "hf_llmkernel.convert.command:convert",
        "Convert a Llama, Mistral, Qwen2 or Qwen3 checkpoint (folder, Hub id, GGUF file) into this family.",
    ),
    "export": Command(
        "hf_llmkernel.convert.command:export",
        "Write a checkpoint of this family as a stock architecture, as compressed-tensors, or as GGUF.",
    ),
    "inspect": Command(
        "hf_llmkernel.evaluate.command:inspect",
        "Show what a checkpoint holds: shape, form, parameters and bytes of every module.",
    ),
    "compress": Command(
        "hf_llmkernel.compress.command:compress",
        "Run a recipe over a checkpoint: prune, factorize, sparsify, quantize, block by block.",
        shared_with="",
    ),
    "evaluate": Command(
        "hf_llmkernel.evaluate.command:evaluate",
        "Measure perplexity, speed and memory of a checkpoint.",
    ),
    "bench": Command(
        "hf_llmkernel.evaluate.bench:bench",
        "Measure tokens a second, load time and memory against what the machine reaches.",
    ),
    "generate": Command(
        "hf_llmkernel.generate.command:generate",
        "Continue a prompt, or answer it, and stream the text.",
        shared_with="prompts",
    ),
    "chat": Command(
        "hf_llmkernel.generate.chat:chat",
        "Talk with a model in the terminal.",
    ),
    "serve": Command(
        "hf_llmkernel.generate.serve:serve",
        "Serve models over HTTP as OpenAI does, several requests at a time.",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. `arguments` default to the process's own."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    open_closed_streams()
    with terminated_as_exit():
        try:
            return run(given)
        except SystemExit as ending:
            return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        except BrokenPipeError:
            # Whoever read the output has left; keep Python from failing once more when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except BaseException as error:
            return report_fault(error, given)


def run(arguments: list[str]) -> int:
    """Parses and runs; raises whatever the command raises."""
    selected = next((argument for argument in arguments if not argument.startswith("-")), None)
    program = typer.main.get_command(build_app(selected))
    ended = program.main(args=arguments or ["--help"], prog_name=PROGRAM, standalone_mode=False)
    if ended == 130:
        raise KeyboardInterrupt
    sys.stdout.flush()
    return ended if isinstance(ended, int) else 0


def build_app(selected: str | None) -> typer.Typer:
    """The typer application. Only the selected command is imported; of the others it knows name and summary."""
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # rich's help takes longer to import than everything else here
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Language models in every compressed form: convert, compress, evaluate and run.",
    )
    app.callback()(_global_options)
    for name, command in COMMANDS.items():
        if name == selected:
            function, render = load(command)
            app.command(name, help=help_of(function))(with_json_option(function, render, name))
        else:
            app.command(name, short_help=command.summary)(_not_selected)
    return app


def load(command: Command) -> tuple[Callable[..., dict[str, Any]], Callable[[dict[str, Any]], str]]:
    """Imports a command's function and its renderer."""
    module_name, _, function_name = command.target.partition(":")
    module = importlib.import_module(module_name)
    return getattr(module, function_name), getattr(module, f"render_{function_name}")


def help_of(function: Callable) -> str:
    """The docstring up to its sections, which are for readers of the code."""
    return re.split(r"\n\s*(?:Args|Returns|Raises):\n", inspect.getdoc(function) or "")[0]


def with_json_option(
    function: Callable[..., dict[str, Any]], render: Callable[[dict[str, Any]], str], name: str
) -> Callable:
    """The function typer calls: the command's parameters and `--json`; prints the result, returns nothing."""

    @functools.wraps(function)
    def command(*args: Any, json: bool, **options: Any) -> None:
        check_processes(name, options)
        # No shell expands the tilde of `--output=~/folder`.
        options = {name: value.expanduser() if isinstance(value, Path) else value for name, value in options.items()}
        if json:
            with stdout_as_stderr():
                result = function(*args, **options)
            text = json_format.dumps(as_json(result), ensure_ascii=False, indent=2)
        else:
            text = render(function(*args, **options))
        if text and os.environ.get("RANK", "0") == "0":  # of the processes of `torchrun` one speaks for all
            print(text)

    help_text = "Print the result as one JSON document; progress goes to standard error."
    option = inspect.Parameter(
        "json",
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=Annotated[bool, typer.Option("--json", help=help_text)],
    )
    signature = inspect.signature(function, eval_str=True)
    parameters = [*signature.parameters.values(), option]
    command.__signature__ = signature.replace(parameters=parameters, return_annotation=None)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def check_processes(name: str, options: Mapping[str, Any]) -> None:
    """Raises `ValueError` where `torchrun` started several processes, each of which would do the same work."""
    shared_with = COMMANDS[name].shared_with
    if os.environ.get("WORLD_SIZE", "1") == "1" or shared_with == "":
        return
    if shared_with is None or options[shared_with] is None:
        from .processes import refuse_several  # brings torch

        given = "" if shared_with is None else f"give --{shared_with}, which they share, or "
        refuse_several(name, f"{given}start it without torchrun")


def as_json(value: Any) -> Any:
    """`value` in types of JSON: paths as text, scalars of array libraries as numbers, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(key): as_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_closed_streams() -> None:
    """Standard streams closed at the start lead nowhere; else the next file opened would take the number of one."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            setattr(sys, name, os.fdopen(handle, "r" if name == "stdin" else "w", encoding="utf-8"))


@contextlib.contextmanager
def stdout_as_stderr() -> Iterator[None]:
    """Sends whatever is printed to standard error: by Python, by native code, and by child processes."""
    sys.stdout.flush()
    try:
        saved = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # started with standard output or error closed
        saved = None
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stderr.flush()
        if saved is not None:
            os.dup2(saved, 1)
            os.close(saved)


@contextlib.contextmanager
def terminated_as_exit() -> Iterator[None]:
    """SIGTERM ends the command through its `finally` clauses, so that half-written folders are removed."""
    try:
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def report_fault(error: BaseException, arguments: Sequence[str]) -> int:
    """Prints the one line of an error and returns the exit code."""
    if os.environ.get("LLMKERNEL_TRACEBACK", "") not in ("", "0"):
        traceback.print_exception(error, file=sys.stderr)
    named = next((argument for argument in arguments if argument in COMMANDS), None)
    code, message = describe_fault(error, usage=f"{PROGRAM} {named} --help" if named else f"{PROGRAM} --help")
    print(f"error: {message}", file=sys.stderr)
    return code


def _not_selected() -> None: ...


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"{PROGRAM} {hf_llmkernel.__version__}")
        raise typer.Exit


def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...
