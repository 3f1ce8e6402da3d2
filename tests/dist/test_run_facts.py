"""run.json, which a run writes at each start, and what `watch` makes of a real run's folder."""

import socket

from pretrain.config.config_yaml import read_config_text
from pretrain.logs.run_facts import PhaseFacts, RunFacts
from tests.dist.training import base_arguments, train, write_corpus
from tools.watching.run_files import read_files
from tools.watching.screen import ASCII, screen


def test_a_run_says_on_what_and_how_far_it_trains_and_watch_reads_it(pool, tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    save = tmp_path / "save"
    argv = base_arguments(corpus, save=str(save), train_iters=3, eval_iters=0)
    assert pool.run(train, 2, argv) == ["done"] * 2
    facts = RunFacts.read(save)
    # 3 steps of 4 samples of 64 tokens.
    assert facts.phases == [PhaseFacts("main", 64, 0, 768)]
    assert facts.world_size == 2
    assert facts.host == socket.gethostname()
    assert "dp 2" in facts.layout
    assert "commit" in facts.code
    assert read_config_text(facts.settings, "run.json").optimizer.lr == 1e-2
    shown = screen(read_files(save), facts.time, 200, ASCII)
    assert "state       done, " in shown, shown
    assert "step        3, 768 of 768 tokens" in shown, shown
    assert "100.0 %" in shown, shown
