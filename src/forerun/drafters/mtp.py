"""Multi-token prediction (DeepSeek-V3, 2412.19437 section 2.2): a layer of the policy's own kind that looks further.

At position t it reads the policy's last hidden state h_t and the embedding of the next token x_{t+1}, each normalised,
projects both to one vector (`eh_proj`, embedding first), runs one decoder layer over it and predicts x_{t+2} through
the policy's own output head. h is taken *after* the final norm, and what is fed on is the layer's output after its own
norm (`shared_head.norm`), as Transformers, SGLang and vLLM's Qwen3-Next run the published heads.
With n layers, draft j comes from layer j, which reads layer j - 1's outputs and tokens j places further on; drafts
beyond n apply the last layer to its own output, as all drafts of a head with one layer do (training-time test).
Embedding, rotary angles and output head are the policy's, read live and never trained. Of the output head a drafter may
read only the rows of a draft vocabulary, its most frequent tokens (2502.14856): beyond them q is 0.
Files: mtp_files.py. Left out: layers without plain attention heads (linear attention, MLA), quantised checkpoints.
Axes: R rows, B live rows, n tokens, W places of a window, L padded length, H hidden size, V vocabulary, D drafted ids.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forerun.drafters.base import Rows, heat_of_round, sample_draft
from forerun.drafters.mtp_checkpoints import IDS, published_name, read_heads
from forerun.drafters.temperature import HeatSetting, make_heat
from forerun.errors import UserError
from forerun.models import Policy
from forerun.models.auxiliary import decoder_layers
from forerun.models.cache import SlotCache, SlotPass
from forerun.models.forward import ATTENTION
from forerun.models.load import load_exactly
from forerun.types import Draft, VerifyResult


@dataclass(frozen=True, slots=True)
class MtpConfig:
    """What a head is made for. `layers` is the tap that it reads: the policy's last hidden state."""

    hidden_size: int
    vocab_size: int
    num_hidden_layers: int  # the policy's; the head's layers are numbered from there on in files
    num_nextn_predict_layers: int

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.num_hidden_layers,)


@dataclass(frozen=True, slots=True)
class Shared:
    """What the head uses of the policy, live; kept out of the head's own parameters."""

    embed: Any
    rotary: Any
    layer_type: str | None  # for a rotary embedding that has one base per layer type
    head: Any
    softcap: float | None

    def rotation(self, x: Tensor, positions: Tensor) -> Any:
        """cos and sin for x [B, n, H] at positions [B, n]."""
        return self.rotary(x, positions) if self.layer_type is None else self.rotary(x, positions, self.layer_type)

    def logits(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """hidden [..., H], normed -> [..., V], or of `tokens` [D] alone; no gradient reaches the head's weight."""
        weight, bias = self.head.weight.detach(), getattr(self.head, "bias", None)
        bias = None if bias is None else bias.detach()
        if tokens is not None:
            weight, bias = weight[tokens], None if bias is None else bias[tokens]
        out = F.linear(hidden, weight, bias)
        return out if self.softcap is None else torch.tanh(out / self.softcap) * self.softcap


class MtpLayer(nn.Module):
    """Projection, decoder layer and norm of one depth."""

    def __init__(self, policy: Policy, index: int, source: int) -> None:
        """A copy of the policy's layer `source`, whose cache entries are those of layer `index`."""
        super().__init__()
        decoder, size = policy.model.get_decoder(), policy.model.config.get_text_config().hidden_size
        self.enorm, self.hnorm = _fresh_norm(decoder.norm, size), _fresh_norm(decoder.norm, size)
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.block = copy.deepcopy(decoder.layers[source])
        self.norm = copy.deepcopy(decoder.norm)
        for module in self.block.modules():
            if getattr(module, "config", None) is not None:
                module.config._attn_implementation = ATTENTION
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False
        self.block.self_attn.layer_idx = index

    def forward(self, embedded: Tensor, hidden: Tensor, positions: Tensor, rotation: Any, slots: Any) -> Tensor:
        """embedded, hidden [B, n, H] -> [B, n, H], normed; `slots` attends, see models/cache.py."""
        x = torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1)
        out = self.block(
            self.eh_proj(x.to(self.eh_proj.weight.dtype)),
            attention_mask=None,
            position_ids=positions,
            position_embeddings=rotation,
            slots=slots,
        )
        return self.norm(out[0] if isinstance(out, tuple) else out)


class MtpHead(nn.Module):
    """The trainable part: one `MtpLayer` per depth."""

    layers: Any
    draft_ids: Tensor | None  # [D] int64, ascending; None: all tokens are drafted

    def __init__(self, policy: Policy, layers: int = 1, vocabulary: Tensor | None = None) -> None:
        """A head of `layers` layers that starts from the policy's last attention layer and its final norm.

        Args:
            vocabulary: [D] int64, ascending, the tokens that it drafts; None: all of them.

        Raises:
            UserError: the policy has no such layer, no final norm, or no rotary positions.
        """
        super().__init__()
        target = policy.model.config.get_text_config()
        source = _source_layer(policy)
        self.config = MtpConfig(target.hidden_size, target.vocab_size, len(decoder_layers(policy.model)), layers)
        self.layers = nn.ModuleList(MtpLayer(policy, index, source) for index in range(layers))
        self.share(policy)
        self.register_buffer("draft_ids", vocabulary)
        with torch.no_grad():
            for layer in self.layers:
                layer.eh_proj.weight.normal_(0, 0.01)
                layer.eh_proj.weight[:, target.hidden_size :] += torch.eye(target.hidden_size)
        self.float().to(policy.device).eval().requires_grad_(True)

    def share(self, policy: Policy) -> None:
        """Use embedding, rotary angles and output head of `policy` from here on."""
        self.use(_shared(policy, _source_layer(policy)))

    def use(self, shared: Shared) -> None:
        """Use these from here on."""
        self._shared = (shared,)  # a tuple: its modules are not submodules

    def apart(self) -> MtpHead:
        """The same parameters without what it uses of the policy: a head to be sent elsewhere, there to `share`."""
        head = copy.copy(self)
        del head._shared
        return head

    @property
    def shared(self) -> Shared:
        """What it uses of the policy."""
        return self._shared[0]

    @property
    def vocabulary(self) -> Tensor:
        """Target ids that it drafts. [D]"""
        everything = torch.arange(self.config.vocab_size, device=self.shared.head.weight.device)
        return everything if self.draft_ids is None else self.draft_ids

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., H], normed -> [..., D]"""
        return self.shared.logits(hidden, self.draft_ids)

    def step(self, index: int, tokens: Tensor, hidden: Tensor, positions: Tensor, slots: Any) -> Tensor:
        """Layer `index`: next tokens [B, n] and the state before them [B, n, H] -> the state after it [B, n, H]."""
        layer = self.layers[index]
        dtype = layer.eh_proj.weight.dtype
        embedded = self.shared.embed(tokens).detach().to(dtype)
        hidden = hidden.to(dtype)
        return layer(embedded, hidden, positions, self.shared.rotation(hidden, positions), slots)


@dataclass(slots=True)
class UnrollPass:
    """Attention of training-time test, in the place of a cache: causal over the true text, then over own guesses.

    A fresh pass sees the keys of the same pass up to each base. In pass r after it, the query of base t has position
    t + r and sees the fresh pass's keys up to t and its own base's keys of passes 1 .. r.
    """

    first: int = 0  # base of the first query
    context: tuple[Tensor, Tensor] | None = None  # [N, K, L, D], the fresh pass's
    own: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # [N, K, T, D] per later pass

    def attend(
        self,
        layer: int,
        query: Tensor,  # [N, heads, T, D]
        key: Tensor,  # [N, K, T, D]
        value: Tensor,
        scale: float | None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:  # [N, T, heads, D]
        """The interface of `SlotPass.attend`."""
        query, key = query.to(value.dtype), key.to(value.dtype)  # norms may have left them in float32 under autocast
        if self.context is None:
            self.context = key, value
            if softcap is None and (window is None or window >= query.shape[2]):
                grouped = query.shape[1] != key.shape[1]
                out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
                return out.transpose(1, 2)
        else:
            bases = query.shape[2]
            self.own = [(k[:, :, :bases], v[:, :, :bases]) for k, v in self.own] + [(key, value)]
        group, passes = query.shape[1] // key.shape[1], len(self.own)
        keys, values = (x.repeat_interleave(group, dim=1) for x in self.context)
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = (query @ keys.transpose(2, 3)).to(wide)  # [N, heads, T, L]
        mine = [(query * k.repeat_interleave(group, dim=1)).sum(-1, keepdim=True).to(wide) for k, _ in self.own]
        scores = torch.cat([scores, *mine], dim=-1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        seen = self._seen(query.shape[2], keys.shape[2], passes, window, query.device)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).to(value.dtype)
        out = weights[..., : keys.shape[2]] @ values
        for i, (_, v) in enumerate(self.own):
            out = out + weights[..., keys.shape[2] + i, None] * v.repeat_interleave(group, dim=1)
        return out.transpose(1, 2)

    def _seen(self, bases: int, length: int, passes: int, window: int | None, device: torch.device) -> Tensor:
        """[T, L + passes] bool"""
        base = torch.arange(self.first, self.first + bases, device=device)[:, None]
        at = torch.arange(length, device=device)[None]
        seen = at <= base
        age = torch.arange(passes - 1, -1, -1, device=device).expand(bases, passes)  # of own keys, in positions
        mine = torch.ones_like(age, dtype=torch.bool)
        if window is not None:
            seen, mine = seen & (at > base + passes - window), age < window
        return torch.cat([seen, mine], dim=1)


def unroll_mtp(
    head: MtpHead, tokens: Tensor, features: Tensor, scored: Tensor, depth: int, taught: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Training-time test. Per draft position: what teaches it, the policy's last hidden states, and the head's, [M, H].

    Args:
        tokens: [N, L]. features: [N, L, H]. scored: [N, L], entry r: token r + 1 belongs to the completion.
        taught: [N, L, D], rows that teach in the place of `features`.
    """
    taught = features if taught is None else taught
    length, layers = tokens.shape[1], len(head.layers)
    positions = torch.arange(length, device=tokens.device)[None]
    hidden, slots, begin, results = features, UnrollPass(), 0, []
    for j in range(depth):
        last = length - 2 - j  # bases beyond it have no next token
        if j >= layers and begin == 0:  # guesses stand on bases that rounds can start from
            begin = max(0, int(scored.any(0).float().argmax()) - 1)
            hidden, slots.first = hidden[:, begin:], begin
        if last < begin:
            break
        if j < layers:
            slots = UnrollPass()
        shift = max(0, j - layers + 1)
        bases = last + 1 - begin
        hidden = head.step(
            min(j, layers - 1),
            tokens[:, begin + 1 + j : last + 2 + j],
            hidden[:, :bases],
            positions[:, begin + shift : last + 1 + shift],
            slots,
        )
        rows = scored[:, begin + 1 : last + 2] & scored[:, begin + 1 + j : last + 2 + j]
        results.append((taught[:, begin + 1 + j : last + 2 + j][rows], hidden[rows]))
    return results


class MtpDrafter:
    """The head at work in an engine: its own cache rows, and a window of what its layers read next.

    The window holds, per row, the newest pairs (x_{p+1}, h_p): those that the last round emitted, and n - 1 older ones,
    because layer j had to guess the tokens j places on and reads them again now that they are known.
    """

    method = "mtp"

    def __init__(self, head: MtpHead, policy: Policy, *, proposal: str = "sampled", heat: HeatSetting = 1.0) -> None:
        """`proposal` "argmax" drafts deterministically; `heat` is the drafts' temperature over the rollouts'."""
        self.head = head.to(policy.device).eval()
        self.aux_layers = head.config.layers
        self.proposal, self.heat = proposal, make_heat(heat, proposal)

    def open(self, rows: int, positions: int, k: int) -> None:
        weight, layers = self.head.layers[0].eh_proj.weight, len(self.head.layers)
        width = k + layers
        self._cache = SlotCache(rows, positions + layers)
        self._tokens = torch.zeros(rows, width, dtype=torch.int64, device=weight.device)
        self._features = torch.zeros(rows, width, weight.shape[0], dtype=weight.dtype, device=weight.device)
        self._count = torch.zeros(rows, dtype=torch.int64, device=weight.device)

    @torch.no_grad()
    def prefill(self, first_row: int, tokens: Tensor, lengths: Tensor, features: Tensor | None) -> None:
        """Read all pairs of the prompts but the last n, which stay in the window."""
        assert features is not None
        layers, prompts = len(self.head.layers), tokens.shape[0]
        rows = torch.arange(first_row, first_row + prompts, device=tokens.device)
        count = (lengths - 1).clamp(max=layers)
        places = (lengths - 1 - count)[:, None] + torch.arange(layers, device=tokens.device)  # [P, n]
        batch = torch.arange(prompts, device=tokens.device)[:, None]
        self._count[rows] = count
        self._tokens[rows, :layers] = tokens[batch, (places + 1).clamp(max=tokens.shape[1] - 1)]
        known = features[batch, places.clamp(max=features.shape[1] - 1)]
        self._features[rows, :layers] = known.to(self._features.dtype)
        width, hidden = tokens.shape[1] - 1 - layers, features
        if width <= 0:
            return
        for index in range(layers):
            slots = SlotPass(self._cache, first_row, torch.zeros_like(lengths), width, width, fresh=True)
            window = tokens[:, 1 + index : 1 + index + width]
            hidden = self.head.step(index, window, hidden[:, :width], slots.positions, slots)

    def copy(self, source: int, target: int) -> None:
        self._cache.copy(source, target, self._cache.positions)
        for store in (self._tokens, self._features, self._count):
            store[target] = store[source]

    @torch.no_grad()
    def propose(self, rows: Rows, budget: Tensor) -> Draft:
        """Read the window, then draft token by token; a row with nothing to read from drafts nothing."""
        count = self._count[: rows.count]
        lengths = torch.where(count > 0, budget, 0)
        k, width, layers = int(lengths.max()), int(count.max()), len(self.head.layers)
        if k == 0:
            return Draft(torch.zeros(rows.count, 0, dtype=torch.int64, device=rows.last.device), lengths)
        heat = heat_of_round(self.proposal, rows, self.heat.value)
        batch = torch.arange(rows.count, device=count.device)
        text = torch.cat([self._tokens[: rows.count, :width], count.new_zeros(rows.count, k)], dim=1)
        starts = (rows.lengths - count).clamp(min=0)
        slots = SlotPass(self._cache, 0, starts, width, int(starts.max()) + width)
        window, newest = self._features[: rows.count, :width], torch.empty(0)
        tokens: list[Tensor] = []
        log_q: list[Tensor] = []
        for slot in range(k):
            if slot < layers:
                window = self.head.step(slot, text[:, slot : slot + width], window, slots.positions, slots)
                newest = window[batch, (count - 1).clamp(min=0)]
            else:
                newest = self._again(rows, tokens[-1], newest, slot - layers)
            column, row = sample_draft(self.head.logits(newest), rows, slot, heat)
            token = column if self.head.draft_ids is None else self.head.draft_ids[column]
            text[batch, count + slot] = token
            tokens.append(token)
            log_q.append(row)
        if heat is None:
            return Draft(torch.stack(tokens, dim=1), lengths)
        return Draft(torch.stack(tokens, dim=1), lengths, torch.stack(log_q, dim=1), self.head.draft_ids)

    def observe(self, rows: Rows, verdict: VerifyResult, features: Tensor | None) -> None:
        assert features is not None
        count, new = self._count[: rows.count], verdict.accepted + 1
        width = self._tokens.shape[1]
        kept = count.clamp(max=len(self.head.layers) - 1)
        take = torch.arange(width, device=count.device).expand(rows.count, width)
        take = torch.where(take < kept[:, None], (count - kept)[:, None] + take, width + take - kept[:, None])
        take = take.clamp(max=width + features.shape[1] - 1)
        batch = torch.arange(rows.count, device=count.device)[:, None]
        tokens = torch.cat([self._tokens[: rows.count], verdict.tokens], dim=1)
        states = torch.cat([self._features[: rows.count], features.to(self._features.dtype)], dim=1)
        self._tokens[: rows.count], self._features[: rows.count] = tokens[batch, take], states[batch, take]
        self._count[: rows.count] = kept + new

    def learn(self, rows: Rows, draft: Draft, logits: Tensor, verdict: VerifyResult) -> None:
        """See `Learning.learn`: the heat, where it is learnt."""
        self.heat.learn(rows, draft, logits, verdict)

    def metrics(self) -> dict[str, float]:
        return self.heat.metrics()

    def _again(self, rows: Rows, token: Tensor, hidden: Tensor, step: int) -> Tensor:  # [B, H]
        """The last layer on its own output [B, H], `step` places behind the newest token."""
        places = rows.lengths + step
        slots = SlotPass(self._cache, 0, places, 1, int(places.max()) + 1)
        last = len(self.head.layers) - 1
        return self.head.step(last, token[:, None], hidden[:, None], slots.positions, slots)[:, 0]

    def state_dict(self) -> dict[str, Tensor]:
        return self.head.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` into the head. Raises UserError when a tensor is missing, unknown or of another shape."""
        load_exactly(self.head, state, "the drafter")

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write config.json and model.safetensors with DeepSeek-V3's names; `about` records how it was made."""
        from safetensors.torch import save_file

        config, folder = self.head.config, Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        run_facts = {
            "architectures": ["ForerunMtp"],
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_nextn_predict_layers": config.num_nextn_predict_layers,
            "forerun": about,
        }
        (folder / "config.json").write_text(json.dumps(run_facts, indent=2) + "\n")
        state = {published_name(k, config.num_hidden_layers): v for k, v in self.head.state_dict().items()}
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path, policy: Policy, *, proposal: str = "sampled", heat: HeatSetting = 1.0) -> MtpDrafter:
        """Read heads saved by `save`, or those that a checkpoint of the policy carries; see `read_heads`.

        Raises:
            UserError: files are missing or broken, or the heads were made for another policy.
        """
        from safetensors import SafetensorError

        try:
            data = json.loads((folder / "config.json").read_text())
            data = data.get("text_config", data)
            state = read_heads(folder, int(data["num_hidden_layers"]))
        except (OSError, json.JSONDecodeError, KeyError, SafetensorError) as error:
            raise UserError(f"The drafter in {folder} cannot be read: {type(error).__name__}: {error}") from error
        _check_fit(data, policy)
        if not state:
            raise UserError(f"{folder} holds no tensors of multi-token-prediction heads; train one: forerun draft")
        depth = 1 + max(int(name.split(".")[1]) for name in state if name != IDS)
        head = MtpHead(policy, depth, state.get(IDS)).to(policy.dtype)
        load_exactly(head, state, f"the drafter in {folder}")
        return cls(head, policy, proposal=proposal, heat=heat)


def _source_layer(policy: Policy) -> int:
    """The last layer with full attention."""
    decoder, config = policy.model.get_decoder(), policy.model.config.get_text_config()
    fits = hasattr(decoder, "norm") and hasattr(decoder, "rotary_emb") and hasattr(decoder.layers[-1], "self_attn")
    if not fits:
        raise UserError(
            f"Multi-token-prediction heads need a final norm, rotary positions and attention in the last layer, which "
            f"'{policy.name}' ({type(policy.model).__name__}) lacks; use speculation.method=eagle3"
        )
    scaled = [n for n in ("logit_scale", "logits_scaling", "logits_mup_width_multiplier") if getattr(config, n, None)]
    if scaled:
        raise UserError(f"'{policy.name}' scales its logits ({scaled[0]}), which mtp cannot follow; use eagle3")
    types = getattr(config, "layer_types", None) or ["full_attention"] * len(decoder.layers)
    full = [i for i, kind in enumerate(types) if kind == "full_attention"]
    return full[-1] if full else len(types) - 1


def _shared(policy: Policy, source: int) -> Shared:
    model, config = policy.model, policy.model.config.get_text_config()
    rotary = model.get_decoder().rotary_emb
    typed = "layer_type" in inspect.signature(rotary.forward).parameters
    kind = config.layer_types[source] if typed else None
    softcap = getattr(config, "final_logit_softcapping", None)
    return Shared(model.get_input_embeddings(), rotary, kind, model.get_output_embeddings(), softcap)


def _fresh_norm(norm: Any, size: int) -> Any:
    """A norm of the same kind that does not scale."""
    return type(norm)(size, eps=getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6)))


def _check_fit(data: Mapping[str, Any], policy: Policy) -> None:
    target = policy.model.config.get_text_config()
    for name in ("hidden_size", "vocab_size", "num_hidden_layers"):
        if data.get(name) != getattr(target, name):
            raise UserError(
                f"The drafter was made for a policy with {name} {data.get(name)}, and this one has "
                f"{getattr(target, name)}"
            )
