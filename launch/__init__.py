"""Programs. They alone read the environment, the command line and `conf/`, and hand the rest typed values.

`serve.py` starts a server, `bench.py` measures one, `chaos.py` breaks one.
"""
