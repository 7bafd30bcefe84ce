"""The GPU benchmark and `make gpu-check`, which also runs the GPU tests."""
