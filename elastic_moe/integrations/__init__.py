"""Models of other libraries, made elastic.

Owns: `elasticize`: a transformers model gets `ElasticMoELayer`s, and its weights from peers or from a checkpoint.
Uses: torch, transformers, the runtime. The only place that knows a model's modules.
Never: torch.distributed, sockets, threads, processes.
"""
