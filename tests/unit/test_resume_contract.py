"""What may change between a checkpoint and the run that goes on: every setting has a kind, every
kind its answer."""

import dataclasses
import json

import pytest

from pretrain.checkpointing.phase_changes import phase_changes
from pretrain.checkpointing.progress import Progress
from pretrain.checkpointing.resume_contract import (
    continuation_changes,
    describe_changes,
    missing_parts,
    needless_acceptance,
    refusals,
    weights_changes,
)
from pretrain.checkpointing.setting_changes import is_same, kind_of, path_settings
from pretrain.config.config import CheckpointConfig, Config, section_types
from pretrain.config.config_yaml import dump_yaml, read_config_yaml
from pretrain.config.facts import facts_of_section
from pretrain.config.flags import spell
from pretrain.config.flat import field_table
from pretrain.config.load import load_config
from pretrain.schedule.learning_rate import LearningRate
from pretrain.schedule.phases import Phase, phase_at
from pretrain.schedule.resolve import resolve_phases
from tests.unit.test_checkpoint import publish

TOKENIZER = {"type": "NullTokenizer", "vocab_size": 100, "fingerprint": "a"}
BASE = (
    "--model tiny --tokenizer-type NullTokenizer --vocab-size 100 --data-path corpus "
    "--seq-length 64 --global-batch-size 4 --train-iters 100 --lr 1e-3 --min-lr 1e-5 "
    "--lr-warmup-iters 2"
).split()


def asked(*flags: str) -> Config:
    given = " ".join(flags).split()
    base = BASE
    if "--data-path" in given:
        # A list is given once.
        at = BASE.index("--data-path")
        base = BASE[:at] + BASE[at + 2 :]
    return load_config(spell([*base, *given]))


def progress_of(config: Config, clock: int, tokenizer=TOKENIZER) -> Progress:
    """How far a run has come at `clock`, as far as the contract reads it."""
    phase = phase_at(resolve_phases(config), clock - 1)
    longest = max(entry.seq_length for entry in resolve_phases(config))
    found = Progress(
        step=clock // 256,
        clock=clock,
        phase=dataclasses.asdict(phase),
        longest_seq_length=longest,
        data={"segments": [{}]},
        tokenizer=tokenizer,
        last_batch_tokens=256,
    )
    return Progress.from_json(json.loads(found.to_text()))


def changes(config: Config, stored: Config, clock: int = 40 * 256, tokenizer=TOKENIZER) -> list:
    phases = resolve_phases(config)
    return continuation_changes(
        stored,
        config,
        progress_of(stored, clock),
        phases,
        LearningRate.make(config.optimizer, phases),
        tokenizer,
    )


def stopping(config: Config, stored: Config | None = None, **situation) -> list[tuple[str, str]]:
    """(name, kind) of the differences that need a flag."""
    found = changes(config, stored or asked(), **situation)
    return [
        (change.name.split(" at token")[0], change.kind)
        for change in found
        if change.kind != "free"
    ]


def phased(*entries: dict, **optimizer) -> Config:
    config = asked("--lr-decay-style constant")
    made = [
        {"seq_length": 64, "global_batch_tokens": 256, "train_tokens": 5120} | entry
        for entry in entries
    ]
    config.schedule.train_iters = config.schedule.global_batch_size = None
    config.schedule.phases = [type_of_entry(**entry) for entry in made]
    for name, value in optimizer.items():
        setattr(config.optimizer, name, value)
    return config


def type_of_entry(**entry):
    from pretrain.config.phase_config import PhaseConfig

    return PhaseConfig(**entry)


def test_every_setting_has_a_kind():
    for section, cls in section_types().items():
        for field in dataclasses.fields(cls):
            kind_of(section, field.name)  # KeyError: it says nothing, and neither does its section


def test_the_fields_of_a_phase_that_matter_on_continuing():
    kinds = {name: facts.resume for name, facts in facts_of_section(Phase).items()}
    assert {name: kind for name, kind in kinds.items() if kind} == {
        "seq_length": "data",
        "rope": "optimization",
        "document_masking": "data",
        "packing": "data",
        "max_documents_per_sample": "data",
        "balance_window": "data",
        "data_exhausted": "data",
    }
    # A new field is added here, or declares its kind: none is free without a decision.
    assert {name for name, kind in kinds.items() if kind is None} == {
        *("name", "index", "start", "end", "tokens", "micro_batch_size", "layout", "memory"),
        # Who computes what changes no number of a step.
        *("auto", "predicted_bytes", "balance"),
        # Judged by what they come to: the batch, the blend, the learning rate.
        *("global_batch_tokens", "stretches", "data_path"),
        *("lr", "min_lr", "lr_schedule", "lr_warmup_tokens"),
    }


def test_a_setting_of_the_schedule_without_a_kind_is_noticed():
    with pytest.raises(KeyError, match="schedule"):
        kind_of("schedule", "a_new_setting")
    assert [
        kind_of(section, "a_new_setting")
        for section in ("model", "layout", "data", "optimizer", "logging", "guards")
    ] == ["forbidden", "free", "data", "optimization", "free", "free"]


def test_nothing_changed_is_nothing():
    assert changes(asked(), asked()) == []


def test_a_checkpoint_from_before_a_setting_had_its_default():
    config = asked("--packing best_fit")
    progress = progress_of(config, 40 * 256)
    del progress.phase["max_documents_per_sample"]
    assert phase_changes(config, progress, resolve_phases(config)) == []
    limited = asked("--packing best_fit --max-documents-per-sample 64")
    (change,) = phase_changes(config, progress, resolve_phases(limited))
    assert (change.theirs, change.ours, change.kind) == (None, 64, "data")


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--ffn-hidden-size 512", [("ffn_hidden_size", "forbidden")]),
        (
            "--qk-layernorm --num-layers 9",
            [("num_layers", "forbidden"), ("qk_layernorm", "forbidden")],
        ),
        ("--fp64", [("fp64", "forbidden")]),
        ("--vocab-size 200", [("vocab_size", "forbidden")]),  # 128 rows hold 100 ids, not 200
        ("--vocab-size 101", [("vocab_size", "tokenizer")]),
        ("--seed 7", [("seed", "data")]),
        ("--split 90,10,0", [("split", "data")]),
        ("--eod-mask-loss", [("eod_mask_loss", "data")]),
        ("--packing best_fit", [("phase 'main': packing", "data")]),
        (
            "--packing best_fit --max-documents-per-sample 64",
            [
                ("phase 'main': packing", "data"),
                ("phase 'main': max_documents_per_sample", "data"),
            ],
        ),
        ("--balance none", []),
        ("--balance window", []),  # packs as before without best_fit
        (
            "--packing best_fit --balance window",
            [("phase 'main': packing", "data"), ("phase 'main': balance_window", "data")],
        ),
        ("--no-document-masking", [("phase 'main': document_masking", "data")]),
        ("--data-exhausted stop", [("phase 'main': data_exhausted", "data")]),
        ("--seq-length 128 --global-batch-size 2", [("phase 'main': seq_length", "data")]),
        ("--skip-data 12K:13K", [("skip_data, windows to come", "data")]),
        (
            "--adam-beta2 0.9 --adam-eps 1e-6",
            [("adam_beta2", "optimization"), ("adam_eps", "optimization")],
        ),
        ("--optimizer muon", [("optimizer", "optimization")]),
        ("--clip-grad 2 --bf16", [("clip_grad", "optimization"), ("bf16", "optimization")]),
        ("--weight-decay 0.2", [("weight_decay", "scheduler")]),
        ("--rotary-base 5e5", [("phase 'main': rope", "optimization")]),
        ("--rope-type linear --rope-scaling-factor 4", [("phase 'main': rope", "optimization")]),
        (
            "--global-batch-size 8 --train-iters 50 --lr-warmup-iters 1",
            [("phase 'main': global_batch_tokens from token 10,240 on", "optimization")],
        ),
        ("--rampup-batch-size 2 2 32", []),  # is over by now
        (
            "--rampup-batch-size 2 1 180",
            [("phase 'main': global_batch_tokens from token 10,240 on", "optimization")],
        ),
        (
            "--step-batch-size-schedule 0:4,15360:8",
            [("phase 'main': global_batch_tokens from token 15,360 on", "optimization")],
        ),
        ("--lr 2e-3", [("learning rate", "scheduler")]),
        ("--min-lr 1e-4", [("learning rate", "scheduler")]),
        ("--lr-decay-style linear", [("learning rate", "scheduler")]),
        ("--train-iters 200", [("learning rate", "scheduler")]),  # the decay is longer
        ("--train-iters 200 --lr-decay-iters 100", []),
        ("--lr-warmup-iters 10 --lr-decay-style constant --lr 1", [("learning rate", "scheduler")]),
        # What changes no token and no update:
        (
            "--micro-batch-size 2 --tensor-model-parallel-size 2 --recompute-granularity full "
            "--attention-backend sdpa",
            [],
        ),
        (
            "--data-path moved/corpus --eval-iters 9 --save elsewhere --save-interval 3 "
            "--kv-channels 32",
            [],
        ),
        (
            "--global-batch-tokens 256 --lr-warmup-tokens 512 --max-position-embeddings 64 "
            "--init-method-std 0.1",
            [],
        ),
        ("--make-vocab-size-divisible-by 10", []),  # other rows of padding: cut or filled on load
    ],
)
def test_each_kind_of_change(flags, expected):
    words = flags.split()
    config = asked(flags)
    if "--global-batch-tokens" in words:
        config.schedule.global_batch_size = config.optimizer.lr_warmup_iters = None
    if "ramp" in flags or "step" in flags:
        config.schedule.train_iters = None
        config.schedule.train_tokens = 25600
    if "step" in flags:
        config.schedule.global_batch_size = None
        config.optimizer.lr_warmup_iters = 1  # a step of 512 tokens
    assert stopping(config) == expected
    settings = [word[2:].replace("-", "_") for word in words if word.startswith("--")]
    texts = [str(change) for change in changes(config, asked())]
    for name in settings:
        name = name.removeprefix("no_")
        if getattr(config.model, name, None) != 32:  # tiny's own head size, said otherwise
            assert any(name in text for text in texts), f"{name} is not printed"


def test_the_learning_rate_is_judged_by_its_effect():
    constant = asked("--lr-decay-style constant")
    assert stopping(asked("--lr-decay-style constant --train-iters 200"), constant) == []
    assert stopping(asked("--lr-decay-style constant --min-lr 1e-4"), constant) == []
    finished = dict(clock=100 * 256)
    assert stopping(asked("--train-iters 200"), asked(), **finished) == []
    assert stopping(asked("--train-iters 200 --lr 1"), asked(), **finished) == [
        ("lr of the phase that goes on", "scheduler")
    ]
    (change,) = [
        change
        for change in changes(asked("--train-iters 200"), asked())
        if change.kind == "scheduler"
    ]
    assert change.name == "learning rate at token 10,240" and change.ours > change.theirs
    wsd = "--lr-decay-style WSD --lr-wsd-decay-iters 10"
    (change,) = [
        change
        for change in changes(asked(wsd, "--train-iters 200"), asked(wsd))
        if change.kind != "free"
    ]
    assert int(change.name.split()[-1].replace(",", "")) >= 90 * 256, (
        "the same until the decay begins"
    )


@pytest.mark.parametrize("edit", ["--lr-wsd-decay-tokens 50B", "--lr-wsd-decay-style linear"])
def test_a_short_decay_far_ahead_is_compared(edit):
    run = (
        "--train-iters 100000000000 --min-lr 5e-4 --lr-decay-style WSD --lr-wsd-decay-tokens 25B "
        "--lr-wsd-decay-style cosine"
    )
    assert stopping(asked(run, edit), asked(run)) == [("learning rate", "scheduler")]
    assert stopping(asked(run), asked(run)) == []


def test_phases_that_have_not_begun_are_free():
    a = dict(name="a")
    b = dict(name="b", seq_length=128)
    edited = dict(
        b, seq_length=256, packing="best_fit", lr=5e-4, rotary_base=5e5, document_masking=False
    )
    for clock in (256, 5120):  # within a, at its end
        found = changes(phased(a, edited, dict(name="c")), phased(a, b), clock=clock)
        assert {change.kind for change in found} == {"free"}
        text = describe_changes(found)
        assert "phases, b: rotary_base: checkpoint None, run 500000.0" in text
        assert "phases, c: checkpoint absent, run there" in text
    found = stopping(phased(a, edited), phased(a, b), clock=5120 + 256)
    assert [name for name, _ in found] == [
        "phase 'b': seq_length",
        "phase 'b': rope",
        "phase 'b': document_masking",
        "phase 'b': packing",
        "learning rate",
    ]
    assert (
        stopping(phased(dict(a, train_tokens=2048), b), phased(a, b), clock=2048) == []
    )  # the next phase comes early
    assert stopping(phased(dict(a, train_tokens=1024), b), phased(a, b), clock=2048) == [
        ("phase 'b': seq_length", "data"),
        ("phases before token 2,048", "data"),
    ]
    # Another name does not make another phase.
    assert stopping(phased(dict(b, name="z")), phased(dict(name="y")), clock=2048) == [
        ("phase 'z': seq_length", "data")
    ]
    # The last step of a may reach beyond its end, where its batch was changed; b has not begun
    # then.
    progress = dataclasses.replace(progress_of(phased(a), 5120), clock=5376, last_batch_tokens=512)
    run = phased(a, edited)
    phases = resolve_phases(run)
    found = continuation_changes(
        phased(a, b), run, progress, phases, LearningRate.make(run.optimizer, phases), TOKENIZER
    )
    assert {change.kind for change in found} == {"free"}
    # A later phase that changes the learning rate of this one is no private matter.
    grown = phased(a, dict(b, train_tokens=51200), lr_decay_style="cosine")
    assert stopping(grown, phased(a, b, lr_decay_style="cosine"), clock=256) == [
        ("learning rate", "scheduler")
    ]
    assert stopping(phased(a, b, lr=5e-4), phased(a, b), clock=5120) == [
        ("learning rate", "scheduler")
    ]


def test_phases_that_are_over_keep_their_places():
    a, b, c = (
        {"name": name, "seq_length": length} for name, length in (("a", 64), ("b", 128), ("c", 256))
    )
    at_the_end_of_a = 5120
    within_b = 5120 + 2560
    past = f"phases before token {at_the_end_of_a:,}"
    assert stopping(phased(b, a, c), phased(a, b, c), clock=at_the_end_of_a) == [(past, "data")], (
        "a would come again"
    )
    assert (f"phases before token {within_b:,}", "data") in stopping(
        phased(a | {"train_tokens": 2560}, b, c), phased(a, b, c), clock=within_b
    )
    for later in (
        (a, c),
        (a, c, b),
        (a, b | {"train_tokens": 512}),
        (a | {"train_tokens": 10240}, b),
    ):
        assert stopping(phased(*later), phased(a, b, c), clock=at_the_end_of_a) == []
    (change,) = [
        change
        for change in changes(phased(b, a), phased(a, b), clock=5120)
        if change.kind == "data"
    ]
    assert (change.theirs, change.ours) == ("a of 64 from 0", "b of 128 from 0")


def test_windows_that_were_passed_over_are_no_difference():
    stored = asked("--skip-data 1K:2K")
    config = asked()
    phases = resolve_phases(config)
    progress = dataclasses.replace(
        progress_of(stored, 40 * 256), data={"segments": [{"skipped_until": 2000}, {}]}
    )
    found = continuation_changes(
        stored, config, progress, phases, LearningRate.make(config.optimizer, phases), TOKENIZER
    )
    assert [(change.name, change.kind) for change in found] == [("skip_data", "free")]


def test_refusals_come_all_at_once_and_name_their_flag():
    found = changes(
        asked("--ffn-hidden-size 512 --seed 7 --lr 1e-2 --clip-grad 3 --micro-batch-size 2"),
        asked(),
        tokenizer=TOKENIZER | {"fingerprint": "b"},
    )
    lines = refusals(found, CheckpointConfig())
    assert [line.split(":")[0] for line in lines] == [
        "ffn_hidden_size",
        "clip_grad",
        "seed",
        "tokenizer",
        "learning rate at token 10,240",
    ]
    assert lines[0] == (
        "ffn_hidden_size: checkpoint 704, run 512: the checkpoint's tensors are of another model "
        "or precision. Fix: the checkpoint's value (--use-checkpoint-args takes what is not "
        "given); or a new run in another --save."
    )
    assert lines[2].endswith("Fix: the checkpoint's value, or --accept-changes data.")
    accept = CheckpointConfig(accept_changes=["data", "tokenizer", "optimization"])
    assert [line.split(":")[0] for line in refusals(found, accept)] == ["ffn_hidden_size"]
    override = CheckpointConfig(
        override_opt_param_scheduler=True, accept_changes=["data", "tokenizer"]
    )
    assert [line.split(":")[0] for line in refusals(found, override)] == [
        "ffn_hidden_size",
        "clip_grad",
    ]
    assert "micro_batch_size: checkpoint 1, run 2" in describe_changes(found)


def test_acceptance_of_nothing_is_named():
    accept = CheckpointConfig(
        accept_changes=["data", "optimization"], override_opt_param_scheduler=True
    )
    assert [text.split(":")[0] for text in needless_acceptance([], accept)] == [
        "accept_changes = data",
        "accept_changes = optimization",
        "override_opt_param_scheduler = True",
    ]
    assert [
        text.split(":")[0]
        for text in needless_acceptance(changes(asked("--lr 1"), asked()), accept)
    ] == ["accept_changes = data"]


def test_a_new_run_on_weights_may_change_all_but_model_and_tokenizer():
    stored = asked()
    config = asked("--seed 3 --lr 1 --rotary-base 5e5 --seq-length 256 --fp64")
    progress = progress_of(stored, 40 * 256)

    def found(config, theirs=TOKENIZER, ours=TOKENIZER):
        return weights_changes(
            stored,
            config,
            dataclasses.replace(progress, tokenizer=theirs),
            resolve_phases(config),
            ours,
        )

    assert [str(change) for change in found(config)] == [
        "rope: checkpoint base 10000, run base 500000",
        "longest seq_length: checkpoint 64, run 256",
    ]
    assert refusals(found(config), CheckpointConfig()) == []
    another = found(asked("--num-layers 9"), ours=TOKENIZER | {"fingerprint": "b"})
    assert [change.kind for change in another] == ["forbidden", "tokenizer"]
    assert [change.kind for change in found(asked(), theirs=None)] == ["free"], (
        "a checkpoint that knows no tokenizer"
    )
    # Other files that give the same ids; a checkpoint of before the ids were described.
    ids = {"ids": "c", "transformers": "5.1"}
    moved = found(asked(), theirs=TOKENIZER | ids, ours=TOKENIZER | ids | {"fingerprint": "b"})
    assert moved == [], [str(change) for change in moved]
    older = found(asked(), ours=TOKENIZER | ids)
    assert older == [], [str(change) for change in older]


def test_what_a_checkpoint_lacks_is_refused():
    settings = CheckpointConfig()
    whole = progress_of(asked(), 40 * 256)
    assert missing_parts(whole, settings, "f") == []
    assert (
        "holds weights only"
        in missing_parts(dataclasses.replace(whole, data=None), settings, "f")[0]
    )
    without = dataclasses.replace(whole, has_optimizer=False)
    assert "was saved with --no-save-optim" in missing_parts(without, settings, "f")[0]
    assert missing_parts(without, CheckpointConfig(no_load_optim=True), "f") == []


def published_run(tmp_path, stored: Config, clock: int = 40 * 256) -> str:
    folder = publish(tmp_path / "load")
    (folder / "config.yaml").write_text(dump_yaml(stored))
    (folder / "progress.json").write_text(progress_of(stored, clock).to_text())
    return str(tmp_path / "load")


def test_use_checkpoint_args_takes_what_is_not_given(tmp_path):
    stored = asked("--num-layers 5 --qk-layernorm --rotary-base 5e5 --attention-backend sdpa")
    root = published_run(tmp_path, stored)
    config = load_config(
        ["--load", root, "--use-checkpoint-args", "--lr", "7", "--norm-epsilon", "0.1"]
    )
    expected = dataclasses.replace(stored.model, attention_backend="auto", norm_epsilon=0.1)
    assert config.model == expected and config.data.vocab_size == 100 and config.optimizer.lr == 7
    # Given settings stay, presets among them, and the contract compares them.
    config = load_config(["--load", root, "--use-checkpoint-args", "--model", "tiny"])
    assert config.model.num_layers == 8 and config.model.qk_layernorm
    # A new run takes the rope that the weights were trained with last.
    stored = phased(dict(name="a", rotary_base=8e6))
    root = published_run(tmp_path / "phased", stored, 2560)
    for flag, base in (("--finetune", 8e6), ("--no-finetune", 1e4)):
        assert (
            load_config(["--load", root, flag, "--use-checkpoint-args"]).model.rotary_base == base
        )
    scaled = asked("--rope-type llama3 --rope-scaling-factor 4")
    root = published_run(tmp_path / "scaled", scaled)
    taking = ["--load", root, "--finetune", "--use-checkpoint-args"]
    assert load_config(taking).model.rope == scaled.model.rope
    other = load_config([*taking, "--rope-type", "linear", "--rope-scaling-factor", "2"]).model
    assert (other.rope.type, other.rope.factor, other.rope_low_freq_factor) == ("linear", 2.0, None)
    phases = tmp_path / "phases.yaml"  # parameters that no phase uses are not the user's to remove
    phases.write_text(
        "original_max_position_embeddings: 64\nphases:\n  - {seq_length: 64, rope_type: yarn, "
        "rope_scaling_factor: 2}\n"
    )
    other = load_config(["--config", str(phases), *taking])
    assert other._unused_rope_parameters() == [] and other.model.rope_low_freq_factor is None
    assert other.schedule.phases[0].with_rope(other.model).rope.factor == 2.0
    assert (
        load_config(["--save", str(tmp_path / "new"), "--use-checkpoint-args"]).model
        == Config().model
    )


@pytest.mark.parametrize(
    "kind, files, expected",
    [
        ("SentencePieceTokenizer", ["spm.model"], "tokenizer/spm.model"),
        ("HuggingFaceTokenizer", ["tokenizer.json"], "tokenizer"),
        ("HuggingFaceTokenizer", ["tokenizer.json", "tokenizer.model"], "tokenizer"),
    ],
)
def test_use_checkpoint_args_takes_the_tokenizer_where_none_is_given(
    tmp_path, monkeypatch, kind, files, expected
):
    # The files are no tokenizer, and no manifest has their checksums.
    monkeypatch.setattr("pretrain.checkpointing.damage.verify_small_files", lambda _: [])
    choice = " --tokenizer-ids-from AutoTokenizer" if kind == "HuggingFaceTokenizer" else ""
    stored = asked(f"--no-mock-data --tokenizer-type {kind} --tokenizer-model /gone{choice}")
    root = published_run(tmp_path, stored)
    folder = next((tmp_path / "load").glob("iter_*"))
    (folder / "tokenizer").mkdir(exist_ok=True)
    for name in files:
        (folder / "tokenizer" / name).write_text("a")

    def taken(*flags):
        data = load_config([*flags, "--use-checkpoint-args"]).data
        return data.tokenizer_type, data.tokenizer_model, data.tokenizer_ids_from

    ids_from = stored.data.tokenizer_ids_from
    # Beside the weights, wherever the file was; a restart keeps a path where something is.
    assert taken("--load", root) == (kind, str(folder / expected), ids_from)
    assert taken("--pretrained-checkpoint", root) == (kind, str(folder / expected), ids_from)
    assert taken("--save", root) == (kind, str(folder / expected), ids_from)
    present = tmp_path / "present"
    present.mkdir()
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("/gone", str(present)))
    assert taken("--save", root) == (kind, str(present), ids_from)
    # One that is given is given whole, and mock data has none.
    given = ("SentencePieceTokenizer", "mine.model", None)
    assert taken("--load", root, "--tokenizer-model", "mine.model") == given
    assert taken("--load", root, "--mock-data") == ("SentencePieceTokenizer", None, None)


def test_use_checkpoint_scheduler_takes_its_learning_rate(tmp_path):
    stored = asked("--weight-decay 0.3 --clip-grad 5")
    flags = (
        f"--load {published_run(tmp_path, stored)} --use-checkpoint-opt_param-scheduler --lr 5 "
        "--weight-decay 9 --lr-decay-style constant --train-iters 300 --clip-grad 5 "
        "--lr-decay-iters 7"
    )
    config = asked(flags)
    assert config.optimizer.lr == 1e-3 and config.optimizer.weight_decay == 0.3
    assert stopping(config, stored) == []
    phases = resolve_phases(config)
    rate = LearningRate.make(config.optimizer, phases)
    theirs = LearningRate.make(stored.optimizer, resolve_phases(stored))
    assert [rate.at(at, 1.0, 0.1) for at in range(0, 25600, 256)] == [
        theirs.at(at, 1.0, 0.1) for at in range(0, 25600, 256)
    ]
    assert rate.at(27000, 1.0, 0.1) == 0.1, (
        "the decay ends where the checkpoint's run would have ended"
    )
    assert config.validate() == []
    assert load_config(spell(["--finetune", *flags.split()])).optimizer.lr == 5, (
        "a new run has its own"
    )


def test_the_contract_survives_the_stored_yaml(tmp_path):
    config = asked("--accept-changes data optimization --skip-data 1K:2K")
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert changes(config, read_config_yaml(str(tmp_path / "config.yaml"))) == []


def test_another_spelling_of_a_path_is_no_change(tmp_path, monkeypatch):
    """Relative, with a detour and in full; weights as 0.7 and 0.70."""
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path)
    stored = asked("--save run --load run --tensorboard-dir tb --data-cache-path cache --split 1")
    stored.data.data_path = ["0.7", "web", "0.3", "code[64Ki:]"]
    stored.data.valid_data_path = ["held=web/valid", "math=m"]
    run = asked(
        f"--save {here}/run --load ./run/ --tensorboard-dir x/../tb --data-cache-path "
        f"{here}/cache --split 1"
    )
    run.data.data_path = ["0.70", f"{here}/web", ".3", "./code[64Ki:]"]
    run.data.valid_data_path = [f"held={here}/web/valid", "math=./m"]
    assert [change.name for change in changes(run, stored, clock=512)] == []


@pytest.mark.parametrize(
    "name, theirs, ours",
    [
        ("data_path", ["web"], ["other"]),
        ("data_path", ["0.7", "web", "0.3", "code"], ["0.6", "web", "0.4", "code"]),
        ("data_path", ["web[64Ki:]"], ["web"]),
        ("data_path", ["a", "b"], ["a"]),
        ("valid_data_path", ["held=a"], ["kept=a"]),
        ("valid_data_path", ["held=a"], ["a"]),
        ("tokenizer_model", "tokenizer", "elsewhere/tokenizer"),
        ("save", "run", None),
        ("name", "a", "./a"),
    ],
)
def test_another_place_is_a_change(name, theirs, ours):
    assert not is_same(name, theirs, ours)


def test_a_phases_data_under_another_spelling_is_no_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stored = phased({"name": "a", "data_path": ["web"]})
    run = phased({"name": "a", "data_path": [str(tmp_path / "web")]})
    assert [change.name for change in changes(run, stored, clock=512)] == []


def test_every_setting_that_names_files_is_known_as_one():
    """By their names and explanations; a new one is declared with is_path=True."""
    named = {name for name in field_table() if name.endswith(("_path", "_dir"))}
    assert named | {"save", "load", "pretrained_checkpoint", "tokenizer_model"} == path_settings()


def test_qk_clip_is_optimization_and_its_numbers_matter_only_with_it():
    assert stopping(asked("--qk-clip-threshold 50")) == []
    clipped = asked("--qk-clip")
    assert stopping(asked("--qk-clip --qk-clip-alpha 0.5"), clipped) == []
    assert stopping(asked("--qk-clip --qk-clip-threshold 50"), clipped) == [
        ("qk_clip_threshold", "optimization")
    ]
    assert stopping(clipped) == [("qk_clip", "optimization")]


@pytest.mark.parametrize(
    "flags, switch",
    [
        (
            "--muon-momentum 0.9 --no-muon-nesterov --muon-num-ns-steps 6 --muon-per-head "
            "--muon-coefficient-type quintic --muon-scale-mode shape_scaling "
            "--muon-extra-scale-factor 1 --muon-fp32-matmul-prec highest",
            "--optimizer muon",
        ),
        ("--qk-clip-threshold 50 --qk-clip-alpha 0.4", "--qk-clip"),
        (
            "--mup-base-hidden-size 64 --mup-base-ffn-hidden-size 88 --mup-base-head-dim 16 "
            "--mup-base-num-attention-heads 2 --mup-attn-scale-power 0.5",
            "--use-mup",
        ),
        ("--qk-layernorm-scope all_heads", "--qk-layernorm"),
        ("--window-rotary-base 1e6", "--window-size 7 0 --window-attn-skip-freq 2"),
        ("--keep-last 5 --hf-export-dtype float32", "--save run --hf-export-phase-ends"),
    ],
)
def test_a_setting_that_does_nothing_in_either_run_is_no_change(flags, switch):
    assert changes(asked(flags), asked()) == []
    names = [word[2:].replace("-", "_") for word in flags.split() if word.startswith("--")]
    found = [change.name for change in changes(asked(switch, flags), asked(switch))]
    assert sorted(found) == sorted(name.removeprefix("no_") for name in names)


def test_a_split_of_data_that_is_not_split_is_no_change():
    def trained_whole(*flags: str) -> Config:
        config = asked(*flags)
        config.data.train_data_path = config.data.data_path
        config.data.data_path = []
        return config

    assert changes(trained_whole("--split 90,10,0"), trained_whole()) == []


def test_a_rope_that_no_layer_has_is_no_change():
    rope = "--rope-type linear --rope-scaling-factor 4 --rotary-base 5e5"
    without = "--no-rope-freq 1"
    assert stopping(asked(without, rope), asked(without)) == []
    half = "--no-rope-freq 2"
    assert stopping(asked(half, rope), asked(half)) == [("phase 'main': rope", "optimization")]


MUP = "--use-mup --mup-base-hidden-size 64 --mup-base-head-dim 32"


@pytest.mark.parametrize(
    "flags, forbidden, accepted",
    [
        # Other factors on logits and scores: another function of the same weights.
        ("", ["use_mup", "mup_base_hidden_size", "mup_base_head_dim"], []),
        ("--use-mup --mup-base-head-dim 32", ["mup_base_hidden_size"], []),
        (MUP.replace("64", "128"), ["mup_base_hidden_size"], []),
        (MUP.replace("32", "16"), ["mup_base_head_dim"], []),
        (f"{MUP} --mup-attn-scale-power 0.5", ["mup_attn_scale_power"], []),
        # Other learning rates alone.
        (f"{MUP} --mup-base-ffn-hidden-size 88", [], ["mup_base_ffn_hidden_size"]),
        (f"{MUP} --mup-base-num-attention-heads 4", [], ["mup_base_num_attention_heads"]),
    ],
)
def test_other_mup_settings_stop_a_run(flags, forbidden, accepted):
    """No flag accepts what gives the checkpoint's weights another meaning."""
    found = changes(asked(flags), asked(MUP))

    def refused(*kinds: str) -> list[str]:
        lines = refusals(found, CheckpointConfig(accept_changes=list(kinds)))
        return [line.split(":")[0] for line in lines]

    assert refused() == [*forbidden, *accepted]
    assert refused("data", "tokenizer", "optimization") == forbidden


def test_a_base_head_size_counts_where_scores_or_learning_rates_take_it():
    """With --softmax-scale it is still a part of the base's width, where that has heads."""
    given = "--use-mup --mup-base-hidden-size 64 --softmax-scale 0.1"
    heads = f"{given} --mup-base-num-attention-heads 2"
    for flags, expected in ((given, []), (heads, ["mup_base_head_dim"])):
        other = asked(f"{flags} --mup-base-head-dim 16")
        stored = asked(f"{flags} --mup-base-head-dim 32")
        assert [name for name, _ in stopping(other, stored)] == expected
        ratios = {each.model.fan_in_ratio("heads") for each in (other, stored)}
        assert (len(ratios) > 1) == bool(expected)


def test_the_base_width_that_is_the_default_may_be_written_out():
    assert changes(asked("--use-mup --mup-base-hidden-size 256"), asked("--use-mup")) == []
