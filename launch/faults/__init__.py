"""What `chaos.py` is made of: which faults, at whom and when, under which load, and what came of it."""
