"""Some steps of main_pretrain.py with --profile, from a packed store: does the GPU wait?

    python benchmarks/steps.py [--models convnextv2_base mae_vit_base_patch16] [--device cuda]
                               [--compile] [--cuda_graph] [--output DIR] [--json FILE]

The store holds 64 synthetic faces of 256 px, repeated: loading costs what it costs for as many
different ones, but the store is in the page cache, so the disk is not measured. Speed and waiting
for data are those of the last of three epochs; the first has the traced steps, which are slower.
"""

import json
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import data
import timing

STEPS, TRACED = 30, 10  # per epoch
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


def make_store(folder: Path, images: int) -> Path:
    """A packed store of this many faces."""
    data.write_faces(folder / "files", side=256, count=images, distinct=64)
    data.pack(folder / "files", folder / "store")
    return folder / "store"


def pretrain(store: Path, output: Path, options: list[str]) -> dict[str, float]:
    """Run main_pretrain.py; -> the last record of its log. Raises RuntimeError if it fails."""
    program = Path(__file__).resolve().parents[1] / "main_pretrain.py"
    fixed = "--epochs 3 --warmup_epochs 0 --accum_iter 1 --vis_freq 0"
    fixed += " --save_ckpt False --auto_resume False"
    command = [sys.executable, program, *fixed.split(), "--profile", str(TRACED), *options]
    command += ["--data_path", store, "--output_dir", output]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        lines = run.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"exit code {run.returncode}")
    return json.loads((output / "log.txt").read_text().splitlines()[-1])


def busy_share(trace: Path) -> float | None:
    """The share of the traced time in which the GPU computed or copied; None without a GPU."""
    events = json.loads(trace.read_text())["traceEvents"]
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in ON_GPU]
    if not spans:
        return None
    spans.sort()
    ends = [spans[0][1]]  # the latest end so far
    for _, end in spans[1:]:
        ends.append(max(ends[-1], end))
    idle = sum(
        max(0, later[0] - end) for (_, later), end in zip(pairwise(spans), ends, strict=False)
    )
    return 1 - idle / (ends[-1] - spans[0][0])


def main() -> None:
    parser = timing.parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--models",
        nargs="+",
        default=["convnextv2_base", "mae_vit_base_patch16"],
        help="models to pre-train (default: %(default)s)",
    )
    parser.add_argument(
        "--batch_size", type=int, default=64, help="images per step (default: %(default)s)"
    )
    parser.add_argument("--compile", action="store_true", help="compile blocks")
    parser.add_argument("--cuda_graph", action="store_true", help="launch each pass as a graph")
    parser.add_argument(
        "--input_size",
        type=int,
        default=224,
        help="side length of images in pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for the runs and their traces (default: that of --json, or output_dir/steps)",
    )
    args = parser.parse_args()
    report, rows = timing.Report("Steps of main_pretrain.py from a packed store", args), []
    folder = args.output or (args.json.parent if args.json else Path("output_dir/steps"))
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--device", args.device, "--batch_size", str(args.batch_size)]
    options += ["--input_size", str(args.input_size)]
    ways = [way for way in ("compile", "cuda_graph") if getattr(args, way)]
    options += [f"--{way}" for way in ways]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        store = make_store(Path(temporary), STEPS * args.batch_size)
        for model in args.models:
            output = folder / "-".join([model, *ways, str(args.batch_size)])
            record = pretrain(store, output, ["--model", model, *options])
            waited = f"{record['data_wait']:.1%}"
            busy = busy_share(output / "trace.json")
            shown = None if busy is None else f"{busy:.1%}"
            where = [model, args.batch_size, " ".join(ways) or None]
            trace = str(output / "trace.json")
            rows.append([*where, record["images_per_s"], waited, shown, trace])
    columns = ["model", "batch", "with", "images/s", "waiting for data", "GPU busy, traced"]
    report.table("Training", [*columns, "trace"], rows)
    report.close()


if __name__ == "__main__":
    main()
