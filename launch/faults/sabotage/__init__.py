"""What is put into a server's processes from outside, for the kind `poison`: by PYTHONPATH, nothing imports it.

Owns: the prompts that are poison, and what they do to whoever runs them.
Uses: the name of one class of the engine.
Never: anything that a server without this folder in its path would notice.
"""
