"""Other projects' forward passes, written from their formulas, for verification."""
