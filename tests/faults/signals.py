"""Stop small runs by signals at random moments: `bash tests/faults/signals.sh --stops 100`.

Half of the signals go to a run on one node, half to one of two nodes. Each time all nodes must end
in order within the grace time, and the last step that was trained must be in the checkpoint. In the
end the run that was stopped so often must be the same, bit for bit, as one left alone.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.dist.training import write_corpus
from tests.faults.soak import SAVE_INTERVAL, Course, finish, flags_of, phases_of
from tools.faults.comparison import differences
from tools.faults.launched_run import LaunchedRun, Node, is_running
from tools.faults.moments import Moment, Moments
from tools.faults.traces import published_step

GRACE_SECONDS = 60
EVAL_INTERVAL = 3
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LONGEST_WAIT_ALONE = 4.0
"""Seconds that a node waits for the other one before it is signalled, at most."""
MOMENTS: tuple[Moment, ...] = (
    "start",
    "step",
    "evaluation",
    "copy",
    "write",
    "publish",
    "retention",
    "crossing",
)
COURSES = (
    Course("one node", 0.5, 2, 1, [], changes_layout=True),
    Course("two nodes", 0.5, 1, 2, [], changes_layout=True),
)
EXIT_STOPPED = 75


@dataclass(frozen=True)
class Stop:
    """A signal, and how all nodes ended."""

    moment: str
    name: str
    node: int
    codes: list[int]
    seconds: float
    problems: list[str]


class Stopper:
    """Stops a run again and again."""

    def __init__(self, run: LaunchedRun, seed: int):
        self.run = run
        self.chance = random.Random(seed)
        self.moments = Moments(
            run,
            self.chance,
            cache=None,
            save_interval=SAVE_INTERVAL,
            eval_interval=EVAL_INTERVAL,
        )
        self.stops: list[Stop] = []

    def stop_all(self, count: int) -> list[Stop]:
        """Stop the run `count` times, or until it ends by itself."""
        names: list[Moment | str] = list(MOMENTS)
        if len(self.run.nodes) > 1:
            names.append("meeting")
        while len(self.stops) < count:
            moment = names[len(self.stops) % len(names)]
            stop = self._stop_meeting() if moment == "meeting" else self._stop_at(moment)
            if stop is None:
                break
            self.stops.append(stop)
            print(
                f"{len(self.stops)}: {stop.name} to node {stop.node} in {stop.moment}: "
                f"{stop.seconds:.1f} s, exit codes {stop.codes}"
                f"{''.join('; ' + problem for problem in stop.problems)}",
                flush=True,
            )
            self.moments.forget("crossing" if moment == "crossing" else "start")
        self.moments.events.close()
        return self.stops

    def _stop_at(self, moment: Moment) -> Stop | None:
        """Start the nodes, and signal one of them at a moment; None if the run ends before."""
        for node in self.run.nodes:
            if not node.is_alive():
                node.start()
        launched = time.monotonic()
        if not self.moments.wait_for(moment, launched):
            return None
        return self._signal(moment, self.chance.randrange(len(self.run.nodes)), self.run.nodes)

    def _stop_meeting(self) -> Stop:
        """Start one node, and signal it while it waits for the other."""
        number = self.chance.randrange(len(self.run.nodes))
        node = self.run.nodes[number]
        node.start()
        time.sleep(self.chance.uniform(0.5, LONGEST_WAIT_ALONE))
        return self._signal("meeting", number, [node])

    def _signal(self, moment: str, number: int, nodes: list[Node]) -> Stop:
        """Signal a node, wait for all, and look at how they ended."""
        already = [len(node.lines) for node in nodes]
        sent = self.chance.choice(SIGNALS)
        processes = [pid for node in nodes for pid in node.tree()]
        self.run.nodes[number].process.send_signal(sent)
        began = time.monotonic()
        limit = began + 2 * GRACE_SECONDS
        while any(node.is_alive() for node in nodes) and time.monotonic() < limit:
            time.sleep(0.02)
        seconds = time.monotonic() - began
        problems = []
        for node in nodes:
            if node.is_alive():
                problems.append(f"a node still runs {seconds:.0f} s later")
                node.process.kill()
            node.process.wait()
            node.reader.join(5)
        if seconds > GRACE_SECONDS:
            problems.append(f"later than the grace time of {GRACE_SECONDS} s")
        codes = [node.process.returncode for node in nodes]
        said = ["".join(node.lines[at:]) for node, at in zip(nodes, already, strict=True)]
        problems += self._problems(codes, said, processes)
        return Stop(moment, sent.name, number, codes, seconds, problems)

    def _problems(self, codes: list[int], said: list[str], processes: list[int]) -> list[str]:
        """List what is not as it must be after a stop."""
        found = []
        if codes != [EXIT_STOPPED] * len(codes):
            found.append(f"exit codes {codes}: " + " | ".join(text[-600:] for text in said))
        if any("Traceback" in text for text in said):
            found.append("a traceback: " + " | ".join(text[-2000:] for text in said))
        if any("the same command goes on" not in text for text in said):
            found.append("a node does not say how to go on: " + " | ".join(said))
        if left := [pid for pid in processes if is_running(pid)]:
            found.append(f"processes {left} stay")
        if (published_step(self.run.save) or 0) < self.run.last_step():
            found.append(
                f"step {self.run.last_step()} was trained and step "
                f"{published_step(self.run.save)} is published"
            )
        return found


def stop_course(course: Course, folder: Path, corpus: str, stops: int, seed: int) -> bool:
    """Stop one run `stops` times, let it end, and compare it with one left alone."""
    config = folder / "run.yaml"
    folder.mkdir()
    config.write_text(yaml.safe_dump({"phases": phases_of(course, 2 * stops)}))
    argv = ["--config", str(config), *flags_of(corpus)]
    argv += ["--split", "90,10", "--eval-iters", "20", "--eval-interval", str(EVAL_INTERVAL)]
    environment = {"GRACE": str(GRACE_SECONDS)}
    alone = LaunchedRun(argv, folder / "alone", course.processes * course.nodes)
    run = LaunchedRun(
        argv, folder / "stopped", course.processes, nodes=course.nodes, environment=environment
    )
    try:
        done = Stopper(run, seed).stop_all(stops)
        for node in run.nodes:
            if not node.is_alive():
                node.start()
        run.wait_until_done()
        alone.wait_until_done()
    finally:
        run.end()
        alone.end()
    in_order = sum(not stop.problems for stop in done)
    kinds = Counter(stop.moment for stop in done)
    print(
        f"{course.name}: {in_order} of {len(done)} stops in order, the slowest in "
        f"{max(stop.seconds for stop in done):.1f} s; "
        + ", ".join(f"{kind} {count}" for kind, count in kinds.items()),
        flush=True,
    )
    found = differences(folder / "alone", folder / "stopped")
    print("compared: " + ("; ".join(found) or "the same, bit for bit"), flush=True)
    return in_order == stops and not found


def main(argv: list[str] | None = None) -> int:
    """Read the arguments and run; 0 if each stop was in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stops", type=int, default=100, help="signals to both runs together")
    parser.add_argument("--seed", type=int, default=1, help="of the moments of the signals")
    parser.add_argument("--folder", help="keep everything in this new folder")
    parser.add_argument("--course", choices=[course.name for course in COURSES], help="only this")
    arguments = parser.parse_args(argv)
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="ithaca-signals-"))
    folder.mkdir(parents=True, exist_ok=True)
    corpus = write_corpus(folder / "corpus", documents=2000)
    courses = [each for each in COURSES if arguments.course in (None, each.name)]
    is_well = True
    for course in courses:
        stops = -(-arguments.stops // len(courses))
        place = folder / course.name.replace(" ", "_")
        is_well = stop_course(course, place, corpus, stops, arguments.seed) and is_well
    return finish("signals", is_well, folder, keep=arguments.folder is not None)


if __name__ == "__main__":
    sys.exit(main())
