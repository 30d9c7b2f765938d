"""The command line: one verb per function, nothing else.

`RECIPE` is a shipped name or a YAML path; `dotted.key=value` overrides follow. A user's mistake ends with one sentence
and exit code 2; `--debug` shows the traceback. Ctrl-C stops cleanly with exit code 130.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from forerun import __version__
from forerun.config import Recipe, load_recipe, parse_overrides
from forerun.errors import Interrupted, UserError

app = typer.Typer(
    help="Reinforcement-learning post-training with lossless speculative rollouts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeName = Annotated[str, typer.Argument(help="shipped recipe or YAML file", metavar="RECIPE")]
Overrides = Annotated[list[str] | None, typer.Argument(help="dotted.key=value ...", metavar="[KEY=VALUE]...")]
Json = Annotated[bool, typer.Option("--json", help="machine-readable result on stdout, everything else on stderr")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the resolved recipe and stop")]


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(help="shipped recipe or YAML file", metavar="RECIPE")] = None,
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option(help="run folder whose newest checkpoint to continue")] = None,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Run the reinforcement-learning loop of a recipe."""
    words = list(overrides or [])
    if resume is not None and recipe is not None and "=" in recipe:
        words, recipe = [recipe, *words], None  # `train --resume RUN key=value`: no recipe is named
    if (recipe is None) == (resume is None):
        raise UserError(
            "Name a recipe to start (forerun train quickstart), or a run to continue (--resume runs/latest)"
        )
    settings = _resumed(resume, words) if resume is not None else load_recipe(str(recipe), parse_overrides(words))
    if dry_run:
        _print_recipe(settings, json)
        return
    from forerun.loop.loop import run
    from forerun.report.console import Console

    run(settings, Console(settings.train.steps, json=json), resume)


@app.command()
def draft(recipe: RecipeName, overrides: Overrides = None, out: Path = Path("drafter"), json: Json = False) -> None:
    """Train a drafter on the policy's own rollouts and save it in the layout that vLLM reads."""
    settings = load_recipe(recipe, parse_overrides(overrides or []))
    from forerun.loop.setup import prepare_policy, train_drafter
    from forerun.report.console import Console
    from forerun.tasks import load_task

    with Console(0, json=json) as console:
        task = load_task(settings.task, settings.seed)
        policy = prepare_policy(settings, task, out, console)
        about = train_drafter(settings, policy, task, out, console)
        console.note(f"drafter saved to {out}; use it with speculation.draft={out}")
    if json:
        _print_json({"draft": str(out), **about})


@app.command()
def verify(
    recipe: RecipeName,
    overrides: Overrides = None,
    quick: Annotated[bool, typer.Option("--quick", help="small samples: minutes on a laptop")] = False,
    against: Annotated[int | None, typer.Option(help="plain rollouts per prompt to compare with")] = None,
    inject: Annotated[str | None, typer.Option(help="break the engine on purpose: the verdict must fail")] = None,
    out: Path = Path("verification"),
    json: Json = False,
) -> None:
    """Test that speculative rollouts are the policy's own; exit code 1 when a claim fails."""
    settings = load_recipe(recipe, parse_overrides(overrides or []))
    from forerun.lossless.harness import FULL, QUICK, verify_recipe
    from forerun.report.console import Console
    from forerun.report.verification import write_verification

    with Console(0, json=json) as console:
        verdict = verify_recipe(settings, console, effort=QUICK if quick else FULL, against=against, inject=inject)
    paths = write_verification(verdict.to_dict(), out)
    if json:
        _print_json({**verdict.to_dict(), "paths": paths})
    else:
        typer.echo(f"{verdict.to_text()}\n{paths['page']}")
    raise typer.Exit(0 if verdict.passed else 1)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="run folder", metavar="RUN")], json: Json = False) -> None:
    """Write the offline HTML page of a run folder."""
    from forerun.report.html import write_report

    path = write_report(run)
    if json:
        _print_json({"report": str(path)})
    else:
        typer.echo(path)


@app.command()
def plan(
    overrides: Overrides = None,
    paper: Annotated[bool, typer.Option("--paper", help="the papers' published numbers beside ours")] = False,
    validate: Annotated[bool, typer.Option("--validate", help="errors on measured serving rows")] = False,
    data: Annotated[Path | None, typer.Option(help="CSV of measured rows for --validate")] = None,
    json: Json = False,
) -> None:
    """Predict what speculation will bring: forerun plan model=Qwen3-8B gpu=H200 gpus=64 lag=1."""
    from forerun.simulate import plan as planning
    from forerun.simulate import render
    from forerun.simulate.validate import validate as validated

    if validate and data is None:
        raise UserError("--validate needs the measured rows: --data FILE.csv")
    if validate and data is not None:
        result, text = validated(data), render.validation_text
    elif paper:
        result, text = planning.plan_paper(), render.paper_text
    else:
        values = {k: yaml.safe_load(v) for k, v in parse_overrides(overrides or []).items()}
        result, text = planning.plan(values).to_dict(), render.plan_text
    if json:
        _print_json(result)
    else:
        typer.echo(text(result))


@app.command()
def doctor(json: Json = False) -> None:
    """Say what this machine has, which extras work, and the command that mends each gap."""
    from forerun.doctor import examine, rows

    findings = examine()
    if json:
        _print_json(findings)
        return
    for mark, what, detail in rows(findings):
        typer.echo(f"{mark:4} {what:14} {detail}")


def main() -> None:
    """Entry point: runs a verb and turns its errors into exit codes."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    if "--version" in sys.argv[1:2]:
        typer.echo(__version__)
        return
    try:
        _quiet_libraries()
        app(standalone_mode=True)
    except UserError as error:
        if debug:
            raise
        typer.echo(f"forerun: {error}", err=True)
        sys.exit(2)
    except (Interrupted, KeyboardInterrupt):
        sys.exit(130)


def _resumed(run: Path, words: list[str]) -> Recipe:
    from forerun.loop.loop import resumed_recipe

    return resumed_recipe(run, parse_overrides(words))


def _print_recipe(recipe: Recipe, as_json: bool) -> None:
    if as_json:
        _print_json(recipe.model_dump(mode="json"))
    else:
        typer.echo(recipe.to_yaml(), nl=False)


def _print_json(data: dict[str, Any]) -> None:
    typer.echo(json.dumps(data, indent=2, default=str))


def _quiet_libraries() -> None:
    """Libraries' own progress bars and warnings would tear the display apart; errors still come through."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


if __name__ == "__main__":
    main()
