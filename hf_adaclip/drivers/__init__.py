"""Who takes a run through its steps: one driver clips by itself, one follows an engine that clips a step late."""
