"""`optimum-cli llmkernel prune`, `quantize` and `compress`: this package's work behind Optimum's command line.

Imported at every start of `optimum-cli`, whatever its command: all that is heavy is imported inside functions.

Exit codes and messages are those of `llmkernel`: 2 bad usage or input, 1 a fault of the machine, each with one line
`error: …` on standard error.
"""

import json
import sys
from argparse import ArgumentParser
from typing import Any, NoReturn

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


def report_usage_in_one_line(parser: ArgumentParser) -> None:
    """Bad usage of this parser ends with exit code 2 and one line."""

    def error(message: str) -> NoReturn:
        parser.exit(2, f"error: {message}; see `{parser.prog} --help`\n")

    parser.error = error


class ReportingCommand(BaseOptimumCLICommand):
    """A command that prints its result, as text or as JSON, and ends with an exit code."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        report_usage_in_one_line(parser)
        parser.add_argument("-m", "--model", required=True, help="Folder, .gguf file or Hub id of a checkpoint.")
        parser.add_argument("--json", action="store_true", help="Print the result as one JSON document.")

    def work(self, given: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """Does it with the options given; returns the result, and what is said of it to people."""
        raise NotImplementedError

    def run(self) -> None:
        from .cli import as_json, report_fault, stdout_as_stderr, terminated_as_exit

        given = vars(self.args)
        with terminated_as_exit():
            try:
                with stdout_as_stderr():
                    result, text = self.work(given)
            except SystemExit:
                raise
            except BaseException as error:
                sys.exit(report_fault(error, []))
        print(json.dumps(as_json(result), ensure_ascii=False, indent=2) if given["json"] else text)


class PruneCommand(ReportingCommand):
    """Prunes by a config of a few names."""

    COMMAND = CommandInfo(name="prune", help="Remove weights, neurons or heads of a language model.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        ReportingCommand.parse_args(parser)
        parser.add_argument("-o", "--output", required=True, help="New folder to write.")
        parser.add_argument("--target-sparsity", type=float, help="Share to remove; an N:M pattern says it already.")
        parser.add_argument("--pruning-type", help="admm, sparsegpt, wanda, magnitude; neurons, heads: flap, obs, ….")
        parser.add_argument("--pattern", default="unstructured", help="unstructured, N:M such as 2:4, neurons, heads.")
        parser.add_argument("--pruning-scope", default="local", help="local: as much in every layer; or global.")
        parser.add_argument("--op-names", nargs="+", metavar="NAME", help="Linears to prune, as q_proj or 'mlp.*'.")
        parser.add_argument("--excluded-op-names", nargs="+", metavar="NAME", help="Linears to leave as they are.")
        parser.add_argument("--layers", nargs=2, type=int, metavar=("FIRST", "END"), help="Layers, END left out.")
        parser.add_argument("--update", help="What stays becomes: none, least_squares, sparsegpt, admm, bias, ….")
        parser.add_argument("--align", type=int, help="The neurons that stay are a multiple of it.")
        add_data_options(parser)

    def work(self, given: dict[str, Any]) -> tuple[dict[str, Any], str]:
        from .compress.check import check_places
        from .compress.optimum import LLMKernelPruner, LLMKernelPruningConfig

        check_places(given["model"], given["output"])
        settings = config_settings(LLMKernelPruningConfig.setting_names(), given)
        pruner = LLMKernelPruner.from_pretrained(given["model"])
        done = pruner.prune(given["output"], LLMKernelPruningConfig(**settings))
        by_op = ", ".join(f"{name} {sparsity:.4g}" for name, sparsity in (done.measured_sparsity_by_op or {}).items())
        return done.to_dict(), f"{given['output']}: measured sparsity {done.measured_sparsity:.4g} ({by_op})"


class QuantizeCommand(ReportingCommand):
    """Quantizes by a config of a few names."""

    COMMAND = CommandInfo(name="quantize", help="Store the linears of a language model as integers or 4-bit floats.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        ReportingCommand.parse_args(parser)
        parser.add_argument("-o", "--output", required=True, help="New folder to write.")
        parser.add_argument("--method", default="rtn", help="rtn, hqq, gptq, …; bnb-nf4, bnb-fp4, bnb-int8.")
        parser.add_argument("--bits", type=int, help="8 or 4; bnb methods say it already.")
        parser.add_argument("--group-size", type=int, help="Columns that share a scale; -1: one scale a row.")
        parser.add_argument("--asymmetric", action="store_false", dest="symmetric", default=None, help="Zero points.")
        parser.add_argument("--embeddings", action="store_true", help="Quantize the embedding and the head too.")
        parser.add_argument("--op-names", nargs="+", metavar="NAME", help="Linears to quantize, as q_proj or 'mlp.*'.")
        parser.add_argument("--excluded-op-names", nargs="+", metavar="NAME", help="Linears to leave as they are.")
        parser.add_argument("--layers", nargs=2, type=int, metavar=("FIRST", "END"), help="Layers, END left out.")
        parser.add_argument(
            "--set", action="append", metavar="NAME=VALUE", help="Any other setting: act_order=true, double_quant=true."
        )
        add_data_options(parser)

    def work(self, given: dict[str, Any]) -> tuple[dict[str, Any], str]:
        from .compress.check import check_places
        from .compress.command import stage_line, underflow_lines
        from .compress.optimum_quantize import LLMKernelQuantizationConfig, LLMKernelQuantizer
        from .compress.pipeline import read_record

        check_places(given["model"], given["output"])
        settings = config_settings(LLMKernelQuantizationConfig.setting_names(), given)
        settings["settings"] = read_settings(given["set"] or [])
        quantizer = LLMKernelQuantizer.from_pretrained(given["model"])
        done = quantizer.quantize(given["output"], quantization_config=LLMKernelQuantizationConfig(**settings))
        reached = f"{done.measured_bytes} bytes, {done.measured_bits_per_weight:.4g} bits a weight in the linears"
        record = read_record(given["output"])
        stages = record["stages"]
        lines = [*map(stage_line, stages), *underflow_lines(record["notes"]), f"{given['output']}: {reached}"]
        return {**done.to_dict(), "stages": stages}, "\n".join(lines)


def add_data_options(parser: ArgumentParser) -> None:
    """What both configs say beside their stage."""
    parser.add_argument("--dtype", help="Of what stays floating: float32, bfloat16, float16.")
    parser.add_argument("--calibration", metavar="TEXT", help="Text to look at activations with: bbc, a file, ….")
    parser.add_argument("--samples", type=int, help="Calibration sequences.")
    parser.add_argument("--length", type=int, help="Tokens of a calibration sequence.")
    parser.add_argument("--seed", type=int, help="Of the choice of calibration sequences.")
    parser.add_argument("--evaluation", metavar="TEXT", help="Text to measure both models on.")


def config_settings(names: list[str], given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config by the options given."""
    settings = {name: given[name] for name in names if name in given}
    text = {"source": given["calibration"], **{name: given[name] for name in ("samples", "length", "seed")}}
    settings["calibration"] = {name: value for name, value in text.items() if value is not None}
    settings["evaluation"] = {} if given["evaluation"] is None else {"source": given["evaluation"]}
    return settings


def read_settings(pairs: list[str]) -> dict[str, Any]:
    """A table of `NAME=VALUE`, values as JSON where they are. Raises `ValueError` for one without a name or value."""
    settings = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if not name or not value:
            raise ValueError(f"--set {pair}: must be NAME=VALUE, such as act_order=true.")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings


class CompressCommand(ReportingCommand):
    """Runs a recipe."""

    COMMAND = CommandInfo(name="compress", help="Run a recipe over a language model: prune, factorize, quantize, ….")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        ReportingCommand.parse_args(parser)
        parser.add_argument("--recipe", required=True, help="Recipe, a .yaml or .json file.")
        parser.add_argument("-o", "--output", help="New folder to write.")
        parser.add_argument("--dry-run", action="store_true", help="Print the plan of the recipe, write nothing.")
        parser.add_argument("--memory", help="A model larger than this is not loaded whole to time it, as in 8GB.")

    def work(self, given: dict[str, Any]) -> tuple[dict[str, Any], str]:
        from .compress.command import compress, render_compress

        result = compress(**{name: given[name] for name in ("model", "recipe", "output", "dry_run", "memory")})
        return result, render_compress(result)


class LLMKernelCommand(BaseOptimumCLICommand):
    """The commands of this package."""

    COMMAND = CommandInfo(name="llmkernel", help="Prune, quantize and compress language models with hf_llmkernel.")
    SUBCOMMANDS = tuple(
        CommandInfo(name=command.COMMAND.name, help=command.COMMAND.help, subcommand_class=command)
        for command in (PruneCommand, QuantizeCommand, CompressCommand)
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        report_usage_in_one_line(parser)
