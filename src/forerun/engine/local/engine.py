"""The batch loop: draft, verify, commit, refill, until every prompt has its samples.

Plain decoding is the same loop with k = 0, and a draft tree is one pass over all its nodes (`tree.py`). A fresh
sequence enters with its last prompt token as "newest token" and the rest of the prompt in the cache, so that the first
completion token is drafted and verified like any other.

Randomness: every uniform is keyed by (request seed, position at which its round starts, draft position, purpose), so
results do not depend on how requests were batched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from forerun.acceptance.chain import verify
from forerun.acceptance.random import Purpose, round_keys, uniforms
from forerun.acceptance.tree import TREE_RULES, TreeResult, verify_tree
from forerun.acceptance.truncate import truncate
from forerun.drafters import Drafter, Rows, load_drafter
from forerun.drafters.base import check_draft
from forerun.engine.base import (
    Requests,
    RolloutEngine,
    Sampling,
    Weights,
    check_drafter,
    check_request,
    ends_with_stop,
    engine_metrics,
    nothing,
    requested,
)
from forerun.engine.local.scheduler import LiveSequence, Scheduler
from forerun.engine.local.self_check import (
    DRAFTS,
    Script,
    check_engine,
    check_in_float32,
    check_layers,
    proven,
    scripted,
)
from forerun.engine.local.tree import along_path, depths, keep_path, tree_places
from forerun.errors import UserError
from forerun.models import Policy, load_policy
from forerun.models.cache import SlotCache, SlotPass
from forerun.models.checksum import checksum
from forerun.models.forward import PolicyForward, check_trees, longest_text
from forerun.models.load import load_exactly
from forerun.types import Draft, Rollout, VerifyInput, VerifyResult

if TYPE_CHECKING:  # an engine with a drafter needs no recipe, and so no pydantic
    from forerun.config import SpeculationConfig

Verify = Callable[[str, VerifyInput], VerifyResult]
VerifyTree = Callable[[str, VerifyInput], TreeResult]


class LocalEngine(RolloutEngine):
    """An engine in this process that runs the live policy module."""

    shares_weights = True

    def __init__(
        self,
        policy: Policy,
        drafter: Drafter | None = None,
        *,
        k: int = 0,
        rule: str = "block",
        slots: int = 32,
        fused: bool = True,
        verifier: Verify = verify,
        tree_verifier: VerifyTree = verify_tree,
        checked: bool = False,
    ) -> None:
        """An engine for the live `policy`.

        Args:
            k: draft tokens per round, of a tree its nodes (0 or no drafter: plain).
            rule: of `chain.py`, or of `tree.py` for a drafter of trees, which are verified by the walk where the rule
                is one for chains.
            verifier, tree_verifier: for tests.
            checked: leave out the self-check.

        Raises UserError when the self-check finds that it does not compute what the policy's own forward computes.
        """
        if (k > 0) != (drafter is not None):
            raise UserError(f"k = {k} and {'no' if drafter is None else 'a'} drafter: give both, or neither")
        super().__init__(policy, k)
        self.drafter, self.k, self.slots = drafter, k, slots
        self._eos_ids = policy.eos_ids
        self._vocabulary = int(policy.model.config.get_text_config().vocab_size)
        self._forward = PolicyForward(policy, drafter.aux_layers if drafter else (), fused)
        self._verify, self._verify_tree = verifier, tree_verifier
        self._chain_rule = rule
        self._tree_rule = rule if rule in TREE_RULES else "walk"
        self._held = Weights(0, {})
        self._detector.watches = drafter is not None and bool(drafter.state_dict())
        if not checked:
            self.warnings += self._check()

    def _check(self) -> list[str]:
        """See `self_check.py`; once per model in a process."""
        fused = self._forward.fused is not None
        if fused in proven.setdefault(self.policy.model, set()):
            return []
        check_layers(self.policy)
        script = Script(self.policy.model.config.get_text_config().vocab_size)

        def check() -> list[str]:
            return check_engine(
                LocalEngine(
                    self.policy, script, k=DRAFTS, slots=DRAFTS + 1, fused=fused, verifier=scripted, checked=True
                )
            )

        warnings = check()
        if self.policy.dtype != torch.float32:
            warnings += check_in_float32(self.policy, check)
        proven[self.policy.model].add(fused)
        return warnings

    @classmethod
    def from_live(
        cls, policy: Policy, drafter: Drafter | None, speculation: SpeculationConfig, slots: int
    ) -> LocalEngine:
        k = speculation.tokens if drafter is not None else 0
        return cls(policy, drafter, k=k, rule=speculation.verify, slots=slots)

    @classmethod
    def from_folder(cls, policy: str, dtype: str, speculation: SpeculationConfig, slots: int) -> LocalEngine:
        loaded = load_policy(policy, dtype)
        return cls.from_live(loaded, load_drafter(loaded, speculation), speculation, slots)

    @property
    def rule(self) -> str:
        if self.drafter is None:
            return "plain"
        return self._tree_rule if self.drafter.trees else self._chain_rule

    def stream(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        n: int = 1,
        only: Requests | None = None,
        between: Callable[[], None] = nothing,
    ) -> Iterator[Rollout]:
        """See `RolloutEngine.stream`. One stream at a time: they would share the cache rows."""
        self._check_not_running()
        check_request(prompts, sampling, n, self._vocabulary, self.policy.context)
        with self._streaming(lambda: self._held.version) as record:
            self._forward.refresh()
            scheduler = Scheduler(self.slots, prompts, requested(len(prompts), n, only), sampling.seed)
            self._scheduler = scheduler
            self._open(scheduler, sampling)
            while not scheduler.done:
                between()
                self._refill(scheduler)
                finished = self._round(scheduler, sampling)
                record(len(scheduler.live))
                self._release(scheduler, finished)
                yield from (sequence.rollout() for _, sequence in finished)

    def extend(self, requests: Requests) -> bool:
        """See `RolloutEngine.extend`."""
        if self._running:
            self._scheduler.extend(requests)
        return self._running

    def load(self, weights: Weights) -> Weights:
        """See `RolloutEngine.load`. The live policy is checked, not copied, unless its tensors are given.

        Samples in flight go on with the new weights over the cache of the old ones.
        """
        with self._loading(weights.version):
            return self._load(weights)

    def _load(self, weights: Weights) -> Weights:
        if weights.policy is not None:
            load_exactly(self.policy.model, weights.policy, "the policy")
            self._forward.refresh()
        check_drafter(weights, self.drafter is not None)
        checksums = {"policy": checksum(self.policy.model.state_dict())}
        if self.drafter is not None:
            if weights.draft is not None:
                self.drafter.load_state_dict(weights.draft)
            checksums["draft"] = checksum(self.drafter.state_dict())
        for group, expected in weights.checksums.items():
            if checksums[group] != expected:
                raise UserError(
                    f"The {group} weights of version {weights.version} have checksum {expected}, but the engine holds "
                    f"{checksums[group]}: the transfer was partial or stale"
                )
        self._held = Weights(weights.version, checksums)
        self._detector.restart(self.counters)
        return self._held

    def metrics(self) -> dict[str, Any]:
        counted = self.drafter.metrics() if self.drafter is not None else {}
        return engine_metrics(self._held, self.counters, self.warnings, counted) | {"rule": self.rule}

    # ---- one stream ----

    def _open(self, scheduler: Scheduler, sampling: Sampling) -> None:
        longest = min(max(len(p) for p in scheduler.prompts) + sampling.max_new_tokens, self.policy.context)
        self._check_length(longest)
        positions = longest + self.k + 1  # draft positions beyond a row's budget are padding
        rows = self.slots + scheduler.prompt_rows
        self._cache = SlotCache(rows, positions, longest)
        if self.drafter is not None:
            self.drafter.open(rows, positions, self.k)

    def _check_length(self, tokens: int) -> None:
        """Raises UserError when texts would be longer than this engine can compute."""
        limit = longest_text(self.policy)
        if limit is not None and tokens > limit:
            raise UserError(
                f"Texts of '{self.policy.name}' may have up to {tokens} tokens, and the local engine computes this "
                f"model up to {limit}; lower rollout.max_new_tokens, or use rollout.engine=vllm"
            )

    def _refill(self, scheduler: Scheduler) -> None:
        """Admit waiting samples to free rows, prefilling prompts as they are needed."""
        while True:
            if chosen := scheduler.to_prefill():
                self._prefill(scheduler, chosen)
            admitted = scheduler.admit()
            if admitted is None:
                return
            self._copy(*admitted, len(scheduler.live[admitted[1]].prompt_ids) - 1)

    def _prefill(self, scheduler: Scheduler, chosen: list[int]) -> None:
        """Run all but the last token of the chosen prompts, once for all their samples."""
        for run in _neighbours(chosen, scheduler, self._forward.recurrent):
            prompts = [scheduler.prompts[p] for p in run]
            lengths = torch.tensor([len(p) for p in prompts], device=self.policy.device)
            width = int(lengths.max())
            tokens = torch.zeros(len(run), width, dtype=torch.int64, device=self.policy.device)
            for row, prompt in enumerate(prompts):
                tokens[row, : len(prompt)] = torch.tensor(prompt)
            if width == 1:  # nothing to run: a place of zeros, so that drafters need no case of their own
                states = len(self._forward.aux_layers) * self.policy.model.config.get_text_config().hidden_size
                features: Tensor | None = torch.zeros(
                    len(run), 1, states, dtype=self.policy.dtype, device=tokens.device
                )
                self._cache.states.clear(slice(scheduler.row_of(run[0]), scheduler.row_of(run[-1]) + 1))
            else:
                starts = torch.zeros_like(lengths)
                slots = SlotPass(self._cache, scheduler.row_of(run[0]), starts, width - 1, width - 1, fresh=True)
                _, features = self._forward(tokens[:, :-1], slots, head=False)
                slots.keep()
            if self.drafter is not None:
                self.drafter.prefill(scheduler.row_of(run[0]), tokens, lengths, features)

    def _round(self, scheduler: Scheduler, sampling: Sampling) -> list[tuple[int, LiveSequence]]:
        """Draft, verify and commit one round. Returns the rows that finished with their sequences."""
        self._check_not_paused()
        live = scheduler.live
        rows = self._rows(live, sampling.temperature)
        draft = self._draft(rows, live, sampling)
        n = draft.tokens.shape[1] + 1
        tokens = torch.cat([rows.last[:, None], draft.tokens], dim=1)
        end = max(s.length for s in live) + n
        tree = None if draft.parents is None else tree_places(draft, rows.lengths)
        if tree is None and self._cache.longest is not None:
            end = min(end, self._cache.longest)  # what is behind is padding
        slots = SlotPass(self._cache, 0, rows.lengths, n, end, tree=tree)
        logits, features = self._forward(tokens, slots)
        assert logits is not None
        logits = truncate(logits, rows.temperature, sampling.truncation)
        keys = round_keys(rows.lengths, n)
        accept = uniforms(rows.seeds, keys[:, :-1], Purpose.ACCEPT)
        residual = uniforms(rows.seeds, keys[:, :1], Purpose.RESIDUAL)[:, 0]
        inputs = VerifyInput(logits, draft, rows.temperature, accept, residual)
        if tree is None:
            verdict = self._verify(self._chain_rule if n > 1 else "token", inputs)  # without drafts all rules are one
        else:  # keeps the accepted path, and the features in the order of the text
            verdict = self._verify_tree(self._tree_rule, inputs)
            keep_path(self._cache, rows.lengths, verdict.path)
            features = None if features is None else along_path(features, verdict.path)
        slots.keep(verdict.accepted)
        if self.drafter is not None:
            self.drafter.learn(rows, draft, logits, verdict)
        before = [len(s.tokens) for s in live]
        finished = self._commit(live, verdict, draft, sampling)
        if self.drafter is not None:  # it observes what the samples keep: nothing beyond an end inside an accepted run
            kept = torch.tensor([len(s.tokens) - b - 1 for s, b in zip(live, before, strict=True)])
            self.drafter.observe(rows, replace(verdict, accepted=kept.to(verdict.accepted)), features)
        return finished

    def _rows(self, live: list[LiveSequence], temperature: float) -> Rows:
        device = self.policy.device
        integers = torch.tensor([(s.last, s.length, s.seed) for s in live], device=device)
        return Rows(
            integers[:, 0], integers[:, 1], integers[:, 2], torch.full((len(live),), temperature, device=device)
        )

    def _draft(self, rows: Rows, live: list[LiveSequence], sampling: Sampling) -> Draft:
        """At most k tokens per row, and none that could not be emitted: a round emits one more than it drafts."""
        nothing = Draft(rows.last.new_zeros(len(live), 0), rows.last.new_zeros(len(live)))
        if self.drafter is None:
            return nothing
        room = [min(sampling.max_new_tokens - len(s.tokens), self.policy.context - 1 - s.length) - 1 for s in live]
        budget = torch.tensor([max(0, min(self.k, r)) for r in room], device=rows.last.device)
        if int(budget.max()) == 0:
            return nothing
        draft = self.drafter.propose(rows, budget)
        check_draft(self.drafter, draft, budget, self.k, self._vocabulary)
        if draft.parents is None:
            return draft
        check_trees(self.policy)
        return draft if draft.tokens.shape[1] > 0 else nothing

    def _commit(
        self, live: list[LiveSequence], verdict: VerifyResult, draft: Draft, sampling: Sampling
    ) -> list[tuple[int, LiveSequence]]:
        finished = []
        sizes, deepest = draft.lengths.tolist(), depths(draft).tolist()
        accepted, tokens, logprobs = verdict.accepted.tolist(), verdict.tokens.tolist(), verdict.logprobs.tolist()
        for row, sequence in enumerate(live):
            sequence.rounds += 1
            before = len(sequence.tokens)
            for token, logprob in zip(tokens[row][: accepted[row] + 1], logprobs[row], strict=False):
                sequence.tokens.append(token)
                sequence.logprobs.append(logprob)
                sequence.versions.append(self._held.version)
                sequence.drafted.append(len(sequence.tokens) - before <= accepted[row])
                sequence.finish_reason = self._finish_reason(sequence, token, sampling)
                if sequence.finish_reason:
                    finished.append((row, sequence))
                    break
            self._count(sizes[row], deepest[row], len(sequence.tokens) - before, accepted[row])
        self._warn_of_collapse()
        return finished

    def _finish_reason(self, sequence: LiveSequence, token: int, sampling: Sampling) -> str:
        if token in self._eos_ids and not sampling.ignore_eos:
            return "eos"
        if sampling.stop and ends_with_stop(self.policy, sequence.tokens, sampling.stop):
            return "stop"
        if len(sequence.tokens) >= sampling.max_new_tokens:
            return "length"
        return "context" if sequence.length + 1 >= self.policy.context else ""

    def _count(self, size: int, depth: int, emitted: int, accepted: int) -> None:
        """One row's round: `size` tokens were drafted; positions are depths, of which a chain has `size`."""
        c = self.counters
        c.tokens += emitted
        c.rows += 1
        if size == 0:
            return
        c.rounds += 1
        c.round_tokens += emitted
        c.drafted += size
        for position in range(depth):
            c.drafted_at[position] += 1
            c.accepted_at[position] += position < min(accepted, emitted)

    def _release(self, scheduler: Scheduler, finished: list[tuple[int, LiveSequence]]) -> None:
        """Give each finished row to the next waiting sample, or close the gap with the last live row."""
        for row, _ in reversed(finished):
            admitted = scheduler.admit(row)
            if admitted is not None:
                self._copy(*admitted, len(scheduler.live[row].prompt_ids) - 1)
            elif (moved := scheduler.vacate(row)) is not None:
                self._copy(moved, row, scheduler.live[row].length)

    def _copy(self, source: int, target: int, length: int) -> None:
        self._cache.copy(source, target, length)
        if self.drafter is not None:
            self.drafter.copy(source, target)


def _neighbours(chosen: list[int], scheduler: Scheduler, same_length: bool) -> list[list[int]]:
    """Split prompts into runs whose cache rows follow one another, and that have the same length where they must."""

    def fits(prompt: int, last: int) -> bool:
        lengths = {len(scheduler.prompts[p]) for p in (prompt, last)}
        return scheduler.row_of(prompt) == scheduler.row_of(last) + 1 and (len(lengths) == 1 or not same_length)

    runs: list[list[int]] = []
    for prompt in chosen:
        if runs and fits(prompt, runs[-1][-1]):
            runs[-1].append(prompt)
        else:
            runs.append([prompt])
    return runs
