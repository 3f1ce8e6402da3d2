"""Commands whose model may take several processes: started here by torch's own launcher.

With tensor or context parallelism above 1, the command starts that many processes on this machine
and waits for them; under torchrun it is one of those that were started. Rank 0 alone prints. The
first rank that fails ends all of them, and its message is the command's.
"""

import contextlib
import logging
import os
import signal
import sys
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import (
    ChildFailedError,
    ProcessFailure,
    get_error_handler,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from data.stream import usable_cores
from parallel.config import CommType, LayoutConfig
from parallel.layout import (
    Layout,
    build_layout,
    choose_device,
    end_world,
    is_launched,
    launched_local_world_size,
    launched_rank,
    launched_world_size,
    single_process_layout,
    start_world,
)
from tools.shared.door import READER_GONE, run_door

BAD_INPUT = ("ValueError: ", "OSError: ", "FileNotFoundError: ", "PermissionError: ")
"""Beginnings of messages that are for the user as they are; others come with a traceback."""
SIGNALLED = 128
"""Added to the number of a signal, this is the exit code of what it ended."""


@dataclass(kw_only=True)
class ProcessArguments:
    """Holds how many processes share the model: settings of every command that runs one."""

    tensor_model_parallel_size: int = 1
    """Processes that split every weight matrix and the heads (tp)."""
    context_parallel_size: int = 1
    """Processes that split the tokens of a prompt or document (cp)."""
    cp_comm_type: CommType = "a2a"
    """a2a, or with more of them than heads a2a+allgather."""
    hierarchical_context_parallel_sizes: list[int] = field(default_factory=list)
    """For a2a+allgather: processes of an all-to-all group, and number of groups."""
    pipeline_model_parallel_size: int = 1
    """1 only: checkpoints of pipelines load, but the layers are not split here."""

    def layout_config(self) -> LayoutConfig:
        """Return the layout that these settings mean.

        Raises:
            ValueError: settings that no layout can have, a line each.
        """
        sizes = {
            "tensor_model_parallel_size": self.tensor_model_parallel_size,
            "context_parallel_size": self.context_parallel_size,
        }
        problems = [
            f"{name} = {size}: must be at least 1. Fix: give a positive number."
            for name, size in sizes.items()
            if size < 1
        ]
        if self.pipeline_model_parallel_size != 1:
            problems.append(
                f"pipeline_model_parallel_size = {self.pipeline_model_parallel_size}: a token "
                "passes through all layers before the next one, so that stages would wait for "
                "each other. Fix: leave it out (a checkpoint of any pipeline loads), and raise "
                "--tensor-model-parallel-size."
            )
        if problems:
            raise ValueError("\n".join(problems))
        config = LayoutConfig(
            **sizes,
            cp_comm_type=self.cp_comm_type,
            hierarchical_context_parallel_sizes=self.hierarchical_context_parallel_sizes,
        )
        problems = config.combination_problems()
        if problems:
            raise ValueError("\n".join(problems))
        return config


Arguments = TypeVar("Arguments", bound=ProcessArguments)
Found = TypeVar("Found")


def run_door_on_processes(
    kind: type[Arguments],
    act: Callable[[Arguments, Layout], int | None],
    *,
    check: Callable[[Arguments], None],
    name: str,
    description: str | None,
    argv: Sequence[str] | None = None,
) -> int:
    """Do what `run_door` does, for a command whose model may take several processes.

    Args:
        act: does the work of one process; every process gets the same arguments.
        check: refuses bad arguments before any process is started.
        name: the command's module, by which it is started again.
    """
    words = list(sys.argv[1:] if argv is None else argv)

    def start(arguments: Arguments) -> int | None:
        config = arguments.layout_config()
        check(arguments)
        if is_launched():
            return _act_as_rank(arguments, config, act)
        count = config.tensor_model_parallel_size * config.context_parallel_size
        if count == 1:
            return act(arguments, single_process_layout(choose_device()))
        return _start_processes(name, words, count)

    return run_door(kind, start, name=name, description=description, argv=words)


# ---------------------------------------------------------------- the process that starts others


def _start_processes(module: str, words: list[str], count: int) -> int:
    """Run the command again in `count` processes -> the exit code.

    Raises:
        ValueError: a process refused its input; its message.
    """
    if torch.cuda.is_available() and count > torch.cuda.device_count():
        raise ValueError(
            f"tensor_model_parallel_size x context_parallel_size = {count}: this machine has "
            f"{torch.cuda.device_count()} GPUs, one for each process. Fix: smaller sizes."
        )
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    # As training sets it: torch's C++ warns of groups that it made itself.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # The launcher reports each process that ends; what went wrong is said once, below.
    logging.disable(logging.CRITICAL)
    try:
        elastic_launch(config, sys.executable)("-m", module, *words)
    except ChildFailedError as error:
        return _tell(list(error.failures.values()))
    except SignalException as stop:
        return SIGNALLED + int(stop.sigval)
    finally:
        logging.disable(logging.NOTSET)
    return 0


def _tell(failures: list[ProcessFailure]) -> int:
    """Say why the processes failed -> the exit code.

    Raises:
        ValueError: what the user can mend; it is said as every command says it.
    """
    if any(failure.exitcode == READER_GONE for failure in failures):
        return READER_GONE
    # When one has failed, the others lose their peer: its message is the one that explains.
    for failure in failures:
        text = _message_of(failure)
        for beginning in BAD_INPUT:
            if text.startswith(beginning):
                raise ValueError(text.removeprefix(beginning))
    # A process that was killed cannot say so. With SIGTERM the launcher ends those that are left.
    first = min(
        failures,
        key=lambda each: (
            each.exitcode == -signal.SIGTERM,
            each.exitcode >= 0,
            each.timestamp,
        ),
    )
    trace = ""
    if isinstance(first.message, dict):
        trace = first.message.get("extraInfo", {}).get("py_callstack", "")
    print(f"{trace}error: rank {first.local_rank}: {_message_of(first)}", file=sys.stderr)
    return SIGNALLED - first.exitcode if first.exitcode < 0 else 1


def _message_of(failure: ProcessFailure) -> str:
    """Return what a process said of its end."""
    message: Any = failure.message
    return str(message.get("message", message) if isinstance(message, dict) else message)


# ---------------------------------------------------------------- one of the processes


def _act_as_rank(
    arguments: Arguments,
    config: LayoutConfig,
    act: Callable[[Arguments, Layout], int | None],
) -> int | None:
    """Join the other processes and act; on an error end this process, and so all of them."""
    count = config.tensor_model_parallel_size * config.context_parallel_size
    # Without a limit each process would take all cores.
    torch.set_num_threads(max(1, usable_cores() // launched_local_world_size()))
    # Names that newer releases of torch have for its collectives are no concern of the user.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed")
    with contextlib.ExitStack() as stack:
        if launched_rank() != 0:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            if launched_world_size() != count:
                raise ValueError(
                    f"{launched_world_size()} processes: tensor_model_parallel_size x "
                    f"context_parallel_size = {count}. Fix: start {count} processes."
                )
            layout = build_layout(config, start_world(config))
            code = act(arguments, layout)
            sys.stdout.flush()
        except KeyboardInterrupt:
            os._exit(SIGNALLED + signal.SIGINT)
        except BrokenPipeError:
            # Whoever read the output has enough of it.
            os._exit(READER_GONE)
        except Exception as error:
            # Whoever started the processes reads it, ends the others and says it once. No group is
            # left in order: the others may be waiting in it.
            get_error_handler().record_exception(error)
            if not dist.is_torchelastic_launched():
                print(f"error: rank {launched_rank()}: {error}", file=sys.__stderr__)
            sys.stdout.flush()
            os._exit(2)
        end_world()
    return code


def tell_all(find: Callable[[], Found], layout: Layout) -> Found:
    """Let the first process find something, and give it to all; what it raises ends all of them."""
    if layout.world.size == 1:
        return find()
    box: list[Any] = [find() if layout.world.is_first else None]
    dist.broadcast_object_list(box, src=0, group=layout.world.group)
    return box[0]
