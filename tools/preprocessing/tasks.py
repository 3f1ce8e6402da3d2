"""How the input is cut into tasks, and how workers encode them, in order and in bounded memory."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

from tools.preprocessing.encoders import Job, Result, Task, build_encoder, start_pool
from tools.preprocessing.read_ahead import Producer, read_ahead
from tools.preprocessing.text_files import Piece, is_stream, read_pieces

TASK_BYTES = 1 << 20
"""Input of one task: large enough to hide the hand-over, small enough to keep all workers busy."""
MOST_PIECES = 256
"""Pieces of one task: small files are taken together, but not without end."""
TASKS_IN_FLIGHT = 4
"""Tasks per worker; bounds the memory, since results are written in order."""
MOST_READERS = 8
"""Threads that decompress, for as many files."""


def cut_into_tasks(
    files: list[Path], key: str, workers: int, start: tuple[int, int]
) -> Iterator[Task]:
    """Cut the files into tasks of about TASK_BYTES, in input order.

    Args:
        key: the key of the text in JSON objects, or a table's column.
        start: the `next` of the last task that is done, (0, 0) for none.
    """
    producers = (
        Producer(
            number,
            partial(read_pieces, files[number], TASK_BYTES, key),
            in_thread=is_stream(files[number]),
        )
        for number in range(start[0], len(files))
    )
    pieces: list[Piece] = []
    work = 0
    place = (start[0], 0)
    for number, piece in read_ahead(producers, min(workers, MOST_READERS)):
        # Count pieces within a file, and pass over those that an earlier run has done.
        place = (number, place[1] + 1 if number == place[0] else 1)
        if place <= start:
            continue
        pieces.append(piece)
        work += piece.work
        if len(pieces) >= MOST_PIECES or work >= TASK_BYTES:
            yield Task(pieces, place)
            pieces = []
            work = 0
    if pieces:
        yield Task(pieces, (len(files), 0))


def encode_tasks(job: Job, workers: int, tasks: Iterable[Task]) -> Iterator[tuple[Task, Result]]:
    """Encode tasks -> each with its result, in their order.

    Raises:
        ValueError: a document that cannot be encoded, or a worker that died.
    """
    # One worker is this process itself.
    if workers == 1:
        encoder = build_encoder(job)
        for task in tasks:
            yield task, encoder.encode(task)
        return
    pool, encode = start_pool(job, workers)
    with pool:
        waiting: deque = deque()
        try:
            for task in tasks:
                waiting.append((task, pool.submit(encode, task)))
                # Results wait here for their turn: no more of them than this are held.
                if len(waiting) >= TASKS_IN_FLIGHT * workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        # The system ends a process that takes too much memory, without a word.
        except BrokenProcessPool:
            raise ValueError(
                f"workers = {workers}: a worker died, most likely for want of memory. Fix: "
                "fewer --workers, or smaller input files."
            ) from None
        finally:
            for _, future in waiting:
                future.cancel()
