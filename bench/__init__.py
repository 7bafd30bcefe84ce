"""Benchmarks: serving, CPU kernels, the GPU path, and comparisons with other servers. `RESULTS.md` has the figures."""
