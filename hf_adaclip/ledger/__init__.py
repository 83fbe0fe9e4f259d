"""The file format of `clip_ledger.jsonl` and what anchors it: records, seals, writing and reading."""
