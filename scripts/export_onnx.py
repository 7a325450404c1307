"""Exports a trained run, or its towers, as ONNX: encoded features in, logits and values or vectors out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import add_run_arguments, require_extra, run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser)
    parser.add_argument("--onnx_path", type=Path, help="folder of the files (default: <run>/onnx)")
    parser.add_argument(
        "--part",
        nargs="+",
        choices=("model", "user", "item"),
        default=["model"],
        help="the whole model, or one tower; several make several files (default: model)",
    )
    args = parser.parse_args()
    require_extra("onnx", "tf2onnx", "onnx", "onnxruntime")

    # TensorFlow takes seconds to import: only after the arguments have proved right.
    from mvke_tf.onnx_export import TOLERANCE, export_run_onnx
    from mvke_tf.run import Run

    run = Run.open(args.checkpoint_path, args.model)
    for part in dict.fromkeys(args.part):
        path = export_run_onnx(run, part, args.onnx_path)
        print(f"ONNX: {path}   (its inputs and outputs: {path.with_suffix('.json')})")
    print(f"onnxruntime and Keras agree to {TOLERANCE:g} on rows of the test part.")


if __name__ == "__main__":
    run_main(main)
