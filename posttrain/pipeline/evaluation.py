"""Any checkpoint's scores on a recipe's held-out prompts, as its own run gives them."""

from pathlib import Path

import torch
from transformers.utils import logging

from posttrain.evaluate import Evaluation, evaluate_checkpoint
from posttrain.judge_config import ACTOR
from posttrain.pipeline.recipe_file import RecipeFile


def evaluate_on(file: RecipeFile, checkpoint: Path) -> Evaluation:
    """Score the checkpoint in a folder; sets this process's threads to the recipe's.

    The base judges where the recipe has the actor judge. Raises RecipeError where the judge is yet
    to be made, and CheckpointError where the folder holds no checkpoint that can be loaded.
    """
    recipe = file.recipe
    check_judges_are_there(file)
    torch.set_num_threads(recipe.cluster.num_threads)
    logging.disable_progress_bar()
    domains, base = recipe.specialists(), recipe.base.path
    actors = [name for name, d in domains.items() if d.judge and d.judge.checkpoint == ACTOR]
    return evaluate_checkpoint(
        checkpoint,
        [domain.spec for domain in domains.values()],
        recipe.evaluate,
        recipe_folder=file.folder,
        data_seed=recipe.seed,
        judges=dict.fromkeys(actors, file.folder / base) if base else {},
    )


def check_judges_are_there(file: RecipeFile) -> None:
    """Raise RecipeError where a judge is no folder's, nor the base of one."""
    for name, domain in file.recipe.domains.items():
        judge = domain.judge
        if judge and not judge.folder and (judge.specialist or not file.recipe.base.path):
            raise file.source.error(
                ("domains", name, "judge", "checkpoint"),
                f"{judge.checkpoint!r} is no folder, and a run makes it: to evaluate without one, "
                "name the folder of a checkpoint that judges",
            )
