"""The vLLM engine: vLLM generates and verifies, this package speaks the engine's contract to it.

`settings.py` translates the speculation block, `engine.py` runs requests, `accounting.py` counts rounds, `transfer.py`
and `worker.py` carry weights, `repair.py` mends one kernel of vLLM's CPU build. Nothing here imports vLLM before an
engine is made. Left out: engines in other processes or on other machines.
"""
