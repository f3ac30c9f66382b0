"""The commands as functions, and through the command line's own protocol."""

import json

import pytest
import typer
from typer.testing import CliRunner

from hf_llmkernel import cli
from hf_llmkernel.evaluate import command, measure

from .conftest import edit_config

QUICK = ["--context", "64", "--tokens", "320", "--no-speed"]


def test_evaluate_prints_a_table_and_writes_a_report(saved, text, tmp_path, capsys):
    output = tmp_path / "report"
    arguments = ["evaluate", str(saved / "compressed"), "--baseline", str(saved / "llama"), "--text", str(text), *QUICK]
    assert cli.main([*arguments, "--output", str(output)]) == 0
    out, err = capsys.readouterr()
    assert "change" in out and "perplexity (articles.jsonl, 320 tokens, context 64, fp32)" in out
    assert str(output / "report.png") in out
    assert "perplexity of compressed" in err
    assert sorted(path.name for path in output.iterdir()) == ["report.json", "report.md", "report.png"]
    assert json.loads((output / "report.json").read_text())["baseline"]["model"] == "llama"


def test_evaluate_as_json_has_a_report_a_model(saved, text, capsys):
    arguments = ["evaluate", str(saved / "llama"), str(saved / "compressed"), "--text", str(text), *QUICK, "--json"]
    assert cli.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert [report["model"] for report in result["models"]] == ["llama", "compressed"]
    assert all(report["perplexity"] > 1 for report in result["models"])
    assert result["files"] == []


def test_an_output_in_the_way_is_found_before_any_work(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "compare", lambda *_, **__: pytest.fail("measured before it looked"))
    (tmp_path / "file").write_text("kept")
    assert cli.main(["evaluate", str(saved / "llama"), "--output", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and str(tmp_path) in err
    assert (tmp_path / "file").read_text() == "kept"


def test_options_reach_the_measurement(saved, monkeypatch):
    seen = {}

    def compare(models, **options):
        seen.update(options, models=models)
        return []

    monkeypatch.setattr(measure, "compare", compare)
    app = typer.Typer()
    app.command()(command.evaluate)
    arguments = ["a", "b", "--no-perplexity", "--dtype", "bfloat16", "--share", "1", "--repeats", "5", "--prompt", "Hi"]
    result = CliRunner().invoke(app, [*arguments, "--seed", "3", "--trust-remote-code"], catch_exceptions=False)
    assert result.exit_code == 0
    assert seen["models"] == ["a", "b"] and seen["text"] is None and seen["dtype"] == "bfloat16"
    assert (seen["evaluation_share"], seen["seed"], seen["speed"]) == (1.0, 3, True)
    settings = seen["settings"]
    assert (settings.repeats, settings.prompt, settings.seed) == (5, "Hi", 3)
    assert seen["trust_remote_code"] is True


def test_inspect_prints_one_line_for_layers_alike_or_all(saved, capsys):
    assert cli.main(["inspect", str(saved / "compressed")]) == 0
    short = capsys.readouterr().out
    assert "model.layers.0,2.mlp.up_proj" in short and "llm_kernel: " in short
    assert cli.main(["inspect", str(saved / "compressed"), "--full", "--verify"]) == 0
    full = capsys.readouterr().out
    assert "model.layers.2.mlp.up_proj" in full and "verified: " in full


def test_inspect_as_json(saved, llama, capsys):
    assert cli.main(["inspect", str(saved / "llama"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["parameters"] == sum(parameter.numel() for parameter in llama.parameters())
    assert {"name", "shape", "form", "parameters", "bytes", "sparsity", "rank"} <= result["entries"][0].keys()


def test_bad_input_is_one_line_and_exit_code_two(llama_folder, tmp_path, capsys):
    edit_config(llama_folder, vocab_size=300)
    for arguments in (["inspect", str(llama_folder)], ["evaluate", str(llama_folder), *QUICK], ["inspect", "nowhere"]):
        assert cli.main(arguments) == 2
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in err and out == ""
