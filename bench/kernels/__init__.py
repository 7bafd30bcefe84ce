"""Time of the CPU kernels: each alone, in an engine step, and for adapters that do more than LoRA."""
