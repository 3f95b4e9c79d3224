"""DeepSpeed's ZeRO, stages 2 and 3, as the learner's mesh uses it.

DeepSpeed sums gradients over the ranks in the order in which a backward pass reaches them, whatever
the other ranks' order is, and V4's order depends on the rows' lengths. So a step's gradients stay
on their rank, whole, until its last backward, and are then summed parameter by parameter. Stage 3
gathers a decoder layer at once ("leaf module"), whatever a row's length lets run inside it.
"""

import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Literal

import deepspeed
import torch
from deepspeed import ops
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import logger, safe_set_local_optimizer_state, set_z3_leaf_modules
from deepspeed.utils import safe_get_full_optimizer_state as get_whole
from deepspeed.utils import safe_set_full_optimizer_state as set_whole
from torch import Tensor, nn
from torch import distributed as dist

from posttrain.errors import StageError


class ZeroOptimizer:
    """An optimizer whose state lies in parts on all ranks, with the engine that cut it; all ranks
    call each method. `state_dict` is whole: what the optimizer of a student in one piece has."""

    def __init__(
        self,
        student: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        stage: Literal[2, 3],
        units: set[str],
    ) -> None:
        """`units` names the classes of the layers that stage 3 gathers one at a time."""
        names = {parameter: name for name, parameter in student.named_parameters()}
        groups = [list(group["params"]) for group in optimizer.param_groups]
        self._params = {p: names[p] for group in groups for p in group}
        self._sizes = [len(group) for group in groups]
        layers = {type(module) for module in student.modules() if type(module).__name__ in units}
        if stage == 3 and layers:
            set_z3_leaf_modules(student, list(layers))
        quieten()
        self.engine: Any = deepspeed.initialize(
            model=student, optimizer=optimizer, config=configuration(stage)
        )[0]
        self._zero = self.engine.optimizer
        self._make_state(optimizer)

    def _make_state(self, optimizer: torch.optim.Optimizer) -> None:
        """The state, which else the first update makes, by one at rate 0. DeepSpeed finds only the
        first group's where it makes stage 2's itself."""
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = 0.0
            for part in group["params"]:
                part.grad = torch.zeros_like(part)
        optimizer.step()
        with self.engine.coalesce_grad_reduction():
            pass
        self._zero.step()
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        for state in self._zero.state.values():
            if "step" in state:
                state["step"] = torch.zeros_like(state["step"])

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Their settings; DeepSpeed has the parameters."""
        return self._zero.param_groups

    @contextmanager
    def one_sum(self) -> Generator[None]:
        """Around all backward passes of a step: its gradients are summed over the ranks at the
        end. Raises StageError where no rank's reached a parameter, which torch would not update
        and DeepSpeed, for which it has a gradient of 0, would let decay."""
        with self.engine.coalesce_grad_reduction():
            yield
            params = list(self._params)
            has_one = [p.grad is not None for p in params]
            num_ranks = torch.tensor(has_one, dtype=torch.float32, device=self.engine.device)
            dist.all_reduce(num_ranks)
            if missing := [self._params[params[i]] for i in (num_ranks == 0).nonzero().flatten()]:
                raise StageError(
                    f"no gradient reaches {missing[0]} and {len(missing) - 1} more parameters, "
                    "which zero2 and zero3 cannot leave as they are: set "
                    "distill.learners.strategy to ddp or fsdp2"
                )
            for i in (num_ranks < dist.get_world_size()).nonzero().flatten():
                with GatheredParameters([params[i]]):
                    if params[i].grad is None:
                        params[i].grad = torch.zeros_like(params[i])

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """As torch's, of the gradients that `one_sum` left."""
        parts = [part for group in self._zero.averaged_gradients.values() for part in group]
        squares = torch.stack([part.double().square().sum() for part in parts]).sum()
        dist.all_reduce(squares)
        norm = squares.sqrt().float()
        scale = max_norm / (norm + 1e-6)
        if scale < 1:  # nan would stay in what fills a part up, which nothing overwrites
            for part in parts:
                part.mul_(scale)
        return norm

    def step(self) -> None:
        """One update."""
        self._zero.step()

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self._zero.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Whole, on each rank."""
        shared = next(iter(self._zero.state.values()), {})  # the keys and the step of each part
        state = {
            i: {key: self._whole(p, key, value) for key, value in shared.items()}
            for i, p in enumerate(self._params)
        }
        ids = torch.arange(len(self._params)).split(self._sizes)
        groups = [
            {**group, "params": own.tolist()}
            for group, own in zip(self.param_groups, ids, strict=True)
        ]
        return {"state": state, "param_groups": groups}

    def _whole(self, parameter: Tensor, key: str, part: Any) -> Any:
        is_cut = isinstance(part, Tensor) and part.dim() > 0
        return get_whole(parameter, key) if is_cut else part

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the whole of one."""
        for i, parameter in enumerate(self._params):
            for key, value in state["state"][i].items():
                if isinstance(value, Tensor) and value.dim() > 0:
                    self._cut(parameter, key, value)
        for part in self._zero.state.values():
            if "step" in part:
                part["step"] = state["state"][0]["step"].clone()
        for group, saved in zip(self.param_groups, state["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})

    def _cut(self, parameter: Any, key: str, whole: Tensor) -> None:
        if not hasattr(parameter, "ds_tensor"):
            set_whole(parameter, whole, key)
            return
        # the last part is filled up to the others' size; DeepSpeed's own call reads past the end
        size, num_ranks = parameter.ds_tensor.numel(), dist.get_world_size()
        padded = nn.functional.pad(whole.flatten(), (0, size * num_ranks - whole.numel()))
        safe_set_local_optimizer_state(parameter, padded.split(size)[dist.get_rank()], key)

    @torch.no_grad()
    def load_weights(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Whole ones, into a student that may be in parts."""
        own = model.state_dict(keep_vars=True)
        assert own.keys() == state.keys(), "the state of another model"
        for name, tensor in own.items():
            with GatheredParameters([tensor], modifier_rank=0):
                tensor.copy_(state[name])
        self._zero.refresh_fp32_params()


@torch.no_grad()
def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """A student's state with all its parts; all ranks call this."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        with GatheredParameters([tensor]):
            state[name] = tensor.detach().clone()
    return state


def configuration(stage: int) -> dict[str, Any]:
    """DeepSpeed's: nothing of a step is left to it but the sum over the ranks and the update."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # it wants a number
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 50_000_000,
            # products have other last bits where a matrix does not begin at 16 bytes
            "parameter_alignment": stage == 2,
            "stage3_param_persistence_threshold": 0,  # small ones come with their layer
        },
    }


def quieten() -> None:
    """Neither its log of each start, nor warnings about its calls of torch, nor an operation for
    ranks of one machine that it would compile for a minute where gloo serves."""
    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
