"""The vLLM engine: vLLM generates and verifies behind the contract of `RolloutEngine`.

`settings.py` translates the speculation block, `in_process.py` isolates vLLM in this process, `adapter.py` runs
requests, `metrics.py` counts rounds, `state.py` tracks the weight version, `worker.py` loads weights, `sleep.py` frees
memory, `proposer.py` drafts from sibling samples, `patches.py` repairs a kernel of vLLM's CPU build. vLLM is imported
when an engine is made.
"""
