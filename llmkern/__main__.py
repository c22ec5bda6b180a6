"""`python -m llmkern` is the `llmkern` command."""

import sys

from .cli import main

sys.exit(main())
