"""transformers' own common tests, as this package's submodules: `library.test_modeling_common` is the library's file.

Nothing of them is kept here. They come from the source distribution of the installed transformers version, which pip
fetches into the cache on first use; where that cannot be had the import fails, and with it every test that needs it.
The distribution leaves out some files that its own tests import. Those stand below with no tests in them, except
`distributed_testing_utils`, which is this project's own.
"""

import os
import sys
from pathlib import Path
from types import ModuleType

import transformers
from filelock import FileLock
from transformers import utils as transformers_utils

from hf_llmkernel.data.fetch import cache_folder, fetch_package_files

# A checkout's `tests` folder, where the run by hand finds what the distribution lacks.
REPOSITORY_TESTS = os.environ.get("TRANSFORMERS_REPOSITORY_TESTS")

# What a configuration takes whatever its family, each away from its default.
COMMON_CONFIG_FIELDS = {
    "architectures": ["LLMKernelModel"],
    "chunk_size_feed_forward": 3,
    "dtype": "float16",
    "id2label": {0: "only"},
    "label2id": {"only": "0"},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}
LACKING = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": COMMON_CONFIG_FIELDS},
}


def distributed_folder() -> Path:
    """The `tests` folder of the source distribution of the installed transformers, from the cache or the registry."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    before = os.environ.get("PIP_NO_BINARY")
    os.environ["PIP_NO_BINARY"] = "transformers"  # of this package alone: what builds its metadata may be a wheel
    try:
        with FileLock(cache_folder() / "transformers-tests.lock"):  # workers of one run download it once
            files = fetch_package_files("transformers", transformers.__version__, "*/tests/*")
    finally:
        os.environ.pop("PIP_NO_BINARY")
        if before is not None:
            os.environ["PIP_NO_BINARY"] = before
    return files[0].parent


def add_lacking_modules() -> None:
    """Puts modules without tests where the distribution's files import what it does not carry."""
    for path, members in LACKING.items():
        parent, name = path.split(".")
        for module_name in (parent, path):
            sys.modules.setdefault(f"{__name__}.{module_name}", ModuleType(f"{__name__}.{module_name}"))
        vars(sys.modules[f"{__name__}.{path}"]).update(members)


# The files ask for a second transformers beside themselves, which only a checkout has.
transformers_utils.direct_transformers_import = lambda path, file="__init__.py": transformers
__path__.append(str(distributed_folder()))
if REPOSITORY_TESTS is None:
    add_lacking_modules()
else:
    __path__.append(REPOSITORY_TESTS)
