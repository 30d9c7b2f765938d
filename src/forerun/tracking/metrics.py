"""What every metric means: one sentence and one unit per name, printed in the report under the figures.

Names follow `group/what`. Times are seconds of wall clock in the named stage of one step; shares are between 0 and 1.
A name with a brace, such as `spec/acceptance_pos_{i}`, stands for a family: `{i}` is a position counted from 1,
`{n}` a number counted from 0, `{name}` the name of a reward function.
Left out: metrics of other frameworks. An alias table can be laid over these names.
"""

from __future__ import annotations

import difflib
import re

DEFINITIONS: dict[str, str] = {
    # rewards and lengths of the step's rollouts
    "reward/mean": "Mean reward over this step's rollouts. Unit: reward.",
    "reward/std": "Standard deviation of the reward over this step's rollouts. Unit: reward.",
    "reward/min": "Smallest reward of this step. Unit: reward.",
    "reward/max": "Largest reward of this step. Unit: reward.",
    "reward/zero_std_groups": "Share of prompts whose samples all got one reward and so teach nothing. Unit: share.",
    "reward/{name}/mean": "Mean of one reward function before the functions are summed. Unit: reward.",
    "advantage/abs_mean": "Mean absolute advantage over this step's rollouts. Unit: advantage.",
    "length/mean": "Mean number of generated tokens per rollout. Unit: tokens.",
    "length/p95": "95th percentile of generated tokens per rollout. Unit: tokens.",
    "length/max": "Generated tokens of the longest rollout. Unit: tokens.",
    "length/truncated": "Share of rollouts that ended at the length limit instead of an end token. Unit: share.",
    "length/prompt_mean": "Mean number of prompt tokens. Unit: tokens.",
    "data/prompts": "Prompts in this step. Unit: prompts.",
    "data/rollouts": "Rollouts in this step. Unit: rollouts.",
    "data/dropped": "Prompts or rollouts left out on purpose in this step. Unit: count.",
    # engines in processes of their own
    "replicas/count": "Engines in processes of their own. Unit: count.",
    "replicas/lost": "Replicas that died, hung or talked nonsense and were replaced, since the run began. Unit: count.",
    "replicas/samples_rerun": "Samples that were asked for again after such a loss, since the run began. Unit: count.",
    "replicas/slowest_ratio": "Seconds per token of the slowest replica over the others' median. Unit: ratio.",
    # agreement between the engine that sampled and the learner that trains
    "mismatch/kl": "Estimated KL divergence from the engine's distribution to the learner's. Unit: nats per token.",
    "mismatch/logp_diff_max": "Largest absolute difference between engine and learner log-probability. Unit: nats.",
    "mismatch/prob_ratio": "Mean of exp(|engine minus learner log-probability|); 1 is perfect. Unit: ratio.",
    "mismatch/is_weight_mean": "Mean truncated importance weight that corrects the mismatch. Unit: ratio.",
    "mismatch/is_weight_capped": "Share of tokens whose importance weight was cut at its cap. Unit: share.",
    "mismatch/masked_tokens": "Share of tokens that the off-policy correction left out. Unit: share.",
    "mismatch/masked_sequences": "Share of rollouts whose tokens the off-policy correction all left out. Unit: share.",
    "mismatch/effective_samples": "Effective sample size of the importance weights, per token. Unit: share.",
    # the policy update
    "policy/loss": "Policy loss, averaged over trained tokens. Unit: loss.",
    "policy/clip_low": "Share of tokens whose probability ratio was clipped from below. Unit: share.",
    "policy/clip_high": "Share of tokens whose probability ratio was clipped from above. Unit: share.",
    "policy/entropy": "Mean entropy of the policy over generated positions. Unit: nats per token.",
    "policy/kl": "Estimated KL divergence from the policy to the frozen reference. Unit: nats per token.",
    "policy/ratio_mean": "Mean probability ratio between updated and sampling policy. Unit: ratio.",
    "policy/grad_norm": "Norm of the policy's gradient before clipping. Unit: gradient.",
    "policy/lr": "Learning rate of the policy. Unit: per update.",
    # the five stages and what is outside them
    "time/step": "The whole step, from fetching prompts to the updated policy. Unit: seconds.",
    "time/data": "Stage data: fetching and tokenising prompts. Unit: seconds.",
    "time/prepare": "Stage prepare: handing policy and drafter weights to the engine. Unit: seconds.",
    "time/generation": "Stage generation: draft, verify and reward until all rollouts are done. Unit: seconds.",
    "time/exposed_generation": "Time in which the learner waits for rollouts. Unit: seconds.",
    "time/logprob": "Stage logprob: the same tokens' log-probabilities under the current policy. Unit: seconds.",
    "time/train": "Stage train: advantages, losses, gradients and optimizer. Unit: seconds.",
    "time/engine_idle": "Time of the five stages in which the engine neither generated nor loaded weights; the mean "
    "over replicas. Unit: seconds.",
    "time/draft_train": "The drafter's share of stage train. Unit: seconds.",
    "time/refit": "The weight transfer's share of stage prepare. Unit: seconds.",
    "time/reward": "The reward functions' share of stage generation. Unit: seconds.",
    "time/other": "What is left of the step after the five stages. Unit: seconds.",
    "time/eval": "Held-out evaluation, not part of the step. Unit: seconds.",
    "time/compare": "The plain run of the comparison, not part of the step. Unit: seconds.",
    "time/checkpoint": "Saving the checkpoint, not part of the step. Unit: seconds.",
    # throughput
    "perf/gen_tokens": "Tokens generated in this step. Unit: tokens.",
    "perf/gen_tokens_per_s": "Generated tokens per second of stage generation. Unit: tokens/s.",
    "perf/train_tokens_per_s": "Trained tokens per second of stage train. Unit: tokens/s.",
    "perf/tokens_per_s": "Generated tokens per second of the whole step. Unit: tokens/s.",
    "perf/memory_gib": "Peak memory of the process or device so far. Unit: GiB.",
    # speculation
    "spec/acceptance_length": "Tokens emitted per round, bonus token included, 1 to k + 1. Unit: tokens per round.",
    "spec/acceptance_rate": "Accepted draft tokens over drafted tokens. Unit: share.",
    "spec/acceptance_pos_{i}": "Share of rounds in which the first {i} drafts were all accepted. Unit: share.",
    "spec/k_mean": "Mean number of tokens drafted per round. Unit: tokens per round.",
    "spec/rounds": "Draft-and-verify rounds of this step, summed over sequences. Unit: rounds.",
    "spec/round_cost": "Time of a round over the time of a plain decode step at the same batch. Unit: ratio.",
    "spec/speedup_gen": "Predicted generation speed-up: acceptance length over round cost. Unit: ratio.",
    "spec/off_share": "Share of decode steps that ran without speculation. Unit: share.",
    "spec/draft_share": "Share of stage generation spent in the drafter. Unit: share.",
    "spec/verify_share": "Share of stage generation spent verifying. Unit: share.",
    "draft/loss": "Loss of the drafter on this step's rollouts, before each update. Unit: loss.",
    "draft/acceptance_simulated": "Tokens per round that the drafter's and the policy's distributions on this step's "
    "rollouts promise, before each update. Unit: tokens per round.",
    "draft/grad_norm": "Norm of the drafter's gradient before clipping. Unit: gradient.",
    "draft/tokens": "Completion tokens that taught the drafter in this step. Unit: tokens.",
    "draft/tokens_left_out": "Completion tokens that draft.cache_gib left no room for. Unit: tokens.",
    "spec/drift": "Fall of the acceptance length against its first steps at the same entropy. Unit: share.",
    # evaluation on held-out prompts
    "eval/reward": "Mean reward on the held-out prompts. Unit: reward.",
    "eval/stderr": "Standard error of eval/reward over prompts. Unit: reward.",
    "eval/length": "Mean generated tokens on the held-out prompts. Unit: tokens.",
    "eval/truncated": "Share of held-out answers that ended at the length limit. Unit: share.",
    "eval/prompts": "Held-out prompts evaluated. Unit: prompts.",
    # the same prompts generated twice
    "compare/plain_s": "Generation of the compared prompts without speculation. Unit: seconds.",
    "compare/spec_s": "Generation of the same prompts with speculation. Unit: seconds.",
    "compare/plain_tokens": "Tokens generated by the plain run. Unit: tokens.",
    "compare/spec_tokens": "Tokens generated by the speculative run. Unit: tokens.",
    "compare/plain_tokens_per_s": "Throughput of the plain run. Unit: tokens/s.",
    "compare/spec_tokens_per_s": "Throughput of the speculative run. Unit: tokens/s.",
    "compare/speedup": "Plain seconds over speculative seconds on the same prompts. Unit: ratio.",
    # asynchronous runs
    "async/lag_mean": "Mean age of the trained tokens' weights. Unit: versions.",
    "async/lag_max": "Age of the oldest trained token's weights. Unit: versions.",
    "async/mixed_rollouts": "Share of rollouts whose tokens are of more than one version. Unit: share.",
    "async/steps_waiting": "Steps that were generated and not trained on when this one was. Unit: count.",
    "async/trainer_idle": "Share of the step in which the learner waited for rollouts. Unit: share.",
    "async/engine_idle": "Share of the step in which the engine neither generated nor loaded weights. Unit: share.",
    "async/lag_tokens_{n}": "Tokens trained on that were sampled {n} versions earlier. Unit: tokens.",
    # training before reinforcement learning
    "cold_start/loss": "Supervised loss on worked solutions. Unit: nats per token.",
    "cold_start/tokens_per_s": "Supervised tokens per second. Unit: tokens/s.",
}

WORDS: dict[str, str] = {
    "policy": "The model that is trained. It is also the target and the verifier: every emitted token is its sample.",
    "drafter": "The cheap proposer of tokens; it decides how fast a rollout is, never what is in it.",
    "plain": "Decoding one token at a time without a drafter.",
    "round": "One pass of drafting and verifying; it emits at least one token.",
    "k": "Tokens drafted per round.",
    "acceptance length": "Tokens emitted per round, bonus token included, from 1 to k + 1.",
    "acceptance at position j": "Share of rounds in which the first j drafts were all accepted, so it falls with j.",
    "round cost": "Time of a round over the time of a plain decode step at the same batch.",
    "speed-up of generation": "Acceptance length over round cost. Acceptance alone is not speed.",
    "lag": "Weight versions between the policy that sampled a token and the one that trains on it.",
}

_FAMILIES = {"{i}": r"(?P<value>[1-9]\d*)", "{n}": r"(?P<value>0|[1-9]\d*)", "{name}": r"(?P<value>[A-Za-z0-9_.:-]+)"}


def _family_pattern(template: str) -> re.Pattern[str] | None:
    for brace, pattern in _FAMILIES.items():
        if brace in template:
            return re.compile(re.escape(template).replace(re.escape(brace), pattern))
    return None


_PATTERNS = {template: pattern for template in DEFINITIONS if (pattern := _family_pattern(template))}


def definition_of(name: str) -> str | None:
    """The sentence of a metric, with the position or name filled in for a family; None for an unknown metric."""
    if name in DEFINITIONS and name not in _PATTERNS:
        return DEFINITIONS[name]
    for template, pattern in _PATTERNS.items():
        if match := pattern.fullmatch(name):
            return re.sub(r"\{\w+\}", match["value"], DEFINITIONS[template])
    return None


def unit_of(name: str) -> str:
    """The unit of a known metric ("seconds"), "" for an unknown one."""
    return (definition_of(name) or "").rpartition("Unit: ")[2].removesuffix(".")


def nearest_name(name: str) -> str:
    """The defined metric whose name looks most like `name`."""
    found = difflib.get_close_matches(name, DEFINITIONS, n=1, cutoff=0.0)
    return found[0]
