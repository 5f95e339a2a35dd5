"""What the package knows of each architecture beside its code: one file and one row each, listed in `registry.py`."""
