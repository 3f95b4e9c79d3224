"""Any checkpoint's scores on a recipe's held-out prompts, as its own run gives them."""

from pathlib import Path

import torch
from transformers.utils import logging

from posttrain.evaluate import Evaluation, evaluate_checkpoint
from posttrain.judge_config import ACTOR
from posttrain.pipeline.recipe_file import RecipeFile


def evaluate_on(file: RecipeFile, checkpoint: Path) -> Evaluation:
    """Score the checkpoint in a folder; sets this process's threads to the recipe's.

    The base judges where the recipe has the actor judge. Raises CheckpointError where the folder
    holds none that can be loaded.
    """
    recipe = file.recipe
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
