"""Loads of timm's models and of several sources, beside timm's own and by hand: `python -m bench.vision`."""
