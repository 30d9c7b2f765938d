"""Exact acceptance rules for drafts, as pure functions on tensors, and broken ones as controls."""
