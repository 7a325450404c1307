# SPDX-License-Identifier: Apache-2.0
"""What a server counts, in the text format of Prometheus (version 0.0.4)."""

from __future__ import annotations

import bisect
import collections
from collections.abc import Callable, Iterator, Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Upper bounds of the latencies that are told apart, seconds.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

Labels = Mapping[str, str]


class Metrics:
    """Requests, latencies and loads of one server; used from its event loop only.

    Args:
        gauges: Numbers that are looked up when they are asked for, `{name: (help, function)}`.
    """

    def __init__(self, gauges: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        self.gauges = dict(gauges)
        self._requests: collections.Counter[tuple[str, int]] = collections.Counter()
        self._latencies: dict[str, list[int]] = {}
        self._seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
        self._loads: collections.Counter[str] = collections.Counter()

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """Counts a request that has been answered."""
        self._requests[endpoint, status] += 1
        buckets = self._latencies.setdefault(endpoint, [0] * (len(SECONDS) + 1))
        buckets[bisect.bisect_left(SECONDS, seconds)] += 1
        self._seconds[endpoint] += seconds

    def load(self, well: bool) -> None:
        """Counts a version that was loaded, or could not be."""
        self._loads["loaded" if well else "refused"] += 1

    def text(self) -> str:
        """Everything, one line per number."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        yield from _head("mvke_requests_total", "counter", "Requests that were answered.")
        for (endpoint, status), count in sorted(self._requests.items()):
            yield _line("mvke_requests_total", {"endpoint": endpoint, "status": str(status)}, count)
        yield from _head("mvke_request_seconds", "histogram", "From the head of a request to its answer.")
        for endpoint, buckets in sorted(self._latencies.items()):
            total = 0
            for bound, count in zip((*map(str, SECONDS), "+Inf"), buckets, strict=True):
                total += count
                yield _line("mvke_request_seconds_bucket", {"endpoint": endpoint, "le": bound}, total)
            yield _line("mvke_request_seconds_sum", {"endpoint": endpoint}, round(self._seconds[endpoint], 6))
            yield _line("mvke_request_seconds_count", {"endpoint": endpoint}, total)
        yield from _head("mvke_model_loads_total", "counter", "Versions that were loaded, or refused.")
        for result in ("loaded", "refused"):
            yield _line("mvke_model_loads_total", {"result": result}, self._loads[result])
        for name, (words, read) in self.gauges.items():
            yield from _head(name, "gauge", words)
            yield _line(name, {}, read())


def _head(name: str, kind: str, words: str) -> Iterator[str]:
    yield f"# HELP {name} {words}"
    yield f"# TYPE {name} {kind}"


def _line(name: str, labels: Labels, value: float) -> str:
    inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
    return f"{name}{{{inside}}} {value}" if inside else f"{name} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
