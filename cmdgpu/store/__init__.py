"""Trajectories on disk: what lies there (``format``), how it gets there (``durable``, ``journal``),
how it is read back (``chunks``) and what its rows mean (``parameter_map``).
"""
