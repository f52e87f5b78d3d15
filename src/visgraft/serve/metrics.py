"""Figures of a running server in Prometheus' format, and one line of JSON for each request."""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

MANY = "PROMETHEUS_MULTIPROC_DIR"
"""Prometheus' own variable: the folder in which several processes put their figures together."""

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
STAGES = ("wait", "forward")
"""Of an adapter's time; decoding is for all adapters of a request."""

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """What is counted. Labels are of few values: routes, reasons, and adapters that exist."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        to: Any = {"registry": self.registry}
        self.requests = Counter("visgraft_requests", "Requests answered", ["route", "status"], **to)
        self.seconds = Histogram("visgraft_request_seconds", "Of a request", ["route"], buckets=SECONDS, **to)
        self.stage = Histogram("visgraft_stage_seconds", "Of a stage", ["stage"], buckets=SECONDS, **to)
        self.answers = Counter("visgraft_answers", "Images answered", ["adapter"], **to)
        self.adapter_seconds = Counter("visgraft_adapter_seconds", "Waiting and computing", ["adapter", "stage"], **to)
        self.broken = Counter("visgraft_broken_images", "Images that could not be read", **to)
        self.batch = Histogram("visgraft_batch_images", "Images in a forward", buckets=BATCHES, **to)
        self.under_way = Gauge(
            "visgraft_images_under_way", "Decoded, waiting or computed", multiprocess_mode="livesum", **to
        )
        self.adapters = Gauge("visgraft_adapters", "Adapters that answer", multiprocess_mode="livemax", **to)

    def forget(self, adapter: str) -> None:
        """Drop the figures of an adapter that answers no more, so that names which come and go take no memory."""
        if MANY in os.environ:  # Prometheus keeps those of several processes in files that only grow
            return
        for family, labels in ((self.answers, ()), *((self.adapter_seconds, (stage,)) for stage in STAGES)):
            with contextlib.suppress(KeyError):
                family.remove(adapter, *labels)

    def text(self) -> bytes:
        """Return all figures, of all processes where there are several."""
        if MANY not in os.environ:
            return generate_latest(self.registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)
        return generate_latest(together)


def labelled(told: Mapping[str, bytes]) -> bytes:
    """Return figures that several workers told as one text, in which each bears the label `worker`."""
    families: dict[str, Metric] = {}
    for worker, text in told.items():
        for family in text_string_to_metric_families(text.decode()):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            whole.samples += [one._replace(labels={**one.labels, "worker": worker}) for one in family.samples]
    registry = CollectorRegistry()
    registry.register(_Families(list(families.values())))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self.families = families

    def collect(self) -> Iterable[Metric]:
        return self.families


class JsonLines(logging.Formatter):
    """A log line as JSON: when, how grave, what, and what a request's line adds."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        facts: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            facts["error"] = self.formatException(record.exc_info)
        return json.dumps(facts, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def log_to_stderr() -> None:
    """Write the log of this package and of the web server as lines of JSON on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("visgraft", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn.access").disabled = True
