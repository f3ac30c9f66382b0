"""`python -m hf_llmkernel` is `llmkernel`."""

import sys

from hf_llmkernel.cli import main

if __name__ == "__main__":
    sys.exit(main())
