"""WHO is in the group: the view that all members have agreed on.

Owns: a process's place in the launch, the rendezvous, the quorum, words between members, the current epoch.
Uses: torchft's lighthouse and torch's store, sockets, clock, threads. `launch` and `signals` load no torch.
Never: files, processes. A word only asks for a view; no process acts on its own opinion of another.
"""
