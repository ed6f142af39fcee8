"""Checkpoint folders: read, patched, verified and reverted, without transformers."""
