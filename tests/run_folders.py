"""Folders as a run leaves them, for the tests of the report."""

import json
import math

from pretrain.checkpointing.manifest import to_text
from pretrain.checkpointing.progress import Progress
from pretrain.config.config_yaml import dump_yaml
from pretrain.config.load import load_config
from pretrain.logs.run_facts import PhaseFacts, RunFacts


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(folder):
    """Two phases of 30 and 10 steps, evaluated before, between and after."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    evaluations = [{"step": 0, "tokens": 0, "phase": "base", "valid_loss": 9.0}]
    tokens = 0
    for name, length, steps in (("base", 8192, 30), ("long", 2**20, 10)):
        for _ in range(steps):
            tokens += 1_000_000
            lines.append(
                {
                    "step": len(lines) + 1,
                    "tokens": tokens,
                    "real_tokens": tokens,
                    "phase": name,
                    "seq_length": length,
                    "loss": 9 - 0.1 * len(lines),
                    "grad_norm": 1.0,
                    "lr": 3e-4,
                    "num_targets": 10,
                    "tokens_per_second": 1e5,
                    "mfu": None,
                    "peak_memory_bytes": 1,
                    "step_seconds": 10.0,
                    "data_seconds": 0.1,
                    "skipped": len(lines) == 20,
                }
            )
        evaluations.append(
            {
                "step": len(lines),
                "tokens": tokens,
                "phase": name,
                "valid_loss": 9 - 0.1 * len(lines),
            }
        )
    write_lines(folder / "validation.jsonl", evaluations)
    write_lines(folder / "metrics.jsonl", lines)


NAMES = ("base", "base-ramp", "extend-16", "extend-64", "long-mix", "quarter", "half", "million")


def _step_line(done, tokens, name, index, batch, steps):
    """Make the line of the step after `done` others: a loss that falls, with waves and two skipped
    steps."""
    progress = tokens / (steps * 3e6)
    wave = 0.03 * math.sin(done * 12.9898) * math.cos(done * 4.1)
    return {
        "step": done + 1,
        "tokens": tokens,
        "real_tokens": tokens,
        "phase": name,
        "seq_length": 2 ** (13 + index),
        "loss": 2.2 + 7 * math.exp(-9 * progress) + wave,
        "grad_norm": 0.4 + abs(wave) * 8 + (6 if done % 97 == 50 else 0),
        "lr": 3e-4 * math.cos(progress),
        "num_targets": batch,
        "global_batch_tokens": batch,
        "tokens_per_second": 2e6 / (1 + 0.2 * index) * (1 + wave),
        "mfu": 0.45 - 0.02 * index + wave,
        "peak_memory_bytes": int((40 + 4 * index) * 2**30),
        "step_seconds": 2.0 + wave,
        "data_seconds": 0.05 + abs(wave),
        "skipped": done in (20, 21),
        "communication_share": 0.3 + wave,
        "data_share": 0.02 + abs(wave),
        "imbalance": 1.02 + abs(wave),
        "imbalance_in_order": 1.7 + wave,
        # Every third step has no target of the rare source.
        "source_losses": {"web": 2.3 + wave, "code": None if done % 3 else 1.5 + wave},
    }


def write_long_run(folder, steps=400):
    """Eight phases from 8Ki to 1Mi, the later ones short, with every kind of record and a
    checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    records = []
    events = []
    account = []
    read = {"web": 0, "code": 0}
    tokens = 0
    write_event = lambda event, text="": events.append(  # noqa: E731
        {
            "time": 1.79e9 + 60 * len(events),
            "event": event,
            "step": len(lines),
            "tokens": tokens,
            "text": text,
        }
    )
    for index, name in enumerate(NAMES):
        length = 2 ** (13 + index)
        batch = 2**21 * (1 + index // 4)
        write_event("restart" if index else "start", f"phase {name}")
        records += _evaluations(lines, tokens, name, length, index)
        count = steps // (1, 3, 10, 12, 20, 24, 30, 40)[index]
        for number in range(count):
            tokens += batch
            lines.append(_step_line(len(lines), tokens, name, index, batch, steps))
            if number in (count // 3, count // 2):
                write_event("save", f"iteration {len(lines)}")
            if number == count // 2 and index < 3:
                write_event("restart", "after a failure")
        records += _evaluations(lines, tokens, name, length, index)
        write_event("again" if index + 1 < len(NAMES) else "done")
        # What the phase drew from each source.
        for source, share in (("web", 0.7), ("code", 0.3)):
            drawn = int(count * batch * share)
            read[source] += drawn
            account.append(
                {
                    "phase": name,
                    "source": source,
                    "skipped": False,
                    "samples": drawn // length,
                    "tokens": drawn,
                    "documents": drawn // 900,
                    "epochs": read[source] / 3e8,
                }
            )
    write_lines(folder / "metrics.jsonl", lines)
    write_lines(folder / "validation.jsonl", records)
    write_lines(folder / "events.jsonl", events)
    write_lines(
        folder / "ledger.jsonl", [{"step": len(lines), "tokens": tokens, "account": account}]
    )
    write_checkpoint(folder, len(lines), tokens)
    write_facts(folder, lines)


def write_facts(folder, steps, **changes):
    """What the last start said of itself, with the phases of these steps."""
    ends = {}
    for step in steps:
        ends[step["phase"], step["seq_length"]] = step["tokens"]
    starts = [0, *list(ends.values())[:-1]]
    phases = [
        PhaseFacts(name, length, start, end)
        for ((name, length), end), start in zip(ends.items(), starts, strict=True)
    ]
    values = {
        "time": 1.79e9,
        "host": "node-0",
        "pid": 4711,
        "records": None,
        "device": "NVIDIA H100 80GB HBM3",
        "world_size": 128,
        "machines": 16,
        "layout": "tp 2 x pp 1 x cp 64 x dp 1 on cuda",
        "code": "0123456789ab, commit fedcba9876+",
        "torch": "2.13.0",
        "phases": phases,
        "settings": "",
    } | changes
    RunFacts(**values).write(folder)


def _evaluations(lines, tokens, name, length, index):
    base = {"step": len(lines), "tokens": tokens, "phase": name}
    loss = lines[-1]["loss"] if lines else 9.2
    records = (
        [
            base
            | {
                "kind": "loss",
                "set": found,
                "seq_length": 2**power,
                "num_targets": 1000,
                "valid_loss": loss
                + 0.02 * abs(power - 13 - index)
                + (0.3 if found == "code" else 0),
            }
            for power in (13, 16, 20)
            for found in ("valid", "code")
        ]
        if index
        else [
            base | {"set": "valid", "seq_length": length, "valid_loss": loss, "num_targets": 1000}
        ]
    )
    gain = 0.02 + 0.03 * index * (len(lines) % 2 + 1)
    records.append(
        base
        | {
            "kind": "context_gain",
            "set": "valid",
            "seq_length": length,
            "cut": 1024,
            "loss_full": loss,
            "loss_cut": loss + gain,
            "gain": gain,
            "gain_low": None if index == 0 else gain - 0.02,
            "gain_high": None if index == 0 else gain + 0.03,
            "documents": 16,
            "num_targets": 900,
        }
    )
    return records + [
        base
        | {
            "kind": "passkey",
            "seq_length": 2**power,
            "depth": depth,
            "trials": 4,
            "accuracy": min(1.0, max(0.0, 0.1 * index + 1.3 - (power - 12) / 6 - abs(depth - 0.9))),
            "answer_loss": 0.2,
        }
        for power in (12, 14, 16, 18, 20)
        for depth in (0.1, 0.3, 0.5, 0.7, 0.9)
    ]


def write_checkpoint(folder, step, tokens):
    """What a report reads of a published checkpoint; the layout of the last phase was chosen."""
    place = folder / f"iter_{step:07d}"
    place.mkdir()
    phases = folder / "phases.yaml"
    layouts = [f"context_parallel_size: {2**i}" for i in range(7)] + ["layout: auto"]
    phases.write_text(
        "phases:\n"
        + "".join(
            f"  - {{name: {name}, seq_length: {2 ** (13 + i)}, train_tokens: 16Mi, "
            f"global_batch_tokens: 2Mi, {layouts[i]}, rotary_base: {1e4 * 2**i}}}\n"
            for i, name in enumerate(NAMES)
        )
    )
    config = load_config(
        ["--config", str(phases), "--model", "125m", "--vocab-size", "50304", "--mock-data"]
    )
    phases.unlink()
    (place / "config.yaml").write_text(dump_yaml(config))
    (place / "manifest.json").write_text(to_text({}))
    chosen = {
        NAMES[7]: {
            "asked": {},
            "chosen": {"tensor_model_parallel_size": 2, "context_parallel_size": 64},
            "recompute_granularity": "full",
        }
    }
    (place / "progress.json").write_text(
        Progress(
            step=step,
            clock=tokens,
            phase={"name": NAMES[7], "seq_length": 1 << 20},
            longest_seq_length=1 << 20,
            data={},
            tokenizer=None,
            world_size=128,
            layouts=chosen,
        ).to_text()
    )
    (folder / "latest_checkpointed_iteration.txt").write_text(str(step))
