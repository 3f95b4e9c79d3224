"""The shipped recipes over public data, where that data lies elsewhere than beside the checkout."""

from pathlib import Path

from posttrain.pipeline.recipe_file import load_recipe


def overrides(recipe: str, data: Path | None) -> list[str]:
    """What `--set` takes to read the recipe's files from the folder `data`; None: nothing."""
    if data is None:
        return []
    found = load_recipe(recipe).recipe
    files = {
        f"domains.{name}.data.jsonl": domain.data.jsonl for name, domain in found.domains.items()
    }
    if found.base.pretrain:
        for number, source in enumerate(found.base.pretrain.mixture):
            files[f"base.pretrain.mixture.{number}.data.jsonl"] = source.data.jsonl
    return [f"{field}={data.resolve() / Path(file).name}" for field, file in files.items() if file]
