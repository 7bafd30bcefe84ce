"""`python -m lora_serve` is the `lora-serve` command."""

import sys

from lora_serve.cli import main

sys.exit(main())
