"""The harness behind `forerun verify`: laws, two-sample tests, parity, injectable faults, verdicts."""

from forerun.lossless.verdict import Check, Claim, Verification

__all__ = ["Check", "Claim", "Verification"]
