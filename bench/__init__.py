"""Measurements of adamw_triton: `python -m bench --help`."""
