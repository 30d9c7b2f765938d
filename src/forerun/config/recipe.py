"""The typed configuration. A recipe is YAML; `dotted.key=value` overrides follow; unknown keys are refused.

Every field, defaults included, is written to `config.resolved.yaml` of a run. Neither data nor models are read here:
whether a path exists is checked by the module that opens it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from forerun.config.block import Block, PathText, known_to
from forerun.config.drafters import DrafterConfig, GraftConfig, NgramConfig, TrieConfig
from forerun.config.messages import sentence
from forerun.config.task import ColdStartConfig, PolicyConfig, TaskConfig
from forerun.registry import DRAFTERS, ENGINES
from forerun.tracking.trackers import TRACKERS


class SpeculationConfig(Block):
    """One block for trainer, engine and simulator alike."""

    method: Annotated[str, known_to(DRAFTERS, "none")] = Field(
        "none",
        description="none, eagle3, mtp, ngram, trie, model, graft; vllm: a drafter of vLLM's own, e.g. suffix decoding "
        "or DFlash, which `vllm` describes; or package.module:Class of another one",
    )
    draft: PathText | None = Field(
        None,
        description="eagle3, mtp, graft: folder or shipped artifact of the drafter, null: train one first; mtp: also "
        "the folder of a policy that carries its heads; model: folder or "
        "hub name of a smaller model; trie: folder of a saved corpus, null: begin empty; ngram: not read",
    )
    k: int | Literal["auto"] = Field(
        3, description="tokens drafted per round; graft: above 0, the size of the tree is graft.nodes"
    )
    verify: Literal["block", "token"] = Field(
        "block", description="acceptance rule at temperature > 0; graft: trees are verified by the target-only walk"
    )
    proposal: Literal["sampled", "argmax"] = Field(
        "sampled", description="argmax: the likeliest token with a one-hot q (usual elsewhere, worse at temperature 1)"
    )
    draft_temperature: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        1.0,
        description="temperature of sampled drafts over that of the rollouts: below 1 for an unsure drafter; auto: "
        "tuned while drafting (eagle3, mtp, model)",
    )
    train: str = Field(
        "off",
        description="whether the drafter is co-trained with the policy (eagle3, mtp): off; every-N: after every N "
        "steps; drift: after a step in which its acceptance had fallen, see draft.drift_share",
    )
    ngram: NgramConfig = NgramConfig()
    trie: TrieConfig = TrieConfig()
    graft: GraftConfig = GraftConfig()
    settings: dict[str, Any] = Field(
        default_factory=dict, description="settings of a drafter that has no group of its own here, see its `Config`"
    )
    vllm: dict[str, Any] = Field(
        default_factory=dict,
        description="entries of vLLM's speculative_config that are handed on as they are, e.g. "
        "num_speculative_tokens_per_batch_size; method: vllm: its method, and its model if it has one",
    )

    @model_validator(mode="after")
    def _check(self) -> SpeculationConfig:
        if self.method == "vllm" and "method" not in self.vllm:
            raise ValueError("method: vllm needs the name of a drafter of vLLM's, e.g. vllm: {method: suffix}")
        if self.k == "auto":
            raise ValueError("k: auto needs the row budget, which this version does not have; set a number, e.g. k: 4")
        if not 0 <= self.k <= 32:
            raise ValueError(f"k must lie between 0 and 32, not {self.k}")
        if self.train != "off" and not self._has("cotrains"):
            names = ", ".join(DRAFTERS.with_trait("cotrains"))
            raise ValueError(f"train: {self.train} needs a drafter that learns beside the policy ({names})")
        if self.draft_temperature == "auto" and not self._has("samples"):
            names = ", ".join(DRAFTERS.with_trait("samples"))
            raise ValueError(
                f"draft_temperature: auto learns from sampled drafts ({names}), and method: {self.method} "
                "samples none; leave it at 1"
            )
        if self.draft_temperature == "auto" and self.proposal != "sampled":
            raise ValueError(
                f"draft_temperature: auto learns from sampled drafts, and proposal: {self.proposal} samples none; set "
                "proposal: sampled, or a number"
            )
        if self.settings:
            self._check_settings()
        return self

    def _has(self, trait: str) -> bool:
        """Whether the drafter's class has a trait; imports it, and with it torch. True where speculation is off."""
        return self.method == "none" or bool(getattr(DRAFTERS.load(self.method), trait))

    def _check_settings(self) -> None:
        """Raises ValueError when `settings` is not for this drafter, or does not fit its `Config`."""
        config = None if self.method == "none" or self._own is not None else DRAFTERS.load(self.method).Config
        if config is None:
            raise ValueError(f"settings is not read by method: {self.method}; leave it out")
        try:
            config.model_validate(self.settings)
        except ValidationError as error:
            raise ValueError(f"settings: {sentence(error, config)}") from None

    @property
    def _own(self) -> DrafterConfig | None:
        """The group of settings with the drafter's name."""
        block = getattr(self, self.method, None)
        return block if isinstance(block, DrafterConfig) else None

    @field_validator("train", mode="before")
    @classmethod
    def _train(cls, value: Any) -> Any:
        value = "off" if value is False else value  # YAML 1.1 reads a bare off as false
        if not isinstance(value, str) or not re.fullmatch(r"off|drift|every-[1-9][0-9]*", value):
            raise ValueError("train must be off, drift or every-N, e.g. every-5")
        return value

    @property
    def tokens(self) -> int:
        """Draft tokens per round, of a tree its nodes; 0 when speculation is off."""
        if self.method == "none" or isinstance(self.k, str):
            return 0
        return self.k if self._own is None else self._own.draft_tokens(self.k)

    @property
    def fixed_draft_temperature(self) -> float:
        """`draft_temperature` as a number: 1 where it is tuned online."""
        return 1.0 if self.draft_temperature == "auto" else self.draft_temperature


class RolloutConfig(Block):
    engine: Annotated[str, known_to(ENGINES)] = Field(
        "local", description="local, vllm, or package.module:Class of another one"
    )
    slots: int = Field(32, ge=1, description="sequences decoded side by side, by every replica")
    replicas: int = Field(
        0, ge=0, description="engines in processes of their own, with a GPU each, and replaced; 0: one, in this process"
    )
    silence_s: float = Field(120.0, gt=0, description="heartbeat timeout of a replica, after which it is replaced")
    max_new_tokens: int = Field(256, ge=1)
    temperature: float = Field(1.0, ge=0)
    stop: list[str] = Field(default_factory=list, description="strings that end a completion (kept in it)")
    mismatch_warn: float = Field(
        0.05, gt=0, description="mismatch/kl, in nats per token, above which a run warns: rounding makes up to 0.02"
    )
    mismatch_stop: float = Field(
        0.5, gt=0, description="mismatch/kl above which steps are counted: engines of another model make 1 to 2"
    )
    mismatch_steps: int = Field(3, ge=1, description="so many steps in a row above mismatch_stop end the run")


class LoraConfig(Block):
    """Low-rank adapters in place of the policy's weights (2106.09685), see `learner/lora.py`."""

    rank: int = Field(16, ge=1)
    alpha: float | None = Field(
        None, gt=0, description="the product of the matrices counts alpha / rank times; null: twice the rank"
    )
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = Field(
        "all-linear",
        description="names of linear layers, or their ends, e.g. [q_proj, v_proj]; all-linear: all but the head",
    )
    seed: int = Field(0, description="of the matrices that do not start at zero")

    @property
    def scale(self) -> float:
        """Factor of the matrices' product."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


class TrainConfig(Block):
    algorithm: Annotated[str, known_to("forerun.algorithms:ALGORITHMS")] = Field(
        "grpo", description="advantages and loss: grpo, dr_grpo, gspo, an entry point or package.module:NAME"
    )
    steps: int = Field(100, ge=0)
    prompts_per_step: int = Field(8, ge=1)
    samples_per_prompt: int = Field(8, ge=2)
    learning_rate: float = Field(1e-6, gt=0)
    warmup: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="sgd: for few samples per update; a rate near 0.03")
    betas: tuple[float, float] = Field((0.9, 0.99), description="adamw")
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd")
    max_grad_norm: float = Field(1.0, gt=0)
    max_skipped_updates: int = Field(
        5,
        ge=1,
        description="updates in a row, skipped because loss or gradient is not finite, that end the run: every step "
        "has new rollouts, so five in a row are no accident",
    )
    updates_per_step: int = Field(1, ge=1, description="optimizer steps per batch of rollouts")
    clip_low: float = Field(0.2, gt=0)
    clip_high: float = Field(0.2, gt=0)
    correction: Literal["token_tis", "sequence_mask", "icepop", "none"] = Field(
        "token_tis",
        description="weight of a token by the ratio of its probabilities, learner over engine: token_tis: the ratio, "
        "at most importance_cap; icepop: the ratio, 0 outside importance_band; sequence_mask: token_tis, 0 in "
        "sequences whose geometric mean ratio is outside importance_band; none: 1",
    )
    importance_cap: float = Field(2.0, ge=1, description="bound of the learner/engine probability ratio per token")
    importance_band: tuple[float, float] | None = Field(
        None, description="least and largest ratio; null: 0.5 and 5 for icepop, 0.9 and 1.1 for sequence_mask"
    )
    kl: float = Field(0.0, ge=0, description="weight of the k3 estimate of KL(policy || reference)")
    normalize_std: bool = Field(
        True, description="divide advantages by the group's standard deviation (dr_grpo never does)"
    )
    microbatch_tokens: int = Field(4096, ge=1, description="padded tokens per forward and backward pass")
    packing: bool = Field(False, description="all sequences of a pass in one row, each attending to itself: no padding")
    gradient_checkpointing: bool = Field(False, description="recompute layers in the backward pass: less memory")
    lora: LoraConfig | None = Field(None, description="train an adapter alone; null: all weights")
    ranks: int = Field(
        1, ge=1, description="processes over which the learner is sharded (FSDP2), one per GPU; 1: in this process"
    )
    tensor_parallel: int = Field(
        1, ge=1, description="of the ranks, how many share each layer's matrices and run the same rows; divides them"
    )
    silence_s: float = Field(300.0, gt=0, description="with ranks: heartbeat timeout, after which they are given up")

    @property
    def data_parallel(self) -> int:
        """Groups of ranks that run rows of their own."""
        return self.ranks // self.tensor_parallel

    @property
    def band(self) -> tuple[float, float]:
        """Least and largest ratio that the correction lets through."""
        return self.importance_band or ((0.9, 1.1) if self.correction == "sequence_mask" else (0.5, 5.0))

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        low, high = self.band
        if not 0 <= low < 1 < high:
            raise ValueError(
                f"importance_band {[low, high]} leaves out the ratio 1 of tokens that the policy itself sampled; set "
                "the first below 1 and the second above"
            )
        if self.importance_band is not None and self.correction not in ("icepop", "sequence_mask"):
            raise ValueError(
                f"importance_band is for correction: icepop and sequence_mask, not for {self.correction}; leave it out"
            )
        return self


class EvalConfig(Block):
    every: int = Field(10, ge=0, description="steps between held-out evaluations; 0: only at start and end")
    prompts: int = Field(64, ge=0, description="held-out problems; 0: no evaluation")
    samples: int = Field(1, ge=1, description="completions per problem")
    temperature: float | None = Field(None, ge=0, description="null: as in rollouts")
    slots: int | None = Field(
        None,
        ge=1,
        description="of the local engine: decode plainly, so many at once (a full machine needs no drafts); null, and "
        "other engines: as in rollouts",
    )


class LoopConfig(Block):
    lag: int = Field(0, ge=0, description="weight versions that generation may run ahead; 0: synchronous")
    in_flight: bool = Field(False, description="with lag: weights change between two rounds of a sample")


class CompareConfig(Block):
    """Plain generation of the same prompts, timed in the same run as the speculative one."""

    steps: int = Field(0, ge=0, description="steps, spread over the run, whose prompts are also generated plainly")


class CheckpointConfig(Block):
    every: int = Field(10, ge=0, description="steps between checkpoints; 0: only when the run ends before its time")
    keep: int = Field(2, ge=1, description="newest checkpoints that are kept; with 1 a broken one has none before it")
    restarts: int = Field(
        3,
        ge=0,
        description="times that a run which lost replicas or ranks resumes from one checkpoint automatically",
    )


class ClusterConfig(Block):
    """Rollout replicas, and the learner's ranks, as Ray actors on any machine of a cluster."""

    address: str = Field(
        "none",
        description="none: processes of this machine; auto: the Ray cluster that this machine belongs to; local: a "
        "private Ray on this machine; else Ray's address, host:port or ray://host:port",
    )
    gpus_per_replica: float = Field(
        0.0, ge=0, description="that Ray reserves for a replica, a share where replicas share one; 0 on CPUs alone"
    )
    cpus_per_replica: float = Field(1.0, gt=0, description="that Ray reserves for a replica; also its threads")
    gpus_per_rank: int = Field(0, ge=0, le=1, description="that Ray reserves for a rank of train.ranks")
    cpus_per_rank: float = Field(1.0, gt=0, description="that Ray reserves for a rank; also its threads")
    placement: Literal["PACK", "SPREAD"] = Field(
        "PACK",
        description="PACK: replicas, and ranks, on as few machines as hold them; SPREAD: on as many as there are",
    )


class DraftConfig(Block):
    """Training of the drafter (`forerun draft`)."""

    rollouts: int = Field(512, ge=1, description="samples of the policy to train on")
    texts: PathText | None = Field(
        None,
        description="JSONL to train on in place of samples: objects with prompt and completion, or with text alone",
    )
    epochs: int = Field(4, ge=1, description="passes over the training data, at most")
    patience: int = Field(4, ge=1, description="epochs in a row without a better validation after which training ends")
    learning_rate: float = Field(1e-3, gt=0)
    batch_tokens: int = Field(4096, ge=64, description="tokens per optimizer step")
    depth: int = Field(4, ge=1, description="training-time-test unroll, in draft positions")
    decay: float = Field(1.0, gt=0, le=1, description="weight of each further draft position in the loss")
    loss: Literal["lk", "kl", "tv", "ce", "e2e"] = Field(
        "lk",
        description="lk: forward KL that fades into total variation; kl, tv: either alone; ce: cross-entropy to the "
        "tokens themselves; e2e: total variation of the whole chain, for drafters that are good already",
    )
    vocab: int = Field(8192, ge=16, description="eagle3, mtp: how many tokens are drafted, the most frequent first")
    layers: list[int] | None = Field(
        None, description="eagle3: hidden states that are fused (inputs of these layers); model: layers that are kept"
    )
    intermediate: int | None = Field(None, description="width of the drafter's MLP; null: the policy's")
    mtp_layers: int = Field(1, ge=1, description="mtp: layers, one per draft position; the last one is applied again")
    cache_gib: float = Field(
        2.0,
        ge=0,
        description="memory for the policy's outputs; beyond it the policy runs again every epoch, and in co-training "
        "(all ranks together) tokens are skipped",
    )
    validation: float = Field(0.1, gt=0, lt=1, description="share of rollouts kept for validation")
    online_learning_rate: float = Field(1e-4, gt=0, description="of co-training (speculation.train)")
    online_max_grad_norm: float = Field(0.5, gt=0, description="of co-training")
    drift_share: float = Field(
        0.05, gt=0, lt=1, description="train: drift: fall of acceptance, at matched entropy, that starts an update"
    )
    drift_window: int = Field(4, ge=1, description="steps that set the reference level, and over which it is smoothed")


class Recipe(Block):
    """A whole run."""

    name: str = "run"
    seed: int = 0
    runs: PathText = Field("runs", description="folder in which run folders are made")
    trackers: list[Annotated[str, known_to(TRACKERS)]] = Field(
        default_factory=list,
        description="experiment trackers, in addition to the run folder: names of entry points, or package.module:Name",
    )
    policy: PolicyConfig
    task: TaskConfig
    cold_start: ColdStartConfig | None = None
    speculation: SpeculationConfig = SpeculationConfig()
    draft: DraftConfig = DraftConfig()
    rollout: RolloutConfig = RolloutConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    loop: LoopConfig = LoopConfig()
    compare: CompareConfig = CompareConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if (self.speculation.method == "vllm" or self.speculation.vllm) and self.rollout.engine != "vllm":
            raise ValueError(
                f"speculation.vllm is for vLLM alone, and rollout.engine is {self.rollout.engine}; set it to vllm"
            )
        if self.train.ranks > 1 and self.train.lora is not None:
            raise ValueError(
                f"train.lora trains an adapter in one process, and train.ranks={self.train.ranks} shards the policy; "
                "set train.ranks=1 or train.lora=null"
            )
        if self.train.ranks % self.train.tensor_parallel:
            raise ValueError(
                f"train.tensor_parallel={self.train.tensor_parallel} does not divide train.ranks={self.train.ranks}; "
                "set train.ranks to a multiple of it"
            )
        if self.cold_start is not None and self.policy.adapter is not None:
            raise ValueError("cold_start trains an adapter and policy.adapter loads one: keep one of the two")
        if self.loop.lag and not self.rollout.replicas:
            raise ValueError(
                f"loop.lag={self.loop.lag} needs engines with weights of their own, and rollout.replicas is 0; set it "
                "to 1"
            )
        if self.loop.lag and self.compare.steps:
            raise ValueError(
                f"loop.lag={self.loop.lag} keeps the engine busy, and compare.steps={self.compare.steps} needs it to "
                "itself; set compare.steps=0"
            )
        if self.cluster.address != "none" and not self.rollout.replicas and self.train.ranks == 1:
            raise ValueError(
                f"cluster.address={self.cluster.address} places replicas and ranks, and rollout.replicas is 0 and "
                "train.ranks is 1; set one of them higher"
            )
        if self.cluster.address != "none" and self.rollout.replicas and self.compare.steps:
            raise ValueError(
                f"compare.steps={self.compare.steps} would take as many replicas of the cluster again; set "
                "compare.steps=0"
            )
        if self.loop.in_flight and not self.loop.lag:
            raise ValueError("loop.in_flight=true changes weights while sampling goes on, which loop.lag=0 never does")
        return self

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
