"""Requests, in three processes: supervisor, engine, front end.

Owns: what they say to each other (`protocol`, `starts`), and what the supervisor of a serving rank does.
Uses: msgspec on ZMQ between engines and front ends, the channel of `supervision` to the supervisor; never pickle.
Never: torch, threads. `engine/` and `front_end/` import neither each other nor the supervisor, which imports neither.
"""
