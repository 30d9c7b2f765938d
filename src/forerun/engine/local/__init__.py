"""The local engine: one process, any Hugging Face causal language model, verified by the live policy module."""
