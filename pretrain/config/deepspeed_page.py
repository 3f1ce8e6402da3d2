"""Make FROM_DEEPSPEED.md: DeepSpeed's configuration, key by key, from deepspeed_keys.yaml."""

import functools
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import yaml

from pretrain.config.page_parts import make_row

TABLE_FILE = Path(__file__).with_name("deepspeed_keys.yaml")
DEEPSPEED_PAGE = Path(__file__).with_name("FROM_DEEPSPEED.md")
TITLES = {
    "launcher": "The launcher",
    "batch": "Batch",
    "optimizer": "Optimizer",
    "schedule": "Learning rate, data over time",
    "precision": "Precision and sums",
    "zero": "ZeRO",
    "parallel": "Parallelism and activations",
    "checkpoints": "Checkpoints",
    "logging": "Logs and tuning",
    "others": "Not here",
}
"""Section of the table -> its heading, in the order of the page."""
HEAD = """# Moving from DeepSpeed

```bash
# The file below, checked and estimated for 8 GPUs, on any machine; then `train`, not `plan`.
bash launch/ithaca.sh plan --config run.yaml --save out/checkpoints --world-size 8 --hardware h100
```
There is no script of yours around it: model, loop, data and checkpoints are here, and a run is one
YAML file. What DeepSpeed's JSON file said, and what your script gave to `deepspeed.initialize`:

```yaml
model: llama3-8b                  # your AutoModel; fields may follow to override
tokenizer_type: SentencePieceTokenizer
tokenizer_model: out/spm.model
data_path: [out/web]              # your data loader; made by `preprocess`
seq_length: 8Ki                   # max_seq_len
global_batch_size: 512            # train_batch_size
micro_batch_size: 1               # train_micro_batch_size_per_gpu
train_iters: 10000                # scheduler.params.total_num_steps
lr: 3.0e-4                        # optimizer.params.lr
lr_decay_style: cosine            # scheduler.type WarmupCosineLR
lr_warmup_iters: 500              # scheduler.params.warmup_num_steps
clip_grad: 1.0                    # gradient_clipping
bf16: true                        # bf16.enabled
data_parallel_sharding_strategy: optim_grads_params   # zero_optimization.stage 3
recompute_granularity: full       # model.gradient_checkpointing_enable()
```
**What to expect.** The plan says for each phase layout, memory, time and what each rank sends.
Weights come over as a Hugging Face folder:
[tools/CONVERTING.md](../../tools/CONVERTING.md). The optimizer state of DeepSpeed is not read.

**When it fails.** Bad input is one line with the value, the rule and the fix. DeepSpeed's words as
flags (`--zero-stage`, `--gradient-accumulation-steps`) are answered with the flag that is meant.
Other defaults that change the loss: `--adam-beta2` 0.95, `--weight-decay` 0.1, `--clip-grad` 1.0,
a linear warmup.

Written by `python -m pretrain.config.flags_page` from `deepspeed_keys.yaml`; edit that. `*` stands
for the rest of a name. All flags: [FLAGS.md](FLAGS.md).
"""


@dataclass(frozen=True)
class Counterpart:
    """Holds what one entry of the table says about DeepSpeed's keys."""

    section: str
    keys: tuple[str, ...]
    """As in DeepSpeed's JSON file, a dot between a mapping and its key; or a launcher's flags."""
    flags: tuple[tuple[str, ...], ...]
    """Our flags, each with the value that stands behind it, if there is one."""
    variables: tuple[str, ...]
    """Our variables of the environment."""
    note: str


@functools.cache
def counterparts() -> tuple[Counterpart, ...]:
    """Return all entries, in the order of the file."""
    table = yaml.safe_load(TABLE_FILE.read_text(encoding="utf-8"))
    return tuple(
        Counterpart(
            section=section,
            keys=tuple(entry["keys"].split()),
            flags=_flags_of(entry.get("flags", "")),
            variables=tuple(entry.get("variables", "").split()),
            note=entry.get("note", ""),
        )
        for section, entries in table.items()
        for entry in entries
    )


def _flags_of(text: str) -> tuple[tuple[str, ...], ...]:
    """Split `--a --b value` into a tuple for each flag."""
    return tuple(tuple(f"--{part}".split()) for part in text.split("--")[1:])


def find_counterpart(key: str) -> Counterpart | None:
    """Return the entry that has a key or a pattern that it matches; None without one."""
    return next(
        (
            found
            for found in counterparts()
            if any(fnmatchcase(key, known) for known in found.keys)
            or any(known == f"{key}.*" for known in found.keys)
        ),
        None,
    )


def make_deepspeed_page() -> str:
    """Return the whole page."""
    parts = [HEAD]
    for section, title in TITLES.items():
        lines = [f"## {title}", "", "| DeepSpeed | here | |", "| --- | --- | --- |"]
        lines += [_row(found) for found in counterparts() if found.section == section]
        parts.append("\n".join([*lines, ""]))
    return "\n".join(parts)


def _row(found: Counterpart) -> str:
    """Return an entry as a row."""
    ours = [" ".join(flag) for flag in found.flags] + list(found.variables)
    return make_row([_quoted(found.keys), _quoted(ours), found.note])


def _quoted(names: tuple[str, ...] | list[str]) -> str:
    """Return names as a cell."""
    return ", ".join(f"`{name}`" for name in names)
