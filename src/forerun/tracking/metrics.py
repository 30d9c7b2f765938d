"""Definitions of the metrics: one sentence and one unit per name. `RunFolder.log` refuses a name without one.

Names follow `group/what`. Times are wall-clock seconds in the named stage of one step; shares are between 0 and 1.
A name with a brace, such as `spec/acceptance_pos_{i}`, is a family: `{i}` is a position counted from 1, `{n}` a number
counted from 0, `{name}` the name of a reward function. Other packages and user code add theirs with `define`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping

from forerun.errors import UserError

DEFINITIONS: dict[str, str] = {
    # rewards and lengths of the step's rollouts
    "reward/mean": "Mean reward over this step's rollouts. Unit: reward.",
    "reward/std": "Standard deviation of the reward over this step's rollouts. Unit: reward.",
    "reward/zero_std_groups": "Share of groups with zero advantage (no gradient). Unit: share.",
    "reward/{name}/mean": "Mean of one named reward or part of one, before its weight. Unit: reward.",
    "reward/failed": "Rollouts whose reward raised, crashed or gave no finite number, and answers like 9^{9^{9}} that "
    "the default reward does not compute: they count 0. Unit: count.",
    "reward/timeout": "Rollouts whose reward missed its deadline, task.reward_timeout_s: it counts 0. Unit: count.",
    "length/mean": "Mean number of generated tokens per rollout. Unit: tokens.",
    "length/p95": "95th percentile of generated tokens per rollout. Unit: tokens.",
    "length/max": "Generated tokens of the longest rollout. Unit: tokens.",
    "length/truncated": "Share of rollouts that ended at the length limit instead of an end token. Unit: share.",
    "length/prompt_mean": "Mean number of prompt tokens. Unit: tokens.",
    # engines in worker processes
    "replicas/count": "Rollout engines in worker processes. Unit: count.",
    "replicas/lost": "Replicas replaced after a crash, a hang or invalid output, over the run. Unit: count.",
    "replicas/samples_rerun": "Samples that were generated again after such a loss, over the run. Unit: count.",
    "replicas/idle": "Replicas that the latest stream had no sample for. Unit: count.",
    "replicas/slowest_ratio": "Seconds per token and sample, slowest replica over the others' median. Unit: ratio.",
    # difference between engine and learner on the same tokens, by the same weight version
    "mismatch/kl": "Estimated KL(engine || learner) by the same weights on sampled tokens. Unit: nats per token.",
    "mismatch/logp_diff_max": "Largest absolute difference of log-probabilities, engine against learner. Unit: nats.",
    "mismatch/prob_ratio": "Mean of exp(|engine - learner log-probability|); 1 is perfect. Unit: ratio.",
    "mismatch/is_weight_mean": "Mean importance weight, truncated at its cap. Unit: ratio.",
    "mismatch/is_weight_capped": "Share of tokens whose importance weight was truncated at its cap. Unit: share.",
    "mismatch/masked_tokens": "Share of tokens that the off-policy correction masked. Unit: share.",
    "mismatch/masked_sequences": "Share of rollouts that the off-policy correction masked entirely. Unit: share.",
    "mismatch/effective_samples": "Effective sample size of the importance weights, per token. Unit: share.",
    # the policy update; those of the loss are in algorithms/
    "policy/entropy": "Mean entropy of the policy over generated positions. Unit: nats per token.",
    "policy/grad_norm": "Norm of the policy's gradient before clipping. Unit: gradient.",
    "policy/skipped_updates": "Optimizer steps skipped because loss or gradient was not finite. Unit: count.",
    "policy/lr": "Learning rate of the policy. Unit: per update.",
    # the five stages, and times outside them
    "time/step": "The whole step, from fetching prompts to the updated policy. Unit: seconds.",
    "time/data": "Stage data: fetching and tokenising prompts. Unit: seconds.",
    "time/prepare": "Stage prepare: weight sync of policy and drafter to the engine. Unit: seconds.",
    "time/generation": "Stage generation: draft, verify and reward until all rollouts are done. Unit: seconds.",
    "time/exposed_generation": "Time in which the learner waited for rollouts. Unit: seconds.",
    "time/logprob": "Stage logprob: log-probabilities of the same tokens under the current policy. Unit: seconds.",
    "time/train": "Stage train: advantages, losses, gradients and optimizer. Unit: seconds.",
    "time/engine_idle": "Time of the five stages in which the engine neither generated nor loaded weights, mean over "
    "replicas. Unit: seconds.",
    "time/draft_train": "Drafter training, within stage train. Unit: seconds.",
    "time/reward": "Wait for rewards after the last rollout, within stage generation; the others are computed while "
    "rollouts are generated. Unit: seconds.",
    "time/eval": "Held-out evaluation, not part of the step. Unit: seconds.",
    # throughput
    "perf/gen_tokens": "Tokens generated in this step. Unit: tokens.",
    "perf/gen_tokens_per_s": "Generated tokens per second of stage generation. Unit: tokens/s.",
    # speculation
    "spec/acceptance_length": "Tokens emitted per round, bonus token included, 1 to k + 1. Unit: tokens per round.",
    "spec/acceptance_rate": "Accepted draft tokens over drafted tokens. Unit: share.",
    "spec/acceptance_pos_{i}": "Share of rounds in which the first {i} drafts were all accepted. Unit: share.",
    "spec/k_mean": "Mean number of tokens drafted per round. Unit: tokens per round.",
    "spec/rounds": "Draft-and-verify rounds of this step, summed over sequences. Unit: rounds.",
    "draft/loss": "Loss of the drafter on this step's rollouts, before each update. Unit: loss.",
    "draft/acceptance_simulated": "Expected tokens per round on this step's rollouts, from the distributions of "
    "drafter and policy, before each update. Unit: tokens per round.",
    "draft/grad_norm": "Norm of the drafter's gradient before clipping. Unit: gradient.",
    "draft/skipped_updates": "Optimizer steps of the drafter skipped because its gradient was not finite. Unit: count.",
    "draft/tokens": "Completion tokens that the drafter was trained on in this step. Unit: tokens.",
    "draft/tokens_left_out": "Completion tokens skipped because draft.cache_gib was full. Unit: tokens.",
    "spec/drift": "Drop of the acceptance length against the first steps at the same entropy. Unit: share.",
    # evaluation on held-out prompts
    "eval/reward": "Mean reward on the held-out prompts. Unit: reward.",
    "eval/stderr": "Standard error of eval/reward over prompts. Unit: reward.",
    "eval/length": "Mean generated tokens on the held-out prompts. Unit: tokens.",
    "eval/truncated": "Share of held-out answers that ended at the length limit. Unit: share.",
    "eval/prompts": "Number of held-out prompts. Unit: prompts.",
    "eval/unscored": "Held-out answers whose reward failed or missed its deadline: it counts 0. Unit: count.",
    # the same prompts generated twice
    "compare/plain_s": "Generation of the compared prompts without speculation. Unit: seconds.",
    "compare/spec_s": "Generation of the same prompts with speculation. Unit: seconds.",
    "compare/plain_tokens": "Tokens generated by the plain run. Unit: tokens.",
    "compare/spec_tokens": "Tokens generated by the speculative run. Unit: tokens.",
    "compare/plain_tokens_per_s": "Throughput of the plain run. Unit: tokens/s.",
    "compare/spec_tokens_per_s": "Throughput of the speculative run. Unit: tokens/s.",
    "compare/speedup": "Plain seconds over speculative seconds on the same prompts. Unit: ratio.",
    # asynchronous runs
    "async/kl": "Estimated KL(older versions that sampled || learner) on the trained tokens. Unit: nats per token.",
    "async/lag_mean": "Mean age, at training, of the weights that sampled a token. Unit: versions.",
    "async/lag_max": "Largest age, at training, of the weights that sampled a token. Unit: versions.",
    "async/mixed_rollouts": "Share of rollouts sampled from more than one weight version. Unit: share.",
    "async/steps_waiting": "Generated steps that waited for the learner when this one was trained. Unit: count.",
    "async/trainer_idle": "Share of the step in which the learner waited for rollouts. Unit: share.",
    "async/engine_idle": "Share of the step in which the engine neither generated nor loaded weights. Unit: share.",
    "async/lag_tokens_{n}": "Trained tokens that were sampled {n} weight versions earlier. Unit: tokens.",
}

TERMS: dict[str, str] = {
    "policy": "The model that is trained. It is also the target and the verifier: every emitted token is its sample.",
    "drafter": "The cheap proposer of tokens. It decides how fast a rollout is, never its distribution.",
    "plain": "Autoregressive decoding without speculation.",
    "round": "One draft-and-verify pass; it emits at least one token.",
    "k": "Tokens drafted per round.",
    "acceptance length": "Tokens emitted per round, bonus token included, from 1 to k + 1.",
    "acceptance at position j": "Share of rounds in which the first j drafts were all accepted, so it falls with j.",
    "round cost": "Time of a round over the time of a plain decode step at the same batch.",
    "speed-up of generation": "Acceptance length over round cost. Acceptance alone is not speed.",
    "lag": "Weight versions between the policy that sampled a token and the one that trains on it.",
}

_FAMILIES = {"{i}": r"(?P<value>[1-9]\d*)", "{n}": r"(?P<value>0|[1-9]\d*)", "{name}": r"(?P<value>[\w.:-]+)"}


def define(definitions: Mapping[str, str]) -> None:
    """Add metrics: name -> "One sentence. Unit: one unit."

    Raises:
        ValueError: a definition lacks its unit, or differs from one that is already there.
    """
    for name, sentence in definitions.items():
        if ". Unit: " not in sentence or not sentence.endswith("."):
            raise ValueError(f'the definition of {name} must read "One sentence. Unit: one unit."')
        if DEFINITIONS.setdefault(name, sentence) != sentence:
            raise ValueError(f"metric {name} is already defined: {DEFINITIONS[name]}")


def _family_pattern(template: str) -> str | None:
    for brace, pattern in _FAMILIES.items():
        if brace in template:
            return re.escape(template).replace(re.escape(brace), pattern)
    return None


def definition_of(name: str) -> str | None:
    """The sentence of a metric, with the position or name filled in for a family; None for an unknown metric."""
    if name in DEFINITIONS:
        return None if _family_pattern(name) else DEFINITIONS[name]
    for template, sentence in DEFINITIONS.items():
        pattern = _family_pattern(template)
        if pattern and (match := re.fullmatch(pattern, name)):
            return re.sub(r"\{\w+\}", match["value"], sentence)
    return None


def unit_of(name: str) -> str:
    """The unit of a known metric ("seconds"), "" for an unknown one."""
    return (definition_of(name) or "").rpartition("Unit: ")[2].removesuffix(".")


def nearest_name(name: str) -> str:
    """The defined metric whose name is most similar to `name`."""
    return difflib.get_close_matches(name, DEFINITIONS, n=1, cutoff=0.0)[0]


def without_non_finite(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """The metrics with None for every NaN and infinity."""
    return {name: value if value is None or math.isfinite(value) else None for name, value in metrics.items()}


def checked_metrics(step: int, metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """The metrics as plain floats: every name is defined and every value finite or None.

    Raises:
        UserError: a name without a definition (the nearest one is named), a NaN or an infinity (metric and step named).
    """
    checked: dict[str, float | None] = {}
    for name, value in metrics.items():
        if definition_of(name) is None:
            raise UserError(
                f'Metric "{name}" has no definition; did you mean "{nearest_name(name)}"? An algorithm defines what '
                "its loss logs in `metrics` (docs/extending.md), other code calls tracking.metrics.define"
            )
        if value is not None and not math.isfinite(value):
            raise UserError(
                f"Metric {name} is {float(value)} at step {step}: the run stops before it spreads. It is: "
                f"{definition_of(name)} Look for what makes it so; the last checkpoint is from before."
            )
        checked[name] = None if value is None else float(value)
    return checked
