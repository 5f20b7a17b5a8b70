"""Hostile input, made and judged: `python tests/fuzz --help` fuzzes; tests/test_fuzz.py runs the kept corpus."""
