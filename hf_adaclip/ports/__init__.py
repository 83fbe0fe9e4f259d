"""What the clipper needs of Accelerate and of a DeepSpeed engine, without importing either."""
