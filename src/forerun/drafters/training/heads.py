"""Training an EAGLE-3 or MTP head on the policy's own rollouts, by training-time test.

In an engine the head's second draft stands on its own first output, not on the policy's hidden state. So it is trained
that way: J passes over a sequence, pass j fed with pass j-1's outputs and scored against the policy's distribution at
position t+1+j. In pass j a query at t sees the true context up to t (keys of pass 0) and its own guesses (keys of
passes 1..j at the same t), as it will in the engine. Teacher and hidden states come from one policy forward, detached.
An MTP head that drafts the whole vocabulary reads what the policy's output head reads: its teacher is that state, and
distributions are made a few rows at a time (`drafters/mtp.py` has its unroll).
Axes: N sequences, L padded length, T base positions, J depth, H hidden, D draft vocabulary.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from forerun.config import DraftConfig
from forerun.drafters.eagle3 import Eagle3Config, Eagle3Head
from forerun.drafters.mtp import MtpHead, unroll_mtp
from forerun.drafters.training.losses import position_loss
from forerun.drafters.training.trainer import Report, StateFile, Validated, Validation, fit
from forerun.models import Policy
from forerun.models.auxiliary import AuxiliaryStates, decoder_layers, default_aux_layers
from forerun.models.logprobs import TokenBatch, completion_logits, microbatches, token_batch

Pair = tuple[list[int], list[int]]  # prompt ids, completion ids
Head = Eagle3Head | MtpHead
ROWS = 512  # full-vocabulary distributions that are held at once


@dataclass(frozen=True, slots=True)
class TeacherBatch:
    """One policy forward: what the head reads, and what it should say."""

    tokens: Tensor  # [N, L]
    features: Tensor  # [N, L, T·H]
    log_p: Tensor  # [N, L, D], entry r: the policy's distribution of token r + 1; D = 0: `features` give it
    scored: Tensor  # [N, L] bool, entry r: token r + 1 belongs to the completion


@dataclass(frozen=True, slots=True)
class Pass:
    """One draft position of an unrolled batch."""

    loss: Tensor  # mean over its rows
    accepted: float  # sum over its rows of the probability that the draft survives
    rows: int


class Lessons:
    """Keeps what the teacher said about a batch while it fits; beyond the bound the policy runs again every epoch."""

    def __init__(self, gib: float) -> None:
        self.room_bytes = int(gib * 2**30)
        self.kept: dict[tuple[int, ...], TeacherBatch] = {}

    def __call__(self, rows: tuple[int, ...], make: Callable[[], TeacherBatch]) -> TeacherBatch:
        """The lesson of these rows, made now unless it was kept."""
        if rows in self.kept:
            return self.kept[rows]
        lesson = make()
        tensors = (lesson.tokens, lesson.features, lesson.log_p, lesson.scored)
        size = sum(t.numel() * t.element_size() for t in tensors)
        if size <= self.room_bytes:
            self.room_bytes -= size
            self.kept[rows] = lesson
        return lesson


def new_head(policy: Policy, pairs: Sequence[Pair], config: DraftConfig) -> Eagle3Head:
    """A head for this policy, started from the policy's own last layer and output head.

    Its draft vocabulary: see `frequent_tokens`.
    """
    target = policy.model.config.get_text_config()
    layers = tuple(config.layers or default_aux_layers(target.num_hidden_layers))
    vocabulary = frequent_tokens(pairs, config.vocab)
    rope = getattr(target, "rope_parameters", None) or {}
    head = Eagle3Head(
        Eagle3Config(
            hidden_size=target.hidden_size,
            intermediate_size=config.intermediate or target.intermediate_size,
            num_attention_heads=target.num_attention_heads,
            num_key_value_heads=target.num_key_value_heads,
            head_dim=getattr(target, "head_dim", None) or target.hidden_size // target.num_attention_heads,
            vocab_size=target.vocab_size,
            draft_vocab_size=len(vocabulary),
            layers=layers,
            rms_norm_eps=float(getattr(target, "rms_norm_eps", 1e-5)),
            rope_theta=float(rope.get("rope_theta", 10000.0)),
            max_position_embeddings=target.max_position_embeddings,
        )
    )
    head.set_vocabulary(vocabulary)
    _start_from(head, policy.model)
    return head.to(policy.device)


def frequent_tokens(pairs: Sequence[Pair], most: int) -> Tensor:
    """The tokens that the completions use, at most `most`, the most frequent first; ascending ids. [D] int64"""
    counts = Counter(token for _, completion in pairs for token in completion)
    return torch.tensor(sorted(token for token, _ in counts.most_common(most)))


def train_head(
    head: Head,
    policy: Policy,
    pairs: Sequence[Pair],
    config: DraftConfig,
    temperature: float,
    seed: int,
    report: Report,
    validated: Validated,
    file: StateFile | None = None,
) -> Validation:
    """Train `head` in place; keeps the weights of the epoch that validates best, stops when `patience` ones did not.

    Args:
        pairs: prompts and completions that the policy sampled, or other texts.
        temperature: at which the policy will be sampled; 0 counts as 1.
        report: called after every optimizer step. validated: called with (epoch, result); epoch 0 is before training.
        file: see `fit`.
    """
    rng = random.Random(seed)
    held, training = split_pairs(pairs, config.validation, rng)
    lessons = Lessons(config.cache_gib)

    def backward(rows: list[int]) -> float:
        teacher = lessons(tuple(rows), partial(teach, head, policy, [training[i] for i in rows], temperature))
        passes = judge(head, policy, teacher, config, temperature)
        if not passes:  # only texts too short to be drafted in
            return 0.0
        loss = weighted_loss(passes, config.decay)
        loss.backward()
        return float(loss.detach())

    batches = microbatches([len(p) + len(c) for p, c in training], config.batch_tokens)
    validation = partial(validate, head, policy, held, config, temperature)
    return fit(head, batches, config, rng, backward, validation, report, validated, file)


@torch.no_grad()
def teach(head: Head, policy: Policy, pairs: Sequence[Pair], temperature: float) -> TeacherBatch:
    """Run the policy once over prompts and completions."""
    return lesson(head, policy.model, token_batch(pairs, policy.device), temperature)[0]


@torch.no_grad()
def lesson(head: Head, model: Any, batch: TokenBatch, temperature: float) -> tuple[TeacherBatch, Tensor]:
    """What one forward of the policy teaches, and its logits [M, V] of the completion tokens."""
    with AuxiliaryStates(model, head.config.layers) as aux_layers:
        logits = completion_logits(model, batch)
    features = aux_layers.features()
    assert features is not None
    scored = torch.zeros(batch.input_ids.shape, dtype=torch.bool, device=logits.device)
    scored[batch.rows, batch.columns] = True
    if _whole(head):
        log_p = features.new_zeros(*batch.input_ids.shape, 0)
        return TeacherBatch(batch.input_ids, features, log_p, scored), logits
    scaled = logits.float() / (temperature or 1.0)
    inside = scaled[:, head.vocabulary] - torch.logsumexp(scaled, dim=-1, keepdim=True)  # [M, D]
    log_p = torch.zeros(*batch.input_ids.shape, inside.shape[1], device=logits.device)
    log_p[batch.rows, batch.columns] = inside
    return TeacherBatch(batch.input_ids, features, log_p, scored), logits


def place_bytes(head: Head, dtype: torch.dtype) -> int:
    """Bytes that a lesson of a policy in `dtype` has for every place of its padded batch."""
    width = head.config.hidden_size if isinstance(head, MtpHead) else head.config.tap_width
    drafted = 0 if _whole(head) else len(head.vocabulary)
    return 8 + len(head.config.layers) * width * dtype.itemsize + 4 * drafted + 1


def judge(head: Head, policy: Policy, teacher: TeacherBatch, config: DraftConfig, temperature: float) -> list[Pass]:
    """Loss and acceptance of every draft position on one batch; positions without rows are left out.

    The rows of a position are the bases that reach it, so each position's are among those of the one before.
    """
    passes: list[Pass] = []
    alive, before = torch.empty(0), teacher.scored  # of the position before: survival of its rows [M], its bases
    with autocast_of(policy):
        if isinstance(head, MtpHead):
            taught = None if _whole(head) else teacher.log_p
            rows = unroll_mtp(head, teacher.tokens, teacher.features, teacher.scored, config.depth, taught)
        else:
            embed = head.embed_tokens if head.config.own_embedding else policy.model.get_input_embeddings()
            rows = unroll(head, embed, teacher, config.depth, temperature)
        for j, (p, q) in enumerate(rows):
            if not len(q):
                break
            bases = _bases(teacher.scored, j)
            tokens = _draft_ids(head, F.pad(teacher.tokens[:, j + 2 :], (0, j + 2))[bases])
            reached = alive[bases[before]] if passes else torch.ones(len(q), device=q.device)
            losses, overlap = _judge_rows(head, p, q, tokens, reached, config.loss, temperature)
            alive, before = reached * overlap, bases
            passes.append(Pass(losses.mean(), float(overlap.detach().sum()), len(q)))
    return passes


def _bases(scored: Tensor, j: int) -> Tensor:
    """Where rounds can start whose draft j is taught: bases t with the scored entries t+1 and t+1+j. [N, L] bool"""
    return F.pad(scored[:, 1:], (0, 1)) & F.pad(scored[:, 1 + j :], (0, 1 + j))


def _draft_ids(head: Head, tokens: Tensor) -> Tensor:
    """Token ids [M] as the head counts them; -1: not in its vocabulary."""
    if _whole(head):
        return tokens
    places = torch.searchsorted(head.vocabulary, tokens).clamp(max=len(head.vocabulary) - 1)
    return torch.where(head.vocabulary[places] == tokens, places, -1)


def _whole(head: Head) -> bool:
    """Whether the head drafts every token of a vocabulary whose rows are too long to be kept."""
    return isinstance(head, MtpHead) and head.draft_ids is None


def _judge_rows(
    head: Head, p: Tensor, q: Tensor, tokens: Tensor, reached: Tensor, loss: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """Loss and survival [M] of one position's rows. p, q: log-probabilities [M, D], of MTP hidden states [M, H].

    Distributions over a whole vocabulary are made `ROWS` at a time; the backward pass makes them again.
    """
    if not isinstance(head, MtpHead):
        return position_loss(loss, p, q, tokens, reached)

    def log_softmax(hidden: Tensor) -> Tensor:
        return torch.log_softmax(head.logits(hidden).float() / (temperature or 1.0), dim=-1)

    if not _whole(head):
        return position_loss(loss, p, log_softmax(q), tokens, reached)

    def part(p: Tensor, q: Tensor, tokens: Tensor, reached: Tensor) -> tuple[Tensor, Tensor]:
        log_p, log_q = log_softmax(p), log_softmax(q)
        return position_loss(loss, log_p.detach(), log_q, tokens, reached)

    rows = zip(*(x.split(ROWS) for x in (p, q, tokens, reached)), strict=True)
    parts = [checkpoint(part, *x, use_reentrant=False, preserve_rng_state=False) for x in rows]
    return torch.cat([x for x, _ in parts]), torch.cat([x for _, x in parts])


def weighted_loss(passes: list[Pass], decay: float, rows: Sequence[int] | None = None) -> Tensor:
    """Mean of the positions' losses, each `decay` times the weight of the one before.

    Args:
        rows: of each position in a batch of which `passes` are a part. The parts' losses add up to the batch's, and so
            do their gradients; a part may lack the last positions. None: they are the whole batch.
    """
    rows = [x.rows for x in passes] if rows is None else rows
    weights = [decay**j for j in range(len(rows))]
    shares = [w * x.loss * (x.rows / n) for w, x, n in zip(weights, passes, rows, strict=False)]
    return torch.stack(shares).sum() / sum(weights)


def rows_by_position(scored: Tensor, depth: int) -> list[int]:
    """How many rows each draft position of a batch is judged on, see `judge`. `scored`: [N, L]"""
    length = scored.shape[1]
    return [int((scored[:, 1 : max(1, length - j)] & scored[:, 1 + j :]).sum()) for j in range(depth)]


def unroll(
    head: Eagle3Head, embed: Any, teacher: TeacherBatch, depth: int, temperature: float
) -> list[tuple[Tensor, Tensor]]:
    """Training-time test. Returns per draft position j the pairs (log_p [M_j, D], log_q [M_j, D]) of all scored bases.

    Base t pairs hidden state t with token t+1, so draft j is taught by the policy's row t+1+j.
    """
    length = teacher.tokens.shape[1]
    first = max(0, int(teacher.scored.any(0).float().argmax()) - 1)  # earliest base that any sequence scores
    embedded = embed(teacher.tokens).detach()
    positions = torch.arange(length, device=teacher.tokens.device)[None]
    hidden = head.fuse(teacher.features[:, :-1])
    query, key, value = head.query_key_value(embedded[:, 1:], hidden, positions[:, :-1])
    context = key, value  # pass 0's
    own: list[tuple[Tensor, Tensor]] = []  # those of later passes, one key per base
    attended = _attend(query[:, :, first:], context, own, first)
    hidden = head.finish(hidden[:, first:], attended)
    results = []
    for j in range(depth):
        last = length - 2 - j  # bases beyond it have no token to be taught by
        started = teacher.scored[:, first + 1 : last + 2]  # rounds start at the last prompt token or later
        rows = started & teacher.scored[:, first + 1 + j : last + 2 + j]
        log_q = torch.log_softmax(head.logits(hidden[:, : rows.shape[1]][rows]).float() / (temperature or 1.0), dim=-1)
        results.append((teacher.log_p[:, first + 1 + j : last + 2 + j][rows], log_q))
        if j == depth - 1 or last - 1 < first:
            break
        kept = last - first  # bases first .. last-1 can go one token further
        hidden = hidden[:, :kept]
        query, key, value = head.query_key_value(
            embedded[:, first + 2 + j : last + 2 + j], hidden, positions[:, first + 1 + j : last + 1 + j]
        )
        own = [(k[:, :, :kept], v[:, :, :kept]) for k, v in own] + [(key, value)]
        hidden = head.finish(hidden, _attend(query, context, own, first))
    return results


@torch.no_grad()
def validate(head: Head, policy: Policy, pairs: Sequence[Pair], config: DraftConfig, temperature: float) -> Validation:
    """Acceptance by draft position on rollouts that were not trained on."""
    judged = []
    for rows in microbatches([len(p) + len(c) for p, c in pairs], config.batch_tokens):
        teacher = teach(head, policy, [pairs[i] for i in rows], temperature)
        judged.append(judge(head, policy, teacher, config, temperature))
    return summarise(judged)


def summarise(judged: Sequence[Sequence[Pass]]) -> Validation:
    """Acceptance over the passes of many batches."""
    depth = max((len(passes) for passes in judged), default=0)
    length, product, rates = 1.0, 1.0, []
    for j in range(depth):
        here = [passes[j] for passes in judged if len(passes) > j]
        rates.append(sum(p.accepted for p in here) / sum(p.rows for p in here))
        product *= rates[-1]
        length += product
    return Validation(rates, length)


def _attend(query: Tensor, context: tuple[Tensor, Tensor], own: list[tuple[Tensor, Tensor]], first: int) -> Tensor:
    """query [N, heads, T, d] at bases first .. first+T-1 -> [N, T, heads, d]; `own`: the same base's keys by pass."""
    bases = query.shape[2]
    group = query.shape[1] // context[0].shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in context)
    if not own:
        mask = _causal(bases, first, keys.shape[2], query.device)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask).transpose(1, 2)
    scale = query.shape[-1] ** -0.5
    past = (query @ keys.transpose(2, 3)).float() * scale  # [N, heads, T, L]
    past = past.masked_fill(~_causal(bases, first, keys.shape[2], query.device), float("-inf"))
    mine = [(query * k.repeat_interleave(group, dim=1)).sum(-1, keepdim=True).float() * scale for k, _ in own]
    weights = torch.cat([past, *mine], dim=-1).softmax(-1).to(values.dtype)
    out = weights[..., : past.shape[-1]] @ values
    for i, (_, v) in enumerate(own):
        out = out + weights[..., past.shape[-1] + i, None] * v.repeat_interleave(group, dim=1)
    return out.transpose(1, 2)


def _causal(bases: int, first: int, length: int, device: torch.device) -> Tensor:  # [T, L] bool, true: visible
    at = torch.arange(length, device=device)
    return at[None] <= torch.arange(first, first + bases, device=device)[:, None]


def autocast_of(policy: Policy) -> torch.autocast:
    return torch.autocast(policy.device.type, dtype=torch.bfloat16, enabled=policy.dtype == torch.bfloat16)


def split_pairs(pairs: Sequence[Pair], share: float, rng: random.Random) -> tuple[list[Pair], list[Pair]]:
    """Validation and training pairs; samples of one prompt stay on one side.

    A prompt of a single token is no prompt (a text that begins with the tokenizer's first token): each stands alone.
    """
    groups = [tuple(p) if len(p) > 1 else (*p, *c) for p, c in pairs]
    names = sorted(set(groups))
    held = set(rng.sample(names, max(1, round(share * len(names)))))
    validation = [pair for pair, name in zip(pairs, groups, strict=True) if name in held]
    return validation, [pair for pair, name in zip(pairs, groups, strict=True) if name not in held] or validation


@torch.no_grad()
def _start_from(head: Eagle3Head, model: Any) -> None:
    """Copy what has the same meaning and shape in the policy's last layer; the latest tap passes straight through."""
    layer, own = decoder_layers(model)[-1], head.midlayer
    head.fc.weight.normal_(0, 0.01)
    head.fc.weight[:, -head.config.hidden_size :] += torch.eye(head.config.hidden_size, device=head.fc.weight.device)
    head.lm_head.weight.copy_(model.get_output_embeddings().weight[head.vocabulary])
    pairs: list[tuple[Tensor, Any]] = [
        (head.norm.weight, getattr(getattr(model.base_model, "norm", None), "weight", None))
    ]
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = own["self_attn"][name].weight
        weight.normal_(0, 0.02)
        pairs.append((weight[:, head.config.hidden_size :], getattr(getattr(attention, name, None), "weight", None)))
    pairs.append((own["self_attn"]["o_proj"].weight, getattr(getattr(attention, "o_proj", None), "weight", None)))
    for name in ("gate_proj", "up_proj", "down_proj"):
        pairs.append((own["mlp"][name].weight, getattr(getattr(mlp, name, None), "weight", None)))
    for name in ("post_attention_layernorm", "input_layernorm"):
        source = getattr(getattr(layer, name, None), "weight", None)
        pairs.append((own["hidden_norm" if name == "input_layernorm" else name].weight, source))
    for mine, theirs in pairs:
        if theirs is not None and theirs.shape == mine.shape:
            mine.copy_(theirs)
