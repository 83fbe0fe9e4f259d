"""Thin layers between the clipper and the trainers that drive it."""
