"""The kernels that `gpu_kernels.py` measures on a GPU, each beside its torch reference."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.backbone import fp4, hyper_connections
from posttrain.backbone.kernels import hyper, indexer_topk, mix, mxfp4, sinkhorn, sparse_attention

Run = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Sizes:
    """V4-Flash's."""

    tokens: int = 2048
    heads: int = 64
    head_dim: int = 512
    window: int = 128
    top_k: int = 512
    entries: int = 16384
    index_heads: int = 64
    index_dim: int = 128
    hidden: int = 4096
    experts: tuple[int, int, int] = (16, 4096, 4096)
    dtype: torch.dtype = torch.bfloat16


SMALL = Sizes(5, 3, 24, 7, 6, 41, 3, 20, 33, (3, 5, 96), torch.float32)


@dataclass(frozen=True)
class Row:
    """A kernel and its reference; each call gives what is compared."""

    name: str
    shape: str
    kernel: Run
    reference: Run


def rows(part: str, s: Sizes, device: torch.device) -> Iterator[Row]:
    makers = {
        "attention": attention_rows,
        "indexer": indexer_rows,
        "mhc": mhc_rows,
        "mxfp4": mxfp4_rows,
    }
    return makers[part](s, device)


def with_gradients(function: Callable[..., Any], inputs: Sequence[Tensor]) -> Run:
    """The outputs, and the gradients of half the sum of their squares."""

    def run() -> Sequence[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(*leaves)
        outs = [out] if isinstance(out, Tensor) else list(out)
        grads = [x.detach() for x in outs]
        return [*grads, *torch.autograd.grad(outs, leaves, grads)]

    return run


def attention_rows(s: Sizes, device: torch.device) -> Iterator[Row]:
    keys, scale = s.window + s.top_k, s.head_dim**-0.5
    num_rows = s.tokens + s.entries
    q = torch.randn(s.tokens, s.heads, s.head_dim, device=device, dtype=s.dtype)
    pool = torch.randn(num_rows, s.head_dim, device=device, dtype=s.dtype)
    sink = torch.randn(s.heads, device=device)
    index = torch.randint(-1, num_rows, (s.tokens, keys), device=device, dtype=torch.int32)

    def kernel(q: Tensor, pool: Tensor, sink: Tensor) -> Tensor:
        return sparse_attention.sparse_attention(q, pool, index, sink, scale=scale)[0]

    def reference(q: Tensor, pool: Tensor, sink: Tensor) -> Tensor:
        dense = sparse_attention.reference
        return dense(q, pool, index, sink.to(q.dtype), scale=scale)[0]

    shape = f"T {s.tokens}, h {s.heads}, d {s.head_dim}, K {keys}"
    inputs = (q, pool, sink)
    yield Row("sparse attention", shape, lambda: [kernel(*inputs)], lambda: [reference(*inputs)])
    both = with_gradients(kernel, inputs), with_gradients(reference, inputs)
    yield Row("sparse attention, with backward", shape, *both)


def indexer_rows(s: Sizes, device: torch.device) -> Iterator[Row]:
    """Integers, whose scores are exact in both: the choices must be equal."""
    size = (s.tokens, s.index_heads, s.index_dim)
    q = torch.randint(-4, 5, size, device=device).to(s.dtype)
    key = torch.randint(-4, 5, (s.entries, s.index_dim), device=device).to(s.dtype)
    weight = torch.randint(-4, 5, size[:2], device=device).float()
    first = torch.zeros(s.tokens, dtype=torch.int32, device=device)
    count = torch.linspace(1, s.entries, s.tokens, device=device).int()
    inputs = (q, weight, key, first, count)

    def reference() -> Sequence[Tensor]:
        parts = zip(*(x.split(128) for x in (q, weight, first, count)), strict=True)
        choose = indexer_topk.reference
        return [
            torch.cat([choose(a.float(), w, key.float(), f, c, s.top_k) for a, w, f, c in parts])
        ]

    yield Row(
        "indexer top-k",
        f"T {s.tokens}, E {s.entries}, h {s.index_heads}, c {s.index_dim}, k {s.top_k}",
        lambda: [indexer_topk.top_entries(*inputs, top_k=s.top_k, most_visible=s.entries)],
        reference,
    )


def mhc_rows(s: Sizes, device: torch.device) -> Iterator[Row]:
    tokens, shape = 4 * s.tokens, f"T {4 * s.tokens}, N 4, H {s.hidden}"
    comb = torch.rand(4, 4, tokens, device=device) + 0.1

    def sweeps() -> Sequence[Tensor]:
        out = sinkhorn.sinkhorn(comb, 20, 1e-6)
        return [out, sinkhorn.sinkhorn_backward(out, comb, 20, 1e-6)]

    plain = with_gradients(lambda x: sinkhorn.reference(x, 20, 1e-6), [comb])
    yield Row("Sinkhorn, with backward", f"T {tokens}, N 4", sweeps, plain)
    x = torch.randn(tokens, 4, s.hidden, device=device, dtype=s.dtype)
    fn = torch.randn(24, 4 * s.hidden, device=device) * (4 * s.hidden) ** -0.5
    parts = [x, fn, torch.randn(24, device=device), torch.randn(24, device=device)]

    def written(module: Any) -> Callable[..., Sequence[Tensor]]:
        def through(*inputs: Tensor) -> Sequence[Tensor]:
            collapsed, write = module.connect(*inputs, 1e-6, 1e-6, 20)
            return [collapsed, write(collapsed)]

        return through

    both = (with_gradients(written(module), parts) for module in (hyper, hyper_connections))
    yield Row("mHC connection, with backward", shape, *both)
    y = torch.randn(tokens, s.hidden, device=device, dtype=s.dtype)
    parts = [x, y, torch.rand(4, tokens, device=device), comb]
    mixes = (with_gradients(f, parts) for f in (mix.mix, mix.mix_reference))
    yield Row("mHC mix, with backward", shape, *mixes)


def mxfp4_rows(s: Sizes, device: torch.device) -> Iterator[Row]:
    """Bit for bit: every error must be 0."""
    weight = torch.randn(s.experts, device=device)
    codes, scale = mxfp4.quantize_mxfp4(weight)
    shape = " x ".join(map(str, s.experts))

    def codecs(module: Any) -> Iterator[Run]:
        yield lambda: [x.view(torch.uint8) for x in module.quantize_mxfp4(weight)]
        yield lambda: [module.dequantize_mxfp4(codes, scale, dtype=s.dtype)]
        yield lambda: [module.fake_mxfp4(weight)]

    names = ("MXFP4 quantise", "MXFP4 dequantise", "MXFP4 there and back")
    for name, kernel, reference in zip(names, codecs(mxfp4), codecs(fp4), strict=True):
        yield Row(name, shape, kernel, reference)
