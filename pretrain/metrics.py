"""What a run says about itself: metrics.jsonl, validation.jsonl, ledger.jsonl, the console line, wandb.

Each step stands in metrics.jsonl exactly once: after a restart, lines of steps that are done again are
removed first.
"""

import json
import os
import socket
from pathlib import Path
from typing import Any

from pretrain.checkpoint import write_atomically
from pretrain.config import Config
from pretrain.load_config import to_flat, warn


class JsonLines:
    """An append-only file of one JSON object per line."""

    def __init__(self, path: Path):
        self.path = path

    def rewind(self, last_step: int) -> None:
        """Drop the lines of later steps, and a last line that a kill cut short."""
        if self.path.exists():
            kept = [line for line in self.read() if line["step"] <= last_step]
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def read(self) -> list[dict]:
        lines = []
        for text in self.path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break  # the cut end of an interrupted write
        return lines

    def append(self, record: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class Reporter:
    """Writes on global rank 0 only; on other ranks every method does nothing.

    Args:
        last_step: step of the checkpoint that the run starts from.
    """

    def __init__(self, config: Config, is_writer: bool, last_step: int, wandb_run_id: str | None):
        self.is_writer, self.interval = is_writer, config.logging.log_interval
        self.metrics = self.validation = self.ledger = self.wandb = None
        self.wandb_run_id = wandb_run_id
        if not is_writer:
            return
        if config.checkpoint.save:
            folder = Path(config.checkpoint.save)
            folder.mkdir(parents=True, exist_ok=True)
            self.metrics, self.validation = JsonLines(folder / "metrics.jsonl"), JsonLines(folder / "validation.jsonl")
            self.ledger = JsonLines(folder / "ledger.jsonl")
            for lines in (self.metrics, self.validation, self.ledger):
                lines.rewind(last_step)
        if config.logging.wandb_project:
            self.wandb = _start_wandb(config, wandb_run_id)
            self.wandb_run_id = self.wandb.id

    def step(self, record: dict[str, Any], remaining_tokens: int) -> None:
        """One optimizer step; `record` is the line of metrics.jsonl."""
        if not self.is_writer:
            return
        if self.metrics:
            self.metrics.append(record)
        if self.wandb:
            plain = {k: v for k, v in record.items() if v is not None and not isinstance(v, dict)}
            of_sources = {f"sources/{name}": tokens for name, tokens in (record.get("sources") or {}).items()}
            self.wandb.log(plain | of_sources, step=record["step"])
        if record["step"] % self.interval == 0:
            print(console_line(record, remaining_tokens), flush=True)

    def evaluation(self, record: dict[str, Any]) -> None:
        if not self.is_writer:
            return
        if self.validation and record not in self.validation_lines():
            self.validation.append(record)
        if self.wandb:
            name = "valid_loss" if record["set"] == "valid" else f"valid_loss/{record['set']}"
            self.wandb.log({name: record["valid_loss"]}, step=record["step"])
        of_set = "" if record["set"] == "valid" else f" of {record['set']}"
        print(f"evaluation{of_set} at step {record['step']} ({record['phase']}, {record['seq_length']:,} tokens): "
              f"loss {record['valid_loss']:.4f} over {record['num_targets']:,} targets", flush=True)

    def account(self, step: int, clock: int, rows: list[dict]) -> None:
        """What was drawn of each source in each phase (data/ledger.py: account), at a save."""
        if self.ledger:
            self.ledger.append({"step": step, "tokens": clock, "account": rows})

    def validation_lines(self) -> list[dict]:
        return self.validation.read() if self.validation.path.exists() else []

    def say(self, text: str) -> None:
        if self.is_writer:
            print(text, flush=True)

    def close(self) -> None:
        if self.wandb:
            self.wandb.finish()


def console_line(record: dict[str, Any], remaining_tokens: int) -> str:
    """A step in one readable line."""
    rate = record["tokens_per_second"]
    parts = [f"step {record['step']:>6,}", f"{record['phase']} {record['seq_length']:,}",
             f"tokens {_short(record['tokens'])}", f"loss {record['loss']:.4f}", f"grad {record['grad_norm']:.3f}",
             f"lr {record['lr']:.2e}", f"{_short(rate)} tok/s", f"{record['peak_memory_bytes'] / 2**30:.2f} GiB"]
    if record["mfu"] is not None:
        parts.append(f"MFU {100 * record['mfu']:.1f} %")
    if record["skipped"]:
        parts.append("SKIPPED: gradient not finite")
    return " | ".join(parts) + f" | ETA {_duration(remaining_tokens / rate)}"


def _short(number: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.2f}{unit}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def _start_wandb(config: Config, run_id: str | None):
    """Start or continue the wandb run; offline where its server cannot be reached or no key is known."""
    import wandb

    mode = os.environ.get("WANDB_MODE")
    if mode is None and not _wandb_reachable(wandb):
        warn("wandb: no key or no network; logging offline, `wandb sync` uploads it later")
        mode = "offline"
    return wandb.init(project=config.logging.wandb_project, name=config.logging.wandb_exp_name,
                      entity=config.logging.wandb_entity, dir=config.logging.wandb_save_dir or config.checkpoint.save,
                      id=run_id, resume="allow", mode=mode, config=to_flat(config))


def _wandb_reachable(wandb) -> bool:
    if not wandb.api.api_key:
        return False
    host = wandb.Settings().base_url.split("//")[-1].split("/")[0].split(":")[0]
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError:
        return False
    return True
