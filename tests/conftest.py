"""What has to be settled before anything is imported."""

from __future__ import annotations

import os

if os.environ.get("LORA_SERVE_TEST_DEVICE") != "cuda":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, by whichever library
