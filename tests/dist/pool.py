"""Worker processes for tests, started once per session and reused: importing torch and megatron
takes seconds.

`pool.run(function, world_size, *args)` calls a module-level function on every rank of a fresh world
and returns the ranks' results in order. A failing rank fails the call with its traceback and the
workers are replaced.
"""

import multiprocessing
import os
import traceback
from multiprocessing.connection import Connection, wait


def _serve(connection: Connection, rank: int, port: int) -> None:
    import faulthandler
    import gc

    import torch
    import torch.distributed as dist
    from torch.distributed.tensor._collective_utils import MeshTopoInfo
    from torch.distributed.tensor._redistribute import (
        _gen_transform_infos,
        clear_redistribute_planner_cache,
    )
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    from parallel.config import LayoutConfig
    from parallel.layout import end_world, start_world

    faulthandler.enable()  # a crash leaves its stack on stderr
    torch.set_num_threads(1)
    # What is imported stays: no collection of garbage has to walk over it.
    gc.freeze()
    # A file as the store would cost each group some hundredths of a second of waiting.
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        function, world_size, name, args = job
        try:
            os.environ["LOCAL_RANK"] = str(rank)
            world = start_world(
                LayoutConfig(distributed_timeout_minutes=10),
                dist.PrefixStore(name, store),
                rank,
                world_size,
            )
            try:
                result = function(world, *args)
            finally:
                gc.collect()  # modules hold each other, and the groups with them
                end_world()
                # DTensor caches specs by equal meshes; those of the ended world name groups that
                # are gone.
                _clear_sharding_prop_cache()
                _gen_transform_infos.cache_clear()
                MeshTopoInfo.build_from_mesh.cache_clear()
                clear_redistribute_planner_cache()
                # What was in a circle with them goes now: what is frozen is never collected, and
                # each group that stays keeps threads that wake up a hundred times a second.
                gc.collect()
                # What the job was the first to import stays as well: to walk over all of it takes
                # longer than a step of a small model.
                gc.freeze()
            connection.send((True, result))
        except BaseException:
            connection.send((False, traceback.format_exc()))


class WorkerPool:
    """Up to eight workers, one thread each."""

    def __init__(self):
        import torch.distributed as dist

        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.dist.preloaded"])
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.workers: list[tuple] = []
        self.jobs = 0

    def _grow(self, size: int) -> None:
        while len(self.workers) < size:
            ours, theirs = self.context.Pipe()
            process = self.context.Process(
                target=_serve, args=(theirs, len(self.workers), self.store.port), daemon=True
            )
            process.start()
            theirs.close()
            self.workers.append((process, ours))

    def run(self, function, world_size: int, *args, timeout: float = 900.0) -> list:
        """Results by rank. Raises AssertionError with the first failing rank's traceback."""
        self._grow(world_size)
        self.jobs += 1
        pending = {}
        for rank in range(world_size):
            connection = self.workers[rank][1]
            connection.send((function, world_size, f"job{self.jobs}", args))
            pending[connection] = rank
        results = [None] * world_size
        while pending:
            ready = wait(list(pending), timeout)
            if not ready:
                self.close_workers()
                raise AssertionError(
                    f"ranks {sorted(pending.values())} did not answer in {timeout:.0f} s"
                )
            for connection in ready:
                rank = pending.pop(connection)
                try:
                    succeeded, results[rank] = connection.recv()
                except (EOFError, ConnectionResetError):
                    process = self.workers[rank][0]
                    process.join()
                    succeeded = False
                    results[rank] = f"the process died with exit code {process.exitcode}"
                if not succeeded:
                    self.close_workers()
                    raise AssertionError(f"rank {rank} of {world_size} failed:\n{results[rank]}")
        return results

    def close_workers(self) -> None:
        for process, connection in self.workers:
            connection.close()
            process.kill()
            process.join()
        self.workers.clear()

    def close(self) -> None:
        self.close_workers()
        del self.store
