"""What `hf_llmkernel_hook.pth` calls when a program first imports transformers.

The .pth file is one line that Python runs at every start: it puts a finder into `sys.meta_path` that finds nothing, and
imports this module when transformers is looked for. (To import a module at the start would cost every Python process of
the environment some 2 ms; the line costs a tenth of that, see `scripts/bench/startup.py`.) This module imports
`hf_llmkernel`, whose import registers the model family. `LLMKERNEL_REGISTRATION=off` in the environment prevents it.
"""

import os
import warnings
from importlib.machinery import ModuleSpec
from typing import Any

_asked = False


def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
    """Transformers' spec by the finder of `hf_llmkernel` the first time, then `None`: that finder has taken over."""
    global _asked
    if _asked or os.environ.get("LLMKERNEL_REGISTRATION", "").lower() == "off":
        return None
    _asked = True
    try:
        from hf_llmkernel.registration import FINDER
    except Exception as error:
        # A broken installation of this package must not keep anybody from transformers.
        warnings.warn(f"hf_llmkernel is not registered with transformers: {error!r}; reinstall it.", stacklevel=2)
        return None
    return FINDER.find_spec(name, path, target)
