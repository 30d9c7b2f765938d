"""The vLLM engine: vLLM generates and verifies behind the contract of `RolloutEngine`.

vLLM is imported when an engine is made. `adapter.py` is the engine; it calls `worker.py`, inside vLLM's worker.
"""
