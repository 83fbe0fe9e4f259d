"""One run: state, decisions, the record of them, events, checkpoints and the checks at its start."""
