"""The vLLM engine: vLLM generates and verifies behind the contract of `RolloutEngine`.

vLLM is imported when an engine is made. `adapter.py` is the engine; it talks to `worker.py`, inside vLLM's worker.
"""
