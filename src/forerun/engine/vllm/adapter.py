"""A `RolloutEngine` that runs vLLM in this process.

Every step of vLLM's scheduler gives each live request the tokens of one round. Log-probabilities are vLLM's processed
ones: of the row that verified the token, at the sampling temperature (0: of the unscaled distribution).
Randomness: each request has its own seed for acceptance and residual draws; sampled drafts come from one stream per
call. Results depend on the seed and on how vLLM batched. Not supported: tensor parallelism, adapters.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch

from forerun.config import SpeculationConfig
from forerun.drafters import Drafter
from forerun.engine.base import (
    Requests,
    RolloutEngine,
    Sampling,
    Weights,
    check_request,
    ends_with_stop,
    engine_metrics,
    nothing,
    requested,
)
from forerun.engine.local.scheduler import LiveSequence, request_seed
from forerun.engine.vllm.in_process import device, own_process, random_state
from forerun.engine.vllm.metrics import SpecDecodeMetrics, VllmRequest
from forerun.engine.vllm.patches import ensure_exact, let_scan_pass
from forerun.engine.vllm.settings import CUSTOM, check, translate
from forerun.engine.vllm.sleep import LEVELS
from forerun.engine.vllm.state import Given, WeightVersionState
from forerun.errors import UserError
from forerun.models import Policy
from forerun.models.checksum import checksum
from forerun.models.load import describe_policy, policy_folder, resolve_dtype, save_policy
from forerun.types import Rollout
from forerun.workers.weights import check_groups, shapes

BROKEN = "The engine's weights are neither the old nor the new ones"
COOLEST = 0.01  # vLLM raises lower temperatures to this one
OPEN: WeakSet[VllmEngine] = WeakSet()  # of this process


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes of an engine."""

    slots: int = 32  # sequences decoded side by side
    context: int | None = None  # positions per sequence; None: as many as the policy was made for
    cache_gib: float | None = None  # of KV cache; None: 2 on a CPU, vLLM's own choice on a GPU
    sleep: bool = False  # whether it may sleep; on a GPU vLLM then allocates in another way, for one engine a process


class VllmEngine(RolloutEngine):
    """An engine that keeps its own copy of the weights, in vLLM."""

    def __init__(
        self,
        policy: str,
        speculation: SpeculationConfig | None = None,
        *,
        dtype: str = "auto",
        limits: Limits | None = None,
    ) -> None:
        """An engine for a policy: folder, alias or shipped artifact. dtype: as for `load_policy`.

        Raises UserError when vLLM is not installed, or cannot run this policy or this speculation block.
        """
        self.speculation, self.limits = speculation or SpeculationConfig(), limits or Limits()
        self.k = self.speculation.tokens
        drafter = check(self.speculation) if self.k else None
        super().__init__(describe_policy(policy_folder(policy)), self.k)
        self.context = min(self.limits.context or self.policy.context, self.policy.context)
        self.patches = True  # whether vLLM's faults are patched; `forerun verify` has to find them
        self._stats = SpecDecodeMetrics(self.counters)
        self._asleep: dict[str, str] | None = None  # fingerprints of the weights that it keeps asleep
        self._custom_proposer = False  # whether a class of this package drafts, in vLLM's worker
        self._counted: dict[str, int] = {}  # `Drafter.metrics` when the engine was closed
        self._random = torch.Generator().get_state()
        self._requests = 0
        self._submit_more: Callable[[Requests], None]  # to the stream under way
        with tempfile.TemporaryDirectory() as scratch:
            source = policy_folder(policy)
            draft = None
            if drafter is not None:
                draft = drafter.vllm_files(self.speculation, self.policy, source, Path(scratch))
            self._state = WeightVersionState({"policy": shapes(self.policy.model.state_dict())})
            if self.k:
                self._state.groups["draft"] = shapes(draft[1] if draft is not None else {})  # none: nothing is stale
            foreign = "model" in (self.speculation.vllm or {})  # vLLM's own drafter, which nothing keeps aligned
            self._detector.watches = bool(self._state.groups.get("draft")) or foreign
            number_format = str(resolve_dtype(dtype, device()))[6:]
            self._rule = self._start(source, draft[0] if draft is not None else None, number_format)

    @classmethod
    def from_live(
        cls,
        policy: Policy,
        drafter: Drafter | None = None,
        speculation: SpeculationConfig | None = None,
        slots: int = 32,
        *,
        limits: Limits | None = None,
    ) -> VllmEngine:
        """An engine that starts with the weights of a live policy and drafter, through a temporary folder.

        `limits` takes the place of `slots`.

        Raises UserError as the constructor, or when there is a drafter and no block that speculates.
        """
        block = speculation if speculation and drafter is not None else SpeculationConfig()
        if drafter is not None and not block.tokens:
            raise UserError(f"speculation.method={block.method} and a drafter: give both, or neither")
        with tempfile.TemporaryDirectory() as scratch:
            save_policy(policy, Path(scratch) / "policy")
            if drafter is not None:
                drafter.save(Path(scratch) / "drafter", {})
                block = block.model_copy(update={"draft": str(Path(scratch) / "drafter")})
            engine = cls(
                str(Path(scratch) / "policy"), block, dtype=str(policy.dtype)[6:], limits=limits or Limits(slots)
            )
        groups = {"policy": checksum(policy.model.state_dict())}
        if drafter is not None:
            groups["draft"] = checksum(drafter.state_dict())
        engine._state.take(Weights(0, groups))
        return engine

    @classmethod
    def from_folder(cls, policy: str, dtype: str, speculation: SpeculationConfig, slots: int) -> VllmEngine:
        return cls(policy, speculation, dtype=dtype, limits=Limits(slots=slots))

    @property
    def rule(self) -> str:
        return self._rule

    # ---- the contract ----

    def stream(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        n: int = 1,
        only: Requests | None = None,
        between: Callable[[], None] = nothing,
    ) -> Iterator[Rollout]:
        """See `RolloutEngine.stream`. One stream at a time: they would share the counters."""
        self._check_not_running()
        self._check(prompts, sampling, n)
        if self.k and sampling.temperature > 0 and self.patches:
            ensure_exact(device().type == "cpu")
        if self._custom_proposer:
            self._vllm.collective_rpc("forerun_open")
        live: dict[str, VllmRequest] = {}
        self._submit_more = lambda requests: self._submit(prompts, sampling, requests, live)
        with self._streaming(lambda: self._state.held.version) as record:
            try:
                self._random = torch.Generator().manual_seed(sampling.seed).get_state()
                self._submit(prompts, sampling, requested(len(prompts), n, only), live)
                while live:
                    between()
                    finished = self._round(live, sampling)
                    record(len(live))
                    yield from (sample.sequence.rollout() for sample in finished)
            finally:
                self._vllm.abort_request(list(live))

    def extend(self, requests: Requests) -> bool:
        """See `RolloutEngine.extend`."""
        if self._running:
            self._submit_more(requests)
        return self._running

    def load(self, weights: Weights) -> Weights:
        """See `RolloutEngine.load`: with tensors, or only checksums where it holds these bytes already.

        A refused version leaves the engine as it was. Samples in flight go on with the new weights, their cache
        recomputed.
        """
        if self._asleep is not None:
            raise UserError(f"The engine is asleep; call wake() before it takes version {weights.version}")
        with self._loading(weights.version):
            given = self._state.check(weights)
            if given:
                if not weights.checked:
                    check_groups(given, weights.checksums)
                self._send(given)
            self._detector.restart(self.counters)
            return self._state.take(weights)

    def sleep(self, level: int = 1) -> None:
        """Free memory until `wake`: the KV cache, and at level 2 the weights of policy and drafter.

        Level 1 keeps the weights in host memory. After level 2 the engine holds no version: once awake it must `load`
        one with the tensors of every group, not older than the one it held.

        Raises:
            UserError: the level is neither 1 nor 2, a stream is open, or the engine sleeps or was not made to sleep.
        """
        self._check_sleep(level)
        self._asleep = self._vllm.collective_rpc("forerun_fingerprints")[0] if level == 1 else {}
        if device().type == "cpu":
            self._vllm.reset_prefix_cache()
            self._vllm.collective_rpc("forerun_sleep", args=(level,))
        else:
            self._vllm.sleep(level)
        if level == 2:
            self._state.discard()

    def wake(self) -> None:
        """Allocate the memory again; acceptance is checked as after a load. Does nothing to an engine that is awake.

        Raises UserError when the weights are not those that it went to sleep with (level 1): load a version again.
        """
        if self._asleep is None:
            return
        if device().type == "cpu":
            self._vllm.collective_rpc("forerun_wake")
        else:
            self._vllm.wake_up()
        before, self._asleep = self._asleep, None
        self._detector.restart(self.counters)
        after = self._vllm.collective_rpc("forerun_fingerprints")[0] if before else {}
        if changed := [group for group in before if before[group] != after.get(group)]:
            self._state.lose(f"The engine woke with other weights of the {' and the '.join(changed)}")
            self._state.require()

    def metrics(self) -> dict[str, Any]:
        """See `RolloutEngine.metrics`; the version is None while none is held."""
        found = engine_metrics(self._state.held, self.counters, self.warnings, self._drafter_metrics())
        if self._state.version is None:
            found |= {"version": None, "checksums": {}}
        return {**found, "rule": self.rule}

    def close(self) -> None:
        """Free vLLM's memory. Process groups are shared: the last engine of the process destroys them."""
        self._counted = self._drafter_metrics()
        core = self._vllm.engine_core.engine_core
        OPEN.discard(self)
        if OPEN:
            core.model_executor.shutdown()
            core.scheduler.shutdown()
            gc.unfreeze()
        else:
            core.shutdown()
        del self._vllm

    # ---- vLLM ----

    def _start(self, folder: Path, draft: Path | None, dtype: str) -> str:
        """Start vLLM; returns the acceptance rule in force."""
        try:
            with own_process():
                from vllm import EngineArgs
                from vllm.v1.engine.llm_engine import LLMEngine
                from vllm.v1.executor import Executor

                let_scan_pass()
                wanted = translate(self.speculation, draft, block=True)
                arguments = self._arguments(folder, dtype)
                settings = EngineArgs(
                    **arguments, speculative_config=wanted.config, additional_config=wanted.additional
                )
                config = settings.create_engine_config()
                if wanted.rule == "block" and not config.use_v2_model_runner:  # it would disable sampled drafts
                    config.speculative_config.rejection_sample_method = "standard"
                    wanted = translate(self.speculation, draft, block=False)
                self._vllm = LLMEngine(
                    config, Executor.get_class(config), log_stats=True, stat_loggers=[lambda *_: self._stats]
                )
        except ImportError as error:
            raise UserError(f"The vLLM engine needs vLLM: {error}; see docs/vllm.md for the install") from error
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise UserError(f"vLLM cannot run '{folder}': {str(error).strip().splitlines()[0]}") from error
        self._vllm.engine_core._finalizer.detach()  # it would destroy the process groups of other engines
        OPEN.add(self)
        self._custom_proposer = wanted.config is not None and wanted.config["method"] == CUSTOM
        if self._custom_proposer:
            self._vllm.collective_rpc("forerun_attach")
        self.warnings += wanted.notes
        return wanted.rule

    def _arguments(self, folder: Path, dtype: str) -> dict[str, Any]:
        gib = self.limits.cache_gib
        if gib is None and device().type == "cpu":
            gib = 2.0
        return {
            "model": str(folder),
            "dtype": dtype,
            # with room for a draft beyond the end: where one sample has none, vLLM drafts for none of the batch
            "max_model_len": min(self.context + self.k + 1, self.policy.context),
            "max_num_seqs": self.limits.slots,
            "enforce_eager": device().type == "cpu",
            "enable_sleep_mode": self.limits.sleep and device().type != "cpu",
            "async_scheduling": False,
            # samples share the whole blocks of their prompt; vLLM's own 128 on a CPU is longer than many prompts
            "block_size": 32 if device().type == "cpu" else None,
            "kv_cache_memory_bytes": None if gib is None else int(gib * 2**30),
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",  # not its sampling defaults; its end tokens are set per request
            "worker_extension_cls": "forerun.engine.vllm.worker.WeightReceiver",
            "per_request_spec_decode_metrics": "detailed" if self.k else "none",
            "use_tqdm_on_load": False,
            "seed": 0,
        }

    def _submit(
        self, prompts: Sequence[list[int]], sampling: Sampling, requests: Requests, live: dict[str, VllmRequest]
    ) -> None:
        for index, sample in requests:
            prompt, seed = prompts[index], request_seed(sampling.seed, index, sample)
            self._requests += 1
            name = str(self._requests)
            room = min(sampling.max_new_tokens, self.context - len(prompt))
            self._vllm.add_request(name, {"prompt_token_ids": prompt}, self._parameters(sampling, seed, room))
            live[name] = VllmRequest(LiveSequence(prompt, index, sample, seed))

    def _parameters(self, sampling: Sampling, seed: int, room: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=room,
            temperature=sampling.temperature,
            seed=seed,
            logprobs=0,  # of the sampled token alone
            ignore_eos=sampling.ignore_eos,
            stop_token_ids=[] if sampling.ignore_eos else sorted(self.policy.eos_ids),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def _round(self, live: dict[str, VllmRequest], sampling: Sampling) -> list[VllmRequest]:
        """One step of vLLM. Finished samples leave `live`."""
        self._check_not_paused()
        with random_state(self._random):
            outputs = self._vllm.step()
            self._random = torch.get_rng_state()
        finished = []
        for output in outputs:
            if self._take(live[output.request_id], output, sampling):
                finished.append(live.pop(output.request_id))
        self._warn_of_collapse()
        return finished

    def _take(self, sample: VllmRequest, output: Any, sampling: Sampling) -> bool:
        """Add one request's tokens of this step; whether the sample is done."""
        new, sequence = output.outputs[0], sample.sequence
        before = len(sequence.tokens)
        sample.add(new.token_ids, new.logprobs, self._state.held.version)
        reason = self._stopped(sample, before, sampling) or _reason(sequence, new.finish_reason, sampling)
        if reason:
            sequence.finish_reason = reason
            sample.settle(new.spec_decode_metrics, self.counters)
            if new.finish_reason is None:
                self._vllm.abort_request([output.request_id])
        self.counters.tokens += len(sequence.tokens) - before
        self.counters.rows += 1
        return bool(reason)

    def _stopped(self, sample: VllmRequest, before: int, sampling: Sampling) -> str:
        """Cut the sample after the token that completes a stop string."""
        if not sampling.stop:
            return ""
        tokens = sample.sequence.tokens
        for length in range(before + 1, len(tokens) + 1):
            if tokens[length - 1] in self.policy.eos_ids and not sampling.ignore_eos:
                return ""
            if ends_with_stop(self.policy, tokens[:length], sampling.stop):
                sample.cut(length)
                return "stop"
        return ""

    def _send(self, given: Given) -> None:
        """vLLM's worker is in this process: it reads these very tensors."""
        try:
            arguments = (given, self.speculation.fixed_draft_temperature)
            agreed = self._vllm.collective_rpc("forerun_load", args=arguments)[0]
        except UserError:  # the old weights stay
            raise
        except Exception as error:
            self._state.lose(BROKEN)
            raise UserError(f"vLLM failed while it took the weights over: {error}; load a version again") from error
        if idle := [group for group, state in given.items() if state and not agreed.get(group)]:
            self._state.lose(BROKEN)
            raise UserError(f"vLLM took no parameter of the {' and the '.join(idle)} over; load a version again")
        if not self._vllm.reset_prefix_cache(reset_running_requests=True):
            self._state.lose(BROKEN)
            raise UserError("vLLM kept key-value entries of the old weights; close its streams before a load")

    def _drafter_metrics(self) -> dict[str, int]:
        """Also after the engine was closed."""
        if not self._custom_proposer or self not in OPEN:
            return self._counted
        return self._vllm.collective_rpc("forerun_drafter_metrics")[0]

    # ---- checks ----

    def _check_sleep(self, level: int) -> None:
        if level not in LEVELS:
            raise UserError(f"Sleep level {level}: there are levels {LEVELS[0]} and {LEVELS[1]}")
        if not self.limits.sleep:
            raise UserError("The engine was not made to sleep; start it with Limits(sleep=True)")
        if self._asleep is not None:
            raise UserError("The engine is asleep already; call wake() first")
        if self._running:
            raise UserError("The engine is generating; finish or close its stream before it sleeps")

    def _check(self, prompts: Sequence[list[int]], sampling: Sampling, n: int) -> None:
        if self._asleep is not None:
            raise UserError("The engine is asleep; call wake() before it generates")
        self._state.require()
        if 0 < sampling.temperature < COOLEST:
            raise UserError(
                f"Temperature {sampling.temperature}: vLLM samples at 0 or at {COOLEST} and above, not between"
            )
        if sampling.truncation:
            raise UserError(f"{sampling.truncation}: the vLLM engine samples from the whole distribution")
        vocabulary = self.policy.model.config.get_text_config().vocab_size
        check_request(prompts, sampling, n, vocabulary, self.context)


def _reason(sample: LiveSequence, reason: str | None, sampling: Sampling) -> str:
    """vLLM's finish reason as the contract's; "" for none."""
    if reason not in (None, "stop", "length"):
        raise UserError(f"vLLM ended sample {sample.sample_index} of prompt {sample.prompt_index} with '{reason}'")
    if reason == "length":
        return "length" if len(sample.tokens) >= sampling.max_new_tokens else "context"
    return "" if reason is None else "eos"
