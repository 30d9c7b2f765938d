"""The vLLM engine: vLLM generates and verifies, this package speaks the engine's contract to it.

`settings.py` translates the speculation block, `process.py` is vLLM's place in this process, `engine.py` runs requests,
`metrics.py` counts rounds, `state.py` knows which version is held, `worker.py` puts weights in use, `sleep.py` frees
memory, `proposer.py` drafts out of sibling samples, `patches.py` mends one kernel of vLLM's CPU build. Nothing here
imports vLLM before an engine is made. Left out: engines on other machines.
"""
