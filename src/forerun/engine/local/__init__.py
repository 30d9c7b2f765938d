"""The local engine: one process, any Hugging Face causal language model, the live policy module is the verifier."""
