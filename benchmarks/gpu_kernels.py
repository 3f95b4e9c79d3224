"""Time each Triton kernel against its torch reference: `python benchmarks/gpu_kernels.py OUT.md`.

Needs a GPU and triton. Each row: V4-Flash's sizes unless --small, medians of synchronised calls,
and the error between the two (the norm of the difference over the reference's). Kernels in
bfloat16 where V4 computes in it; a reference that would not fit runs on a part of the tokens.
With TRITON_INTERPRET=1 (numpy below 2.4), --device cpu and --small it only shows that it runs.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import triton
from torch import Tensor

from posttrain.backbone import fp4, hyper_connections
from posttrain.backbone.kernels import indexer_topk, mix, mxfp4, sinkhorn, sparse_attention

Run = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Sizes:
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
    repeats: int = 20


SMALL = Sizes(4, 3, 16, 4, 6, 40, 3, 16, 24, (2, 3, 64), 1)


@dataclass(frozen=True)
class Row:
    """A kernel and its reference; each call gives what is compared."""

    name: str
    shape: str
    kernel: Run
    reference: Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the markdown file to write")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a trial")
    arguments = parser.parse_args()
    device, sizes = torch.device(arguments.device), SMALL if arguments.small else Sizes()
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU, interpreted: no timing"
    lines = [
        "# Triton kernels against torch",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {name}, torch {torch.__version__}, triton "
        f"{triton.__version__}. Medians of {sizes.repeats} calls.",
        "",
        "| kernel | shape | torch ms | kernel ms | ratio | error |",
        "|---|---|---|---|---|---|",
    ]
    torch.manual_seed(0)
    for row in rows(sizes, device):
        lines.append(measure(row, device, sizes.repeats))
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def rows(s: Sizes, device: torch.device) -> Iterator[Row]:
    yield from attention_rows(s, device)
    yield from indexer_rows(s, device)
    yield from mhc_rows(s, device)
    yield from mxfp4_rows(s, device)


def measure(row: Row, device: torch.device, repeats: int) -> str:
    """A line of the table."""
    pairs = list(zip(row.kernel(), row.reference(), strict=True))
    error = max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)
    of_torch, of_kernel = (median(f, device, repeats) for f in (row.reference, row.kernel))
    return (
        f"| {row.name} | {row.shape} | {of_torch:.3f} | {of_kernel:.3f} | "
        f"{of_torch / of_kernel:.2f} | {error:.1e} |"
    )


def median(function: Run, device: torch.device, repeats: int) -> float:
    """Milliseconds a call, the first two left out."""
    seconds: list[float] = []
    for _ in range(repeats + 2):
        synchronise(device)
        start = time.perf_counter()
        function()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[2:])


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def with_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Run:
    """The output and the gradients of its sum's square, so that they are not all alike."""

    def run() -> Sequence[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, out.detach())]

    return run


def attention_rows(s: Sizes, device: torch.device) -> Iterator[Row]:
    keys, scale = s.window + s.top_k, s.head_dim**-0.5
    rows = s.tokens + s.entries
    q = torch.randn(s.tokens, s.heads, s.head_dim, device=device, dtype=torch.bfloat16)
    pool = torch.randn(rows, s.head_dim, device=device, dtype=torch.bfloat16)
    sink = torch.randn(s.heads, device=device)
    index = torch.randint(rows, (s.tokens, keys), device=device, dtype=torch.int32)

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
    q = torch.randint(-4, 5, size, device=device).bfloat16()
    key = torch.randint(-4, 5, (s.entries, s.index_dim), device=device).bfloat16()
    weight = torch.randint(-4, 5, size[:2], device=device).float()
    first = torch.zeros(s.tokens, dtype=torch.int32, device=device)
    count = torch.linspace(1, s.entries, s.tokens, device=device).int()
    inputs = (q, weight, key, first, count)

    def reference() -> Sequence[Tensor]:
        parts = zip(*(x.split(128) for x in (q, weight, first, count)), strict=True)
        return [
            torch.cat(
                [
                    indexer_topk.reference(a.float(), w, key.float(), f, c, s.top_k)
                    for a, w, f, c in parts
                ]
            )
        ]

    yield Row(
        "indexer top-k",
        f"T {s.tokens}, E {s.entries}, h {s.index_heads}, c {s.index_dim}, k {s.top_k}",
        lambda: [indexer_topk.top_entries(*inputs, top_k=s.top_k, most_visible=s.entries)],
        reference,
    )


def mhc_rows(s: Sizes, device: torch.device) -> Iterator[Row]:
    tokens, shape = 8 * s.tokens, f"T {8 * s.tokens}, N 4, H {s.hidden}"
    comb = torch.rand(4, 4, tokens, device=device) + 0.1

    def swept(function: type[torch.autograd.Function]) -> Run:
        return with_gradients(lambda x: function.apply(x, 20, 1e-6), [comb])

    yield Row(
        "Sinkhorn, with backward",
        shape,
        swept(sinkhorn.Sinkhorn),
        swept(hyper_connections.Sinkhorn),
    )
    x = torch.randn(tokens, 4, s.hidden, device=device)
    y, post = torch.randn(tokens, s.hidden, device=device), torch.rand(4, tokens, device=device)
    mixes = (with_gradients(f, [x, y, post, comb]) for f in (mix.mix, hyper_connections.mix))
    yield Row("mHC mix, with backward", shape, *mixes)
    collapses = (mix.Collapse.apply, hyper_connections.Collapse.apply)
    yield Row(
        "mHC collapse, with backward", shape, *(with_gradients(f, [post, x]) for f in collapses)
    )


def mxfp4_rows(s: Sizes, device: torch.device) -> Iterator[Row]:
    weight = torch.randn(s.experts, device=device)
    codes, scale = fp4.quantize_mxfp4(weight)
    shape = " x ".join(map(str, s.experts))
    yield Row(
        "MXFP4 quantise",
        shape,
        lambda: mxfp4.quantize_mxfp4(weight)[:1],
        lambda: fp4.quantize_mxfp4(weight)[:1],
    )
    bf16 = torch.bfloat16
    yield Row(
        "MXFP4 dequantise",
        shape,
        lambda: [mxfp4.dequantize_mxfp4(codes, scale, dtype=bf16)],
        lambda: [fp4.dequantize_mxfp4(codes, scale, dtype=bf16)],
    )
    yield Row(
        "MXFP4 there and back",
        shape,
        lambda: [mxfp4.fake_mxfp4(weight)],
        lambda: [fp4.fake_mxfp4(weight)],
    )


if __name__ == "__main__":
    main()
