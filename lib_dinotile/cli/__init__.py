"""Commands of `python -m lib_dinotile`."""
