"""Reinforcement on verifiable rewards, by trl.GRPOTrainer on rollouts of our engine.

    A_i = R_i - mean of R over the prompt's group
    L = -(sum over own tokens of r A) / (own tokens of the step) + kl_weight * KL

where r = p / p(sampled), clipped. A step that samples with its own weights has r = 1, and the
gradient of r is what counts. TRL sees token ids, log-probabilities and rewards only: its own
decoding of answers drops control tokens and keeps what tools said, so rewards are computed from the
rollouts before TRL hears of them.
"""

from contextlib import ExitStack, closing
from typing import Any

from datasets import Dataset
from trl.trainer.grpo_config import GRPOConfig

from posttrain.checkpoints import load_tokenizer
from posttrain.domains import Need, Row, overlap
from posttrain.errors import DataError
from posttrain.job import Job
from posttrain.tasks import Task
from specialists import training
from specialists.config import GrpoConfig, GrpoStage
from specialists.curriculum import Curriculum
from specialists.groups import GroupSampler, handed_on
from specialists.judge import open_task
from specialists.lora import engine_for, load_start
from specialists.reference import ReferenceRefresh
from specialists.rows import draw
from specialists.trl_border import OurGRPOTrainer, known_warnings


def work(config: GrpoStage, job: Job) -> None:
    """Reinforce `start` on the train prompts of its domains, as many of each in every step.

    Raises:
        DataError: a domain has no train prompt.
    """
    if not training.prepare(job):
        return
    start = job.inputs["start"] / "checkpoint"
    grpo = config.grpo
    tokenizer, (model, base) = load_tokenizer(start), load_start(start, grpo.lora)
    need = Need(num_train=-(-grpo.num_visits // len(config.domains)))
    with ExitStack() as stack:
        tasks = [
            stack.enter_context(closing(open_task(spec, tokenizer, job, need=need, actor=model)))
            for spec in config.domains
        ]
        sampler = GroupSampler(
            engine_for(model, num_slots=grpo.num_slots, seed=job.seed),
            tasks,
            prompt_order(tasks, grpo, seed=job.seed),
            config=grpo,
            seed=job.seed,
            curriculum=grpo.curriculum
            and Curriculum(job.out / "visits.jsonl", grpo.curriculum, seed=job.seed),
        )
        trainer = build_trainer(model, tokenizer, sampler, config, job)
        counts = {f"prompts/{task.name}": len(task.train) for task in tasks}
        counts |= overlap.counts(job.out)
        training.run(
            trainer, job, tokenizer, read_metrics=sampler.read_metrics, facts=counts, base=base
        )


def prompt_order(tasks: list[Task], config: GrpoConfig, *, seed: int) -> list[tuple[int, Row]]:
    """Which prompt is visited when: (index of its task, row), prompts_per_step of them a step, as
    many of each task and by weight of the parts of its mixture."""
    groups: list[tuple[int, list[Row]]] = []
    weights: list[float] = []
    for number, task in enumerate(tasks):
        data = task.spec.data
        for place, part in enumerate(data.parts):
            rows = [row for row in task.train if row.source == place]
            if not rows:
                raise DataError(
                    f"domain {task.name!r} has no train prompt of {part.source} left for grpo: "
                    "give it more rows, or lower its heldout_share"
                )
            groups.append((number, rows))
        weights += data.shares
    sizes = [len(rows) for _, rows in groups]
    drawn = draw(sizes, config.num_visits, seed=seed, weights=weights)
    return [(groups[group][0], groups[group][1][row]) for group, row in drawn]


def build_trainer(
    model: Any, tokenizer: Any, sampler: GroupSampler, config: GrpoStage, job: Job
) -> OurGRPOTrainer:
    """A trainer for all of the sampler's visits, in their order."""
    grpo, visits = config.grpo, [str(visit) for visit in range(len(sampler.visits))]
    with known_warnings():
        trainer = OurGRPOTrainer(
            model,
            reward_funcs=handed_on,
            args=arguments(config, job),
            train_dataset=Dataset.from_dict({"prompt": visits}),
            processing_class=tokenizer,
            optimizers=training.optimizer_for(model, grpo.optimizer, num_steps=grpo.num_steps),
            rollout_func=sampler,
        )
    trainer.max_ratio = grpo.max_ratio
    if grpo.reference_every:
        trainer.add_callback(ReferenceRefresh(trainer, grpo.reference_every))
    return trainer


def arguments(config: GrpoStage, job: Job) -> GRPOConfig:
    """TRL's, for a stage's settings."""
    grpo = config.grpo
    shared = training.shared_arguments(
        job,
        num_steps=grpo.num_steps,
        rows_per_microbatch=grpo.rows_per_step // grpo.microbatches,
        microbatches=grpo.microbatches,
        checkpoint_every=grpo.checkpoint_every,
        optimizer=grpo.optimizer,
    )
    return GRPOConfig(
        **shared,
        num_generations=grpo.samples_per_prompt,
        steps_per_generation=grpo.microbatches * grpo.steps_per_sampling,
        num_iterations=1,
        shuffle_dataset=False,
        temperature=grpo.temperature,
        max_completion_length=max(spec.max_new_tokens for spec in config.domains),
        loss_type="dapo",  # the mean over all own tokens of the step
        scale_rewards="none",  # R - mean(R), not divided by the group's deviation
        beta=grpo.kl_weight,
        epsilon=grpo.clip_low,
        epsilon_high=grpo.clip_high,
        off_policy_mask_threshold=grpo.off_policy_mask,
        mask_truncated_completions=grpo.mask_truncated,
        use_bias_correction_kl=True,  # the K3 estimate times the ratio: its gradient is the KL's
        disable_dropout=True,
        router_aux_loss_coef=0.0,
        log_completions=False,
    )
