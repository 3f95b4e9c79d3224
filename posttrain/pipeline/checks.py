"""What can be wrong with a recipe beyond its types, found in seconds and before any training.

Files, checkpoints, tokenizers, rewards, tools, data, prompt lengths, GPUs: each check raises
RecipeError with one line that names the recipe's file and line, the field, what was found and the
remedy. The hub is asked whether what is to be downloaded is there; what would have to be generated
at length is left to the stage that needs it.
"""

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from posttrain.adapters import find_base
from posttrain.domains import (
    ROWS_TO_CHECK,
    DataConfig,
    Row,
    SourceConfig,
    check_parts,
    import_object,
    is_heldout,
    refuse_names_of_tool_arguments,
    rows_to_check,
    split,
)
from posttrain.errors import DataError, PosttrainError
from posttrain.pipeline.checkpoint_checks import (
    check_folder,
    check_logits,
    check_teacher,
    read_config,
    read_tokenizer,
    teacher_tokenizer,
)
from posttrain.pipeline.graded_rows import check_graded_rows
from posttrain.pipeline.hub import check_on_hub
from posttrain.pipeline.judges import check_judge, check_judged_rows, context_of
from posttrain.pipeline.recipe_domain import DomainConfig
from posttrain.pipeline.recipe_file import RecipeFile
from posttrain.pipeline.recipe_yaml import FieldPath
from posttrain.pipeline.sandboxes import sandbox_level
from posttrain.pipeline.words import shown
from rewards.grader import check_loads
from rewards.registry import REWARDS, known_reward
from rewards.sandbox import Level
from rewards.score import RewardError

PRESET_CONTEXT = {"tiny": 4096, "small": 16384}
"""The presets' max_position_embeddings: reading them there would import torch."""

REGISTER = "register_dataset("
"""What a reasoning-gym generator's module calls."""

IMPORT_S = 2.0
"""How long the checks wait for the user's reward modules; a slower one is the grader's to load."""

NUM_TOKENISED = 100
"""How many demonstrations are tokenised to see whether one is short enough."""

FORMAT_TOKENS = 64
"""More than V4's format adds to a prompt, and to each of its messages."""

V4_TURN = "<｜Assistant｜>"

TEMPLATE_TOKENS = 4096
"""More than a chat template is expected to add, a system prompt of its own included."""


def check_recipe(file: RecipeFile) -> dict[str, str]:
    """RecipeError for the first thing found that would stop the run later. The sandbox's levels."""
    check_cluster(file)
    check_checkpoints(file)
    for name, domain in file.recipe.domains.items():
        check_functions(file, name, domain)
    check_own_rewards(file)
    if file.recipe.base.pretrain:
        share = max(domain.heldout_share for domain in file.recipe.domains.values())
        for i, source in enumerate(file.recipe.base.pretrain.mixture):
            kind = source.data.source.partition(" ")[0]
            with naming(file, ("base", "pretrain", "mixture", i, "data", kind)):
                check_source(source.data, file.folder, heldout_share=share)
    domains = file.recipe.domains.items()
    levels = {name: check_data(file, name, domain) for name, domain in domains}
    return {name: level for name, level in levels.items() if level is not None}


@contextmanager
def naming(file: RecipeFile, where: FieldPath) -> Generator[None]:
    """Errors raised inside get the recipe's file, line and field in front."""
    try:
        yield
    except (PosttrainError, RewardError) as error:
        raise file.source.error(where, str(error)) from None


def check_cluster(file: RecipeFile) -> None:
    """A job's GPUs, vLLM and DeepSpeed are on this machine, unless the cluster is elsewhere."""
    cluster = file.recipe.cluster
    if cluster.address:
        return
    backends = [distill.rollout_backend for distill in file.recipe.distillations().values()]
    if "vllm" in backends and find_spec("vllm") is None:
        raise file.source.error(
            ("distill", "rollout_backend"),
            "vllm is asked for and not installed here: install it, or use engine",
        )
    strategies = {distill.learners.strategy for distill in file.recipe.distillations().values()}
    if strategies & {"zero2", "zero3"} and find_spec("deepspeed") is None:
        raise file.source.error(
            ("distill", "learners", "strategy"),
            "zero2 and zero3 are DeepSpeed's, which is not installed here: install it, or use ddp "
            "or fsdp2",
        )
    if not cluster.gpus_per_job:
        return
    import torch

    found = torch.cuda.device_count()
    if found < cluster.gpus_per_job:
        raise file.source.error(
            ("cluster", "gpus_per_job"),
            f"a job is to take {cluster.gpus_per_job:g} GPUs, and PyTorch finds {found} on this "
            "machine: lower it (0: none), install PyTorch's build for your GPU, or give "
            "cluster.address",
        )


def check_checkpoints(file: RecipeFile) -> None:
    """The base and the teachers are there, and map every token to the same id."""
    base = file.recipe.base
    teachers = [
        (domain, path)
        for domain in file.recipe.teachers
        for path in file.recipe.teacher_folders(domain).values()
    ]
    if base.hub:
        with naming(file, ("base", "hub")):
            check_on_hub("model", base.hub, base.revision)
    if base.path:
        with naming(file, ("base", "path")):
            check_folder(file.folder / base.path)
            if file.recipe.distillations():
                check_logits(file.folder / base.path)
    for name, path in teachers:
        with naming(file, ("teachers", name)):
            check_teacher(file.folder / path, hub=base.hub)
    if teachers and not base.hub:
        student = student_tokenizer(file)
        for name, path in teachers:
            with naming(file, ("teachers", name)):
                from posttrain.tokenizer import check_same_tokens

                check_same_tokens(student, teacher_tokenizer(file.folder / path), name=name)


def student_tokenizer(file: RecipeFile) -> Any:
    """The base's tokenizer; a preset's is the byte-level one."""
    from posttrain.tokenizer import build_tokenizer

    base = file.recipe.base
    return read_tokenizer(file.folder / base.path) if base.path else build_tokenizer()


def check_functions(file: RecipeFile, name: str, domain: DomainConfig) -> None:
    """The domain's rewards, tools and judge exist. A user's reward module is read, not yet run."""
    for reward in domain.graded_rewards:
        with naming(file, ("domains", name, "reward")):
            known_reward(reward, file.folder)
    for i, tool in enumerate(domain.tools):
        with naming(file, ("domains", name, "tools", i, "python")):
            import_object(tool.python, file.folder)
    if domain.judge:
        with naming(file, ("domains", name, "judge", "checkpoint")):
            check_judge(file.folder, domain.judge)


def check_own_rewards(file: RecipeFile) -> None:
    """The user's reward modules can be imported, in a process of their own."""
    domains = {
        reward: name
        for name, domain in reversed(file.recipe.domains.items())
        for reward in domain.graded_rewards
        if reward not in REWARDS
    }
    if not domains:
        return
    try:
        check_loads(list(domains), file.folder, timeout_s=IMPORT_S)
    except RewardError as error:
        named = (name for reward, name in domains.items() if repr(reward) in str(error))
        where = ("domains", next(named, next(iter(domains.values()))), "reward")
        raise file.source.error(where, str(error)) from None


def check_source(data: DataConfig, folder: Path, *, heldout_share: float) -> None:
    """A mixture's source is there; a file is read, and has something to learn."""
    if file_name := data.jsonl or data.parquet:
        rows = rows_to_check(data, folder=folder, seed=0)
        answered = [row for row in rows if row.response]
        if is_whole(data, rows) and all(
            is_heldout(row.messages, heldout_share) for row in answered
        ):
            raise DataError(
                f"{folder / file_name}: of its {len(rows)} rows {len(answered)} have a response "
                f"or a demonstration, and no such row is left besides those that may be held out "
                f"(heldout_share {heldout_share:g}): give more of them"
            )
    elif data.hub:
        check_on_hub("dataset", data.hub)
    elif data.python:
        import_object(data.python, folder)


def is_whole(data: DataConfig, rows: Sequence[Row]) -> bool:
    """Whether these are all rows, so that what they lack the data lacks."""
    return not data.streaming or len(rows) < ROWS_TO_CHECK


def check_data(file: RecipeFile, name: str, domain: DomainConfig) -> Level | None:
    """The domain's rows can be read, split, learned from, and fit; the sandbox's level, if any."""
    where: FieldPath = ("domains", name, "data")
    hubs = [part.hub for part in domain.data.parts if part.hub]
    for hub in hubs:
        with naming(file, (*where, "mixture" if domain.data.mixture else "hub")):
            check_on_hub("dataset", hub)
    if hubs or any(is_known_generator(part) for part in domain.data.parts):
        return None
    with naming(file, (*where, domain.data.source.partition(" ")[0])):
        rows = rows_to_check(domain.data, folder=file.folder, seed=file.recipe.seed)
        check_graded_rows(domain, rows, file.folder)
    with naming(file, ("domains", name, "reward")):
        level = sandbox_level(domain, rows)
    share = max(other.heldout_share for other in file.recipe.domains.values())
    train, heldout = split(rows, domain.heldout_share, untrained_share=share)
    for side, found in (("train on", train), ("evaluate on", heldout)):
        if not found and is_whole(domain.data, rows):
            raise file.source.error(
                where,
                f"none of its {len(rows)} rows is left to {side} at heldout_share "
                f"{domain.heldout_share:g}: give more rows, or another share",
            )
    has_response = any(row.response for row in train)
    if domain.sft and not has_response and is_whole(domain.data, rows):
        raise file.source.error(
            ("domains", name, "sft"),
            f"none of the {len(train)} rows to train on has a response or a demonstration: add "
            "some, or set sft to null",
        )
    if (domain.sft or domain.grpo) and is_whole(domain.data, rows):
        with naming(file, where):
            learned = [row for row in train if row.response or not domain.sft]
            check_parts(domain.data, learned, rows)
    if domain.sft and domain.sft.max_length and has_response:
        check_sft_length(file, name, domain, [row for row in train if row.response])
    if domain.tools:
        with naming(file, where):
            refuse_names_of_tool_arguments(rows)
    check_roles(file, name, domain, rows)
    check_lengths(file, name, domain, rows)
    if domain.judge:
        folder, judge = file.folder, domain.judge
        context = context_of(folder, judge) if judge.folder else context_length(file)
        with naming(file, where):
            check_judged_rows(
                domain, rows, context=context, tokenizer=partial(full_tokenizer, file, judge.folder)
            )
    return level


def check_roles(file: RecipeFile, name: str, domain: DomainConfig, rows: list[Row]) -> None:
    """A role that only V4's format has can be said in the base's."""
    if file.recipe.base.hub:
        return
    for role in ("developer", "latest_reminder"):
        row = next((row for row in rows if any(m["role"] == role for m in row.messages)), None)
        if row is not None:
            with naming(file, ("domains", name, "data")):
                prompt_length(full_tokenizer(file), domain, row)


def check_sft_length(file: RecipeFile, name: str, domain: DomainConfig, rows: list[Row]) -> None:
    """Some demonstration fits in sft.max_length. Of very many, the shortest are tokenised."""
    assert domain.sft
    from posttrain.chat import encode_example

    chosen = sorted(rows, key=lambda row: row.id)[: domain.sft.num_demonstrations]
    tokenizer, tools, limit = full_tokenizer(file), domain.prompt_tools, domain.sft.max_length
    shortest = min(
        len(
            encode_example(
                tokenizer,
                [*system_messages(domain), *row.messages, *(row.response or [])],
                tools=tools,
                effort=domain.effort,
            )[0]
        )
        for row in sorted(chosen, key=num_tokens_at_most)[:NUM_TOKENISED]
    )
    if limit is not None and shortest > limit:
        raise file.source.error(
            ("domains", name, "sft", "max_length"),
            f"found {limit}, but the shortest of {len(chosen)} demonstrations has {shortest} "
            "tokens: raise it, or shorten them",
        )


def is_known_generator(data: SourceConfig) -> bool:
    """Whether reasoning-gym has the task, read from its sources: importing it takes seconds."""
    spec = find_spec("reasoning_gym")
    if data.reasoning_gym is None or spec is None or spec.origin is None:
        return False
    quoted = f'"{data.reasoning_gym["task"]}"'
    files = Path(spec.origin).parent.rglob("*.py")
    return any(quoted in text for text in (f.read_text("utf-8") for f in files) if REGISTER in text)


def check_lengths(file: RecipeFile, name: str, domain: DomainConfig, rows: list[Row]) -> None:
    """Every prompt leaves room for its answer. Only suspiciously long ones are tokenised."""
    context = context_length(file)
    if context is None:
        return
    room = context - domain.max_new_tokens
    extra = num_extra_tokens(domain, is_v4=has_v4_format(file))
    long = [row for row in rows if num_tokens_at_most(row) + extra > room]
    tokenizer = full_tokenizer(file) if long else None
    for row in long:
        num_tokens = prompt_length(tokenizer, domain, row)
        if num_tokens > room:
            raise file.source.error(
                ("domains", name, "data"),
                f"the prompt {shown(row.messages[-1]['content'])} takes {num_tokens} tokens, "
                f"and with max_new_tokens {domain.max_new_tokens} it does not fit into the base's "
                f"context of {context}: shorten or remove it, lower max_new_tokens, or take a "
                "base with a longer context",
            )


def has_v4_format(file: RecipeFile) -> bool:
    """Whether the base's tokenizer knows V4's turns, so that no template adds anything else."""
    base = file.recipe.base
    if not base.path:
        return base.preset is not None
    return read_tokenizer(file.folder / base.path).token_to_id(V4_TURN) is not None


def num_tokens_at_most(row: Row) -> int:
    """A bound for any byte-level tokenizer: no token is shorter than a byte of the text."""
    text = json.dumps(row.messages, ensure_ascii=False)
    return len(text.encode("utf-8", "surrogatepass")) + FORMAT_TOKENS * (len(row.messages) + 1)


def num_extra_tokens(domain: DomainConfig, *, is_v4: bool) -> int:
    """A bound of what stands in front of every prompt: system text, tools, effort."""
    texts = [domain.system or "", *(json.dumps(tool) for tool in domain.prompt_tools)]
    num_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    is_plain = is_v4 and not domain.prompt_tools and domain.effort in ("none", "high")
    return num_bytes + (0 if is_plain else TEMPLATE_TOKENS)


def context_length(file: RecipeFile) -> int | None:
    """The base's context in tokens; None where it cannot be known without a download."""
    base = file.recipe.base
    if base.preset:
        return PRESET_CONTEXT[base.preset]
    if not base.path:
        return None
    found = read_config(file.folder / base.path).get("max_position_embeddings")
    return found if isinstance(found, int) else None


def full_tokenizer(file: RecipeFile, path: str | None = None) -> Any:
    """The base's tokenizer as the chat format needs it, or that of the checkpoint in `path`."""
    path = path or file.recipe.base.path
    if path:
        from transformers import AutoTokenizer

        folder = file.folder / path
        has_own = (folder / "tokenizer.json").exists()
        return AutoTokenizer.from_pretrained(folder if has_own else find_base(folder))
    from posttrain.tokenizer import build_tokenizer

    return build_tokenizer()


def prompt_length(tokenizer: Any, domain: DomainConfig, row: Row) -> int:
    """Tokens of the row's prompt as a rollout will start with it."""
    from posttrain.chat import encode_prompt

    messages = [*system_messages(domain), *row.messages]
    tools = domain.prompt_tools
    return len(encode_prompt(tokenizer, messages, tools=tools, effort=domain.effort))


def system_messages(domain: DomainConfig) -> list[dict[str, Any]]:
    """What stands in front of every row."""
    return [{"role": "system", "content": domain.system}] if domain.system else []
