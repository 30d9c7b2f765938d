"""The drafter of a run: loaded, or trained on the policy's own rollouts or the user's texts.

`forerun draft` trains one alone. An `UnfinishedTraining` keeps what a killed one needs to resume.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from forerun.chat import check_text
from forerun.config import Recipe
from forerun.drafters import DRAFTERS, Drafter, load_drafter
from forerun.drafters.training.trainer import EpochDone, StateFile, Training, TrainingSetup
from forerun.engine import RolloutEngine, Sampling, build_engine
from forerun.engine.local.engine import LocalEngine
from forerun.errors import Interrupted, UserError
from forerun.events import EventStream, Note, Progress, Warned, as_stage
from forerun.models import Policy, load_policy
from forerun.models.checksum import checksum
from forerun.tasks import Problem, Task, load_task
from forerun.tasks.files import read_rows
from forerun.tracking.files import disk_errors, write_atomically
from forerun.training.data import encode_problem, prepare_data, recipe_encoder
from forerun.training.prompts import encode, prepare_policy
from forerun.training.resume import flat
from forerun.workers.ray import ray_launcher

T = TypeVar("T")
Pairs = list[tuple[list[int], list[int]]]  # (prompt ids, completion ids)


def prepare_drafter(recipe: Recipe, policy: Policy, task: Task, folder: Path) -> EventStream[Drafter | None]:
    """Load the recipe's drafter, or train one on the policy's own rollouts where it names none."""
    speculation = recipe.speculation
    if speculation.tokens == 0:
        return None
    if speculation.draft is None and DRAFTERS.load(speculation.method).trains:
        yield from train_drafter(recipe, policy, task, folder)
        speculation = speculation.model_copy(update={"draft": str(folder)})
    return load_drafter(policy, speculation)


@dataclass(frozen=True, slots=True)
class UnfinishedTraining:
    """What a killed `forerun draft` resumes from; removed when the drafter is saved. A cold start begins again.

    OUT/training/settings.json   what decides the result: settings of the recipe, checksum of the policy
    OUT/training/pairs.jsonl     {"prompt": [ids], "completion": [ids]}: the policy's samples, or the texts
    OUT/training/state.pt        see `StateFile`
    """

    folder: Path

    @property
    def state(self) -> StateFile:
        """The state after the last finished epoch."""
        return StateFile(self.folder / "state.pt")

    @property
    def exists(self) -> bool:
        """Whether there is something to resume."""
        return self._settings.exists()

    @property
    def _settings(self) -> Path:
        return self.folder / "settings.json"

    def begin(self, recipe: Recipe, policy: Policy) -> None:
        """Write down what the training depends on. Raises UserError when the disk is full or cannot be written."""
        with disk_errors(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        settings = {"recipe": _deciding(recipe), "policy": checksum(policy.model.state_dict())}
        write_atomically(self._settings, json.dumps(settings, indent=2) + "\n")

    def check_recipe(self, recipe: Recipe) -> None:
        """Raises UserError when the training has other settings than `recipe`."""
        saved, now = flat(self._read()["recipe"]), flat(_deciding(recipe))
        for key in sorted(saved.keys() | now.keys()):
            if saved.get(key) != now.get(key):
                raise UserError(
                    f"The unfinished training in {self.folder} has {key}={saved.get(key)} and this recipe "
                    f"{key}={now.get(key)}; give the same settings, or remove the folder to start again"
                )

    def check_policy(self, policy: Policy) -> None:
        """Raises UserError when the training is of other weights."""
        saved, now = self._read()["policy"], checksum(policy.model.state_dict())
        if saved != now:
            raise UserError(
                f"The unfinished training in {self.folder} is of a policy with checksum {saved} and '{policy.name}' "
                f"now has {now}; bring the same weights, or remove the folder to start again"
            )

    def _read(self) -> dict[str, Any]:
        try:
            data = json.loads(self._settings.read_text(encoding="utf-8"))
            return {"recipe": dict(data["recipe"]), "policy": str(data["policy"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._settings} is broken: {error}; remove {self.folder} to start again") from None

    def save_pairs(self, pairs: Pairs) -> None:
        """Keep what is trained on."""
        lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs]
        write_atomically(self.folder / "pairs.jsonl", "\n".join(lines) + "\n")

    def pairs(self) -> Pairs | None:
        """What is trained on, in its order; None: not known yet."""
        path = self.folder / "pairs.jsonl"
        if not self.exists or not path.exists():
            return None
        return [(row["prompt"], row["completion"]) for row in read_rows(str(path))]

    def remove(self) -> None:
        """Call this once the drafter is saved."""
        self._settings.unlink(missing_ok=True)  # first: without it the rest is not looked at
        shutil.rmtree(self.folder, ignore_errors=True)


def _deciding(recipe: Recipe) -> dict[str, Any]:
    """The settings that a drafter's weights depend on."""
    data = recipe.model_dump(mode="json")
    chosen = {key: data[key] for key in ("seed", "policy", "task", "cold_start", "draft", "rollout")}
    return chosen | {
        "speculation": {"method": recipe.speculation.method},
        "train": {"samples_per_prompt": recipe.train.samples_per_prompt},
    }


def make_drafter(recipe: Recipe, out: Path, resume: bool = False) -> EventStream[dict[str, object]]:
    """Train the recipe's drafter and save it to `out`; one that was killed goes on with `resume`.

    Returns:
        See `train_drafter`.

    Raises:
        UserError: `out` holds an unfinished training and `resume` is false, or none or another and it is true; or
            something of the user's is wrong. KeyboardInterrupt: Ctrl-C; what was done is kept.
    """
    unfinished = UnfinishedTraining(out / "training")
    if unfinished.exists and not resume:
        raise UserError(f"{out} holds an unfinished training: go on with --resume, or remove {unfinished.folder}")
    if resume and not unfinished.exists:
        raise UserError(f"{out} holds no unfinished training to go on with; leave out --resume to start one")
    _check_trained(recipe)
    if recipe.draft.texts is not None and not resume:
        read_texts(recipe.draft.texts)  # report bad data before the model is loaded
    samples = recipe.draft.texts is None or recipe.cold_start is not None
    task = (yield from prepare_data(recipe)).task if samples else load_task(recipe.task, recipe.seed)
    if resume:
        unfinished.check_recipe(recipe)
        policy = yield from as_stage("loading the policy", _policy_again(recipe, out))
        unfinished.check_policy(policy)
    else:
        policy = yield from prepare_policy(recipe, task, out)
    try:
        return (yield from train_drafter(recipe, policy, task, out, unfinished))
    except (KeyboardInterrupt, Interrupted):
        if unfinished.exists:
            yield Warned(f"stopped; go on with the same command and --resume (kept in {unfinished.folder})")
        raise


def _policy_again(recipe: Recipe, folder: Path) -> EventStream[Policy]:
    """The policy of a training that had begun: the adapter of its cold start, if it had one, is there."""
    settings = recipe.policy
    adapter = settings.adapter if recipe.cold_start is None else str(folder / "cold_start")
    yield from ()
    return load_policy(settings.model, settings.dtype, settings.device, adapter)


def _check_trained(recipe: Recipe) -> None:
    method = recipe.speculation.method
    if method == "none" or not DRAFTERS.load(method).trains:
        raise UserError("The recipe has no drafter to train: set speculation.method, e.g. speculation.method=eagle3")


def train_drafter(
    recipe: Recipe, policy: Policy, task: Task, folder: Path, unfinished: UnfinishedTraining | None = None
) -> EventStream[dict[str, object]]:
    """Train a drafter on samples of the policy, or on `draft.texts`; save it to `folder`.

    Args:
        unfinished: keeps samples and state until the drafter is saved, and resumes from them; None: nothing is kept.

    Returns:
        What is also written into the drafter's config.json under "forerun": data, settings and acceptance.
    """
    _check_trained(recipe)
    pairs = yield from _training_pairs(recipe, policy, task, unfinished)
    file = None if unfinished is None else unfinished.state
    setup = TrainingSetup(pairs, recipe.draft, recipe.rollout.temperature, recipe.seed, file)
    torch.manual_seed(recipe.seed)  # what a new head begins with; a resumed training must make the same
    training = DRAFTERS.load(recipe.speculation.method).train(policy, setup)
    drafter, best = yield from as_stage("training the drafter", _shown(training, recipe.draft.epochs))
    about: dict[str, object] = {
        "policy": policy.name,
        "adapter": recipe.policy.adapter,
        "rollouts": len(pairs),
        "tokens": sum(len(c) for _, c in pairs),
        "temperature": recipe.rollout.temperature,
        "training": recipe.draft.model_dump(mode="json"),
        "acceptance_per_position": [round(a, 4) for a in best.per_position],
        "tokens_per_round": round(best.length, 4),
    }
    with disk_errors(folder):
        drafter.save(folder, about)
    if unfinished is not None:
        unfinished.remove()
    return about


def _shown(training: Training[T], epochs: int) -> EventStream[T]:
    """A training as events of the run."""
    while True:
        try:
            event = next(training)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        if isinstance(event, EpochDone):
            yield Note(f"drafter: epoch {event.epoch}/{epochs}: {event.result}")
        else:
            yield Progress(event.step, event.steps, "steps", event.rate)


def _training_pairs(
    recipe: Recipe, policy: Policy, task: Task, unfinished: UnfinishedTraining | None
) -> EventStream[Pairs]:  # what is kept in `unfinished`, or else the recipe's texts, or else samples
    kept = None if unfinished is None else unfinished.pairs()
    if kept is not None:
        yield Note(f"drafter: going on with {len(kept)} texts of the training that was broken off")
        return kept
    pairs: Pairs = []
    if recipe.draft.texts is not None:
        pairs, cut = text_pairs(recipe.draft.texts, recipe, policy)
        yield Note(f"drafter: {len(pairs)} texts, {cut} of them cut at the policy's {policy.context} positions")
        if long := len(read_texts(recipe.draft.texts)) - len(pairs):
            yield Warned(f"{long} texts are left out: their prompts fill the policy's {policy.context} positions")
    if unfinished is not None:
        unfinished.begin(recipe, policy)
    if not pairs:
        work = sample_policy(recipe, policy, task, recipe.draft.rollouts)
        pairs = yield from as_stage("sampling the policy", work)
    if unfinished is not None:
        unfinished.save_pairs(pairs)
    return pairs


def read_texts(path: str) -> list[tuple[str | None, str]]:
    """(prompt, completion) of every object of a JSONL file; of one that has `text` alone (None, text).

    Raises:
        UserError: the file is missing or empty, a line is not a JSON object, or an object has neither.
    """
    texts: list[tuple[str | None, str]] = []
    for number, row in enumerate(read_rows(path), 1):
        prompt, completion, text = (row.get(key) for key in ("prompt", "completion", "text"))
        for value in (prompt, completion, text):
            check_text(value if isinstance(value, str) else "", f"Object {number} of {path}")
        if isinstance(prompt, str) and isinstance(completion, str):
            texts.append((prompt, completion))
        elif isinstance(text, str):
            texts.append((None, text))
        else:
            raise UserError(
                f"Object {number} of {path} has neither strings under 'prompt' and 'completion' nor one under 'text'"
            )
    return texts


def text_pairs(path: str, recipe: Recipe, policy: Policy) -> tuple[Pairs, int]:
    """The texts of `draft.texts` as (prompt ids, completion ids), and how many were cut at the policy's context.

    A prompt goes through the chat template like a problem's, and its completion gets the end token. A text without one
    is a completion after its own first token. One whose prompt fills the context is left out.

    Raises:
        UserError: see `read_texts` and `encode_problem`; or a text has nothing to draft, or no prompt fits.
    """
    encoder = recipe_encoder(recipe, policy.tokenizer, policy.name)
    pairs: Pairs = []
    cut = 0
    for number, (prompt, completion) in enumerate(read_texts(path), 1):
        ids = policy.tokenizer(completion, add_special_tokens=prompt is None)["input_ids"]
        if prompt is None:
            head, ids = ids[:1], ids[1:]
        else:
            head = encode_problem(Problem(f"{Path(path).name}/{number}", prompt, ""), encoder)
            ids = ids + _end(ids, policy)
        if len(head) >= policy.context:
            continue
        if len(head) + len(ids) < 3:
            raise UserError(f"Object {number} of {path} has {len(head) + len(ids)} tokens; a text needs at least 3")
        room = policy.context - len(head)
        cut += len(ids) > room
        pairs.append((head, ids[:room]))
    if not pairs:
        raise UserError(f"All prompts of {path} fill the policy's context of {policy.context} positions; shorten them")
    return pairs, cut


def _end(ids: list[int], policy: Policy) -> list[int]:
    """The token that ends a completion, unless it has one or there is none."""
    end = policy.tokenizer.eos_token_id
    return [] if end is None or (ids and ids[-1] in policy.eos_ids) else [int(end)]


def sample_policy(recipe: Recipe, policy: Policy, task: Task, count: int) -> EventStream[Pairs]:
    """`count` plain samples on training prompts, at the recipe's temperature: (prompt ids, completion ids)."""
    n = recipe.train.samples_per_prompt
    problems = task.problems("train")
    chosen = random.Random(recipe.seed + 1).sample(problems, min(len(problems), -(-count // n)))
    prompts = [encode(p, recipe, policy) for p in chosen]
    sampling = Sampling(
        recipe.rollout.max_new_tokens, recipe.rollout.temperature, recipe.seed + 1, tuple(recipe.rollout.stop)
    )
    pairs: Pairs = []
    started = time.perf_counter()
    with closing(_sampler(recipe, policy)) as engine:
        for rollout in engine.stream(prompts, sampling, n):
            pairs.append((rollout.prompt_ids, rollout.tokens))
            yield Progress(len(pairs), len(prompts) * n, "rollouts", len(pairs) / (time.perf_counter() - started))
    return pairs


def _sampler(recipe: Recipe, policy: Policy) -> RolloutEngine:
    """The run's engine without speculation; in place of replicas of the local one, one in this process."""
    rollout = recipe.rollout
    if rollout.engine == "local":
        return LocalEngine(policy, slots=rollout.slots)
    ranks = recipe.train.ranks
    launcher = ray_launcher(recipe.cluster, "replica", rollout.replicas, ranks)
    return build_engine(rollout, policy, None, recipe.speculation, launcher, ranks)
