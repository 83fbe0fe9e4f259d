"""Fixed runs and what they left behind when they were last recorded. `python -m tests.golden.record` records anew."""
