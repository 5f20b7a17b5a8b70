"""Loads by several ranks of torch.distributed, beside transformers' and torch's own: `python -m bench.ranks`."""
