"""The command line: one verb per function, nothing else.

`RECIPE` is a shipped name or a YAML path; `dotted.key=value` overrides follow. A user's mistake ends with one sentence
and exit code 2; `--debug` shows the traceback. Signals stop cleanly with exit code 128 and their number (Ctrl-C: 130).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from forerun import __version__
from forerun.config import Recipe, load_recipe, parse_overrides
from forerun.config.overrides import read_yaml
from forerun.config.paths import check_paths
from forerun.errors import Interrupted, UserError, WorkersLost

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
    from_run: Annotated[
        Path | None, typer.Option("--from", help="run folder with whose policy and drafter a new run begins")
    ] = None,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Run the reinforcement-learning loop of a recipe."""
    words = list(overrides or [])
    if (resume or from_run) is not None and recipe is not None and "=" in recipe:
        words, recipe = [recipe, *words], None  # `train --resume RUN key=value`: no recipe is named
    if (recipe is None and from_run is None) == (resume is None):
        raise UserError(
            "Name a recipe to start (forerun train quickstart), a run to continue (--resume runs/latest), or one whose "
            "weights a new run begins with (--from runs/latest)"
        )
    settings = _settings(recipe, resume, from_run, parse_overrides(words))
    if dry_run:
        _print_recipe(settings, json)
        return
    check_paths(settings, resume is not None)
    from forerun.report.console import Console, follow
    from forerun.training.run import run

    follow(run(settings, resume), Console(settings.train.steps, json=json))


@app.command()
def draft(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Path = Path("drafter"),
    resume: Annotated[bool, typer.Option("--resume", help="go on with the unfinished training in --out")] = False,
    json: Json = False,
) -> None:
    """Train a drafter on the policy's own rollouts and save it in the layout that vLLM reads."""
    settings = load_recipe(recipe, parse_overrides(overrides or []))
    check_paths(settings)
    from forerun.report.console import Console, follow
    from forerun.training.drafter import make_drafter

    console = Console(0, json=json)
    about = follow(make_drafter(settings, out, resume), console)
    console.note(f"drafter saved to {out}; use it with speculation.draft={out}")
    if json:
        _print_json({"draft": str(out), **about})


@app.command()
def bench(
    recipe: RecipeName,
    overrides: Overrides = None,
    methods: Annotated[str | None, typer.Option(help="drafters, with commas; default: the recipe's and ngram")] = None,
    ks: Annotated[str, typer.Option(help="draft lengths")] = "1,3,4",
    batches: Annotated[str, typer.Option(help="sequences side by side")] = "1,8,32",
    draft: Annotated[list[str] | None, typer.Option(help="method=folder of a drafter; may be repeated")] = None,
    repeats: Annotated[int, typer.Option(help="turns; every figure is their median")] = 3,
    out: Path = Path("bench"),
    json: Json = False,
) -> None:
    """Measure plain decoding against each drafter, k and batch on this machine; writes the cost table."""
    settings = load_recipe(recipe, parse_overrides(overrides or []))
    check_paths(settings)
    from forerun.bench import Grid, bench_recipe
    from forerun.report.bench_page import write_bench
    from forerun.report.console import Console, follow

    names = methods.split(",") if methods else list(dict.fromkeys([settings.speculation.method, "ngram"]))
    drafters = [name for name in names if name != "none"]
    folders = {name: os.path.expanduser(folder) for name, folder in parse_overrides(draft or []).items()}
    grid = Grid(drafters, _numbers(ks), _numbers(batches), repeats, folders)
    console = Console(0, json=json)
    result = follow(bench_recipe(settings, grid), console)
    paths = write_bench(result, out)
    console.note(f"cost table {paths['table']}, page {paths['page']}")
    if json:
        _print_json({**result, "paths": paths})


@app.command()
def verify(
    recipe: RecipeName,
    overrides: Overrides = None,
    quick: Annotated[bool, typer.Option("--quick", help="small samples: minutes on a laptop")] = False,
    engine: Annotated[str | None, typer.Option(help="local or vllm; default: the recipe's")] = None,
    against: Annotated[int | None, typer.Option(help="plain rollouts per prompt to compare with")] = None,
    inject: Annotated[str | None, typer.Option(help="break the engine on purpose: the verdict must fail")] = None,
    out: Path = Path("verification"),
    json: Json = False,
) -> None:
    """Test that speculative rollouts are the policy's own; exit code 1 when a claim fails."""
    chosen = [] if engine is None else [f"rollout.engine={engine}"]
    settings = load_recipe(recipe, parse_overrides([*(overrides or []), *chosen]))
    check_paths(settings)
    from forerun.lossless.harness import FULL, QUICK, verify_recipe
    from forerun.report.console import Console, follow
    from forerun.report.verify_page import write_verification

    work = verify_recipe(settings, effort=QUICK if quick else FULL, against=against, inject=inject)
    verdict = follow(work, Console(0, json=json))
    paths = write_verification(verdict.to_dict(), out)
    if json:
        _print_json({**verdict.to_dict(), "paths": paths})
    else:
        typer.echo(f"{verdict.to_text()}\n{paths['page']}")
    raise typer.Exit(0 if verdict.passed else 1)


@app.command()
def data(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="the offline page that is written")] = Path("data.html"),
    json: Json = False,
) -> None:
    """Show the task as the model sees it: counts, lengths, first prompts, what is left out and why."""
    settings = load_recipe(recipe, parse_overrides(overrides or []))
    check_paths(settings)
    from forerun.report.console import Console, follow
    from forerun.report.data_page import data_text, write_data
    from forerun.training.data_overview import describe_data

    result = follow(describe_data(settings), Console(0, json=json))
    page = write_data(result, out)
    if json:
        _print_json({**result, "paths": {"page": page}})
    else:
        typer.echo(f"{data_text(result)}\npage {page}")


@app.command()
def score(
    recipe: RecipeName,
    file: Annotated[Path, typer.Argument(help="JSONL of objects with answer and completion", metavar="FILE")],
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Compute a recipe's rewards of the completions in a file, with the seconds of each; loads no model."""
    settings = load_recipe(recipe, parse_overrides(overrides or []))
    from forerun.report.console import Console
    from forerun.tasks.score_file import as_json, as_table, score_file

    scored = score_file(settings, str(file))
    if json:
        _print_json(as_json(scored))
    else:
        Console().print(as_table(scored))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="run folder", metavar="RUN")], json: Json = False) -> None:
    """Write the offline HTML page of a run folder."""
    from forerun.report.run_page import write_report

    path = write_report(run)
    if json:
        _print_json({"report": str(path)})
    else:
        typer.echo(path)


@app.command()
def plan(
    subject: Annotated[
        str | None, typer.Argument(help="recipe or run folder; none: the planner's own keys", metavar="[RECIPE|RUN]")
    ] = None,
    overrides: Overrides = None,
    paper: Annotated[bool, typer.Option("--paper", help="the papers' published numbers beside ours")] = False,
    validate: Annotated[bool, typer.Option("--validate", help="errors on measured serving rows")] = False,
    data: Annotated[
        Path | None, typer.Option(help="CSV of measured serving rows for --validate; without it round costs alone")
    ] = None,
    costs: Annotated[Path | None, typer.Option(help="cost table of forerun bench, in place of nominal costs")] = None,
    html: Annotated[Path | None, typer.Option(help="also write the plan as an offline page")] = None,
    json: Json = False,
) -> None:
    """Predict what speculation will bring: forerun plan gsm8k hardware=H200 gpus=8 lag=1, forerun plan runs/latest."""
    from forerun.simulate.plan import render

    words = list(overrides or [])
    if subject is not None and "=" in subject:  # `plan model=Qwen3-8B`: neither a recipe nor a run
        words.insert(0, subject)
        subject = None
    if (paper or validate) and html is not None:
        raise UserError("--html draws a plan; --paper and --validate print tables, with --json for other programs")
    if validate:
        from forerun.simulate.validation.validate import validate as validated

        result, text = validated(data), render.validation_text
    elif paper:
        from forerun.simulate.validation.paper import paper_table

        result, text = paper_table(), render.paper_text
    else:
        result = _planned(subject, words, costs)
        text = render.run_text if "run" in result else render.plan_text
    if html is not None:
        from forerun.report.plan_page import write_plan

        write_plan(result, html)
    if json:
        _print_json(result)
    else:
        typer.echo(text(result))


def _planned(subject: str | None, words: list[str], costs: Path | None) -> dict[str, Any]:
    """The plan of a recipe, of a run, or of the planner's own keys."""
    from forerun.simulate.plan.cost_table import read_cost_table
    from forerun.simulate.plan.planner import plan as planned
    from forerun.simulate.plan.recipe import plan_recipe
    from forerun.simulate.plan.run import is_run, plan_run
    from forerun.simulate.plan.spec import spec_keys

    values = parse_overrides(words)
    run = subject is not None and is_run(Path(subject))
    recipe_keys = () if run else [key for key in values if key not in spec_keys() and _names_recipe_key(key)]
    changes = {key: read_yaml(key, value) for key, value in values.items() if key not in recipe_keys}
    if subject is None or run:
        if costs is not None:
            raise UserError("--costs belongs to a recipe: forerun plan RECIPE --costs FILE")
        if subject is None:
            return planned(changes).to_dict()
        recipe = load_recipe(str(Path(subject) / "config.resolved.yaml"))
        return plan_run(subject, recipe.model_dump(), changes)
    recipe = load_recipe(subject, {key: values[key] for key in recipe_keys})
    table = None if costs is None else read_cost_table(costs)
    return plan_recipe(recipe.model_dump(), changes, table).to_dict()


def _names_recipe_key(key: str) -> bool:
    return "." in key or key in Recipe.model_fields


@app.command()
def doctor(json: Json = False) -> None:
    """Say what this machine has, which extras work, and the command that mends each gap."""
    from forerun.doctor import examine, findings_table
    from forerun.report.console import Console

    findings = examine()
    if json:
        _print_json(findings)
    else:
        Console().print(findings_table(findings))


def main() -> None:
    """Entry point: runs a verb and turns its errors into exit codes."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.path.append(os.getcwd())  # parts of the user's own, named by module:Name
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    if "--version" in sys.argv[1:2]:
        typer.echo(__version__)
        return
    try:
        _catch_signals()
        _quiet_libraries()
        app(standalone_mode=True)
    except (UserError, WorkersLost) as error:
        if debug:
            raise
        typer.echo(f"forerun: {error}", err=True)
        sys.exit(2)
    except Interrupted as stopped:
        typer.echo(f"forerun: {stopped}", err=True)
        sys.exit(128 + stopped.number)
    except KeyboardInterrupt:
        sys.exit(130)


def _catch_signals() -> None:
    """SIGTERM and SIGHUP end a verb as Ctrl-C does, cleaning up; one that is ignored (nohup) stays ignored."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(number, stop)


def _settings(recipe: str | None, resume: Path | None, from_run: Path | None, values: dict[str, Any]) -> Recipe:
    """The recipe of `forerun train`."""
    if resume is None and from_run is None:
        return load_recipe(str(recipe), values)
    from forerun.training.resume import recipe_from, resumed_recipe

    return resumed_recipe(resume, values) if resume is not None else recipe_from(Path(str(from_run)), recipe, values)


def _numbers(words: str) -> list[int]:
    try:
        numbers = [int(word) for word in words.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UserError(f"'{words}' is no list of positive whole numbers; write them as 1,3,4")
    return numbers


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
