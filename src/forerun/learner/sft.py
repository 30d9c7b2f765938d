"""The cold start: supervised training of a LoRA adapter on worked solutions, before any reinforcement learning.

A policy that already writes short, sure steps has a learning signal for GRPO, and is easy to draft for.
The result is an ordinary peft adapter, merged into the policy and loadable later as `policy.adapter`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch

from forerun.config import ColdStartConfig
from forerun.drafters.training.trainer import learning_rate_factor
from forerun.errors import UserError
from forerun.models import Policy
from forerun.models.logprobs import completion_logits, microbatches, token_batch, token_logprobs
from forerun.tasks import Problem
from forerun.tracking.files import disk_errors

MICROBATCH_TOKENS = 1024  # padded tokens per pass


def train_adapter(
    policy: Policy, examples: list[tuple[list[int], list[int]]], config: ColdStartConfig, seed: int
) -> Generator[float, None, Any]:
    """Train an adapter on (prompt ids, solution ids) pairs and return the peft model around `policy.model`.

    Yields the loss after every step, in nats per solution token.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    lora = LoraConfig(r=config.rank, lora_alpha=2 * config.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(policy.model, lora)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    order = _batches(len(examples), config.batch, random.Random(seed))
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(step, config.steps, config.warmup)
        loss = _accumulate(model, policy, [examples[i] for i in next(order)])
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss
    return model


def _accumulate(model: Any, policy: Policy, pairs: list[tuple[list[int], list[int]]]) -> float:
    """Add the gradient of the mean loss over all solution tokens, a few rows of like length at a time."""
    size, total = sum(len(solution) for _, solution in pairs), 0.0
    for rows in microbatches([len(prompt) + len(solution) for prompt, solution in pairs], MICROBATCH_TOKENS):
        batch = token_batch([pairs[i] for i in rows], policy.device)
        with torch.autocast(policy.device.type, dtype=torch.bfloat16, enabled=policy.dtype == torch.bfloat16):
            logits = completion_logits(model, batch)
        loss = -token_logprobs(logits, batch.targets, 1.0).sum() / size
        loss.backward()
        total += loss.item()
    return total


def merge(policy: Policy, adapter: Any, folder: Path) -> None:
    """Save the adapter in bfloat16 to `folder` and merge those same rounded weights into the policy, in place.

    The merged policy is therefore bit for bit the one that `policy.adapter=folder` gives later.
    """
    weights = [p for name, p in adapter.named_parameters() if "lora_" in name]
    formats = [p.dtype for p in weights]
    for parameter in weights:
        parameter.data = parameter.data.bfloat16()
    for settings in adapter.peft_config.values():
        settings.base_model_name_or_path = policy.name  # not the folder that this machine keeps it in
    with disk_errors(folder):
        adapter.eval().save_pretrained(folder)
    for parameter, dtype in zip(weights, formats, strict=True):
        parameter.data = parameter.data.to(dtype)
    adapter.merge_and_unload().requires_grad_(True)  # peft froze what it wrapped


def solved_examples(
    policy: Policy, problems: list[Problem], encode: Callable[[Problem], list[int]], answer_only: float = 0.0
) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, solution ids with the end token) of every problem that has a worked solution.

    Args:
        answer_only: share of them, evenly spread, that only state the answer. A policy that now guesses and now works
            its answer out lets the rewards decide between the two.

    Raises:
        UserError: none of the problems has one, or there is no end token.
    """
    end = _end_token(policy)
    pairs = []
    for i, problem in enumerate(p for p in problems if p.solution):
        cut = int((i + 1) * answer_only) > int(i * answer_only)
        solution = f"#### {problem.answer}" if cut else str(problem.solution)
        completion = [*policy.tokenizer(solution, add_special_tokens=False)["input_ids"], end]
        pairs.append((encode(problem), completion))
    if not pairs:
        raise UserError("The cold start needs worked solutions and this task has none; leave out 'cold_start'")
    return pairs


def _end_token(policy: Policy) -> int:
    """What ends a solution: the tokenizer's end token, else one at which the model's generation ends."""
    if (end := policy.tokenizer.eos_token_id) is not None:
        return int(end)
    if not policy.eos_ids:
        raise UserError(
            f"The cold start teaches where an answer ends, and neither the tokenizer nor the generation_config.json of "
            f"'{policy.name}' names an end token; add eos_token to tokenizer_config.json, or leave out 'cold_start'"
        )
    return min(policy.eos_ids)


def _batches(count: int, size: int, rng: random.Random):  # -> Iterator[list[int]]
    while True:
        order = rng.sample(range(count), count)
        for start in range(0, count - count % size or count, size):
            yield order[start : start + size]
