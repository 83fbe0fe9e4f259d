"""How far a run has come, in steps, seconds and energy; no transformers."""
