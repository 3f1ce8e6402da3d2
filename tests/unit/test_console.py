"""pretrain/logs/console.py and the plan's table: what a person reads of a run."""

import dataclasses
import json
import sys

import pytest

from pretrain.config.config import Config
from pretrain.config.flat import from_flat
from pretrain.logs.console import Console, Outlook
from pretrain.logs.metrics import Reporter
from pretrain.logs.step_record import StepRecord
from pretrain.schedule.phase_table import describe_place
from pretrain.schedule.resolve import resolve_phases

RECORD = StepRecord(
    step=1,
    tokens=1000,
    real_tokens=1000,
    phase="base",
    seq_length=500,
    global_batch_tokens=1000,
    loss=2.0,
    grad_norm=1.0,
    lr=1e-3,
    num_targets=990,
    tokens_per_second=100.0,
    mfu=None,
    peak_memory_bytes=2**30,
    step_seconds=10.0,
    data_seconds=0.1,
    skipped=False,
    data_digest="",
    sources=None,
)
OUTLOOK = Outlook(phase_start=0, phase_end=20_000, run_end=100_000)


def step(number: int, **changes) -> StepRecord:
    return dataclasses.replace(RECORD, step=number, tokens=1000 * number, **changes)


def test_a_file_gets_one_line_per_interval_and_no_bar(capsys):
    console = Console(2, is_terminal=False)
    for number in range(1, 5):
        console.step(step(number), OUTLOOK)
    console.close()
    out = capsys.readouterr().out
    assert "\r" not in out and "\x1b" not in out
    second, fourth = out.splitlines()
    assert second == (
        "step      2 | base 500 | tokens 2.00K | loss 2.0000 | grad 1.000 | lr 1.00e-03 | "
        "100 tok/s | 1.00 GiB | ETA 16m20s (phase 3m00s)"
    )
    assert fourth.startswith("step      4 | ")


def test_a_terminal_gets_a_bar_below_the_lines_with_the_time_that_is_left(capsys):
    console = Console(10, is_terminal=True)
    for number in range(1, 11):
        console.step(step(number), OUTLOOK)
    out = capsys.readouterr().out
    assert "base 500  50 %|" in out, out
    assert "step 10, left: phase 1m40s, run 15m00s" in out, out
    # The line of the interval starts at the left edge: the bar was taken away before it.
    assert "\rstep     10 | base" in out, out
    console.step(step(21, phase="long"), Outlook(20_000, 100_000, 100_000))
    console.close()
    assert "long 500   1 %|" in capsys.readouterr().out


def test_one_step_that_was_paused_does_not_move_the_time_that_is_left(capsys):
    console = Console(1, is_terminal=False)
    rates = [100.0] * 5 + [0.01]
    for number, rate in enumerate(rates, start=1):
        console.step(step(number, tokens_per_second=rate), OUTLOOK)
    assert capsys.readouterr().out.splitlines()[-1].endswith("ETA 15m40s (phase 2m20s)")


def test_waits_are_shown_where_they_are_much(capsys):
    console = Console(1, is_terminal=False)
    console.step(step(1, communication_share=0.31, data_share=0.02), OUTLOOK)
    console.step(step(2, communication_share=0.04, data_share=0.5), OUTLOOK)
    first, second = capsys.readouterr().out.splitlines()
    assert "| waiting 31 % | ETA" in first
    assert "| data 50 % | ETA" in second


def test_the_slowest_ranks_are_shown_where_dealing_had_much_to_do(capsys):
    console = Console(1, is_terminal=False)
    console.step(step(1, imbalance=1.021, imbalance_in_order=1.87), OUTLOOK)
    console.step(step(2, imbalance=1.0, imbalance_in_order=1.04), OUTLOOK)
    console.step(step(3), OUTLOOK)
    first, second, third = capsys.readouterr().out.splitlines()
    assert "| slowest rank 1.02x mean (1.87x undealt) | ETA" in first
    assert "slowest" not in second + third


@pytest.mark.parametrize(
    "clock, index, number, place",
    [
        (0, 0, 0, "phase base (1 of 2), step 0 of 18, 0 of 7,168 tokens"),
        (1024, 0, 4, "phase base (1 of 2), step 4 of 18, 1,024 of 7,168 tokens"),
        # Two steps of the second phase are left, however many came before.
        (6144, 1, 40, "phase long (2 of 2), step 40 of 42, 6,144 of 7,168 tokens"),
    ],
)
def test_a_restart_says_in_one_line_where_it_goes_on(clock, index, number, place):
    config = from_flat(
        {
            "model": "tiny",
            "phases": [
                {
                    "name": "base",
                    "seq_length": "128",
                    "train_tokens": "2048",
                    "global_batch_tokens": "256",
                },
                {
                    "name": "long",
                    "seq_length": "512",
                    "train_tokens": "5120",
                    "global_batch_tokens": "512",
                },
            ],
        },
        "test",
        Config(),
    )
    phases = resolve_phases(config)
    # 8 steps of 256 tokens and 10 of 512.
    text = describe_place(phases, phases[index], clock, number)
    assert text == place


def test_the_largest_logit_and_the_heads_that_were_clipped_are_shown_where_they_are_known(capsys):
    console = Console(1, is_terminal=False)
    console.step(step(1), OUTLOOK)
    console.step(step(2, max_attention_logit=61.04, qk_clipped_heads=0), OUTLOOK)
    console.step(step(3, max_attention_logit=123.46, qk_clipped_heads=8), OUTLOOK)
    first, second, third = capsys.readouterr().out.splitlines()
    assert "logit" not in first and "QK-clip" not in first
    assert "| logit 61.0 |" in second and "QK-clip" not in second
    assert "| logit 123.5 | QK-clip 8 heads |" in third


def test_a_console_that_is_gone_is_an_event_once(tmp_path, monkeypatch):
    reporter = Reporter(
        from_flat({"save": str(tmp_path)}, "test", Config()), 0, None, is_writer=True
    )
    reporter.step(step(1), OUTLOOK)
    monkeypatch.setattr(sys.stdout, "lost", "Broken pipe", raising=False)
    reporter.step(step(2), OUTLOOK)
    reporter.step(step(3), OUTLOOK)
    reporter.close()
    (event,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert (event["event"], event["step"], event["tokens"]) == ("console lost", 2, 2000)
    assert "Broken pipe" in event["text"]
