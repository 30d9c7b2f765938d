"""Start-up proof of the local engine: on the model at hand, it computes what the model's own plain forward computes.

The engine itself runs a few texts: prompts of different lengths prefilled together, two samples of each, rounds of
drafts of which none, some or all are accepted, rows that leave and enter. What it reports is compared with one plain
forward of the whole texts. Windows and chunks are shortened meanwhile, for both, so that short texts are longer than
they are; one that cannot be shortened gets a text that is longer.

How much may differ, on average over the tokens that end a round: in tiny models of 70 families a wrong cache, mask or
state costs 3e-4 to 10 nats a token, rounding up to 1e-5 in float32 and 0.03 in bfloat16 (0.06 in SmolLM2-135M), where
faults below `REDUCED` pass: a model in bfloat16 is checked in float32 too, where there is memory for it. The largest
differences are left out: rounding may flip the expert of a single token.
Not covered: what only happens in longer texts; `models/forward.py` knows some of it (`longest_text`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from forerun.drafters import Drafter, Rows
from forerun.engine.base import RolloutEngine, Sampling
from forerun.errors import UserError
from forerun.models import Policy
from forerun.models.memory import free_memory
from forerun.types import Draft, Rollout, VerifyInput, VerifyResult

EXACT, REDUCED = 1e-4, 0.25  # allowed nats a token in float32, and in shorter formats
LEFT_OUT = 0.05  # share of the tokens, those with the largest differences
WINDOW = 8  # what windows are shortened to
SHORTENED = ("sliding_window", "attention_chunk_size")  # read by masks at every forward
LONGEST = 1024  # tokens of a window that cannot be shortened and is checked with a longer text
DRAFTS, TOKENS = 3, 7  # drafted per round, and emitted per text
LAYERS = frozenset({  # `layer_types` that a cache of keys, values and states covers
    "full_attention", "sliding_attention", "chunked_attention", "linear_attention", "conv", "hybrid", "hybrid_sliding",
    "mamba", "attention", "moe", "mlp", "dense", "sparse", "dummy",
})  # fmt: skip
proven: WeakKeyDictionary[torch.nn.Module, set[bool]] = WeakKeyDictionary()  # checked in this process, fused or not


def check_layers(policy: Policy) -> None:
    """Raises UserError when a layer is of a kind that keeps something else than keys, values and states."""
    types = getattr(policy.model.config.get_text_config(), "layer_types", None) or ()
    if unknown := sorted(set(types) - LAYERS):
        raise UserError(_refusal(policy, f"its layers of type {', '.join(unknown)} have no cache here"))


def check_engine(engine: RolloutEngine) -> list[str]:
    """Run the proof with an engine that has a `Script` for drafter and `scripted` for verifier.

    Returns:
        Warnings: what could not be checked.

    Raises UserError when the engine cannot run the model, or computes something else.
    """
    policy = engine.policy
    config = policy.model.config.get_text_config()
    sizes = {name: getattr(config, name, None) for name in SHORTENED}
    windows = {name: size for name, size in sizes.items() if isinstance(size, int) and size > WINDOW}
    try:
        fixed = _fixed_windows(policy, windows)
        reach = max(WINDOW, *(size for size in fixed if size <= LONGEST))
        with shortened(config, windows):
            gaps = _gaps(policy, _generate(engine, reach + WINDOW + 1))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of modelling code that was not made for this
        first = (str(error).splitlines() or [""])[0]
        why = first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"
        raise UserError(_refusal(policy, why)) from error
    mean = float(gaps.sort().values[: len(gaps) - int(LEFT_OUT * len(gaps))].mean())
    allowed = EXACT if policy.dtype == torch.float32 else REDUCED
    if not mean <= allowed:  # NaN is no proof
        raise UserError(
            _refusal(
                policy,
                f"its log-probabilities are off by {mean:.2g} nats a token against the model's own forward (largest "
                f"{float(gaps.max()):.2g}, allowed {allowed:g} in {str(policy.dtype)[6:]})",
            )
        )
    far = [size for size in fixed if size > LONGEST]
    return [f"The engine was checked on texts shorter than a window of '{policy.name}', {size} tokens" for size in far]


def check_in_float32(policy: Policy, check: Callable[[], object]) -> list[str]:
    """Run `check` once more with the weights in float32, where small faults are not lost in rounding.

    Returns:
        Warnings: that there was no memory for it, or that the model's code computes in bfloat16 alone.

    Raises UserError as `check_engine` does.
    """
    needed = 4 * sum(t.numel() for t in _reduced(policy.model))
    free = free_memory(policy.device) or 0
    why = f"in float32 it would take {needed / 2**30:.1f} GiB more, and {free / 2**30:.1f} GiB are free"
    if needed <= free / 2:
        try:
            with in_float32(policy.model):
                check()
            return []
        except torch.OutOfMemoryError:
            why = f"in float32 {needed / 2**30:.1f} GiB more were not enough"
        except UserError as error:
            if error.__cause__ is None:
                raise
            why = str(error)
    return [
        f"The engine was checked for '{policy.name}' in {str(policy.dtype)[6:]} alone, where faults below {REDUCED:g} "
        f"nats a token pass ({why}); check a small model of the family with policy.dtype=float32"
    ]


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Context in which the numbers of a model are float32; afterwards it has its own tensors back."""
    tensors = _reduced(model)
    before = [tensor.data for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data


def _reduced(model: Any) -> list[Tensor]:
    return [t for t in (*model.parameters(), *model.buffers()) if t.dtype in (torch.bfloat16, torch.float16)]


def _refusal(policy: Policy, why: str) -> str:
    name = type(policy.model).__name__
    return f"The local engine cannot run {name}: {why}; use rollout.engine=vllm, or another model"


class Script(Drafter):
    """Drafts random tokens: whether they are accepted is for `scripted` to say."""

    name = "self-check"

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._random = torch.Generator().manual_seed(0)

    def propose(self, rows: Rows, budget: Tensor) -> Draft:
        shape = rows.count, int(budget.max())
        return Draft(torch.randint(self._vocabulary, shape, generator=self._random).to(budget.device), budget)


def scripted(rule: str, inputs: VerifyInput) -> VerifyResult:
    """Accepts none, one, two ... drafts in turns, and ends each round with the token that the model finds likeliest."""
    drafted, logits = inputs.draft.tokens, inputs.target_logits
    count = len(drafted)
    row = torch.arange(count, device=drafted.device)
    accepted = torch.minimum(row % (DRAFTS + 1), inputs.draft.lengths)
    tokens = torch.cat([drafted, drafted.new_zeros(count, 1)], dim=1)
    tokens[row, accepted] = logits[row, accepted].argmax(-1)
    logprobs = logits.float().log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    return VerifyResult(accepted, tokens, logprobs)


@contextmanager
def shortened(config: Any, windows: dict[str, int]) -> Iterator[None]:
    """Context in which these windows and chunks are `WINDOW` tokens."""
    for name in windows:
        setattr(config, name, WINDOW)
    try:
        yield
    finally:
        for name, size in windows.items():
            setattr(config, name, size)


def _fixed_windows(policy: Policy, windows: dict[str, int]) -> list[int]:
    """Sizes of the windows that cannot be shortened, 0 among them."""
    config = policy.model.config.get_text_config()
    named = config.to_dict().items()
    fixed = [v for k, v in named if "window" in k and type(v) is int and k not in SHORTENED and "layers" not in k]
    if windows:
        text = _prompts(policy, 3 * WINDOW)[:1]
        usual = _plain(policy, text)
        with shortened(config, windows):
            if torch.allclose(usual, _plain(policy, text), atol=1e-2):  # the module does not read them at its forward
                fixed += windows.values()
    return [0, *fixed]


def _prompts(policy: Policy, length: int) -> list[list[int]]:
    """Three prompts: longer than every window, about one window, and a single token."""
    length = min(length, policy.context - TOKENS - 1)
    random = torch.Generator().manual_seed(1)
    vocabulary = policy.model.config.get_text_config().vocab_size
    sizes = [max(size, 1) for size in (length, min(WINDOW + 1, length), 1)]
    return [torch.randint(vocabulary, (size,), generator=random).tolist() for size in sizes]


def _generate(engine: RolloutEngine, length: int) -> list[Rollout]:
    sampling = Sampling(TOKENS, ignore_eos=True)
    return list(engine.stream(_prompts(engine.policy, length), sampling, n=2))


@torch.no_grad()
def _plain(policy: Policy, texts: list[list[int]]) -> Tensor:
    """Logits [N, L, V] of the module's own forward of right-padded texts, as the learner runs it."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    return policy.model(input_ids=ids.to(policy.device), use_cache=False).logits.float()


def _gaps(policy: Policy, rollouts: list[Rollout]) -> Tensor:
    """|engine - module| in nats, of the tokens that end a round: random drafts are unlikely, and so round badly."""
    logits = _plain(policy, [r.prompt_ids + r.tokens for r in rollouts])
    parts = []
    for rollout, row in zip(rollouts, logits, strict=True):
        first = len(rollout.prompt_ids) - 1
        exact = row[first : first + len(rollout.tokens)].log_softmax(-1).cpu()
        gap = exact.gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0] - torch.tensor(rollout.logprobs)
        parts.append(gap[~torch.tensor(rollout.drafted)])
    return torch.cat(parts).abs()
