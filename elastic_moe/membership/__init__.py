"""Who is in the group: the launch, rendezvous at the start, signals between members, views by quorum, current epoch.

Uses group. Never acts on what one process alone says: it only makes this one leave, and ask for a view. `launch` and
`signals` load no torch, for supervisors use them.
"""
