"""What is built, what an installed wheel does in a new process, and when the scripts build the environment anew."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import hf_llmkernel
from hf_llmkernel.model.configuration_llm_kernel import PAYLOAD_FILES

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = "optimum/commands/register/register_llmkernel.py"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="session")
def distributions(tmp_path_factory):
    """Folder with a wheel and an sdist, built by the build backend of this environment."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def test_wheel_holds_the_package_the_payload_and_the_hook(distributions):
    wheel = zipfile.ZipFile(next(distributions.glob("*.whl")))
    names = set(wheel.namelist())
    # No __init__.py: the folders are of Optimum's namespace.
    assert [name for name in names if name.startswith("optimum/")] == [COMMANDS]
    assert {"hf_llmkernel_hook.py", "hf_llmkernel_hook.pth"} <= names
    assert {f"hf_llmkernel/model/{name}" for name in PAYLOAD_FILES} <= names
    folders = {name.split("/")[0] for name in names}
    information = f"hf_llmkernel-{hf_llmkernel.__version__}.dist-info"
    assert folders == {"hf_llmkernel", "hf_llmkernel_hook.py", "hf_llmkernel_hook.pth", "optimum", information}
    metadata = wheel.read(f"{information}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert f"{information}/licenses/LICENSE" in names
    assert "llmkernel = hf_llmkernel.cli:main" in wheel.read(f"{information}/entry_points.txt").decode()


def test_sdist_holds_what_builds_and_tests_it(distributions):
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = {"pyproject.toml", "constraints.txt", "LICENSE", "README.md", "tests/conftest.py", "scripts/test.sh"}
    assert wanted | {"startup/hf_llmkernel_hook.pth"} <= names


def test_installed_wheel_registers_by_its_pth_file(distributions, tiny_checkpoint, tmp_path):
    site_packages = tmp_path / "site-packages"
    zipfile.ZipFile(next(distributions.glob("*.whl"))).extractall(site_packages)
    # -S: without this environment's own .pth files, an editable install among them.
    code = """
import site, sys
site.addsitedir(sys.argv[1])
sys.path.append(sys.argv[2])
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[3])
import hf_llmkernel
print(type(model).__module__, hf_llmkernel.__file__)
"""
    arguments = [str(site_packages), sysconfig.get_path("purelib"), str(tiny_checkpoint)]
    ended = subprocess.run(
        [sys.executable, "-S", "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    expected = ["hf_llmkernel.model.modeling_llm_kernel", str(site_packages / "hf_llmkernel" / "__init__.py")]
    assert ended.stdout.split() == expected


@pytest.fixture(scope="session")
def editable_wheel(tmp_path_factory):
    """What `pip install -e` unpacks: files of site-packages itself, and a path to the working tree."""
    folder = tmp_path_factory.mktemp("editable")
    code = "import sys; from hatchling.build import build_editable; build_editable(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def installed(wheel: Path, site_packages: Path) -> None:
    """Unpacks a wheel among the packages of this environment, this project's own left out."""
    site_packages.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if entry.name == "optimum":  # the one package that the wheel writes into
            shutil.copytree(entry, site_packages / "optimum", ignore=shutil.ignore_patterns("register", "__pycache__"))
        elif "hf_llmkernel" not in entry.name:
            (site_packages / entry.name).symlink_to(entry)
    zipfile.ZipFile(wheel).extractall(site_packages)


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_optimum_cli_prunes_from_an_install(request, distributions, tiny_checkpoint, tmp_path, kind):
    wheel = next(distributions.glob("*.whl")) if kind == "wheel" else request.getfixturevalue("editable_wheel")
    installed(wheel, tmp_path / "site-packages")
    code = """
import site, sys
site.addsitedir(sys.argv.pop(1))
from optimum.commands.optimum_cli import main
sys.argv[0] = "optimum-cli"
main()
import hf_llmkernel
print(hf_llmkernel.__file__, file=sys.stderr)
"""
    options = ["--target-sparsity", "0.5", "--pattern", "neurons", "--pruning-type", "magnitude", "--update", "none"]
    arguments = ["llmkernel", "prune", "-m", str(tiny_checkpoint), "-o", "pruned", *options, "--align", "8", "--json"]
    ended = subprocess.run(
        [sys.executable, "-S", "-c", code, str(tmp_path / "site-packages"), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert json.loads(ended.stdout) == json.loads((tmp_path / "pruned" / "pruning_config.json").read_text())
    assert json.loads(ended.stdout)["measured_sparsity"] == 0.5
    package = ROOT if kind == "editable" else tmp_path / "site-packages"
    assert ended.stderr.splitlines()[-1] == str(package / "hf_llmkernel" / "__init__.py")


def test_every_dependency_is_pinned_and_its_pin_in_range():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pins = {canonicalize_name(name): Version(version) for name, version in pins.items()}
    tested = [requirement for extra in ("test", "peft", "eval", "tensorboard", "serving")
              for requirement in PROJECT["optional-dependencies"][extra]]
    for line in [*PROJECT["dependencies"], *tested]:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        assert name == "hf-llmkernel" or pins[name] in requirement.specifier, line


def test_torch_xla_is_no_dependency():
    """Next to a torch that it was not built for, its import fails and takes transformers with it."""
    everything = [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]
    assert not [line for line in everything if re.match(r"torch[_-]xla", line)]


@pytest.fixture
def shell(tmp_path):
    """Runs lines in bash after scripts/environment.sh, in a copy of what it reads; returns the ended process."""
    project = tmp_path / "project"
    (project / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "environment.sh", project / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, project)
    shutil.copytree(ROOT / "startup", project / "startup")

    def run(lines: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", f"set -euo pipefail; source {project}/scripts/environment.sh\n{lines}"],
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", **environment},
            capture_output=True,
            text=True,
        )

    return run


def test_environment_is_made_anew_only_when_its_files_change(shell, tmp_path):
    state = f"VENV={tmp_path} PYTHON={sys.executable}"
    installed = 'is_installed "" test && echo yes || echo no'
    ended = shell(f"""
{state}
{installed}
fingerprint test > $VENV/llmkernel-test.stamp
{installed}
is_installed "" && echo yes || echo no
echo '# changed' >> $ROOT/constraints.txt
{installed}
fingerprint "" > $VENV/llmkernel-core.stamp
{installed}
is_installed test && echo yes || echo no
""")
    assert ended.stdout.split() == ["no", "yes", "no", "no", "yes", "no"], ended.stderr


@pytest.mark.parametrize(
    ("name", "script", "words"),
    [
        ("old", "exit 1", "is no Python of version 3.11 or newer; name another"),
        ("bare", 'case "$2" in *venv*) exit 1;; esac', "has no venv module; install it"),
    ],
)
def test_unfit_python_is_a_clear_error(shell, tmp_path, name, script, words):
    python = tmp_path / name
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    ended = shell("make_environment", LLMKERNEL_PYTHON=str(python), LLMKERNEL_VENV=str(tmp_path / "venv"))
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert words in ended.stderr


def test_folder_of_something_else_is_not_cleared(shell, tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "letter.txt").write_text("mine")
    ended = shell("make_environment", LLMKERNEL_PYTHON=sys.executable, LLMKERNEL_VENV="venv")
    assert ended.returncode == 1
    assert "is not empty and no Python environment" in ended.stderr
    assert (tmp_path / "venv" / "letter.txt").read_text() == "mine"


def test_interrupted_installation_leaves_no_stamp(shell, tmp_path):
    """pip fails here as it does without a registry; the next run installs again."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin" / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *"-m pip"*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (venv / "llmkernel-test.stamp").write_text("of before")
    ended = shell("make_environment test", LLMKERNEL_VENV=str(venv))
    assert ended.returncode == 1
    assert "error: pip could not install torch==" in ended.stderr
    assert not list(venv.glob("*.stamp"))
