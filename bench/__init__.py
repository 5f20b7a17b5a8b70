"""Benchmarks and the checkpoints that they read."""
