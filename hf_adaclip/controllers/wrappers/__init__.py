"""What stands around a controller: limits, skips, delay, one for each group of parameters, and states that are carried over."""
