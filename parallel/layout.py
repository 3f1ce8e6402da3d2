"""Who talks to whom: the process axes tp, cp, dp, pp, made once from Megatron-Core's groups.

This is the only file that imports megatron, the only one that reads the launcher's environment and
the only one that chooses the device. Rank order is Megatron's (tp fastest, then cp, dp, pp):

    rank = tp + TP * (cp + CP * (dp + DP * pp))
"""

import functools
import importlib.util
import os
import resource
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from parallel.config import LayoutConfig, check_world_size, token_multiple
from parallel.schedule import SCHEDULES, ScheduleName, stages_of_rank

HOST_AXIS_TIMEOUT = timedelta(hours=1)
"""What others wait for a rank that writes to a slow disk; one that died is noticed at once."""


@dataclass(frozen=True)
class Axis:
    """One process axis as this rank sees it. Size 1 means that its collectives do nothing."""

    name: str
    rank: int
    size: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None
    """None only on the axes of size 1 of `single_process_layout`."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1


@dataclass(frozen=True)
class World:
    """The launched processes, before any axis is laid over them."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def axis(self) -> Axis:
        """All processes, for what is exchanged before there is a layout."""
        group = dist.group.WORLD
        assert group is not None, "start_world was called"
        return _axis("world", group)


@dataclass(frozen=True)
class Layout:
    """Every axis of this rank.

    `dp_cp` shards parameters, `dp_cp_tp` has all parts of each, `world` sums what is summed once
    over everything.
    """

    world: Axis
    tp: Axis
    pp: Axis
    dp: Axis
    cp: Axis
    cp_a2a: Axis
    """The cp ranks that trade tokens for heads: all, or with two levels a group of neighbours."""
    cp_gather: Axis
    """The cp ranks that gather keys and values: with two levels one of each group, else itself."""
    dp_cp: Axis
    dp_cp_tp: Axis
    """All ranks of this rank's pipeline stages, those of tp next to each other."""
    embedding: Axis
    """The two ranks that hold a tied embedding's copies.

    Its size is 1 where both copies are on one rank, or this rank has none."""
    schedule: ScheduleName
    stages: tuple[int, ...]
    """Numbers of this rank's pipeline stages, first to last."""
    num_stages: int
    sequence_parallel: bool
    """Are activations between the tensor-parallel parts split over tp by tokens (Megatron-SP)?"""
    mesh: DeviceMesh | None
    """[dp_cp, tp] of this pipeline stage; parameters are DTensors on it, on [dp_cp] if tp is 1."""
    device: torch.device

    @property
    def token_multiple(self) -> int:
        """A number that must divide a microbatch's tokens, so that all ranks get equally many."""
        over_tp = self.tp.size if self.sequence_parallel else 1
        return token_multiple(self.cp.size, self.cp_gather.size, over_tp)

    def describe(self) -> str:
        """Write the sizes of the axes in one line, and of each what is not the default."""
        tp_note = " (sequence parallel)" if self.sequence_parallel else ""
        pp_note = f" ({self.schedule}, {self.num_stages} stages)" if self.pp.size > 1 else ""
        cp_note = ""
        if self.cp_gather.size > 1:
            cp_note = f" ({self.cp_a2a.size} a2a x {self.cp_gather.size} gather)"
        return (
            f"tp {self.tp.size}{tp_note} x pp {self.pp.size}{pp_note} x "
            f"cp {self.cp.size}{cp_note} x dp {self.dp.size} on {self.device.type}"
        )


def launched_world_size() -> int:
    """Read how many processes the launcher started (WORLD_SIZE); 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """Read this process's rank among them, before anything is initialised."""
    return int(os.environ.get("RANK", "0"))


def launched_local_rank() -> int:
    """Read this process's rank on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def launched_local_world_size() -> int:
    """Read how many processes the launcher started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def launched_on_one_machine() -> bool:
    """Did the launcher start all processes here?"""
    return launched_local_world_size() == launched_world_size()


def record_folder() -> str | None:
    """Read in which folder the launcher looks for the ranks' records; None = it does not."""
    return os.environ.get("ITHACA_RECORDS")


def environment_of_numbers() -> dict[str, str]:
    """Read the variables that change what a GPU computes, also where they are not set."""
    names = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG")
    return {name: os.environ.get(name, "not set") for name in names}


def host_memory() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process may still take of its device's memory.

    On CPUs they are an equal share of what the machine can give away.
    """
    if device.type == "cuda":
        # What torch keeps for later tensors is free for them.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    with open("/proc/meminfo", encoding="ascii") as file:
        sizes = dict(line.split(":", 1) for line in file)
    kibibytes = int(sizes["MemAvailable"].split()[0])
    return kibibytes * 1024 // launched_local_world_size()


def device_here() -> tuple[str, int]:
    """Return the name and the bytes of memory of this process's device.

    On CPUs these are "cpu" and an equal share of the machine's memory. Readable before anything is
    initialised, and the same for all processes of a machine.
    """
    # A GPU is this process's own; a machine's memory is shared by its processes.
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(launched_local_rank())
        return properties.name, properties.total_memory
    return "cpu", host_memory() // launched_local_world_size()


def choose_device() -> torch.device:
    """Choose where this process's tensors live: on its GPU where the machine has them.

    This is the one place where the device is chosen.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", launched_local_rank())
    return torch.device("cpu")


def is_launched() -> bool:
    """Tell whether a launcher started this process and its peers."""
    return "RANK" in os.environ


def has_bf16_units(device: torch.device) -> bool:
    """Tell whether the device multiplies bf16 in hardware; else bf16 is slower than fp32."""
    if device.type != "cpu":
        return True
    known = torch.cpu.get_capabilities()
    return bool(known.get("amx_bf16") or known.get("avx512_bf16"))


def start_world(
    config: LayoutConfig,
    store: dist.Store | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> World:
    """Join the other processes; call once per process, before `build_layout`.

    Rank and size come from torchrun's environment unless given with a `store` (worker pools that
    form several worlds one after the other).
    """
    local_rank = launched_local_rank()
    device = choose_device()
    # gloo for CPU tensors also on GPUs: asynchronous saves need it.
    has_cuda = device.type == "cuda"
    if config.distributed_backend not in ("auto", "nccl" if has_cuda else "gloo"):
        raise ValueError(
            f"distributed_backend = {config.distributed_backend}: this machine's tensors live on "
            f"{device.type}. Fix: leave it at auto."
        )
    if has_cuda:
        torch.cuda.set_device(device)
    options = {
        "backend": "cpu:gloo,cuda:nccl" if has_cuda else "cpu:gloo",
        "timeout": timedelta(minutes=config.distributed_timeout_minutes),
    }
    _raise_open_files_limit()
    # A store of the caller's, torchrun's environment, or a world of one process.
    if store is not None:
        assert rank is not None and world_size is not None
        dist.init_process_group(store=store, rank=rank, world_size=world_size, **options)
    elif is_launched():
        dist.init_process_group(**options)
    else:
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1, **options)
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device)


def start_world_on_meta(rank: int, world_size: int) -> World:
    """Be one rank of a world of which no other process exists.

    Tensors live on device meta, where they have shapes and no memory, and collectives of torch's
    backend "fake" send nothing. `build_layout` makes the same groups as in a real world.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    backend = "cpu:fake,meta:fake"
    dist.init_process_group(backend, store=FakeStore(), rank=rank, world_size=world_size)
    return World(rank, world_size, 0, torch.device("meta"))


def _raise_open_files_limit() -> None:
    """Allow as many open files as the system does.

    gloo opens a socket to every peer of every group: at 1,024 ranks more than a shell's usual 1,024
    files.
    """
    # The hard limit is the system's; a process may raise the soft one up to it.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def build_layout(config: LayoutConfig, world: World) -> Layout:
    """Make every group once.

    All processes must ask for the same, since groups of different layouts would wait for each
    other forever (pretrain/processes/agreement.py compares them before).

    Raises:
        ValueError: the world size is no multiple of tp x pp x cp.
    """
    assert not config.combination_problems(), "phases are checked before a layout is built"
    # What the sizes leave of the world is data parallel.
    tp, pp, cp = config.sizes
    problem = check_world_size(world.size, tp, pp, cp)
    if problem:
        raise ValueError(problem)
    # Megatron-Core makes the groups; each becomes an axis.
    two_levels = config.context_levels[1] > 1
    parallel_state = import_parallel_state()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        hierarchical_context_parallel_sizes=list(config.context_levels) if two_levels else None,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=config.distributed_timeout_minutes,
    )

    dp_cp = _axis("dp_cp", parallel_state.get_data_parallel_group(with_context_parallel=True))
    tp_axis = _axis("tp", parallel_state.get_tensor_model_parallel_group())
    pp_axis = _axis("pp", parallel_state.get_pipeline_model_parallel_group())
    cp_axis = _axis("cp", parallel_state.get_context_parallel_group())
    # One level: all cp ranks trade tokens for heads, and nobody gathers.
    cp_a2a = cp_axis
    cp_gather = Axis("cp_gather", 0, 1, (world.rank,), cp_axis.group)
    if two_levels:
        inner, outer = parallel_state.get_hierarchical_context_parallel_groups()
        cp_a2a = _axis("cp_a2a", inner)
        cp_gather = _axis("cp_gather", outer)
    stages: tuple[int, ...] = (0,)
    if pp > 1:
        stages = stages_of_rank(config.schedule, pp_axis.rank, pp, config.stages_per_rank)
    return Layout(
        world=world.axis,
        tp=tp_axis,
        pp=pp_axis,
        dp=_axis("dp", parallel_state.get_data_parallel_group()),
        cp=cp_axis,
        cp_a2a=cp_a2a,
        cp_gather=cp_gather,
        dp_cp=dp_cp,
        dp_cp_tp=_axis(
            "dp_cp_tp",
            parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
        ),
        embedding=_embedding_axis(pp_axis, config.schedule),
        schedule=config.schedule,
        stages=stages,
        num_stages=pp * len(stages),
        sequence_parallel=config.sequence_parallel and tp > 1,
        mesh=_mesh_of_stage(world, dp_cp, tp_axis, pp_axis),
        device=world.device,
    )


def _mesh_of_stage(world: World, dp_cp: Axis, tp: Axis, pp: Axis) -> DeviceMesh:
    """Make the [dp_cp, tp] mesh of this pipeline stage's ranks: tp is the fastest index."""
    assert dp_cp.group is not None and tp.group is not None
    # pp is the slowest index of the rank order: a stage's ranks are neighbours.
    ranks_per_stage = world.size // pp.size
    first_rank = pp.rank * ranks_per_stage
    ranks = first_rank + torch.arange(ranks_per_stage, device="cpu")
    # Device meta has no meshes of its own.
    device_type = "cpu" if world.device.type == "meta" else world.device.type
    return DeviceMesh.from_group(
        [dp_cp.group, tp.group],
        device_type,
        mesh=ranks.view(dp_cp.size, tp.size),
        mesh_dim_names=("dp_cp", "tp"),
    )


def add_host_axis(name: str) -> Axis:
    """Make one more group of all processes, over gloo; collective.

    Its collectives are of tensors in the host's memory, and may run in a thread of their own beside
    those of training. `drop_axis` leaves it.
    """
    group = dist.new_group(backend="gloo", timeout=HOST_AXIS_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup), "all processes are in it"
    return _axis(name, group)


def drop_axis(axis: Axis) -> None:
    """Leave the group of an axis that `add_host_axis` made."""
    dist.destroy_process_group(axis.group)


def single_process_layout(device: torch.device) -> Layout:
    """Make a layout of one process without any process group.

    Tools that read or run a model by themselves use it.
    """
    # Every axis is of size 1, so that no collective looks at its group.
    levels = ("cp_a2a", "cp_gather")
    joined = ("world", "dp_cp", "dp_cp_tp", "embedding")
    names = ("tp", "pp", "dp", "cp", *levels, *joined)
    return Layout(
        **{name: Axis(name, 0, 1, (0,), None) for name in names},
        schedule="1F1B",
        stages=(0,),
        num_stages=1,
        sequence_parallel=False,
        mesh=None,
        device=device,
    )


def end_world() -> None:
    """Leave every group; without this gloo aborts the process at exit."""
    import_parallel_state().destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@functools.cache
def import_parallel_state() -> ModuleType:
    """Import Megatron-Core's groups when they are needed: tools of one process need no megatron.

    Only this module of it is imported. The package's own __init__ imports all of Megatron-Core, and
    with it torch's compiler and wandb: two seconds in every process of a run.
    """
    name = "megatron.core"
    is_imported = name in sys.modules
    if not is_imported:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with warnings.catch_warnings():
            # It warns of missing packages (fused optimizers, norms) that are not used here.
            warnings.simplefilter("ignore")
            from megatron.core import parallel_state
    finally:
        # Whoever imports the package itself gets all of it.
        if not is_imported:
            del sys.modules[name]
    return parallel_state


def _axis(name: str, group: dist.ProcessGroup) -> Axis:
    return Axis(
        name,
        dist.get_rank(group),
        dist.get_world_size(group),
        tuple(dist.get_process_group_ranks(group)),
        group,
    )


def _embedding_axis(pp: Axis, schedule: ScheduleName) -> Axis:
    """Take Megatron-Core's group of the first and the last pipeline rank.

    They hold the first and the last stage, but under a V-shaped schedule.
    """
    holds_an_end = pp.size > 1 and (pp.is_first or pp.is_last)
    if holds_an_end and not SCHEDULES[schedule].is_v_shaped:
        return _axis("embedding", import_parallel_state().get_embedding_group())
    return Axis("embedding", 0, 1, (dist.get_rank(),), pp.group)
