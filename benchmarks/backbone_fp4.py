"""What packed FP4 experts save: `python benchmarks/backbone_fp4.py`.

A V4 of 109M parameters, nearly all of them experts, is written in the official layout (MXFP4
experts, FP8 matrices) and by `save_pretrained` in float32. Each form is then loaded in a process
of its own: peak memory of loading, what is held after it, the peak of a forward of 64 tokens, all
above what the imports hold, and that of saving it in the same layout, above what was held then.
The packed model's logits must be those of the unpacked one, bit for bit.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from measured import Json, forget_peak, machine, memory_mib, place, write

from posttrain.backbone import V4ForCausalLM, official, preset_config
from posttrain.compiled_loops import has_numba

FORMS = (
    "float32 saved by save_pretrained",
    "official, unpacked to bfloat16",
    "official, packed FP4",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=Path("docs/backbone-fp4.md"))
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        form, folder = arguments.worker
        sys.stdout.write(json.dumps(measure(form, Path(folder))) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        rows = [run_worker(form, folder) for form in FORMS]
    if rows[1]["logits"] != rows[2]["logits"]:
        raise SystemExit("packed and unpacked experts give different logits")
    data: Json = {**machine(), "rows": rows}
    write(arguments.page, data, page)


def write_model(folder: Path) -> None:
    config = preset_config("tiny", vocab_size=512, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    config.update(
        {
            "hidden_size": 512,
            "moe_intermediate_size": 512,
            "n_routed_experts": 44,
            "num_experts_per_tok": 4,
        }
    )
    torch.manual_seed(0)
    model = V4ForCausalLM(config)
    official.save(model, folder / "official")
    model.save_pretrained(folder / "float32")


def run_worker(form: str, folder: str) -> Json:
    command = [sys.executable, __file__, "--worker", form, folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def measure(form: str, folder: Path) -> Json:
    """A row of the table."""
    path = folder / ("float32" if form == FORMS[0] else "official")
    if has_numba():
        import posttrain.backbone.host.connect  # noqa: F401  # is among the imports

    base = memory_mib("VmRSS")
    if form == FORMS[0]:
        model: Any = V4ForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    else:
        model = official.load(path, dtype=torch.bfloat16, keep_fp4=form == FORMS[2])
    loaded, held = memory_mib("VmHWM") - base, memory_mib("VmRSS") - base
    forget_peak()
    ids = torch.randint(3, 512, (1, 64), generator=torch.Generator().manual_seed(0))
    logits = model(ids).logits
    forward, saving = memory_mib("VmHWM") - base, memory_mib("VmRSS")
    forget_peak()
    with tempfile.TemporaryDirectory() as out:
        if form == FORMS[0]:
            model.save_pretrained(Path(out) / "again")
        else:
            official.save(model, Path(out) / "again", template=path)
    files = [file.stat().st_size for file in path.glob("*.safetensors")]
    return {
        "form": form,
        "disk_mib": sum(files) / 2**20,
        "load_mib": loaded,
        "held_mib": held,
        "forward_mib": forward,
        "save_mib": memory_mib("VmHWM") - saving,
        "shard_mib": max(files) / 2**20,
        "parameters": sum(x.numel() for x in model.parameters()),
        "logits": sha256(logits.float().numpy().tobytes()).hexdigest(),
    }


def page(data: Json) -> str:
    """The markdown page: where it was measured, and a table."""
    lines = [
        "# Packed FP4 experts",
        "",
        f"{place(data)}. Written by "
        "`benchmarks/backbone_fp4.py`, which says how. The logits of the last two rows are the "
        "same bits. `from_pretrained` maps its file: it is read by the first forward.",
        "",
        "| form | files MiB | largest shard MiB | loading, peak MiB | held MiB "
        "| forward of 64 tokens, peak MiB | saving, MiB above |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        names = ("disk", "shard", "load", "held", "forward", "save")
        sizes = [row[f"{name}_mib"] for name in names]
        lines.append(f"| {row['form']} | {' | '.join(f'{size:.0f}' for size in sizes)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
