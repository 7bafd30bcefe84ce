"""Sizes of the steps that are replayed from CUDA graphs on a GPU."""

from __future__ import annotations

from lora_serve.kernels.contract import GraphBuckets

MAX_SEGMENT_ROWS = 16  # rows that a tensor core multiplies at once
MAX_RANK = 1024  # graphs have scratch memory for it; adapters of higher rank are served without graphs
GRAPH_SIZES = GraphBuckets(
    rows=(1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256),
    max_segment_rows=MAX_SEGMENT_ROWS,
    max_rank=MAX_RANK,
    # Beyond the largest the device has so much to do that it does not wait for Python.
    tokens=(16, 32, 64, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1536, 2048),
    sequences=(64, 256),
)
