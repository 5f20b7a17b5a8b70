"""The forward of models whose weights are on disk, beside accelerate's and the disk: `python -m bench.forward`."""
