"""transformers' own common tests, as this package's submodules: `library.test_modeling_common` is the library's file.

Nothing of them is kept here. They come from the source distribution of the installed transformers version, which pip
fetches into the cache on first use; where that cannot be had the import fails, and with it every test that needs it.
The distribution leaves out some files that its own tests import. Those stand below with no tests in them, except
`distributed_testing_utils`, which is this project's own.
"""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import transformers
from filelock import FileLock

from hf_llmkernel.data.fetch import cache_folder, fetch_package_files

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
    # Of this package alone no wheel: with all of them barred, pip would build its build tools from source too.
    with (
        mock.patch.dict(os.environ, PIP_NO_BINARY="transformers"),
        FileLock(cache_folder() / "transformers-tests.lock"),  # the workers of one run download it once
    ):
        files = fetch_package_files("transformers", transformers.__version__, "*/tests/*")
    return files[0].parent


def add_lacking_modules() -> None:
    """Puts modules without tests where the distribution's files import what it does not carry."""
    for path, members in LACKING.items():
        for name in (path.partition(".")[0], path):
            sys.modules.setdefault(f"{__name__}.{name}", ModuleType(f"{__name__}.{name}"))
        vars(sys.modules[f"{__name__}.{path}"]).update(members)


__path__.append(str(distributed_folder()))
add_lacking_modules()
# This file asks for the transformers beside it, which only a checkout has.
with mock.patch("transformers.utils.direct_transformers_import", lambda path: transformers):
    importlib.import_module(f"{__name__}.test_configuration_common")
