"""These tests run in a pytest call of their own, with LORA_SERVE_TEST_DEVICE=cuda, as `make gpu-check` does.

A process either compiles Triton's kernels or interprets them, and all the other tests interpret.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if "LORA_SERVE_TEST_DEVICE" in os.environ else ["test_*.py"]
