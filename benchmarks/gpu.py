"""Measure FCMAE and MAE on a GPU: one command of some minutes.

    python benchmarks/gpu.py [--output DIR] [--batch_size 64]

The documentation has no GPU measurements; this script makes them for your GPU. It also trains an
MAE and an FCMAE for a few steps with `--profile`, whose traces show whether the GPU ever waits.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def commands(output: Path, batch_size: int) -> list[list[str]]:
    """The commands to run, in order."""
    common = ["--device", "cuda", "--compile", "--rounds", "15"]
    fcmae = ["fcmae.py", *common, "--batch_size", str(batch_size), "--json", f"{output}/fcmae.json"]
    mae = ["mae.py", *common, "--batches", str(batch_size), "--json", f"{output}/mae.json"]
    runs = []
    for model in ("mae_vit_base_patch16", "convnextv2_base"):
        for more in ([], ["--compile"]):
            name = "-".join([model, *(option.strip("-") for option in more)])
            images = f"synthetic:{60 * batch_size}"
            options = ["--device", "cuda", "--epochs", "1", "--warmup_epochs", "0", *more]
            options += ["--batch_size", str(batch_size), "--data_path", images, "--profile", "10"]
            options += ["--model", model, "--output_dir", f"{output}/{name}"]
            options += ["--save_ckpt", "False", "--auto_resume", "False"]
            runs.append(["../main_pretrain.py", *options])
    return [fcmae, mae, *runs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output_dir/gpu"),
        metavar="DIR",
        help="folder for results and traces (default: %(default)s)",
    )
    parser.add_argument(
        "--batch_size", type=int, default=64, help="images per step (default: %(default)s)"
    )
    args = parser.parse_args()
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    failed = 0
    for script, *options in commands(output, args.batch_size):
        print(f"\n$ {script} {' '.join(options)}", flush=True)
        failed += subprocess.call([sys.executable, HERE / script, *options]) != 0
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
