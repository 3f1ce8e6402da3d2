"""pretrain/logs: wandb, TensorBoard, trackio and OpenTelemetry get the same numbers and never end a
run."""

import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from pretrain.config.config import Config
from pretrain.config.flat import from_flat
from pretrain.logs import wandb_sink
from pretrain.logs.otlp_sink import Otlp, instrument_name, with_path
from pretrain.logs.sinks import SafeSink, Told, open_sinks
from pretrain.logs.wandb_sink import read_run_id, wandb_warnings, write_run_id
from pretrain.plan_settings import missing_packages


def config(**settings) -> Config:
    texts = {name: str(value) for name, value in settings.items()}
    return from_flat(texts, "test", Config())


# ---------------------------------------------------------------- OpenTelemetry


class Collector(HTTPServer):
    """Takes metrics on a port of this machine, and keeps the gauges' values of each sending."""

    def __init__(self, answer: int = 200):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.received: list[dict[str, float]] = []
        self.services: set[str] = set()
        self.paths: set[str] = set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
            ExportMetricsServiceRequest,
        )

        body = self.rfile.read(int(self.headers["Content-Length"]))
        request = ExportMetricsServiceRequest.FromString(body)
        values = {}
        for resource in request.resource_metrics:
            for attribute in resource.resource.attributes:
                if attribute.key == "service.name":
                    self.server.services.add(attribute.value.string_value)
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    values[metric.name] = metric.gauge.data_points[0].as_double
        self.server.received.append(values)
        self.server.paths.add(self.path)
        self.send_response(self.server.answer)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def collector():
    server = Collector()
    yield server
    server.shutdown()
    server.server_close()


def test_a_collector_receives_the_last_values_under_the_names_of_metrics_jsonl(collector):
    sink = Otlp(collector.url)
    sink.log({"loss": 3.0, "phase": "base", "skipped": False}, 1)
    sink.log({"loss": 2.5, "mfu": 0.4, "sources/corpora of web": 7, "skipped": True}, 2)
    sink.close()
    assert collector.paths == {"/v1/metrics"} and collector.services == {"ithaca"}
    assert collector.received[-1] == {
        "step": 2.0,
        "loss": 2.5,
        "mfu": 0.4,
        "skipped": 1.0,
        "sources/corpora_of_web": 7.0,
    }


def test_a_collector_that_refuses_is_said_once_and_at_the_end(collector, capsys):
    collector.answer = 400
    sink = Otlp(collector.url)
    for step in range(3):
        sink.log({"loss": 3.0}, step)
        sink._provider.force_flush()
    sink.close()
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("warning: OpenTelemetry:") and "400" in first
    assert last.startswith(f"warning: OpenTelemetry: {len(collector.received)} sendings failed")


def test_an_endpoint_gets_the_usual_path_unless_it_names_one():
    assert with_path("http://collector:4318") == "http://collector:4318/v1/metrics"
    assert with_path("http://collector:4318/") == "http://collector:4318/v1/metrics"
    assert with_path("https://host/otlp/metrics") == "https://host/otlp/metrics"
    assert instrument_name("sources/a b:c") == "sources/a_b_c"


@pytest.mark.parametrize(
    "endpoint", ["collector:4318", "grpc://collector", "http://", "http://a:b"]
)
def test_an_endpoint_that_is_no_url_is_refused(endpoint):
    (problem,) = config(otlp_endpoint=endpoint).logging.validate()
    assert problem.startswith(f"otlp_endpoint = {endpoint}: must be a URL with http://")


# ---------------------------------------------------------------- trackio, wandb


class FakeRun:
    def __init__(self, options: dict):
        self.options = options
        self.id = options.get("id") or "new"
        self.logged: list[tuple[int, dict]] = []
        self.is_finished = False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.is_finished = True


@pytest.fixture
def runs(monkeypatch):
    """The runs that were begun with a stand-in of trackio and of wandb."""
    begun: list[FakeRun] = []

    def init(**options):
        begun.append(FakeRun(options))
        return begun[-1]

    for name in ("trackio", "wandb"):
        module = types.ModuleType(name)
        module.init = init
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return begun


def test_trackio_goes_on_with_its_run_and_hears_each_step_once(runs, tmp_path):
    settings = config(trackio_project="p", save=tmp_path / "my run")
    (sink,), _ = open_sinks(settings, Told(last_step=4, until=6), None)
    for step in (5, 6, 7):
        sink.log({"loss": 1.0}, step)
    sink.close()
    (run,) = runs
    assert (run.options["project"], run.options["name"]) == ("p", "my run")
    assert run.options["resume"] == "allow" and run.options["config"]["trackio_project"] == "p"
    assert run.logged == [(7, {"loss": 1.0})] and run.is_finished


def test_wandb_goes_on_with_its_run_and_hears_each_step_once(runs, tmp_path):
    settings = config(wandb_project="p", save=tmp_path)
    (first,), run_id = open_sinks(settings, Told(last_step=0, until=6), None)
    assert run_id == "new"
    (second,), run_id = open_sinks(settings, Told(last_step=4, until=6), "old")
    assert run_id == "old" and runs[1].options["resume"] == "allow"
    for sink in (first, second):
        for step in (5, 6, 7):
            sink.log({"loss": 1.0}, step)
    assert [step for step, _ in runs[0].logged] == [5, 6, 7], "a new run has heard nothing"
    assert [step for step, _ in runs[1].logged] == [7]


def test_a_folder_remembers_the_wandb_run_before_the_first_checkpoint(tmp_path):
    assert read_run_id(str(tmp_path)) is None
    write_run_id(str(tmp_path), "abc")
    assert read_run_id(str(tmp_path)) == "abc"


def test_wandb_offline_is_said_with_the_reason_the_host_and_the_fix(monkeypatch):
    monkeypatch.setattr(wandb_sink.socket, "gethostname", lambda: "node7")
    monkeypatch.setattr(wandb_sink, "_why_offline", lambda: "no key is known")
    (text,) = wandb_warnings(config(wandb_project="p"))
    assert text == (
        "wandb_project = p: no key is known on node7, so wandb logs offline and `wandb sync` "
        "uploads it later. Fix: `wandb login`, or WANDB_MODE=offline if it is meant so."
    )
    assert wandb_warnings(config()) == []


def test_wandb_without_a_key_or_a_network_is_offline(monkeypatch):
    module = types.ModuleType("wandb")
    module.login = lambda *, prompt, verify: False
    # Nothing listens on this port.
    module.Settings = lambda: types.SimpleNamespace(base_url="http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert wandb_sink._why_offline() == "no key is known"
    module.login = lambda *, prompt, verify: True
    assert wandb_sink._why_offline().startswith("127.0.0.1:9 cannot be reached")
    monkeypatch.setenv("WANDB_MODE", "online")
    assert wandb_sink._why_offline() is None, "who says the mode has decided"


# ---------------------------------------------------------------- no sink ends a run


class Broken:
    def __init__(self):
        self.calls = 0

    def log(self, values, step):
        self.calls += 1
        if step > 1:
            raise OSError(28, "No space left on device")

    def close(self):
        raise RuntimeError("cannot close")


def test_a_sink_that_fails_is_said_once_tried_again_and_counted_at_the_end(capsys):
    broken = Broken()
    sink = SafeSink("somewhere", broken)
    for step in (1, 2, 3):
        sink.log({}, step)
    sink.close()
    assert broken.calls == 3
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith(
        "warning: somewhere: does not take step 2 (OSError: [Errno 28] No space"
    )
    assert second == "warning: somewhere: may lack its last numbers (RuntimeError: cannot close)"
    assert third == "warning: somewhere: did not take 2 of 3 records"


def test_a_sink_that_cannot_be_opened_is_left_out(runs, monkeypatch, capsys, tmp_path):
    def fail(**options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    settings = config(wandb_project="p", trackio_project="q", save=tmp_path)
    sinks, run_id = open_sinks(settings, Told(0, 0), None)
    assert [sink.name for sink in sinks] == ["trackio"] and run_id is None
    assert capsys.readouterr().err == (
        "warning: wandb: cannot be opened (ConnectionError: no route to host); the run goes on "
        "without it\n"
    )


def test_a_package_that_is_missing_is_one_line_that_says_what_to_install(monkeypatch):
    def find(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("importlib.util.find_spec", find)
    problems = missing_packages(config(trackio_project="p", otlp_endpoint="http://host:4318"))
    assert [problem.split(". Fix: ")[1] for problem in problems] == [
        "pip install trackio, or leave the flag out.",
        "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http, or leave the flag "
        "out.",
    ]
