"""Comparisons with vLLM, PEFT and plain transformers. `README.md` says how each server is started."""
