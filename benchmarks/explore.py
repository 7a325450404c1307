# SPDX-License-Identifier: Apache-2.0
"""Seconds until `mvke explore RUN` answers, and milliseconds from an edit to its answer, in Chromium and without it.

Starts the command several times, each time until its page is there, and edits a feature of a user in the page: from
the key to the changed tables. `explorer_ms` is the same without page and browser. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import import_tensorflow, positive_int, run_main
from mvke_tf.errors import RunError

_CHANGED = """() => {
    const result = document.querySelector("#user-result");
    window.changed = new Promise(resolve => new MutationObserver(() => resolve(performance.now())).observe(
        result, {childList: true, subtree: true, characterData: true}));
}"""


@contextmanager
def started(run: Path) -> Iterator[tuple[str, float]]:
    """The address of the page, and after how many seconds it answered."""
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "mvke_tf", "explore", str(run), "--port", "0"]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        found = next((match for line in process.stdout or () if (match := re.search(r"at (http://\S+)", line))), None)
        if found is None:
            raise RunError(f"`mvke explore {run}` has ended before its page was there.")
        with urllib.request.urlopen(found[1]) as answer:
            answer.read()
        yield found[1], time.perf_counter() - began
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--starts", type=positive_int, default=5, help="(default: 5)")
    parser.add_argument("--edits", type=positive_int, default=50, help="(default: 50)")
    args = parser.parse_args()
    import_tensorflow()

    import numpy as np
    from playwright.sync_api import sync_playwright

    from mvke_tf.explore.explorer import Explorer
    from mvke_tf.run import Run

    explorer = Explorer(Run.open(args.run))
    explorer.warm_up()
    name = next(feature.name for feature in explorer.fields if explorer.vocabulary(feature) is None)
    values = list(dict.fromkeys(explorer.texts(user)[name] for user in range(min(1000, len(explorer.users)))))
    texts = [values[number % len(values)] for number in range(args.edits)]

    def timed(function, *arguments) -> float:
        began = time.perf_counter()
        function(*arguments)
        return 1000 * (time.perf_counter() - began)

    explorer_ms = [timed(explorer.user, 0, {name: text}) for text in texts]
    item_ms = [timed(explorer.item, number % len(explorer.items)) for number in range(args.edits)]
    starts, page_ms = [], []
    for number in range(args.starts):
        with started(args.run) as (address, seconds):
            starts.append(seconds)
            if number < args.starts - 1:
                continue
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(
                    executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
                )
                page = browser.new_page()
                page.goto(address)
                field = page.get_by_label(re.compile(rf"^\s*{re.escape(name)}\b")).locator("visible=true").first
                for text in texts:
                    field.fill(text)
                    page.evaluate(_CHANGED)
                    began = page.evaluate("performance.now()")
                    page.get_by_role("button", name="Show").click()
                    page_ms.append(page.evaluate("window.changed") - began)
                browser.close()

    def spread(samples: list[float], digits: int) -> dict[str, float]:
        found = {"median": np.median(samples), "p99": np.quantile(samples, 0.99), "most": max(samples)}
        return {key: round(float(value), digits) for key, value in found.items()}

    print(
        json.dumps(
            {
                "start_seconds": [round(seconds, 1) for seconds in starts],
                "page_ms": spread(page_ms, 1),
                "explorer_ms": spread(explorer_ms, 1),
                "item_ms": spread(item_ms, 1),
                "edited": name,
                "users": len(explorer.users),
                "items": len(explorer.items),
                "model": explorer.model.name,
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
            }
        )
    )


if __name__ == "__main__":
    run_main(main)
