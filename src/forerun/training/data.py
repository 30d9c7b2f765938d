"""A run's data: the task's problems whose prompts fit the model, known before the model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from forerun.config import Recipe
from forerun.errors import UserError
from forerun.events import EventStream, Warned
from forerun.models import Policy
from forerun.models.prompts import PromptEncoder, load_tokenizer, model_context
from forerun.tasks import Problem, Task, load_task, with_splits
from forerun.tasks.splits import Splits

MESSAGE_TOKENS = 16  # that a template puts around a message, at most, beside those of the first prompt


@dataclass(frozen=True, slots=True)
class Data:
    """A task with its problems, how their prompts are encoded, and what the user should know of them."""

    task: Task
    splits: Splits
    encoder: PromptEncoder
    context: int | None  # positions of the model
    warnings: list[str]


def prepare_data(recipe: Recipe) -> EventStream[Data]:
    """`load_data`, with its warnings as events."""
    data = load_data(recipe)
    for text in data.warnings:
        yield Warned(text)
    return data


def load_data(recipe: Recipe, policy: Policy | None = None) -> Data:
    """The problems of a recipe; nothing but the model's tokenizer and configuration is loaded.

    Args:
        policy: has tokenizer and context already.

    Raises UserError when there are no problems, or a prompt cannot be rendered or is too long (task.too_long=error).
    """
    task = load_task(recipe.task, recipe.seed)
    assert task.splits is not None
    splits = task.splits()
    name = recipe.policy.model
    context = model_context(name) if policy is None else policy.context
    encoder = recipe_encoder(recipe, load_tokenizer(name) if policy is None else policy.tokenizer, name)
    note = encoder.render(_first(splits).prompt).note
    fitting, warnings = _fitting(recipe, splits, encoder, context)
    warnings = [*splits.warnings(), *warnings, *([] if note is None else [note])]
    if recipe.policy.system is not None and not recipe.policy.chat:
        warnings.append("policy.system is not used: policy.chat=false gives questions as they are")
    return Data(with_splits(task, lambda: fitting), fitting, encoder, context, warnings)


def recipe_encoder(recipe: Recipe, tokenizer: object, name: str) -> PromptEncoder:
    """How a recipe wants prompts."""
    settings = recipe.policy
    return PromptEncoder(tokenizer, name, settings.chat, settings.system, settings.template)


def encode_problem(problem: Problem, encoder: PromptEncoder) -> list[int]:
    """A problem's token ids [P]. Raises UserError, which names the problem, when its prompt cannot be read."""
    try:
        return encoder.encode(problem.prompt)
    except UserError as error:
        raise UserError(f"Problem '{problem.id}': {error}") from None


def _first(splits: Splits) -> Problem:
    return (splits.train or splits.problems("eval"))[0]


def _fitting(recipe: Recipe, splits: Splits, encoder: PromptEncoder, context: int | None) -> tuple[Splits, list[str]]:
    """The splits without prompts that leave no position free, and the sentence about those."""
    if context is None:
        return splits, []
    length = _length_or_bound(_first(splits), encoder, context)
    long = [(n, p) for p in [*splits.train, *splits.held_out] if (n := length(p)) >= context]
    if not long:
        return splits, []
    tokens, longest = max(long, key=lambda pair: pair[0])
    what = f"fill the model's context of {context} tokens ('{longest.id}' has {tokens})"
    if recipe.task.too_long == "error":
        raise UserError(f"{len(long)} prompts {what}; shorten them, or leave them out with task.too_long=drop")
    left_out = {id(problem) for _, problem in long}
    train = [problem for problem in splits.train if id(problem) not in left_out]
    held_out = [problem for problem in splits.held_out if id(problem) not in left_out]
    dropped = {**splits.dropped, "too_long": len(long)}
    fitting = replace(splits, train=train, held_out=held_out, dropped=dropped)
    return fitting, [f"{len(long)} problems are left out: their prompts {what}"]


def _length_or_bound(first: Problem, encoder: PromptEncoder, context: int) -> Callable[[Problem], int]:
    """Tokens of a prompt, or a bound below the context: a tokenizer makes at most one token of a byte.

    Conversations are always encoded: a template may refuse one for the order of its turns.
    """
    frame = len(encode_problem(first, encoder)) + MESSAGE_TOKENS

    def length(problem: Problem) -> int:
        bound = len(problem.question.encode()) + frame
        return bound if bound < context and problem.messages is None else len(encode_problem(problem, encoder))

    return length
