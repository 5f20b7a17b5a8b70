"""Loads into a CUDA device, beside the rate of the bus and beside other loaders."""
