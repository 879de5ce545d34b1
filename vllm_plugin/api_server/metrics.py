"""Prometheus metrics, served on vLLM's own ``/metrics``.  No label holds text from a client."""

from __future__ import annotations

import functools

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Metrics:
    """The metrics of one process.

    With several API servers, vLLM adds up their counters and takes the most recent value of a gauge.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.merges = Counter(
            "merged_lora_merges",
            "New merges, by strategy and result: made, shared (the workers had it already, or made it for "
            "another API server), refused (a client's mistake), busy (too many wait, or no room in memory), "
            "cancelled (its clients left), failed (a fault).",
            ["strategy", "result"],
            registry=registry,
        )
        self.seconds = Histogram(
            "merged_lora_merge_seconds",
            "Time to make a new merge, without the wait for its turn.",
            buckets=SECONDS,
            registry=registry,
        )
        self.waited = Histogram(
            "merged_lora_wait_seconds",
            "Time that a request waited for a new merge.",
            buckets=SECONDS,
            registry=registry,
        )
        self.queue = Gauge(
            "merged_lora_queue",
            "New merges that are being made or wait for that.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.again = Counter(
            "merged_lora_made_again",
            "Merges that were made once more, because they had made room for others.",
            registry=registry,
        )
        self.hits = Counter(
            "merged_lora_cache_hits", "Requests for a merge that had been made already.", registry=registry
        )
        self.evictions = Counter(
            "merged_lora_evictions",
            "Merges forgotten and copies of sources dropped to make room for others.",
            ["what"],
            registry=registry,
        )
        self.checks = Counter(
            "merged_lora_checks",
            "Sources of merges that were replayed, by result: kept, lost (less than half of the answers "
            "survive), failed (no answers to replay, or a fault).",
            ["result"],
            registry=registry,
        )
        self.held = Gauge(
            "merged_lora_bytes_held",
            "Bytes of the copies of adapters in the workers' memory, all ranks together.",
            registry=registry,
            multiprocess_mode="mostrecent",
        )


@functools.cache
def metrics() -> Metrics:
    """This process's metrics."""
    return Metrics(REGISTRY)
