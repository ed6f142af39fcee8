"""Scripts, each run as `python benchmarks/NAME.py`; their parts are used in tests."""
