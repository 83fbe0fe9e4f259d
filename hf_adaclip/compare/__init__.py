"""Time to a target: measuring it in one run, comparing it between arms, showing it."""
