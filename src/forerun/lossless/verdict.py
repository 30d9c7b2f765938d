"""Results of a verification: checks with numbers, grouped into claims, grouped into one verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["algorithmic", "numerical", "log-probability", "contract"]


@dataclass(frozen=True, slots=True)
class Check:
    """One test and its outcome."""

    name: str
    passed: bool
    sentence: str  # what was measured
    numbers: dict[str, float]
    p_value: float | None = None  # None: not a statistical test
    detectable: str | None = None  # the smallest fault that this sample would have caught nine times in ten


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim holds if all its checks pass."""

    name: str
    kind: Kind
    checks: list[Check]
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


@dataclass(frozen=True, slots=True)
class Verification:
    """The verdict on one policy, engine and speculation block."""

    about: dict[str, Any]  # recipe, policy, engine, rule, k, temperature, dtype, injected fault, machine
    claims: list[Claim]

    @property
    def passed(self) -> bool:
        return all(claim.passed for claim in self.claims)

    @property
    def failed_claims(self) -> list[str]:
        return [claim.name for claim in self.claims if not claim.passed]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with the outcome of every claim."""
        claims = [{**asdict(claim), "passed": claim.passed} for claim in self.claims]
        return {**self.about, "passed": self.passed, "failed_claims": self.failed_claims, "claims": claims}

    def to_text(self) -> str:
        """A page for a terminal."""
        lines = [f"{self.about['recipe']}: {self.about['engine']} engine, {self.about['speculation']}"]
        for claim in self.claims:
            lines.append(f"\n{_mark(claim.passed)}  {claim.name} ({claim.kind}, {claim.seconds:.0f} s)")
            for check in claim.checks:
                lines.append(f"      {'' if check.passed else 'FAILED '}{check.name}: {check.sentence}")
                lines += [f"        would have caught: {check.detectable}"] if check.detectable else []
        verdict = "every claim holds" if self.passed else f"NOT lossless: {', '.join(self.failed_claims)}"
        return "\n".join([*lines, "", f"{verdict} ({sum(c.seconds for c in self.claims):.0f} s)"])


def _mark(passed: bool) -> str:
    return "ok  " if passed else "FAIL"
