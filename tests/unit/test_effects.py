"""A setting that is given and cannot act is warned of; one that can, or was not given, is not."""

import dataclasses
from pathlib import Path

import pytest

from pretrain.checkpointing.start import Start
from pretrain.config.config_yaml import dump_yaml, read_config_yaml
from pretrain.config.effects import CONDITIONS, NEEDS_SIZE, effect_warnings
from pretrain.config.flat import field_table
from pretrain.config.load import load_config
from pretrain.config.phase_config import PhaseConfig
from pretrain.config.replaced_by_phases import OTHER_RULES, REPLACED_AS, STILL_ACTS
from pretrain.plan import make_plan
from pretrain.plan_settings import with_data_args
from pretrain.plan_warnings import warnings_about

RUN = (
    "--model tiny --data-path prefix --tokenizer-model model --seq-length 128 "
    "--global-batch-tokens 512 --train-tokens 1000"
).split()
MOCK = (
    "--model tiny --mock-data --vocab-size 100 --seq-length 128 --global-batch-tokens 512 "
    "--train-tokens 1000"
).split()
# flag -> (what is missing, what makes it act)
CASES = {
    "--qk-clip-alpha 0.4": ("without --qk-clip", "--qk-clip"),
    "--qk-clip-threshold 50": ("without --qk-clip", "--qk-clip"),
    "--lr-wsd-decay-style linear": ("without --lr-decay-style WSD", "--lr-decay-style WSD"),
    "--lr-wsd-decay-iters 5": ("without --lr-decay-style WSD", "--lr-decay-style WSD"),
    "--lr-wsd-decay-samples 5": ("without --lr-decay-style WSD", "--lr-decay-style WSD"),
    "--lr-wsd-decay-tokens 5": ("without --lr-decay-style WSD", "--lr-decay-style WSD"),
    "--lr-decay-iters 5 --lr-decay-style constant": (
        "without a style that decays",
        "--lr-decay-style linear",
    ),
    "--lr-decay-samples 5 --lr-decay-style constant": (
        "without a style that decays",
        "--lr-decay-style linear",
    ),
    "--lr-decay-tokens 5 --lr-decay-style constant": (
        "without a style that decays",
        "--lr-decay-style linear",
    ),
    "--min-lr 1e-5 --lr-decay-style constant": (
        "without a style that decays",
        "--lr-decay-style cosine",
    ),
    "--lr-warmup-init 1e-6": ("without a warmup", "--lr-warmup-tokens 100"),
    "--lr-warmup-init 1e-6 --lr-warmup-iters 0": ("without a warmup", "--lr-warmup-iters 1"),
    "--muon-momentum 0.9": ("without --optimizer muon", "--optimizer muon"),
    "--muon-nesterov": ("without --optimizer muon", "--optimizer muon"),
    "--muon-num-ns-steps 4": ("without --optimizer muon", "--optimizer muon"),
    "--muon-coefficient-type quintic": ("without --optimizer muon", "--optimizer muon"),
    "--muon-scale-mode unit_rms_norm": ("without --optimizer muon", "--optimizer muon"),
    "--muon-extra-scale-factor 1": ("without --optimizer muon", "--optimizer muon"),
    "--muon-fp32-matmul-prec highest": ("without --optimizer muon", "--optimizer muon"),
    "--muon-per-head": ("without --optimizer muon", "--optimizer muon"),
    "--eval-interval 5 --eval-iters 0": ("without --eval-iters above 0", "--eval-iters 1"),
    "--eval-seq-lengths 64 --eval-iters 0": ("without --eval-iters above 0", "--eval-iters 1"),
    "--valid-data-path p --split 1 --eval-iters 0": (
        "without --eval-iters above 0",
        "--eval-iters 1",
    ),
    "--eval-context-gain --eval-iters 0": ("without --eval-iters above 0", "--eval-iters 1"),
    "--context-gain-cut 64 --no-eval-context-gain": (
        "without --eval-context-gain",
        "--eval-context-gain",
    ),
    "--context-gain-cut 64 --eval-iters 0": ("without --eval-iters above 0", "--eval-iters 1"),
    "--context-gain-documents 4 --no-eval-context-gain": (
        "without --eval-context-gain",
        "--eval-context-gain",
    ),
    "--eval-passkey-lengths 64 --eval-iters 0": ("without --eval-iters above 0", "--eval-iters 1"),
    "--eval-passkey-depths 0.5": ("without --eval-passkey-lengths", "--eval-passkey-lengths 64"),
    "--eval-passkey-trials 3": ("without --eval-passkey-lengths", "--eval-passkey-lengths 64"),
    "--wandb-exp-name x": ("without --wandb-project", "--wandb-project y"),
    "--wandb-entity x": ("without --wandb-project", "--wandb-project y"),
    "--profile-step-start 5": ("without --profile", "--profile --profile-dir d"),
    "--profile-step-end 15": ("without --profile", "--profile --profile-dir d"),
    "--profile-ranks 0 1": (
        "without --profile or --record-memory-history",
        "--profile --profile-dir d",
    ),
    "--profile-dir d": ("without --profile or --record-memory-history", "--profile"),
    "--memory-snapshot-path m": (
        "without --record-memory-history",
        "--record-memory-history",
    ),
    "--trackio-name n": ("without --trackio-project", "--trackio-project p"),
    "--wandb-save-dir x": ("without --wandb-project", "--wandb-project y"),
    "--save-interval 5": ("without --save", "--save folder"),
    "--save-interval-in-mins 5": ("without --save", "--save folder"),
    "--keep-last 5": ("without --save", "--save folder"),
    "--keep-every 5B --save x --keep-all": (", since --keep-all deletes no checkpoint", None),
    "--save-retain-interval 5": ("without --save", "--save folder"),
    "--keep-best 2 --save x --eval-iters 0": ("without --eval-iters above 0", None),
    "--keep-all": ("without --save", "--save folder"),
    "--async-save": ("without --save", "--save folder"),
    "--no-save-optim": ("without --save", None),
    "--hf-export-interval 4": ("without --save", "--save folder"),
    "--hf-export-phase-ends": ("without --save", "--save folder"),
    "--hf-export-phase-ends --save x --save-interval 2 --hf-export-interval 4": (
        ", since --hf-export-interval exports the ends of phases, too",
        None,
    ),
    "--hf-export-dir y --save x": ("without --hf-export-interval", "--hf-export-phase-ends"),
    "--hf-export-dtype float32 --save x": (
        "without --hf-export-interval or --hf-export-phase-ends",
        "--hf-export-phase-ends",
    ),
    "--max-rewinds 2": ("without --spike-policy rewind", "--spike-policy rewind --save folder"),
    "--rewind-skip-steps 2": (
        "without --spike-policy rewind",
        "--spike-policy rewind --save folder",
    ),
    "--cpu-offloading-host-memory 5": (", since nothing is offloaded", "--optimizer-cpu-offload"),
    "--recompute-modules mlp": (
        "without recompute_granularity selective",
        "--recompute-granularity selective",
    ),
    "--sequence-parallel": (
        "without tensor_model_parallel_size above 1",
        "--tensor-model-parallel-size 2",
    ),
    "--pipeline-schedule ZBV": (
        "without pipeline_model_parallel_size above 1",
        "--pipeline-model-parallel-size 2",
    ),
    "--num-virtual-stages-per-pipeline-rank 2": (
        "without pipeline_model_parallel_size above 1",
        "--pipeline-model-parallel-size 2",
    ),
    "--mup-base-hidden-size 64": ("without --use-mup", "--use-mup"),
    "--mup-base-ffn-hidden-size 176": ("without --use-mup", "--use-mup"),
    "--mup-base-num-attention-heads 2": ("without --use-mup", "--use-mup"),
    "--mup-base-head-dim 32": ("without --use-mup", "--use-mup"),
    "--mup-attn-scale-power 0.5": (
        "without --use-mup",
        "--use-mup --mup-base-hidden-size 64",
    ),
    "--mup-base-head-dim 32 --use-mup --softmax-scale 1": (
        ", since --softmax-scale says it",
        "--mup-base-num-attention-heads 2",  # a head's size tells the width of the base's output
    ),
    "--mup-attn-scale-power 0.5 --use-mup --mup-base-hidden-size 64 --softmax-scale 1": (
        ", since --softmax-scale says it",
        None,
    ),
    "--qk-layernorm-scope all_heads": ("without --qk-layernorm", "--qk-layernorm"),
    "--window-rotary-base 1e4": (
        ", since no layer has both a window and a rope",
        "--window-size 7 0",
    ),
    "--rotary-base 5e5 --window-size 7 0 --window-rotary-base 1e4": (
        ", since no layer uses this rope",
        "--window-attn-skip-freq 2",
    ),
    "--rope-type linear --rope-scaling-factor 2 --no-rope-freq 1": (
        ", since no layer uses this rope",
        None,
    ),
    "--no-rope-freq 0 0 0 0 0 0 0 0": (
        ", since it names no layer",
        None,
    ),
    "--cp-comm-type a2a": ("without context_parallel_size above 1", "--context-parallel-size 2"),
    "--hierarchical-context-parallel-sizes 2 2": (
        "without context_parallel_size above 1",
        "--context-parallel-size 4",
    ),
}


@pytest.mark.parametrize("flags", CASES)
def test_a_setting_that_cannot_act_is_named_and_one_that_can_is_not(flags):
    missing, mends = CASES[flags]
    name = flags.split()[0].removeprefix("--").replace("-", "_")
    found = effect_warnings(load_config([*RUN, *flags.split()]))
    assert len(found) == 1, found
    assert found[0].startswith(f"{name} = "), found
    assert f"has no effect{'' if missing.startswith(',') else ' '}{missing}" in found[0], found
    if mends:
        assert effect_warnings(load_config([*RUN, *flags.split(), *mends.split()])) == []


def test_files_have_no_effect_beside_synthetic_data():
    found = effect_warnings(
        load_config(
            [
                *MOCK,
                "--tokenizer-model",
                "m",
                "--tokenizer-type",
                "HuggingFaceTokenizer",
                "--data-cache-path",
                "c",
            ]
        )
    )
    assert [text.split(" = ")[0] for text in found] == [
        "data_cache_path",
        "tokenizer_type",
        "tokenizer_model",
    ]
    assert all(
        text.endswith("has no effect, since --mock-data reads no files") for text in found
    ), found


def test_a_null_tokenizer_has_no_file():
    found = effect_warnings(
        load_config([*RUN, "--tokenizer-type", "NullTokenizer", "--vocab-size", "9"])
    )
    assert found == ["tokenizer_model = model: has no effect, since a NullTokenizer has no files"]


def test_data_that_is_all_trained_on_is_not_split():
    found = effect_warnings(
        load_config("--model tiny --train-data-path p --tokenizer-model m --split 9,1".split())
    )
    assert found == ["split = 9,1: has no effect, since --train-data-path is not split"]


def test_every_condition_has_a_case():
    tested = {flags.split()[0].removeprefix("--").replace("-", "_") for flags in CASES}
    by_themselves = {
        "data_cache_path",
        "tokenizer_type",
        "tokenizer_model",
        "split",
        "rampup_batch_size",
        "step_batch_size_schedule",
        "global_batch_size",
        "global_batch_tokens",
    }
    assert tested | by_themselves == CONDITIONS.keys() | NEEDS_SIZE.keys()
    assert CONDITIONS.keys() | NEEDS_SIZE.keys() <= field_table().keys(), "settings that are gone"
    fields_of_phases = PhaseConfig.__dataclass_fields__.keys()
    assert set(OTHER_RULES) <= fields_of_phases, "fields that are gone"
    assert {key for keys in REPLACED_AS.values() for key in keys} <= fields_of_phases
    assert REPLACED_AS.keys() | set(STILL_ACTS) <= field_table().keys(), "settings that are gone"


def write(tmp_path, text: str, *flags: str):
    path = tmp_path / "run.yaml"
    path.write_text("model: llama3-8b\nmock_data: true\nvocab_size: 100\n" + text)
    return load_config(["--config", str(path), *flags])


def test_settings_of_the_run_that_every_phase_replaces_are_named(tmp_path):
    phases = (
        "phases:\n"
        "  - {name: a, seq_length: 64, train_tokens: 640, global_batch_tokens: 64,"
        " rotary_base: 1e6}\n"
        "  - {name: b, seq_length: 128, train_tokens: 640, global_batch_tokens: 128,"
        " rotary_base: 1e7}\n"
    )
    assert effect_warnings(write(tmp_path, phases)) == [], (
        "the preset's rotary_base is not the user's"
    )
    found = effect_warnings(
        write(tmp_path, "seq_length: 32\nrotary_base: 5e5\nglobal_batch_size: 2\n" + phases)
    )
    assert found == [
        "global_batch_size = 2: has no effect, since every phase gives a batch of its own",
        "seq_length = 32: has no effect, since every phase gives its own",
        "rotary_base = 500000: has no effect, since every phase gives its own",
    ]
    found = effect_warnings(
        write(tmp_path, "rotary_base: 5e5\n" + phases.replace(", rotary_base: 1e7", ""))
    )
    assert found == []


KEPT = "since a flag wins over the run's keys of the YAML file, not over a phase's"


@pytest.mark.parametrize(
    "flags, keys, keeping",
    [
        ("--data-path other", "data_path: [own]", "data_path = other"),
        ("--packing best_fit", "packing: concat", "packing = best_fit"),
        ("--no-document-masking", "document_masking: true", "document_masking = False"),
        ("--seq-length 64", "seq_length: 128", "seq_length = 64"),
        ("--global-batch-size 2", "global_batch_tokens: 512", "global_batch_size = 2"),
        ("--rampup-batch-size 1 1 8", "global_batch_tokens: 512", "rampup_batch_size = 1 1 8"),
        ("--rope-type default", "use_rope_scaling: true", "rope_type = default"),
        (
            "--no-recompute-activations",
            "recompute_granularity: full",
            "recompute_activations = False",
        ),
        (
            "--tensor-model-parallel-size 2 --no-sequence-parallel",
            "sequence_parallel: true",
            "sequence_parallel = False",
        ),
    ],
)
def test_a_flag_that_some_phases_do_not_take_names_them(tmp_path, flags, keys, keeping):
    phases = f"phases:\n  - {{name: a}}\n  - {{name: b, {keys}}}\n  - {{name: c, {keys}}}\n"
    found = effect_warnings(write(tmp_path, phases, *flags.split()))
    assert found == [f"{keeping}: phases 'b', 'c' each keep its own, {KEPT}"]
    one = phases.replace(f"name: c, {keys}", "name: c")
    found = effect_warnings(write(tmp_path, one, *flags.split()))
    assert found == [f"{keeping}: phase 'b' keeps its own, {KEPT}"]
    # The YAML file's own key of the run is what phases differ from.
    name, value = keeping.split(" = ")
    if " " not in value and "sequence" not in name:
        text = f"{name}: [{value}]\n" if name == "data_path" else f"{name}: {value}\n"
        assert effect_warnings(write(tmp_path, text + phases)) == []


def test_a_flag_that_phases_agree_with_needs_no_warning(tmp_path):
    phases = "phases:\n  - {name: a}\n  - {name: b, packing: best_fit, data_path: [x]}\n"
    flags = "--packing best_fit --data-path x --train-tokens 5 --lr-warmup-tokens 1".split()
    assert effect_warnings(write(tmp_path, phases, *flags)) == []


@pytest.mark.parametrize(
    "flags, keys",
    [
        ("--use-distributed-optimizer", "data_parallel_sharding_strategy: optim"),
        ("--recompute-activations", "recompute_granularity: selective"),
        ("--train-data-path x", "data_path: [x]"),
    ],
)
def test_a_flag_that_a_phase_says_in_other_words_needs_no_warning(tmp_path, flags, keys):
    phases = f"phases:\n  - {{name: a}}\n  - {{name: b, {keys}}}\n"
    found = effect_warnings(write(tmp_path, phases, *flags.split()))
    assert not [text for text in found if "keeps its own" in text]


def test_a_flag_that_every_phase_replaces_is_named_also_where_it_still_acts(tmp_path):
    phases = "phases:\n  - {name: a, data_path: [x]}\n  - {name: b, data_path: [y]}\n"
    found = effect_warnings(write(tmp_path, phases, "--data-path", "z"))
    assert found == [f"data_path = z: phases 'a', 'b' each keep its own, {KEPT}"]
    words = tmp_path / "words.txt"
    words.write_text("z")
    config = with_data_args(write(tmp_path, phases, "--data-args-path", str(words)))
    assert effect_warnings(config) == found
    off = phases.replace("data_path: [x]", "document_masking: true")
    off = off.replace("data_path: [y]", "document_masking: true")
    assert effect_warnings(write(tmp_path, off, "--no-document-masking")) == [
        "document_masking = False: has no effect, since every phase gives its own"
    ]


def test_a_phases_lowest_rate_without_a_decay_is_named(tmp_path):
    found = effect_warnings(
        write(tmp_path, "lr_decay_style: constant\nphases:\n  - {name: a, min_lr: 1e-6}\n")
    )
    assert found == [
        "phase 'a': min_lr = 1e-06: has no effect without a style that decays (--lr-decay-style)"
    ]


def test_what_a_default_or_a_switch_that_is_off_says_is_not_warned_of():
    assert effect_warnings(load_config(RUN)) == []
    off = "--no-sequence-parallel --min-lr 0 --lr-decay-style constant --lr-warmup-init 0"
    assert effect_warnings(load_config([*RUN, *off.split()])) == []


def test_the_record_of_what_was_given_is_no_setting(tmp_path):
    config = load_config([*RUN, "--num-workers", "4"])
    text = dump_yaml(config)
    assert "given:" not in text
    assert "num_workers" not in text
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert read_config_yaml(str(path)) == config


def test_the_loss_and_a_checkpoint_without_optimizer_are_warned_of():
    found = effect_warnings(
        load_config([*RUN, "--save", "x", "--no-save-optim", "--no-calculate-per-token-loss"])
    )
    assert [text.split(" = ")[0] for text in found] == ["no_save_optim", "calculate_per_token_loss"]


def test_mup_without_a_base_is_named():
    text = (
        "use_mup = True: nothing is scaled by width, since without --mup-base-hidden-size the base "
        "is as wide as the model itself"
    )
    assert effect_warnings(load_config([*RUN, "--use-mup"])) == [text]
    assert effect_warnings(load_config([*RUN, "--no-use-mup"])) == []
    for base in ("hidden-size 64", "ffn-hidden-size 176", "num-attention-heads 2", "head-dim 32"):
        flags = f"--use-mup --mup-base-{base}".split()
        assert effect_warnings(load_config([*RUN, *flags])) == [], flags


def test_a_fresh_start_has_no_optimizer_state_to_leave():
    plan = make_plan(load_config([*MOCK, "--no-load-optim"]), 1, only_print=True)
    assert (
        "no_load_optim = True: has no effect, since the run starts from no checkpoint"
        in warnings_about(plan)
    )
    plan = make_plan(load_config(MOCK), 1, only_print=True)
    assert not [text for text in warnings_about(plan) if "no_load_optim" in text]


def test_what_a_start_from_weights_leaves_without_effect_is_named():
    flags = ["--no-load-optim", "--init-method-std", "0.01"]
    plan = make_plan(load_config([*MOCK, *flags]), 1, only_print=True)
    from_weights = dataclasses.replace(plan, start=Start(Path("base"), weights_only=True))
    found = warnings_about(from_weights)
    assert "init_method_std = 0.01: has no effect, since the weights are those of base" in found
    assert "no_load_optim = True: has no effect, since the run starts from weights alone" in found
    assert not [text for text in warnings_about(plan) if "init_method_std" in text]


@pytest.mark.parametrize(
    "tokens, times", [(8, 64), (255, 2), (256, 2), (257, None), (512, None), (1000, None)]
)
def test_a_step_of_many_times_the_tokens_is_named(tokens, times):
    plan = make_plan(load_config([*MOCK, "--train-tokens", str(tokens)]), 1, only_print=True)
    found = [text for text in warnings_about(plan) if "one step has" in text]
    assert found == (
        [
            f"phase 'main': train_tokens = {tokens}: one step has 512, and is trained whole: "
            f"{times} times what was asked for"
        ]
        if times
        else []
    )


def warnings_of_balance(flags: str, world_size: int, balances: tuple[str | None, ...] = ()) -> list:
    config = load_config([*MOCK, *flags.split()])
    if balances:
        config.schedule.train_tokens = None
        config.schedule.phases = [
            PhaseConfig(name=f"p{number}", train_tokens=1024, balance=balance)
            for number, balance in enumerate(balances)
        ]
    found = warnings_about(make_plan(config, world_size, only_print=True))
    return [text for text in found if "data rank" in text]


def test_dealing_that_is_asked_for_without_a_rank_to_deal_to_is_named():
    text = "balance = deal: has no effect with one data rank and no pipeline"
    assert warnings_of_balance("--balance deal", 1) == [text]
    assert warnings_of_balance("--balance deal --tensor-model-parallel-size 2", 2) == [text]
    window = "balance = window: deals no samples with one data rank and no pipeline"
    assert warnings_of_balance("--balance window --packing best_fit", 1) == [window]
    # Not of the default, of what deals nothing, or where there is another rank or a pipeline.
    for flags, world_size in (
        ("", 1),
        ("--balance none", 1),
        ("--balance deal", 2),
        ("--balance deal --pipeline-model-parallel-size 2", 2),
    ):
        assert warnings_of_balance(flags, world_size) == [], flags


def test_dealing_of_a_phase_without_a_rank_to_deal_to_is_named():
    assert warnings_of_balance("", 1, ("deal", None, "none")) == [
        "phase 'p0': balance = deal: has no effect with one data rank and no pipeline"
    ]
    assert warnings_of_balance("--balance deal", 1, (None, "none")) == [
        "balance = deal: has no effect with one data rank and no pipeline"
    ]
    assert warnings_of_balance("", 2, ("deal", "window")) == []


def test_a_run_of_which_nothing_stays_is_warned_of(tmp_path):
    text = "there is no --save: nothing is saved, and whatever ends the run loses its state"
    plan = make_plan(load_config(MOCK), 1, only_print=True)
    assert warnings_about(plan).count(text) == 1
    plan = make_plan(load_config([*MOCK, "--save", str(tmp_path / "save")]), 1, only_print=True)
    assert text not in warnings_about(plan)
