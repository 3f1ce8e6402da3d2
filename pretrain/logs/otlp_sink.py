"""A run's numbers as OpenTelemetry metrics, sent to a collector by OTLP over HTTP.

A gauge per curve has the last value; a thread of the SDK sends all of them every 60 s, or as often
as OTEL_METRIC_EXPORT_INTERVAL says. The SDK's other variables (headers, certificates, resource
attributes) act, too.
"""

import logging
import re
from typing import Any
from urllib.parse import urlsplit

from pretrain.config.load import warn

METRICS_PATH = "/v1/metrics"
"""Where collectors take metrics, when the endpoint names no path."""
LONGEST_NAME = 255
CLOSE_MILLISECONDS = 10_000
"""What the last sending may take."""


class Otlp:
    """The gauges of a run, and what sends them."""

    def __init__(self, endpoint: str):
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import (
            MetricExportResult,
            PeriodicExportingMetricReader,
        )
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource

        self._log = _LastMessage()
        self._failures = 0
        sink = self

        class Exporter(OTLPMetricExporter):
            """Counts what the collector did not take."""

            def export(self, *args: Any, **options: Any) -> MetricExportResult:
                result = super().export(*args, **options)
                if result is not MetricExportResult.SUCCESS:
                    sink._note_failure()
                return result

        resource = Resource({"service.name": "ithaca"}).merge(OTELResourceDetector().detect())
        reader = PeriodicExportingMetricReader(Exporter(endpoint=with_path(endpoint)))
        self._provider = MeterProvider([reader], resource, shutdown_on_exit=False)
        self._meter = self._provider.get_meter("ithaca")
        self._gauges: dict[str, Any] = {}

    def log(self, values: dict[str, float | str | bool], step: int) -> None:
        for name, value in ({"step": step} | values).items():
            if isinstance(value, int | float):
                self._gauge(name).set(float(value))

    def close(self) -> None:
        self._provider.shutdown(CLOSE_MILLISECONDS)
        self._log.close()
        if self._failures:
            warn(f"OpenTelemetry: {self._failures:,} sendings failed; the last: {self._log.text}")

    def _gauge(self, name: str) -> Any:
        if name not in self._gauges:
            self._gauges[name] = self._meter.create_gauge(instrument_name(name))
        return self._gauges[name]

    def _note_failure(self) -> None:
        if not self._failures:
            warn(f"OpenTelemetry: {self._log.text}; the run goes on, and it is tried again")
        self._failures += 1


class _LastMessage(logging.Handler):
    """Keeps what the SDK would write on the console at every sending."""

    def __init__(self) -> None:
        super().__init__()
        self.text = "the collector does not take the metrics"
        self._logger = logging.getLogger("opentelemetry")
        self._propagated = self._logger.propagate
        self._logger.addHandler(self)
        self._logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        self.text = " ".join(record.getMessage().split())

    def close(self) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = self._propagated
        super().close()


def with_path(endpoint: str) -> str:
    """Return the URL that metrics are sent to: the endpoint's own, or the usual path on it."""
    has_path = urlsplit(endpoint).path not in ("", "/")
    return endpoint if has_path else endpoint.rstrip("/") + METRICS_PATH


def instrument_name(curve: str) -> str:
    """Return the name of a curve in the letters that OpenTelemetry allows."""
    return re.sub(r"[^-_./a-zA-Z0-9]", "_", curve)[:LONGEST_NAME]
