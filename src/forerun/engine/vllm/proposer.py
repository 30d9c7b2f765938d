"""Drafts from samples of the same prompt, inside vLLM: the corpus of `drafters/trie.py` as a vLLM proposer class.

vLLM calls the class after every step with the rows of the batch; which request a row belongs to is read from the model
runner, which the worker's extension attaches. Requests with the same prompt, token by token, are siblings. The tokens
of a step enter the corpus for all rows before any is drafted for, as in the local engine.
The corpus lives as long as the engine, also through weight updates and sleep, and is not saved in checkpoints. Tokens
beyond a stop string, at most k per sample, stay in it: the engine looks for the string after the step.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forerun.config import TrieConfig
from forerun.drafters.trie import VLLM_SETTINGS, Corpus, Text, TrieDrafter


@dataclass(slots=True)
class _Sample:
    """A request's place in the corpus."""

    scope: bytes
    text: Text
    taken: int = 0  # tokens of it


class Siblings:
    """Which request is which text of a corpus."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self._samples: dict[str, _Sample] = {}
        self._scopes: dict[tuple[int, ...], bytes] = {}  # of the prompts of this epoch
        self._opened = 0

    def open(self) -> None:
        """A prompt's next visit starts an epoch."""
        self._opened += 1
        self._scopes.clear()

    def take(self, name: str, prompt: Sequence[int], tokens: Sequence[int], end: int) -> None:
        """Request `name` has emitted tokens[:end] so far; the new ones go into the corpus."""
        if name not in self._samples:
            scope = self._scope(prompt)
            context = list(prompt[-self.corpus.settings.match_max :])
            self._samples[name] = _Sample(scope, self.corpus.begin(scope, context))
        sample = self._samples[name]
        self.corpus.extend(sample.text, tokens[sample.taken : end])
        sample.taken = end

    def draft(self, name: str, context: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens after `context`, the newest tokens (with the prompt's) of a request known to `take`."""
        return self.corpus.continuation(self._samples[name].scope, context, most)

    def keep(self, names: Container[str]) -> None:
        """Forget which texts belonged to requests that are not among `names`; the texts stay."""
        self._samples = {name: sample for name, sample in self._samples.items() if name in names}

    def _scope(self, prompt: Sequence[int]) -> bytes:
        key = tuple(prompt)
        if key not in self._scopes:
            self._scopes[key] = self.corpus.visit(prompt, self._opened)
        return self._scopes[key]


class TrieProposer:
    """The interface is that of vLLM's `vllm/v1/spec_decode/custom_class_proposer.py`."""

    def __init__(self, vllm_config: Any) -> None:
        """`additional_config` has the settings of `speculation.trie`, and the folder of a corpus to begin with."""
        given = dict(vllm_config.additional_config[VLLM_SETTINGS])
        folder, settings = given.pop("folder"), TrieConfig(**given)
        drafter = TrieDrafter(settings) if folder is None else TrieDrafter.load(Path(folder), settings)
        self.siblings = Siblings(drafter.corpus)
        self._k: int = vllm_config.speculative_config.num_speculative_tokens
        self._positions: int = vllm_config.model_config.max_model_len
        self._longest = settings.match_max
        self._runner: Any = None

    def attach(self, runner: Any) -> None:
        """The runner whose batch is drafted for."""
        self._runner = runner

    def open(self) -> None:
        """See `Siblings.open`."""
        self.siblings.open()

    def load_model(self, target: Any) -> None:
        """Nothing to load; the CPU's runner calls this on every drafter."""

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,  # [rows]
        token_ids_cpu: np.ndarray,  # [rows, positions]
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts for every row of the batch; none for one that is still prefilling, or whose sample is done.

        Args:
            sampled_token_ids: the step's tokens per row. num_tokens_no_spec, token_ids_cpu: the rows' tokens
                now. slot_mappings: not used.
        """
        requests = self._runner.requests
        self.siblings.keep(requests)
        names = {row: self._runner.input_batch.req_ids[row] for row, new in enumerate(sampled_token_ids) if new}
        room = {row: self._take(requests[name], len(sampled_token_ids[row])) for row, name in names.items()}
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        for row, name in names.items():
            length = int(num_tokens_no_spec[row])
            context = token_ids_cpu[row, max(0, length - self._longest) : length].tolist()
            drafts[row] = self.siblings.draft(name, context, min(self._k, room[row], self._positions - length - 1))
        return drafts

    def metrics(self) -> dict[str, int]:
        """As `TrieDrafter.metrics`."""
        return asdict(self.siblings.corpus.counts)

    def _take(self, request: Any, new: int) -> int:
        """Put a request's tokens into the corpus, `new` of them of this step; how many drafts the next could keep."""
        tokens, most = request.output_token_ids, request.sampling_params.max_tokens
        stops = request.sampling_params.stop_token_ids
        stop = next((place for place in range(len(tokens) - new, len(tokens)) if tokens[place] in stops), None)
        end = min(len(tokens) if stop is None else stop + 1, most)
        self.siblings.take(request.req_id, request.prompt_token_ids, tokens, end)
        return most - end - 1 if stop is None else 0
