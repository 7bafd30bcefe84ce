"""Tests that need a GPU; they run in a pytest call of their own with LORA_SERVE_TEST_DEVICE=cuda (`make gpu-check`).

A process either compiles Triton kernels or interprets them, and all other tests interpret.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if "LORA_SERVE_TEST_DEVICE" in os.environ else ["test_*.py"]
