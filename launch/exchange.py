"""What the nodes' watchdogs tell each other, through the store of the meeting.

Nothing is exchanged while the run goes on, but a look of each node, once a second, whether node 0
has asked or anybody suspects. Node 0 asks in rounds; each node answers with what its ranks do.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed import TCPStore

from launch.rank_view import RankView
from launch.store import PREFIX

SILENT_NODE_SECONDS = 10.0
"""The seconds after a question from which on a node counts as silent."""
ASKED = f"{PREFIX}watchdog/asked"
SUSPECT = f"{PREFIX}watchdog/suspect"
VERDICT = f"{PREFIX}watchdog/verdict"


@dataclass
class Answers:
    """What node 0 knows of the other nodes."""

    views: list[RankView]
    missing: list[int]
    """Nodes that have not answered this question yet."""
    silent: list[int]
    """Those of them that had enough time."""


class Exchange:
    """Speaks with the watchdogs of the other nodes; with one node there is nobody to speak to."""

    def __init__(self, store: TCPStore | None, node_rank: int, nnodes: int):
        self.store = store
        self.node_rank = node_rank
        self.others = [node for node in range(nnodes) if node != node_rank] if store else []
        self._round = 0
        self._asked_at: float | None = None
        self._answered = 0

    # ------------------------------------------------------------ node 0

    def ask(self) -> Answers:
        """Ask all other nodes, and return what they have answered to this or the last question."""
        if self.store is None:
            return Answers([], [], [])
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            self._first_round = self._round + 1
            self._last_answer = dict.fromkeys(self.others, now)
        self._round += 1
        self.store.set(ASKED, str(self._round))
        views: list[RankView] = []
        missing = []
        for node in self.others:
            answer = self._read(_answer_of(node))
            if answer is None or answer["round"] < max(self._first_round, self._round - 3):
                missing.append(node)
                continue
            self._last_answer[node] = now
            views += [RankView.from_json(each) for each in answer["views"]]
        silent = [node for node in missing if now - self._last_answer[node] >= SILENT_NODE_SECONDS]
        return Answers(views, missing, silent)

    def rest(self) -> None:
        """Stop asking: the run goes on."""
        self._asked_at = None
        if self.store is not None and self.store.check([SUSPECT]):
            self.store.delete_key(SUSPECT)

    @property
    def others_suspect(self) -> bool:
        """Has another node seen a stopped rank?"""
        return self.store is not None and self.store.check([SUSPECT])

    def tell_verdict(self, lines: Sequence[str]) -> None:
        """Tell all nodes how it ends."""
        if self.store is not None:
            self.store.set(VERDICT, json.dumps(list(lines)))

    def collect_stacks(self, silent: Sequence[int], seconds: float) -> dict[int, str]:
        """Wait for the stacks of the nodes that answer -> rank: text."""
        limit = time.monotonic() + seconds
        waiting = set(self.others) - set(silent)
        stacks: dict[int, str] = {}
        while waiting and time.monotonic() < limit:
            for node in list(waiting):
                found = self._read(_stacks_of(node))
                if found is not None:
                    stacks |= {int(rank): text for rank, text in found.items()}
                    waiting.remove(node)
            time.sleep(0.1)
        return stacks

    # ------------------------------------------------------------ the other nodes

    def suspect(self) -> None:
        """Ask node 0 to look at all nodes."""
        if self.store is not None:
            self.store.set(SUSPECT, "1")

    def answer(self, views: Sequence[RankView]) -> None:
        """Answer node 0, if it has asked since the last time."""
        asked = self._read(ASKED)
        if self.store is None or asked is None or asked == self._answered:
            return
        self._answered = asked
        content = {"round": asked, "views": [view.to_json() for view in views]}
        self.store.set(_answer_of(self.node_rank), json.dumps(content))

    def heard_verdict(self) -> list[str] | None:
        """Return the verdict that node 0 has told; None while there is none."""
        return self._read(VERDICT)

    def send_stacks(self, stacks: dict[int, str]) -> None:
        """Send the stacks of this node's ranks to node 0."""
        if self.store is not None:
            self.store.set(_stacks_of(self.node_rank), json.dumps(stacks))

    def _read(self, key: str) -> Any:
        """Read a value that may not be there, without waiting for it."""
        if self.store is None or not self.store.check([key]):
            return None
        return json.loads(self.store.get(key))


def _answer_of(node: int) -> str:
    return f"{PREFIX}watchdog/answer/{node}"


def _stacks_of(node: int) -> str:
    return f"{PREFIX}watchdog/stacks/{node}"
