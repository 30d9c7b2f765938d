"""The local engine: one process, verified by the live policy module, for every model that it proves it computes."""
