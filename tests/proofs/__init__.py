"""Exact proofs of the acceptance rules: rational-number oracles, slow references and rules with one fault each."""
