"""Incidents: what went wrong in a step, which module it came from, and the batch that it was made with."""
