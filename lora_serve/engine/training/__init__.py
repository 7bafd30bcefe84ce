"""Training of adapters on the resident base, in the engine process: `trainer.py` is what others use."""
