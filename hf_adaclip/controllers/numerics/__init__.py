"""What the maths of controllers is written in: operations on three kinds of numbers, logarithm, windows, a trend of the loss."""
