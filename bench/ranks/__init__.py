"""Loads by several ranks, beside those of transformers, torch and accelerate: `python -m bench.ranks`."""
