"""Exact acceptance rules for drafts, as pure functions on tensors, and the oracle that proves them."""
