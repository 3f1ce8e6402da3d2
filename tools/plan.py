"""Plan a run: what it needs, how fast it is, what it costs.

    bash launch/ithaca.sh plan --config FILE [--flags of the run] [--world-size N]

Checks everything that the trainer checks before its processes meet, starts nothing, and needs no
GPU. All flags of the trainer are taken (pretrain/config/FLAGS.md), and those below. With
--world-size or --hardware the plan is for other machines: tokenizer, data and checkpoints that are
not here are not looked at, which a line says; without, they must be here.
"""

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from data.files import write_atomically
from parallel.layout import launched_world_size
from pretrain.config.config import Config
from pretrain.config.flags import spell
from pretrain.config.load import load_config
from pretrain.plan import Plan, make_plan
from tools.outputs.files import check_file, is_own_page
from tools.plan_verify.verify import PlannedRun, verify
from tools.planning.absent import absent_data, describe_absent, without_absent_start
from tools.planning.calibrate import calibrate, is_own_row
from tools.planning.cluster import Cluster, find_cluster
from tools.planning.report import RunPlan
from tools.planning.run_plan import estimate_phases, make_run_plan
from tools.planning.text import describe_plan
from tools.planning.totals import DEVICE_HOURS_TO_FAILURE, Assumed
from tools.shared.door import run_door, split_words, warn


@dataclass(kw_only=True)
class Arguments:
    """Hold the options of the command line that are not the run's."""

    world_size: int | None = None
    """Processes, one per device; by default NNODES x NPROC_PER_NODE of the environment."""
    hardware: str | None = None
    """Devices to plan for: h100, h200, a100, b200, mi300x, ...; by default this machine's."""
    hardware_file: str | None = None
    """YAML file with a row for the devices (tools/planning/hardware_file.py)."""
    gpus_per_node: int | None = None
    """Devices of a node; by default 8."""
    host_memory_gib: float | None = None
    """Memory of a node's host in GiB; by default this machine's, of named hardware 2,048."""
    price_per_gpu_hour: float | None = None
    """Price of one device for an hour, in any currency; without it no price is shown."""
    mtbf_hours: float | None = None
    """Mean hours between failures of the whole run; by default 7.9 with 1,024 devices (arXiv
    2410.21680), and more with fewer."""
    node_mtbf_hours: float | None = None
    """The same of one node."""
    disk_gigabytes_per_second: float = 1.0
    """What a node reads and writes of the shared file system."""
    document_tokens: int | None = None
    """Length of documents, where the data is not here to count them; by default a sample is one."""
    without_data: bool = False
    """Do not look at tokenizer and data, also where they are here; needs --vocab-size."""
    search: bool = False
    """Rank the layouts that each phase could have."""
    across_nodes: bool = False
    """With --search: rank layouts whose tp or all-to-all leaves a node as well."""
    verify: bool = False
    """Rehearse a step of each phase on a sample of ranks: the run's own code, with tensors that
    have shapes and no memory. Groups, the order of collectives, bytes and memory are compared; exit
    code 1 where something is wrong."""
    calibrate: str | None = None
    """Measure this machine instead, with --world-size processes and the shapes of the run's model,
    and write the row for --hardware-file to this YAML file."""
    json: str | None = None
    """Also write the plan to this JSON file."""
    html: str | None = None
    """Also write the plan as a page: pictures of the layout, of a step and of the memory."""


def validate(arguments: Arguments) -> list[str]:
    """List options that are out of range or contradict each other."""
    problems = []
    for field in fields(arguments):
        value = getattr(arguments, field.name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and not 0 < value < float("inf"):
            problems.append(
                f"{field.name} = {value}: must be above 0. Fix: give a positive number."
            )
    if arguments.mtbf_hours is not None and arguments.node_mtbf_hours is not None:
        problems.append(
            f"node_mtbf_hours = {arguments.node_mtbf_hours:g}: cannot be combined with mtbf_hours. "
            "Fix: remove one of them."
        )
    if arguments.across_nodes and not arguments.search:
        problems.append(
            "across_nodes = True: is about what --search ranks. Fix: give --search as well."
        )
    return problems


@dataclass(frozen=True)
class CheckedRun:
    """Holds a run that was checked, and where it is to run."""

    plan: Plan
    cluster: Cluster
    notes: tuple[str, ...]
    """What was not looked at."""

    @property
    def to_verify(self) -> PlannedRun:
        """Return the phases that are still to be trained, for a rehearsal."""
        clock = self.plan.resumed.clock if self.plan.resumed else 0
        return PlannedRun(
            self.plan.config,
            [phase for phase in self.plan.phases if phase.end > clock],
            self.plan.vocab_size,
            self.cluster.world_size,
            self.cluster.hardware,
            self.cluster.machine.device.memory_bytes,
        )


def check_run(arguments: Arguments, words: list[str]) -> CheckedRun:
    """Check the run as the trainer would.

    Args:
        words: the command line of the run.

    Raises:
        ValueError: everything that is wrong, a line each.
    """
    problems = validate(arguments)
    if problems:
        raise ValueError("\n".join(problems))
    config = load_config(spell(words))
    cluster = find_cluster(
        config,
        arguments.world_size or launched_world_size(),
        hardware=arguments.hardware,
        hardware_file=arguments.hardware_file,
        devices_per_node=arguments.gpus_per_node,
        host_memory_gib=arguments.host_memory_gib,
    )
    # What is on the other machines is not looked at.
    note = _why_without_data(arguments, config)
    notes = [] if note is None else [note]
    if _is_elsewhere(arguments):
        config, lines = without_absent_start(config)
        notes += lines
        if cluster.hardware.is_cpu and not (arguments.hardware or arguments.hardware_file):
            notes.append("hardware: CPUs as of this machine; --hardware h100 plans for GPUs")
    plan = make_plan(
        config,
        cluster.world_size,
        only_print=True,
        machine=cluster.machine,
        with_data=note is None,
    )
    checked = CheckedRun(plan, cluster, tuple(notes))
    # What cannot be verified is said before anything else.
    problems = checked.to_verify.validate() if arguments.verify else []
    if problems:
        raise ValueError("\n".join(problems))
    return checked


def plan_run(arguments: Arguments, words: list[str]) -> RunPlan:
    """Check the run and estimate it.

    Args:
        words: the command line of the run.

    Raises:
        ValueError: everything that is wrong, a line each.
    """
    return estimate_run(check_run(arguments, words), arguments, words)


def estimate_run(checked: CheckedRun, arguments: Arguments, words: list[str]) -> RunPlan:
    """Estimate a run that was checked."""
    return make_run_plan(
        checked.plan,
        checked.cluster,
        _assumed(arguments, checked.cluster),
        config_name=_config_name(words),
        document_tokens=arguments.document_tokens,
        notes=checked.notes,
        with_search=arguments.search,
        across_nodes=arguments.across_nodes,
    )


def _is_elsewhere(arguments: Arguments) -> bool:
    """Tell whether the plan is for other machines than this one."""
    named = (arguments.world_size, arguments.hardware, arguments.hardware_file)
    return any(value is not None for value in named)


def _why_without_data(arguments: Arguments, config: Config) -> str | None:
    """Say why tokenizer and data are not looked at; None where they are."""
    if arguments.without_data:
        return "data: not looked at (--without-data); a sample is taken as one document"
    # A plan for this machine needs them here, as the run does.
    if not _is_elsewhere(arguments):
        return None
    names = absent_data(config)
    return describe_absent(names) if names else None


def _assumed(arguments: Arguments, cluster: Cluster) -> Assumed:
    """Return what is assumed of the cluster."""
    hours = DEVICE_HOURS_TO_FAILURE / cluster.world_size
    if arguments.node_mtbf_hours is not None:
        hours = arguments.node_mtbf_hours / cluster.nodes
    if arguments.mtbf_hours is not None:
        hours = arguments.mtbf_hours
    are_given = arguments.mtbf_hours is not None or arguments.node_mtbf_hours is not None
    return Assumed(
        arguments.disk_gigabytes_per_second, hours, arguments.price_per_gpu_hour, are_given
    )


def _config_name(words: list[str]) -> str:
    """Return the run's file as it was named."""
    for word, following in zip(words, [*words[1:], ""]):
        if word == "--config":
            return following
        if word.startswith("--config="):
            return word.partition("=")[2]
    return "a run without a file"


def calibrate_here(arguments: Arguments, words: list[str]) -> int:
    """Measure this machine at the shapes of the run's next phase -> the exit code.

    Raises:
        ValueError: what is asked for beside it, or what is wrong with the run.
    """
    assert arguments.calibrate is not None
    for name in ("hardware", "hardware_file", "verify", "search", "json", "html"):
        if getattr(arguments, name):
            raise ValueError(
                f"{name} = {getattr(arguments, name)}: cannot be combined with calibrate, which "
                "measures this machine and plans nothing. Fix: remove it, and plan afterwards."
            )
    path = check_file("calibrate", Path(arguments.calibrate), "tools.plan", is_own_row)
    checked = check_run(arguments, words)
    estimate = estimate_phases(checked.plan, checked.cluster, arguments.document_tokens)[0]
    print(calibrate(path, estimate), end="")
    print(f"\nwrote {path}: plan with --hardware-file {path}")
    return 0


def act(arguments: Arguments, words: list[str]) -> int:
    """Print the plan, write and verify what was asked for -> the exit code."""
    if arguments.calibrate is not None:
        return calibrate_here(arguments, words)
    page = None
    if arguments.html is not None:
        page = check_file("html", Path(arguments.html), "tools.plan", is_own_page)
    checked = check_run(arguments, words)
    report = estimate_run(checked, arguments, words)
    for text in (*report.notes, *report.warnings):
        warn(text)
    print(describe_plan(report))
    if arguments.json is not None:
        write_atomically(Path(arguments.json), json.dumps(report.to_json(), indent=1) + "\n")
        print(f"\nwrote {arguments.json}")
    if page is not None:
        # The drawing library takes a second to import.
        from tools.planning.page import plan_page

        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(page, plan_page(report))
        print(f"\nwrote {arguments.html}")
    if not arguments.verify:
        return 0
    print(flush=True)
    found = verify(checked.to_verify, say=lambda line: print(line, flush=True))
    print(found.describe())
    for problem in found.problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if found.problems else 0


def main(argv: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    own, of_run = split_words(Arguments, words)
    return run_door(
        Arguments,
        lambda arguments: act(arguments, of_run),
        name="tools.plan",
        description=__doc__,
        argv=own,
    )


if __name__ == "__main__":
    sys.exit(main())
