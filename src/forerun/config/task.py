"""Settings of the policy, the task with its data and rewards, and the cold start; `recipe.py` puts them together."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, FiniteFloat, model_validator

from forerun.config.block import Block, DType, PathText


class PolicyConfig(Block):
    model: PathText = Field(description="folder or hub name of a Hugging Face causal language model, or a known alias")
    adapter: PathText | None = Field(
        None, description="LoRA folder or shipped artifact that is merged into the policy on load"
    )
    dtype: DType = Field("auto", description="auto: bfloat16 where the hardware multiplies it natively, else float32")
    device: str = Field("auto", description="auto: cuda where there is one, else cpu")
    system: str | None = Field(None, description="system message before every question; null: the chat template's own")
    chat: bool = Field(True, description="false: questions are given as they are, without the model's chat template")
    template: dict[str, Any] = Field(
        default_factory=dict, description="variables of the chat template, e.g. {enable_thinking: false}"
    )


class ColumnsConfig(Block):
    """Columns of `task.path`; a dot reaches into an object. null: the usual names, see `tasks/columns.py`."""

    question: str | None = Field(None, description="question, problem, prompt, messages: text or a list of messages")
    answer: str | None = Field(None, description="answer, ground_truth, reward_model.ground_truth, solution")
    system: str | None = Field(None, description="system, system_prompt: the row's own system message")
    solution: str | None = Field(None, description="solution: a worked one, for the cold start")
    id: str | None = Field(None, description="id")


class TaskConfig(Block):
    name: str = Field(description="gsm8k, jsonl, reasoning_gym, or package.module:build of your own")
    path: PathText | None = Field(
        None,
        description="jsonl, gsm8k: data file (JSON lines, JSON array, CSV, Parquet, also compressed), folder, or data "
        "set owner/name of the hub",
    )
    eval_path: PathText | None = Field(None, description="held-out problems; null: every tenth question of `path`")
    subset: str | None = Field(None, description="of a data set in a folder or on the hub: its configuration")
    split: str = Field("train", description="of a data set in a folder or on the hub")
    eval_split: str | None = Field(None, description="the same, for held-out problems; null: see eval_path")
    columns: ColumnsConfig = ColumnsConfig()
    dataset: str = Field("chain_sum", description="reasoning_gym: the name of its dataset")
    options: dict[str, Any] = Field(default_factory=dict, description="reasoning_gym: the dataset's own options")
    reward: str | None = Field(
        None,
        description="package.module:function or file.py:function, of (problem, completion) or (problem, rollout), "
        "that returns a number, or a dict of named parts whose sum is the reward; null: the task's own",
    )
    rewards: dict[str, FiniteFloat] = Field(
        default_factory=dict,
        description="several in place of one: paths as in `reward`, or task (the task's own), and the weight of each",
    )
    reward_timeout_s: float = Field(5.0, gt=0, description="deadline of an answer's reward, after which it counts as 0")
    reward_workers: int | None = Field(
        None, ge=1, description="processes that compute rewards, started when needed; null: one per CPU, at most 8"
    )
    reward_failures: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of a step's answers on which rewards of your own may fail or miss their deadline before "
        "the run stops",
    )
    size: int | None = Field(
        None, ge=1, description="training problems, at most; null: all, and 2000 of a task that generates them"
    )
    too_long: Literal["drop", "error"] = Field(
        "drop",
        description="problems that fill the model's context: left out with a warning that counts them, or refused",
    )
    suffix: str | None = Field(
        None,
        description="text that is added to every question, e.g. the wanted answer format; null: what the task asks for "
        "(reasoning_gym: the answer after ####)",
    )

    @model_validator(mode="after")
    def _one_or_several(self) -> TaskConfig:
        if self.reward is not None and self.rewards:
            raise ValueError("task.reward names one reward and task.rewards several: keep one of the two")
        return self

    @property
    def uses_task_reward(self) -> bool:
        """Whether the task's own reward counts."""
        return "task" in self.rewards or not (self.rewards or self.reward)


class ColdStartConfig(Block):
    """Supervised training on worked solutions before the drafter and the reinforcement-learning stages."""

    steps: int = Field(200, ge=1)
    batch: int = Field(24, ge=1, description="solutions per step")
    learning_rate: float = Field(5e-4, gt=0)
    rank: int = Field(32, ge=1, description="rank of the LoRA adapter on every linear layer")
    warmup: int = Field(10, ge=0, description="steps of linear warm-up; then cosine decay to a tenth")
    answer_only: float = Field(
        0.0, ge=0, lt=1, description="share of solutions cut to their answer: two habits for RL to choose between"
    )
