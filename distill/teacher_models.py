"""Teachers in memory: one skeleton an architecture, and a copy of it filled for each teacher.

A skeleton has its parameters on the meta device and its buffers real. Filling a copy assigns it
tensors of the teacher's files: 0.04 s and no copy of the weights, where `from_pretrained` took
0.2 s (25M parameters, a warm disk). V4's official files are decoded tensor by tensor. A teacher
whose files have other names than its modules (experts one by one) goes through `load_model`.

Only the base model is filled: a teacher answers with hidden states, and its head is read from disk
by whoever needs it.
"""

import copy
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, AutoModelForCausalLM

from distill.logits import logit_scale
from distill.reverse_kl import Head
from distill.teacher_files import TeacherFiles
from distill.teacher_shards import shard
from posttrain.backbone import official
from posttrain.checkpoints import load_model
from posttrain.errors import CheckpointError
from posttrain.sharded import shard_of

log = logging.getLogger(__name__)

MAKING = RLock()
"""Held by who makes a skeleton, since accelerate meanwhile puts what any thread's module gets as a
parameter on the meta device, and by who gives a module parameters."""

VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""What a config says that makes no other model."""


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint on disk: the skeleton it fits, and where its tensors come from."""

    skeleton: Any
    read: Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class Weights:
    """What a skeleton is filled with: the base model's tensors, or this rank's rows of them."""

    skeleton: Any
    tensors: Mapping[str, Tensor]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


class Loader:
    """Makes models of checkpoint folders, sharded over `mesh` where one is given."""

    def __init__(self, *, dtype: torch.dtype, device: str) -> None:
        self.dtype = dtype
        self.device = torch.device(device)
        self.mesh: DeviceMesh | None = None
        self._skeletons: dict[str, Any] = {}
        self._found: dict[Path, Callable[[], Source]] = {}
        """Of folders that were looked into: how each is opened once more."""

    def can_read_ahead(self, folder: Path) -> bool:
        """Whether another thread may `read` it: transformers' own loading changes torch's default
        dtype for all threads."""
        return self._mapped(folder) is not None

    def skeleton(self, folder: Path) -> Any:
        """The checkpoint's architecture, without its weights."""
        return self._source(folder).skeleton

    def read(self, folder: Path) -> Weights:
        """The tensors, in the dtypes and on the device where they will be used."""
        source = self._source(folder)
        tensors = {
            name: self._take(source.read(name), wanted)
            for name, wanted in base_tensors(source.skeleton).items()
        }
        return Weights(source.skeleton, tensors)

    def assemble(self, weights: Weights) -> Any:
        """The causal language model, its head left empty."""
        model = copy.deepcopy(weights.skeleton)
        tensors = dict(weights.tensors)
        with MAKING:
            if self.mesh:
                tensors = shard(model, self.mesh, tensors)
            model.load_state_dict(tensors, strict=False, assign=True)
        for module in model.base_model.modules():  # non-persistent buffers: real, on the CPU
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device != self.device:
                    module._buffers[name] = buffer.to(self.device)
        return model

    def head(self, folder: Path) -> Head:
        """The head alone, as the files have it: of mapped files a view. Raises CheckpointError
        where logits are not scale * (hidden @ weight.T + bias)."""
        source = self._source(folder)
        name, skeleton = head_name(source.skeleton), source.skeleton
        tied: Mapping[str, str] = skeleton.all_tied_weights_keys
        has_bias = getattr(skeleton.get_output_embeddings(), "bias", None) is not None
        weight, bias = f"{name}.weight", f"{name}.bias"
        return Head(
            source.read(tied.get(weight, weight)),
            source.read(tied.get(bias, bias)) if has_bias else None,
            logit_scale(skeleton.config.to_dict(), name=str(folder)),
        )

    def _source(self, folder: Path) -> Source:
        if mapped := self._mapped(folder):
            return mapped
        log.info("%s is not in its modules' layout: loaded whole through transformers", folder)
        model: Any = load_model(folder, dtype=self.dtype)
        return Source(self._skeleton(model.config), model.state_dict().__getitem__)

    def _mapped(self, folder: Path) -> Source | None:
        """None where the files' names are not the modules'."""
        if folder not in self._found:
            if official.is_official(folder):
                source = self._official(folder)
                self._found[folder] = lambda: source
            elif (skeleton := self._fitting(folder)) is not None:
                # opened anew: as long as a file is open what was read of it stays in memory
                self._found[folder] = lambda: Source(skeleton, TeacherFiles(folder).read)
        found = self._found.get(folder)
        return found() if found else None

    def _official(self, folder: Path) -> Source:
        skeleton = self._skeleton(official.read_config(folder))
        try:
            return Source(skeleton, official.reader(folder, skeleton))
        except official.OfficialError as error:
            raise CheckpointError(f"cannot load a model from {folder}: {error}") from error

    def _fitting(self, folder: Path) -> Any:
        """The skeleton that the files fit, if their names are its modules'."""
        files = TeacherFiles(folder)
        if not files.names:
            return None
        skeleton = self._skeleton(load_config(folder))
        if not needed(skeleton) <= files.names:
            return None
        _check_shapes(skeleton, files, folder)
        return skeleton

    def _skeleton(self, config: Any) -> Any:
        key = json.dumps(stable(config.to_dict()), sort_keys=True, default=str)
        if key not in self._skeletons:
            auto: Any = AutoModelForCausalLM
            # initial values are drawn for buffers, which real ones replace
            with MAKING, torch.random.fork_rng(), init_empty_weights(include_buffers=False):
                skeleton = auto.from_config(config, dtype=self.dtype)
            self._skeletons[key] = skeleton.eval().requires_grad_(False)
        return self._skeletons[key]

    def _take(self, tensor: Tensor, wanted: Tensor) -> Tensor:
        """This rank's rows of a parameter, or a whole buffer, in memory of its own: in a mapped
        file numbers do not begin at a cache line, and the last bits of products depend on that."""
        if self.mesh and isinstance(wanted, torch.nn.Parameter):
            rows = shard_of(len(tensor), self.mesh.get_local_rank(), self.mesh.size())
            tensor = tensor[rows]
        return tensor.to(self.device, wanted.dtype, copy=True)


def load_config(folder: Path) -> Any:
    """Its config.json. Raises CheckpointError where there is none."""
    if official.is_official(folder):
        return official.read_config(folder)
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load a model from {folder}: {error}") from error


def stable(config: Any) -> Any:
    """A config without the fields that make no other model, at any depth."""
    if not isinstance(config, dict):
        return config
    return {name: stable(value) for name, value in config.items() if name not in VOLATILE}


def base_tensors(skeleton: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers of the base model, by the causal model's names."""
    base = f"{skeleton.base_model_prefix}."
    state = skeleton.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if name.startswith(base)}


def head_name(skeleton: Any) -> str:
    """`lm_head`, in most models."""
    head = skeleton.get_output_embeddings()
    return next(name for name, module in skeleton.named_modules() if module is head)


def needed(skeleton: Any) -> set[str]:
    """The tensors that a file must hold: all but those that are tied to others."""
    return skeleton.state_dict().keys() - skeleton.all_tied_weights_keys.keys()


def _check_shapes(skeleton: Any, files: TeacherFiles, folder: Path) -> None:
    state = skeleton.state_dict()
    for name in sorted(needed(skeleton)):
        found, wanted = files.read(name).shape, state[name].shape
        if found != wanted:
            raise CheckpointError(
                f"the weights in {folder} do not fit its config.json: {name} is {tuple(found)} "
                f"there and {tuple(wanted)} in the model"
            )
