"""The front end's process: a node's HTTP API, and the journal that makes a loss harmless.

Owns: the OpenAI and admin APIs, requests and their tokens so far, routing, text from tokens, metrics.
Uses: fastapi, uvicorn, ZMQ, the model's tokenizer; one event loop. It may die: the socket is its supervisor's.
Never: torch.distributed, processes. It holds no weights; `listener` loads next to nothing, for the supervisor uses it.
"""
