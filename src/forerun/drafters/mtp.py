"""Multi-token prediction (DeepSeek-V3, 2412.19437 section 2.2): decoder layers that predict tokens further ahead.

At position t it reads the policy's last hidden state h_t and the embedding of the next token x_{t+1}, each normalised,
projects both to one vector (`eh_proj`, embedding first), runs one decoder layer over it and predicts x_{t+2} through
the policy's own output head. h is taken *after* the final norm, and the layer's output is fed on after its own norm
(`shared_head.norm`), as Transformers, SGLang and vLLM's Qwen3-Next run the published heads.
With n layers, draft j comes from layer j, which reads layer j - 1's outputs and tokens j places further on; drafts
beyond n apply the last layer to its own output, as all drafts of a head with one layer do (training-time test).
Embedding, rotary angles and output head are the policy's, read live and never trained. With a draft vocabulary, its
most frequent tokens (2502.14856), only their rows of the output head are read: beyond them q is 0.
Not supported: linear attention, MLA, quantised checkpoints.
Axes: R rows, B live rows, n tokens, W places of a window, L padded length, H hidden size, V vocabulary, D drafted ids.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forerun.drafters.base import Drafter, Rows
from forerun.drafters.files import check_fit, reading, write_drafter
from forerun.drafters.mtp_checkpoints import IDS, published_name, read_heads
from forerun.drafters.sampled import HeadDrafter, SampledChain
from forerun.drafters.trainable import TeacherBatch, TrainableHead, scored_bases
from forerun.drafters.unroll import UnrollPass
from forerun.errors import UserError
from forerun.models import Policy
from forerun.models.auxiliary import decoder_layers
from forerun.models.cache import SlotPass
from forerun.models.checks import require_finite
from forerun.models.interface import LAYER_ATTENTION
from forerun.models.load import load_exactly
from forerun.types import Draft

if TYPE_CHECKING:
    from forerun.drafters.training.trainer import Training, TrainingSetup, Validation


@dataclass(frozen=True, slots=True)
class MtpConfig:
    """Shape of the head. `layers` is the auxiliary state that it reads: the policy's last hidden state."""

    hidden_size: int
    vocab_size: int
    num_hidden_layers: int  # the policy's; the head's layers are numbered from there on in files
    num_nextn_predict_layers: int

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.num_hidden_layers,)

    @property
    def aux_width(self) -> int:
        return self.hidden_size


@dataclass(frozen=True, slots=True)
class Shared:
    """Modules of the policy that the head reads; no parameters of the head."""

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
                module.config._attn_implementation = LAYER_ATTENTION
            vars(module).pop("forward", None)  # what a learner does in the policy's layer is not copied
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


class MtpHead(TrainableHead):
    """The trainable part: one `MtpLayer` per depth."""

    layers: Any
    draft_ids: Tensor | None  # [D] int64, ascending; None: all tokens are drafted

    def __init__(self, policy: Policy, layers: int = 1, vocabulary: Tensor | None = None) -> None:
        """A head of `layers` layers that starts from the policy's last attention layer and its final norm.

        Args:
            vocabulary: [D] int64, ascending, the tokens that it drafts; None: all of them.

        Raises UserError when the policy has no such layer, no final norm, or no rotary positions.
        """
        super().__init__()
        target = policy.model.config.get_text_config()
        source = _source_layer(policy)
        self.config = MtpConfig(target.hidden_size, target.vocab_size, len(decoder_layers(policy.model)), layers)
        self.layers = nn.ModuleList(MtpLayer(policy, index, source) for index in range(layers))
        self.attach(policy)
        self.register_buffer("draft_ids", vocabulary)
        with torch.no_grad():
            for layer in self.layers:
                layer.eh_proj.weight.normal_(0, 0.01)
                layer.eh_proj.weight[:, target.hidden_size :] += torch.eye(target.hidden_size)
        self.float().to(policy.device).eval().requires_grad_(True)

    def attach(self, policy: Policy) -> None:
        """Read embedding, rotary angles and output head of `policy` from here on."""
        self._shared = (_shared(policy, _source_layer(policy)),)  # a tuple: its modules are not submodules

    def detached(self) -> MtpHead:
        head = copy.copy(self)
        del head._shared
        return head

    def gather_shared(self, gather: Callable[[Tensor], Tensor]) -> None:
        """See `TrainableHead.gather_shared`: it reads the output head's matrix itself."""
        output = self.shared.head
        parts = {"weight": output.weight, "bias": getattr(output, "bias", None)}
        plain = SimpleNamespace(**{k: None if p is None else gather(p.detach()) for k, p in parts.items()})
        self._shared = (replace(self.shared, head=plain),)

    @property
    def drafts_all_tokens(self) -> bool:  # type: ignore[override]
        return self.draft_ids is None

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

    def unroll(self, policy: Policy, teacher: TeacherBatch, depth: int) -> list[Tensor]:
        return unroll_mtp(self, teacher.tokens, teacher.features, teacher.scored, depth)

    def step(self, index: int, tokens: Tensor, hidden: Tensor, positions: Tensor, slots: Any) -> Tensor:
        """Layer `index`: next tokens [B, n] and the state before them [B, n, H] -> the state after it [B, n, H]."""
        layer = self.layers[index]
        dtype = layer.eh_proj.weight.dtype
        embedded = self.shared.embed(tokens).detach().to(dtype)
        hidden = hidden.to(dtype)
        try:
            return layer(embedded, hidden, positions, self.shared.rotation(hidden, positions), slots)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of a layer that needs more than the layer before gives it
            raise UserError(
                f"{type(layer.block).__name__} cannot run in a drafter ({type(error).__name__}: {error}); use "
                "speculation.method=eagle3, or one without a head"
            ) from error


def unroll_mtp(head: MtpHead, tokens: Tensor, features: Tensor, scored: Tensor, depth: int) -> list[Tensor]:
    """Training-time test. Per draft position the head's last states [M, H].

    Args:
        tokens: [N, L]. features: [N, L, H]. scored: [N, L], entry r: token r + 1 belongs to the completion.
    """
    length, layers = tokens.shape[1], len(head.layers)
    positions = torch.arange(length, device=tokens.device)[None]
    hidden, slots, begin, results = features, UnrollPass(), 0, []
    for j in range(depth):
        last = length - 2 - j  # bases beyond it have no next token
        if j >= layers and begin == 0:  # guesses begin at bases that rounds can start from
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
        results.append(hidden[scored_bases(scored, j)[:, begin : last + 1]])
    return results


class MtpDrafter(HeadDrafter):
    """The head in an engine."""

    name = "mtp"
    needs = "the folder of the heads or of a policy that carries them"
    vllm_refusal = (
        "vLLM runs prediction heads only inside checkpoints of the architectures that were published with them, and "
        "these heads stand beside the policy"
    )

    def __init__(self, head: MtpHead, policy: Policy) -> None:
        super().__init__(head, policy, len(head.layers))

    @classmethod
    def train(cls, policy: Policy, setup: TrainingSetup) -> Training[tuple[Drafter, Validation]]:
        from forerun.drafters.training.heads import frequent_tokens, train_head

        tokens = frequent_tokens(setup.pairs, setup.config.vocab)
        head = MtpHead(policy, setup.config.mtp_layers, tokens)
        result = yield from train_head(head, policy, setup)
        return cls(head.to(policy.dtype), policy), result

    def read_prompts(self, tokens: Tensor, features: Tensor, slots: SlotPass) -> None:
        for index in range(len(self.head.layers)):
            window = tokens[:, 1 + index : 1 + index + slots.tokens]
            features = self.head.step(index, window, features, slots.positions, slots)

    @torch.no_grad()
    def propose(self, rows: Rows, budget: Tensor) -> Draft:
        """Read the window, then draft token by token; a row with an empty window drafts nothing."""
        count = self.pending[: rows.count]
        lengths = torch.where(count > 0, budget, 0)
        k, width, layers = int(lengths.max()), int(count.max()), len(self.head.layers)
        chain = SampledChain(rows, self.round_temperature(rows), self.head.draft_ids)
        if k == 0:
            return chain.draft(lengths)
        batch = torch.arange(rows.count, device=count.device)
        text = torch.cat([self._tokens[: rows.count, :width], count.new_zeros(rows.count, k)], dim=1)
        starts = (rows.lengths - count).clamp(min=0)
        slots = SlotPass(self.cache, 0, starts, width, int(starts.max()) + width)
        window, newest = self._features[: rows.count, :width], torch.empty(0)
        token = rows.last
        for j in range(k):
            if j < layers:
                window = self.head.step(j, text[:, j : j + width], window, slots.positions, slots)
                newest = window[batch, (count - 1).clamp(min=0)]
            else:
                newest = self._again(rows, token, newest, j - layers)
            token = chain.extend(self.head.logits(newest))
            text[batch, count + j] = token
        return chain.draft(lengths)

    def _again(self, rows: Rows, token: Tensor, hidden: Tensor, step: int) -> Tensor:  # [B, H]
        """The last layer on its own output [B, H], `step` places behind the newest token."""
        places = rows.lengths + step
        slots = SlotPass(self.cache, 0, places, 1, int(places.max()) + 1)
        last = len(self.head.layers) - 1
        return self.head.step(last, token[:, None], hidden[:, None], slots.positions, slots)[:, 0]

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write config.json and model.safetensors with DeepSeek-V3's names; `about` records how it was made."""
        config = self.head.config
        state = {published_name(k, config.num_hidden_layers): v for k, v in self.head.state_dict().items()}
        write_drafter(folder, {"architectures": ["ForerunMtp"], **asdict(config), "forerun": about}, state)

    @classmethod
    def load(cls, source: Path, policy: Policy) -> Self:
        """Read heads saved by `save`, or those that a checkpoint of the policy carries; see `read_heads`.

        Raises UserError when files are missing or broken, or the heads were made for another policy.
        """
        with reading(f"The drafter in {source}", source):
            data = json.loads((source / "config.json").read_text())
            data = data.get("text_config", data)
            state = read_heads(source, int(data["num_hidden_layers"]))
        check_fit(policy, {name: data.get(name) for name in ("hidden_size", "vocab_size", "num_hidden_layers")})
        if not state:
            raise UserError(f"{source} holds no tensors of multi-token-prediction heads; train one: forerun draft")
        depth = 1 + max(int(name.split(".")[1]) for name in state if name != IDS)
        head = MtpHead(policy, depth, state.get(IDS)).to(policy.dtype)
        load_exactly(head, state, f"the drafter in {source}")
        require_finite(f"The drafter in {source}", head.named_parameters())
        return cls(head, policy)


def _source_layer(policy: Policy) -> int:
    """The last layer with full attention."""
    decoder, config = policy.model.get_decoder(), policy.model.config.get_text_config()
    last = decoder_layers(policy.model)[-1]
    fits = hasattr(decoder, "norm") and hasattr(decoder, "rotary_emb") and hasattr(last, "self_attn")
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
