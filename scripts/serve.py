"""Serves an exported model on this machine, in TensorFlow Serving's REST protocol; for trying it out."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import positive_int, require_extra, run_main


def _name(text: str) -> str:
    if not re.fullmatch(r"[\w.-]+", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"expected letters, digits, '.', '_' and '-', received {text!r}")
    return text


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 65535, received {text!r}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--export_path",
        type=Path,
        required=True,
        help="folder of all versions, of which the newest is served, such as runs/mine/export; or one version in it",
    )
    parser.add_argument("--name", type=_name, default="mvke", help="name of the model in addresses (default: mvke)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1; 0.0.0.0 lets other machines in)"
    )
    parser.add_argument("--port", type=_port, default=8501, help="0 takes any free one (default: 8501)")
    parser.add_argument("--max_request_mb", type=positive_int, default=8, help="longest request, MiB (default: 8)")
    parser.add_argument("--max_rows", type=positive_int, default=10_000, help="most rows of a request (default: 10000)")
    parser.add_argument(
        "--max_values",
        type=positive_int,
        default=200_000,
        help="most values of one input, such as rows x items to score (default: 200000)",
    )
    parser.add_argument(
        "--threads",
        type=positive_int,
        default=os.cpu_count() or 1,
        help="requests computed at the same time (default: one per core)",
    )
    parser.add_argument(
        "--max_waiting", type=positive_int, default=256, help="requests under way beyond those (default: 256)"
    )
    parser.add_argument("--log_requests", action="store_true", help="print a line for each request")
    args = parser.parse_args()
    require_extra("serve", "starlette", "uvicorn")

    from mvke_tf.server.process import bind, curl, newest_version, run, url

    folder = newest_version(args.export_path)
    bound = bind(args.host, args.port)
    print(f"Loading {folder}", flush=True)

    # TensorFlow takes seconds to import: only after the arguments have proved right.
    from mvke_tf.server.app import Limits, answer, create_app
    from mvke_tf.server.model import ServedModel
    from mvke_tf.server.protocol import RequestError

    model = ServedModel(folder)
    limits = Limits(args.max_request_mb * 2**20, args.max_rows, args.max_values, args.threads, args.max_waiting)
    example = model.example(model.default_signature)
    try:
        # The first call of a signature takes long.
        answer(model, json.dumps(example).encode(), limits)
    except RequestError as error:
        print(f"The made-up example does not fit this model: {error}")
    for name, description in model.descriptions.items():
        print(f"  {name}: {description}" if description else f"  {name}")
    bound.listen()
    address = f"{url(bound)}/v1/models/{args.name}"
    print(f"Serving version {model.version} at {address}   (its signatures: {address}/metadata)")
    print(f"Try it: {curl(address + ':predict', example)}")
    print("Ctrl-C stops it.", flush=True)
    run(create_app(model, args.name, limits), bound, args.log_requests)
    print("Stopped.")


if __name__ == "__main__":
    run_main(main)
