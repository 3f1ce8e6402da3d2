"""Pretrain a GPT: one process of those that launch/train.sh starts.

Reads top to bottom: check everything, join the processes, build or load the state, and hand it to
the training loop (training_loop.py). The process ends with an outcome that the launcher reads:
done, again (the next phase needs another layout, the newest checkpoint is damaged and an earlier
one is taken, or a spike goes back), stopped (signal or --exit-...), unstarted (signal before the
first step), refused (bad input).
"""

import gc
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch

from model import compiled
from parallel.layout import (
    World,
    build_layout,
    device_here,
    end_world,
    has_bf16_units,
    launched_local_rank,
    launched_local_world_size,
    launched_on_one_machine,
    launched_rank,
    launched_world_size,
    record_folder,
    start_world,
)
from pretrain.attention_backend import attention_of_run
from pretrain.checkpointing.folder_lock import FolderLock, same_start_on_all_ranks
from pretrain.checkpointing.manifest import DamagedCheckpoint
from pretrain.checkpointing.resume_contract import describe_changes
from pretrain.checkpointing.set_aside import fall_back, mend_save_folder
from pretrain.config.config_yaml import dump_yaml
from pretrain.config.flags import spell
from pretrain.config.load import load_config, warn
from pretrain.data_outlook import describe_forecast
from pretrain.logs.metrics import Reporter
from pretrain.logs.profiler import begin_memory_history, write_memory_snapshot
from pretrain.logs.run_facts import PhaseFacts, RunFacts, describe_cpu
from pretrain.logs.tally import StepTally
from pretrain.plan import Plan, make_plan
from pretrain.plan_warnings import warnings_about
from pretrain.planner.model_size import ModelSize
from pretrain.processes.agreement import Refused, known_to_all, require_agreement
from pretrain.processes.code_version import describe_code
from pretrain.processes.heartbeat import Heartbeat
from pretrain.processes.out_of_memory import out_of_memory_explained
from pretrain.processes.outcome import (
    UNSTARTED,
    is_full_disk,
    refuse,
    refuse_with_others,
    report_failure,
    say_stopped_at_start,
    write_outcome,
)
from pretrain.processes.recovery import Recovery, wait_at_gate
from pretrain.processes.shared_facts import shared_by_all
from pretrain.processes.shared_folder import require_shared_folder
from pretrain.processes.start_facts import tell_launcher
from pretrain.processes.stop import StopSignals, defer_together, let_signals_through
from pretrain.schedule.phase_table import describe, describe_place
from pretrain.schedule.phases import Phase, phase_at
from pretrain.state import build_state, compute_dtype
from pretrain.training_loop import TrainingLoop

# ---------------------------------------------------------------- the process


def main(argv: list[str] | None = None) -> int:
    """Run the trainer in this process -> its exit code.

    0 for an end that the launcher reads from the outcome file, 2 for bad input without a launcher.
    """
    arguments = spell(sys.argv[1:] if argv is None else argv)
    tell_launcher(arguments)
    recovery = wait_at_gate()
    signals = StopSignals()
    try:
        return _main(arguments, signals, recovery)
    finally:
        signals.close()


def _main(argv: list[str], signals: StopSignals, recovery: Recovery) -> int:
    heartbeat = Heartbeat.of_this_process()
    # Everything that this process can check alone, before it waits for others.
    only_print = "--print-config" in argv
    try:
        config = load_config([arg for arg in argv if arg != "--print-config"])
        heartbeat.set_limits(
            config.layout.watchdog_seconds, config.layout.distributed_timeout_minutes
        )
        heartbeat.enter_plan()
        if config.checkpoint.exit_signal_handler and not only_print:
            signals.listen(before_end=say_stopped_at_start)
        else:
            let_signals_through()
        plan = make_plan(config, launched_world_size(), only_print=only_print)
        if only_print:
            _print_config(plan)
            return 0
    except (ValueError, OSError) as error:
        if only_print or launched_on_one_machine():
            return refuse(error)
        return refuse_with_others(error)

    # The processes meet, train, and part.
    heartbeat.enter_slow("joining the other processes")
    try:
        world = start_world(config.layout)
    except (ValueError, OSError) as error:
        return refuse(error)
    recovery.mark("plan")
    trainer = Trainer(plan, world, signals, heartbeat, recovery)
    try:
        outcome = trainer.run()
    except Refused as error:
        return refuse(error, "all ranks")
    except ValueError as error:
        return refuse(error, "this rank" if trainer.in_steps else "this machine")
    except Exception as error:
        if is_full_disk(error):  # another try would fill it, too
            return refuse(error, "this rank")
        raise
    finally:
        end_world()
    if launched_local_rank() == 0:
        write_outcome(outcome)
    return 0


def _print_config(plan: Plan) -> None:
    if launched_rank() != 0:
        return
    for text in warnings_about(plan):
        warn(text)
    print(dump_yaml(plan.config), end="")


# ---------------------------------------------------------------- the run


class Trainer:
    """One process's part of a run on one layout."""

    def __init__(
        self,
        plan: Plan,
        world: World,
        signals: StopSignals | None = None,
        heartbeat: Heartbeat | None = None,
        recovery: Recovery | None = None,
    ):
        self.plan = plan
        self.config = plan.config
        self.world = world
        self.signals = signals or StopSignals()
        self.heartbeat = heartbeat or Heartbeat()
        self.recovery = recovery or Recovery()
        self.started = time.monotonic()
        self.evaluation_due: str | None = None
        """The phase of an evaluation that a stop cut short or left out; the next start makes up for
        it."""
        self.code = ""
        """Which code trains; known on rank 0 only."""
        self.in_steps = False
        """From now on an error may be this rank's alone."""

    def run(self) -> str:
        """Train until done, or until the layout must change or someone stops us -> the outcome."""
        self.heartbeat.listen(self.world.axis)
        try:
            return self._run()
        finally:
            self.heartbeat.enter_slow("ending")
            self.heartbeat.close()

    def _run(self) -> str:
        self.heartbeat.enter_slow("comparing what the ranks are to do")
        # Each process planned alone: do all of them mean the same run?
        require_agreement(shared_by_all(self.plan), self.world.axis)
        phase = self._first_phase()
        self._print_plan(phase)
        if phase is None:
            self._require_success()
            if self.world.rank == 0:
                step = self.plan.resumed.step if self.plan.resumed else 0
                text = f"done: all {step:,} steps are trained; raise the tokens to go on"
                print(text, flush=True)
            return "done"

        # From here on the processes have groups, the folder is ours, and memory is allocated.
        self.heartbeat.enter_slow("making the groups")
        self.layout = build_layout(phase.layout, self.world)
        self.heartbeat.name_axes(self.layout)
        lock = self._lock_save_folder()
        self.recovery.mark("groups")
        try:
            self.loop = self._prepare(phase)
        except DamagedCheckpoint as damage:
            # Every rank has heard of it. The plan follows from this checkpoint: make another.
            with known_to_all():
                fall_back(damage, self.plan.start, self.layout.world)
            if lock is not None:
                lock.release()
            return "again"
        self.recovery.mark("state")
        try:
            # Until here a signal ends the process at once; from here on ranks stop together.
            if self.config.checkpoint.exit_signal_handler:
                if not defer_together(self.signals, self.layout.world):
                    self.loop.end("stopped", "stopped before the first step")
                    return UNSTARTED
            self.in_steps = True
            return self.loop.run(phase)
        except Exception as error:
            # What follows may have to wait for ranks that are gone.
            report_failure(error, self.loop.state.step)
            raise
        finally:
            gc.unfreeze()
            self.loop.profiler.close()
            write_memory_snapshot(self.config, self.world.rank, is_out_of_memory=False)
            self.loop.saver.close(finish=False)
            self.loop.reporter.close()
            if lock is not None:
                lock.release()

    def _require_success(self) -> None:
        """Raise Refused where there is nothing left to train and the last phase came to nothing."""
        resumed = self.plan.resumed
        if resumed is None:
            return
        tally = StepTally.resume(resumed)
        failure = tally.failure_of_phase(resumed.phase_name, resumed.skipped_in_a_row)
        if failure:
            raise Refused(f"step {resumed.step:,}: {failure}")

    def _first_phase(self) -> Phase | None:
        """Choose the phase that runs first, None = all is done.

        It is the one at the clock, or one that is over but for an evaluation that a stop cut short.
        """
        resumed = self.plan.resumed
        if resumed is None:
            return phase_at(self.plan.phases, 0)
        # The evaluation comes before anything else, in the phase that it belongs to.
        due = resumed.evaluation_due
        begun = {phase.name: phase for phase in self.plan.phases if phase.start < resumed.clock}
        if due is not None and due not in begun and self.world.rank == 0:
            warn(
                "the evaluation that a stop cut short is left out: no phase that has begun is "
                f"called {due} any more"
            )
        if due is not None and due in begun:
            self.evaluation_due = due
            return begun[due]
        return phase_at(self.plan.phases, resumed.clock)

    def _print_plan(self, phase: Phase | None) -> None:
        """Print everything that was decided before the processes met, on rank 0."""
        if self.world.rank != 0:
            return
        plan = self.plan
        if plan.start.is_restart and plan.resumed and phase is not None and not plan.changes:
            # The first start has printed the plan, which is the same.
            resumed = plan.resumed
            lines = [describe_place(plan.phases, phase, resumed.clock, resumed.step)]
        else:
            lines = self._plan_lines(phase)
        print("\n".join(lines), flush=True)
        for text in warnings_about(plan):
            warn(text)
        self.code = describe_code()
        print(f"code: {self.code}", flush=True)

    def _plan_lines(self, phase: Phase | None) -> list[str]:
        """Return the plan as tables and lines."""
        plan = self.plan
        lines = [describe(plan.phases, self.world.size), *plan.layout_lines, *plan.memory.lines]
        lines += plan.disk.lines
        if plan.changes:
            lines.append(describe_changes(plan.changes))
        if phase is not None:
            lines.append(describe_forecast(plan.forecast))
        return lines

    def _lock_save_folder(self) -> FolderLock | None:
        """Keep other runs out of --save; None without it. Collective."""
        root = self.config.checkpoint.save
        if root is None:
            return None
        with known_to_all():
            lock = FolderLock(root, self.layout.world)
            require_shared_folder(root, self.layout.world)
        # The plan was made before the lock was taken.
        start = self.plan.start
        planned = start.folder if start.is_restart else None
        if not same_start_on_all_ranks(root, planned, self.layout.world, self.plan.rewinds):
            raise RuntimeError(
                f"{root} got another checkpoint, or a rewind, while this run was starting; "
                "starting again picks it up"
            )
        mend_save_folder(start, self.layout.world)
        return lock

    def _prepare(self, phase: Phase) -> TrainingLoop:
        """Build or load the state, and what trains it."""
        self.heartbeat.enter_slow("building or loading the state")
        plan = self.plan
        config = self.config
        dtype = compute_dtype(config.optimizer)
        begin_memory_history(config, self.layout)
        with out_of_memory_explained(phase, plan, self.world.rank, self.world.size):
            attend, attention = attention_of_run(config, plan.phases, phase, self.layout, dtype)
            is_emulated = config.optimizer.bf16 and not has_bf16_units(self.layout.device)
            if is_emulated and self.world.rank == 0:
                warn(
                    "bf16 = True: this CPU has no bf16 units and emulates them many times slower. "
                    "Fix: --no-bf16"
                )
            state = build_state(plan, phase, self.layout, attend)
        # Files, wandb and TensorBoard are open only now: what fails before leaves no trace there.
        reporter = Reporter(config, state.step, state.wandb_run_id, is_writer=self.world.rank == 0)
        state.wandb_run_id = reporter.wandb_run_id
        loop = TrainingLoop(
            plan,
            self.layout,
            state,
            reporter,
            self.signals,
            self.heartbeat,
            evaluation_due=self.evaluation_due,
            started=self.started,
            recovery=self.recovery,
        )
        self._report_start(loop, phase, attention)
        return loop

    def _report_start(self, loop: TrainingLoop, phase: Phase, attention: str) -> None:
        start = self.plan.start
        layout = self.layout.describe()
        parameters = ModelSize(self.config.model, self.plan.vocab_size).num_parameters
        loop.reporter.say(
            f"start: {start.reason}, step {loop.state.step:,}, phase {phase.name}, {layout}, "
            f"{parameters:,} parameters; {attention}; {compiled.describe(self.layout.device)}"
        )
        if self.world.rank == 0 and self.config.checkpoint.save:
            self._facts(layout).write(Path(self.config.checkpoint.save))
        loop.report("restart" if start.is_restart else "start", f"{start.reason}; {layout}")

    def _facts(self, layout: str) -> RunFacts:
        """Describe this start for those who look at the run from outside."""
        name, _ = device_here()
        phases = [
            PhaseFacts(phase.name, phase.seq_length, phase.start, phase.end)
            for phase in self.plan.phases
        ]
        return RunFacts(
            time=time.time(),
            host=socket.gethostname(),
            pid=os.getpid(),
            records=record_folder(),
            device=describe_cpu() if name == "cpu" else name,
            world_size=self.world.size,
            machines=-(-self.world.size // launched_local_world_size()),
            layout=layout,
            code=self.code,
            torch=torch.__version__,
            phases=phases,
            settings=dump_yaml(self.config),
        )


if __name__ == "__main__":
    # Who asks a question may read the first lines only (`--help | head`).
    if {"-h", "--help", "--print-config", "--print_config"} & set(sys.argv):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
