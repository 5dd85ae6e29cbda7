"""What `bench.py` runs: a file a benchmark, named as in `bench=NAME`, and what they share."""
