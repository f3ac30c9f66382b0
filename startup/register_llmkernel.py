"""The commands `optimum-cli llmkernel …`: the build puts this file into `optimum/commands/register/`.

That folder is of no package, so none above it may hold an `__init__.py`. The file points at the commands, rather than
being them, so that in an editable install too they are those of the working tree.
"""

from hf_llmkernel.optimum_cli import LLMKernelCommand

REGISTER_COMMANDS = [LLMKernelCommand]
