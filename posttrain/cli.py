"""The `posttrain` command: each verb is bound to one library function, imported when it is called.

Results go to stdout, progress to stderr; what a user can mend is one line there and exit code 2.
"""

import json
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from posttrain.errors import PosttrainError

app = typer.Typer(
    name="posttrain",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Specialists by SFT and GRPO, merged into one model by on-policy distillation.",
)


def effort_of(text: str) -> Any:
    """`none`, `high`, `max`, or a number from 1 to 100."""
    from pydantic import TypeAdapter, ValidationError

    from posttrain.config import Effort

    try:
        return TypeAdapter(Effort).validate_python(int(text) if text.isdigit() else text)
    except ValidationError:
        raise typer.BadParameter(f"{text!r} is not none, high, max or 1 to 100") from None


RecipeName = Annotated[str, typer.Argument(help="A shipped recipe's name, or a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field, such as --set seed=1."),
]
Directory = Annotated[
    Path | None, typer.Option("--dir", help="The run's folder.", show_default="runs/<name>")
]
AsJson = Annotated[bool, typer.Option("--json", help="The same facts for machines.")]


@contextmanager
def user_errors() -> Generator[None]:
    """A PosttrainError becomes one line on stderr and exit code 2."""
    try:
        yield
    except PosttrainError as error:
        line = " ".join(str(error).split())
        print(f"posttrain: {line}", file=sys.stderr)
        raise typer.Exit(2) from None


@app.command()
def run(
    recipe: RecipeName,
    directory: Directory = None,
    overrides: Overrides = None,
    is_plain: Annotated[
        bool, typer.Option("--plain", help="Lines in place of a live table.")
    ] = False,
) -> None:
    """Run a recipe: what is done already is kept, what was stopped goes on."""
    with user_errors():
        from posttrain.pipeline.checks import check_recipe
        from posttrain.pipeline.recipe_file import load_recipe
        from posttrain.pipeline.run import run as run_recipe

        file = load_recipe(recipe, overrides or ())
        sandboxes = check_recipe(file)
        if is_plain:
            os.environ["TTY_COMPATIBLE"] = "0"  # rich then takes stderr for no terminal
        try:
            result = run_recipe(
                file.recipe, file.folder, directory or file.directory, sandboxes=sandboxes
            )
        except KeyboardInterrupt:
            print("posttrain: stopped; the same command goes on from here", file=sys.stderr)
            raise typer.Exit(130) from None
    print(result.report)


@app.command()
def plan(
    recipe: RecipeName,
    directory: Directory = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Print a recipe's stages: which are done, and what the others will cost. Computes nothing."""
    with user_errors():
        from posttrain.pipeline.checks import check_recipe
        from posttrain.pipeline.plan import plan as plan_recipe
        from posttrain.pipeline.recipe_file import load_recipe

        file = load_recipe(recipe, overrides or ())
        check_recipe(file)
        found = plan_recipe(file.recipe, file.folder, directory or file.directory)
    print(json.dumps(found.json(), indent=1) if as_json else found.text())


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the shipped recipes."""
    from posttrain.pipeline.shipped import describe, shipped_recipes

    found = {path.stem: describe(path) for path in shipped_recipes()}
    if as_json:
        print(json.dumps(found, indent=1))
        return
    width = max(map(len, found), default=0)
    for name, text in found.items():
        print(f"{name:<{width}}  {text}")


@app.command()
def schema(
    as_markdown: Annotated[bool, typer.Option("--markdown", help="As a page to read.")] = False,
) -> None:
    """Print the JSON schema of recipes: every field, its type, its default and what it means."""
    from posttrain.pipeline.recipe import Recipe
    from posttrain.pipeline.recipe_docs import reference

    if as_markdown:
        print(reference(), end="")
        return
    print(json.dumps(Recipe.model_json_schema(), indent=1, ensure_ascii=False))


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint's folder, or a stage's.")],
    recipe: Annotated[str, typer.Option(help="Whose held-out prompts.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Score a checkpoint on a recipe's held-out prompts, with 95% intervals."""
    with user_errors():
        from posttrain.pipeline.checkpoint_checks import checkpoint_folder
        from posttrain.pipeline.checks import check_recipe
        from posttrain.pipeline.recipe_file import load_recipe

        folder = checkpoint_folder(checkpoint)
        file = load_recipe(recipe, overrides or ())
        check_recipe(file)
        from posttrain.pipeline.evaluation import evaluate_on

        evaluation = evaluate_on(file, folder)
    if as_json:
        print(json.dumps(evaluation.to_json(), indent=1))
        return
    print_scores(evaluation)


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint's folder, or a stage's.")],
    prompt: Annotated[str, typer.Argument(help="What to say to it.")],
    system: Annotated[str | None, typer.Option(help="A system message in front.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    effort: Annotated[
        str, typer.Option(metavar="none|high|max|1-100", help="How long it thinks first.")
    ] = "none",
    seed: Annotated[int, typer.Option(help="Another seed, another answer.")] = 0,
) -> None:
    """Print a checkpoint's answer as it is sampled."""
    with user_errors():
        from posttrain.pipeline.checkpoint_checks import checkpoint_folder

        folder = checkpoint_folder(checkpoint)
        from posttrain.generate import generate as answer

        answer(
            folder,
            prompt,
            on_text=lambda text: print(text, end="", flush=True),
            system=system,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            effort=effort_of(effort),
            seed=seed,
        )
    print()


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="A run's folder, such as runs/quickstart.")],
) -> None:
    """Make a finished run's report again, and print where the page is."""
    with user_errors():
        from posttrain.pipeline.rebuild import rebuild_report

        print(rebuild_report(directory))


@app.command()
def doctor(
    target: Annotated[
        str, typer.Argument(help="A checkpoint's folder, or a stage's; or a recipe, as for run.")
    ],
    measure: Annotated[
        bool | None,
        typer.Option(
            "--measure/--no-measure",
            help="Load the model and compare padded with single rows.",
            show_default="if it is small",
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Say what is in a checkpoint, and what is wrong with it; or whether a recipe's graders tell
    right from wrong, every row's gold answer being to score 1 and wrong ones less, and which of its
    train prompts say nearly what a test's say."""
    with user_errors():
        if Path(target).is_dir():
            from posttrain.pipeline.checkpoint_checks import checkpoint_folder

            folder = checkpoint_folder(Path(target))
            from posttrain.doctor import examine

            found = examine(folder, measure=measure)
        else:
            from posttrain.pipeline.checks import check_recipe
            from posttrain.pipeline.data_report import check_data
            from posttrain.pipeline.recipe_file import load_recipe

            file = load_recipe(target, overrides or ())
            check_recipe(file)
            found = check_data(file)
        print(json.dumps(found.json(), indent=1) if as_json else found.text())
        found.raise_problems()


def print_scores(evaluation: Any) -> None:
    """A table of an Evaluation's scores, one row per domain."""
    from rich.console import Console
    from rich.table import Table

    table = Table("domain", "score at T = 1", "95% interval", "greedy", "prompts", "tokens")
    for name, scores in evaluation.domains.items():
        greedy = "" if scores.greedy is None else f"{scores.greedy:.3f}"
        interval = f"{scores.low:.3f} to {scores.high:.3f}"
        length = f"{scores.mean_length:.1f}"
        table.add_row(name, f"{scores.score:.3f}", interval, greedy, str(scores.n), length)
    table.add_section()
    table.add_row("macro", f"{evaluation.macro:.3f}")
    Console().print(table)


def main() -> None:
    """The entry point."""
    app()
