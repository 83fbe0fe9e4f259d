"""The controllers' common test: streams of norms as runs have them, and bars for what may come of them."""
