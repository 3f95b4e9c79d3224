"""A run of fake stages in a process of its own: `python fake_driver.py SCENARIO DIRECTORY`.

Exit code 2 and one line on stderr where a user could mend it, as the command line does.
"""

import signal
import sys
from pathlib import Path

from fake_stages import FakeConfig

from posttrain.errors import PosttrainError
from posttrain.pipeline.recipe import ClusterConfig, TrackingConfig
from posttrain.pipeline.run import Work, run_work
from posttrain.pipeline.stages import Stage, stage_keys


def fake(name: str, *inputs: str, work: str = "work", helpers: int = 0, **config: object) -> Stage:
    """A stage of fake_stages."""
    return Stage(
        name=name,
        work=f"fake_stages:{work}",
        config=FakeConfig.model_validate({"text": name[-1], **config}),
        inputs={f"input/{other}": other for other in inputs},
        num_helpers=helpers,
    )


SCENARIOS = {
    "tree": [
        fake("base"),
        fake("sft/a", "base", num_steps=3, step_s=0.4),
        fake("sft/b", "base", num_steps=3, step_s=0.4),
        fake("opd", "sft/a", "sft/b", work="work_with_role", helpers=1),
    ],
    "long": [
        fake("base"),
        fake("sft/a", "base", num_steps=30, step_s=0.2),
        fake("sft/b", "sft/a", num_steps=2),
    ],
    "die once": [
        fake("base", num_steps=2, end="die once"),
        fake("sft/a", "base", end="mend"),
        fake("sft/b", "base", num_steps=1000, step_s=0.1),
    ],
    "die": [fake("base", end="die")],
    "crash": [fake("base", end="crash")],
}


def make_work(scenario: str, directory: Path) -> Work:
    """The scenario's stages, to be run in `directory`; its parent is the recipe's folder."""
    folder = Path(__file__).resolve().parent  # fake_stages is the user's own module here
    stages = SCENARIOS[scenario]
    return Work(
        stages=stages,
        keys=stage_keys(stages, folder, seed=0),
        recipe_folder=directory.parent,
        directory=directory,
        name="fake",
        seed=0,
        cluster=ClusterConfig.model_validate({"num_workers": 2}),
        tracking=TrackingConfig(),
        sandboxes={"code": "landlock"},
    )


if __name__ == "__main__":
    # a shell that starts the tests in its background has Ctrl-C ignored, and children inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run_work(make_work(sys.argv[1], Path(sys.argv[2])))
    except PosttrainError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(2)
