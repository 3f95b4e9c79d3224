"""RMSNorm and linear maps of one decode step in few and cheap calls: at one token a row a call
takes longer than its sums, and a Python number among its arguments as long as both.

Nothing has a gradient.

Legend: T tokens (every axis but the last), C channels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.backbone.norm import V4RMSNorm, V4UnweightedRMSNorm


def constant(value: float, like: Tensor) -> Tensor:
    """`value` as a tensor () of the dtype and on the device of `like`."""
    if torch.compiler.is_compiling():
        return like.new_tensor(value)
    return _constant(value, like.dtype, like.device)


@lru_cache(maxsize=64)
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):  # also read outside of it
        return torch.tensor(value, dtype=dtype, device=device)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / rms(x), (..., 1); x in float32 at least."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(constant(eps, x), norm, norm, value=1 / x.shape[-1]).rsqrt_()


def normed(module: Any, x: Tensor) -> Tensor:
    """module(x), of a norm; in x's dtype."""
    kind = type(module)
    if not ((kind is V4RMSNorm or kind is V4UnweightedRMSNorm) and is_bare(module)):
        return module(x)
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    if kind is V4UnweightedRMSNorm:
        out = wide * inverse_rms(wide, module.eps)
    else:
        scale = inverse_rms(wide, module.variance_epsilon)
        out = (wide * scale).mul_(_parameters(module)["weight"])
    return out if wide is x else out.to(x.dtype)


def projected(module: Any, x: Tensor) -> Tensor:
    """module(x), of a linear map: around the call where nothing hangs on it."""
    if type(module) is not nn.Linear or not is_bare(module):
        return module(x)
    own = _parameters(module)
    return F.linear(x, own["weight"], own["bias"])


def is_bare(module: nn.Module) -> bool:
    """Whether a call of `module` is its class's forward alone: no hooks, no other forward."""
    own = module.__dict__
    return not (own["_forward_pre_hooks"] or own["_forward_hooks"] or "forward" in own)


def _parameters(module: nn.Module) -> dict[str, Any]:
    """By name, past nn.Module's search for a name, which takes as long as a sum."""
    return module.__dict__["_parameters"]
