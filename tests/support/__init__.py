"""What tests share: ranks and servers as real processes, engines without a model, tiny models, what must come out.

A harness says how every process has to end, and shows that nothing of it is left.
"""
