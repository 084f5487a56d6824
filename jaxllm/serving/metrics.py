"""What Prometheus reads at /metrics."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jaxllm.serving.worker import Worker

SECONDS = 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300


class Metrics:
    """Counters of requests and tokens, and times, in a registry of their own.

    Args:
        worker: whose engine is looked at whenever the metrics are read.
        paths: of the routes; others are counted together, as there can be any number of them.
    """

    def __init__(self, worker: Worker, paths: Iterable[str]) -> None:
        self._registry, self._paths = CollectorRegistry(), frozenset(paths)
        self._requests = Counter("jaxllm_requests", "answers by HTTP", ["path", "status"], registry=self._registry)
        first, whole = "until something of an answer came", "until a request was answered"
        self._first = Histogram("jaxllm_first_token_seconds", first, registry=self._registry, buckets=SECONDS)
        self._whole = Histogram("jaxllm_answer_seconds", whole, registry=self._registry, buckets=SECONDS)
        self._registry.register(_Engine(worker))

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def count(self, path: str, status: int) -> None:
        """One more answer with this status."""
        self._requests.labels(path if path in self._paths else "other", status).inc()

    @contextmanager
    def timed(self) -> Iterator[Callable[[], None]]:
        """Measures an answer; what it gives is called whenever something of it comes."""
        begun, came = time.perf_counter(), False

        def first() -> None:
            nonlocal came
            if not came:
                self._first.observe(time.perf_counter() - begun)
            came = True

        yield first
        self._whole.observe(time.perf_counter() - begun)


class _Engine(Collector):
    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("jaxllm_live", "answers that run or wait", self._worker.live)
        engine = self._worker.engine
        yield GaugeMetricFamily("jaxllm_running", "answers in slots", engine.running)
        yield GaugeMetricFamily("jaxllm_slots", "answers that can run at once", engine.slots)
        for name, value in asdict(engine.stats).items():
            yield CounterMetricFamily(f"jaxllm_{name}", f"{name.replace('_', ' ')} since the start", value)
