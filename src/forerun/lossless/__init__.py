"""`forerun verify`: distribution tests, two-sample tests, log-probability parity, injectable faults."""

from forerun.lossless.verdict import Check, Claim, Verification

__all__ = ["Check", "Claim", "Verification"]
