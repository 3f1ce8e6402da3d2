"""Presets, YAML, flags, and every check of validate()."""

import dataclasses

import pytest

from model.presets import PRESETS
from pretrain.config.config import Config
from pretrain.config.config_yaml import dump_yaml, read_config_yaml
from pretrain.config.effects import effect_warnings
from pretrain.config.facts import problems_of
from pretrain.config.flags import spell
from pretrain.config.flat import field_table
from pretrain.config.load import load_config
from pretrain.planner.model_size import ModelSize
from pretrain.schedule.resolve import resolve_phases


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def test_flags_win_over_yaml_and_yaml_over_the_preset(tmp_path):
    path = write(tmp_path, "model: tiny\nnum_layers: 3\nlr: 3e-4\nseq_length: 8Ki\nbf16: on\n")
    config = load_config(["--config", path, "--lr", "8.0e-6", "--no-bf16"])
    assert (config.model.num_layers, config.model.hidden_size) == (3, 256)
    assert (config.optimizer.lr, config.schedule.seq_length, config.optimizer.bf16) == (
        8.0e-6,
        8192,
        False,
    )


def test_megatron_spellings():
    config = load_config(
        spell(
            [
                "--ds_sequence_parallel_size",
                "4",
                "--global-batch-size=8",
                "--seq_length",
                "1Mi",
                "--data-path",
                "some/prefix",
                "--tokenizer_type",
                "NullTokenizer",
            ]
        )
    )
    assert config.layout.context_parallel_size == 4 and config.schedule.global_batch_size == 8
    assert config.schedule.seq_length == 1 << 20 and config.data.data_path == ["some/prefix"]


@pytest.mark.parametrize(
    "flags, level, warnings",
    [
        ("--recompute-activations", "selective", []),
        ("--recompute-granularity selective --recompute-modules mlp core_attn", "selective", []),
        (
            "--recompute-granularity selective --recompute-modules core_attn",
            None,
            ["nothing is computed again"],
        ),
        (
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
            "full",
            [],
        ),
        (
            "--recompute-granularity attention_kept --cpu-offloading --cpu-offloading-num-layers 4",
            "attention_kept",
            [],
        ),
        ("--recompute-granularity none --no-cpu-offloading", None, []),
        (
            "--recompute-granularity full --recompute-modules mlp",
            "full",
            ["has no effect without recompute_granularity"],
        ),
    ],
)
def test_megatrons_memory_flags(flags, level, warnings, tmp_path):
    config = load_config(
        f"--model tiny --mock-data --vocab-size 100 --seq-length 8 --global-batch-size 1 "
        f"--train-iters 1 {flags}".split()
    )
    assert (
        problems_of(config) == []
        and resolve_phases(config)[0].memory.recompute_granularity == level
    )
    found = effect_warnings(config)
    assert len(found) == len(warnings) and all(
        part in text for part, text in zip(warnings, found, strict=True)
    )
    assert load_config(["--config", write(tmp_path, dump_yaml(config))]).model == config.model


def test_megatrons_switch_for_recompute_must_agree():
    config = load_config(
        "--model tiny --recompute-activations --recompute-granularity full".split()
    )
    assert any(
        text.startswith(
            "recompute_activations = True: means recompute_granularity selective, but that is full"
        )
        for text in config.validate()
    )


def test_yaml_values_are_read_by_the_type_of_their_field(tmp_path):
    path = write(
        tmp_path,
        "model: tiny\nlr: 8.0e-6\ndocument_masking: off\nnum_query_groups: null\nphases:\n"
        "  - {name: a, seq_length: 64Ki, rotary_base: 5.0e8}\n",
    )
    config = load_config(["--config", path])
    assert config.optimizer.lr == 8.0e-6 and config.data.document_masking is False
    assert config.model.num_query_groups is None
    assert (
        config.schedule.phases[0].seq_length == 65536
        and config.schedule.phases[0].rotary_base == 5.0e8
    )


def test_all_yaml_errors_at_once(tmp_path):
    path = write(
        tmp_path,
        "num_layrs: 3\nlr: fast\nbf16: maybe\nseq_length: 8q\nlr_decay_style: wsd\n"
        "seed: [1, 2]\nphases:\n  - {nam: x}\n",
    )
    with pytest.raises(ValueError) as error:
        load_config(["--config", path])
    text = str(error.value)
    for part in (
        "num_layrs: no such setting. Fix: did you mean num_layers?",
        "lr = 'fast': must be a number",
        "bf16 = 'maybe': must be true or false",
        "'8q' is no token count",
        "lr_decay_style = 'wsd': must be one of constant, linear, cosine, inverse-square-root, WSD",
        "seed = ['1', '2']: must be a single value",
        "phases[0]: nam: no such setting",
    ):
        assert part in text
    assert len(text.splitlines()) == 7 and all(path in line for line in text.splitlines())


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--seq-lenght", "8"], "--seq-lenght: no such flag. Fix: did you mean --seq-length?"),
        (["--model", "lama3-8b"], "did you mean llama3-8b?"),
        (["--config", "missing.yaml"], "config = missing.yaml: no such file"),
        (["--config"], "--config : takes one value, got 0"),
        (["--lr", "1", "2"], "--lr 1 2: takes one value, got 2"),
        (["--svae", "x"], "--svae: no such flag. Fix: did you mean --save?"),
        (["stray"], "stray: no such flag. Fix: see --help."),
        (
            ["u/s.yaml", "--save", "x"],
            "u/s.yaml: no such flag. Fix: did you mean --config u/s.yaml?",
        ),
        (["my run.yml"], "my run.yml: no such flag. Fix: did you mean --config 'my run.yml'?"),
        (["-save", "x"], "-save: no such flag. Fix: did you mean --save?"),
        (
            ["--accept-changes", "optimization", "--accept-changes", "data"],
            "--accept-changes data: is given twice. Fix: give it once; the first was "
            "--accept-changes optimization.",
        ),
        (
            ["--data-path", "a b", "--lr", "1", "--data-path=c"],
            "--data-path c: is given twice. Fix: give it once; the first was --data-path 'a b'.",
        ),
        (["--lr=--x"], "command line: lr = '--x': must be a number"),
        (["--phases", "x"], "--phases: no such flag"),
        (["--lr", "fast"], "command line: lr = 'fast': must be a number"),
        (["--no-lr", "1"], "--no-lr: no such flag"),
        (["--no-bf16", "true"], "--no-bf16 true: takes no value. Fix: --bf16 or --no-bf16"),
        (["--bf16", "perhaps"], "bf16 = 'perhaps': must be true or false"),
    ],
)
def test_bad_flags(argv, message):
    with pytest.raises(ValueError) as error:
        load_config(argv)
    assert message in str(error.value)


def test_bad_yaml_files(tmp_path):
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(["--config", write(tmp_path, "a: [1\n")])
    with pytest.raises(ValueError, match="must hold `key: value` lines"):
        load_config(["--config", write(tmp_path, "- a\n")])
    with pytest.raises(ValueError, match="phases: the list is empty"):
        load_config(["--config", write(tmp_path, "phases: []\n")])
    with pytest.raises(ValueError, match="lr: is given twice, in lines 1 and 3"):
        load_config(["--config", write(tmp_path, "lr: 1\nseed: 2\nlr: 3\n")])
    with pytest.raises(ValueError, match="settings are not nested"):
        load_config(["--config", write(tmp_path, "model:\n  num_layers: 2\n")])
    with pytest.raises(ValueError, match="phases: must be a list of mappings"):
        load_config(["--config", write(tmp_path, "phases: 3\n")])


def test_saved_yaml_reads_back_the_same(tmp_path):
    path = write(
        tmp_path, "model: qwen3-8b\nlr: 1e-5\nphases:\n  - {name: a, seq_length: 4Ki, lr: 2e-5}\n"
    )
    config = load_config(["--config", path, "--train-tokens", "1B"])
    saved = write(tmp_path, dump_yaml(config))
    assert read_config_yaml(saved) == config


@pytest.mark.parametrize(
    "name, billions, vocabulary",
    [
        ("tiny", 0.0101, 8192),
        ("125m", 0.124, 50257),
        ("1b", 1.236, 128256),
        ("llama3-8b", 8.03, 128256),
        ("llama3-70b", 70.55, 128256),
        ("qwen3-8b", 8.19, 151936),
    ],
)
def test_presets_have_the_published_sizes(name, billions, vocabulary):
    config = load_config(["--model", name]).model
    assert problems_of(config) == []
    assert ModelSize(config, vocabulary).num_parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert set(PRESETS[name]) <= {field.name for field in dataclasses.fields(config)}


CHECKS = [
    ("num_layers", 0, "num_layers = 0: must be at least 1"),
    ("hidden_size", -1, "hidden_size = -1: must be at least 1"),
    ("swiglu", False, "swiglu = False: only True is built"),
    ("attention_dropout", 0.1, "attention_dropout = 0.1: only 0.0 is built"),
    ("rotary_percent", 0.5, "rotary_percent = 0.5: only 1.0 is built"),
    ("disable_bias_linear", False, "disable_bias_linear = False: only True"),
    ("norm_epsilon", 0.0, "norm_epsilon = 0.0: must be above 0"),
    (
        "num_query_groups",
        3,
        "num_query_groups = 3: must divide num_attention_heads = 8. Fix: one of [1, 2, 4, 8]",
    ),
    (
        "device_memory_gib",
        0.0,
        "device_memory_gib = 0.0: must be above 0. Fix: give the GiB of one device",
    ),
    ("num_attention_heads", 5, "must be a multiple of num_attention_heads = 5"),
    ("kv_channels", 3, "kv_channels = 3: rotary embedding turns pairs"),
    ("group_query_attention", False, "group_query_attention = False: but num_query_groups = 4"),
    ("tensor_model_parallel_size", 0, "tensor_model_parallel_size = 0: must be at least 1"),
    (
        "data_parallel_sharding_strategy",
        "optim_grads",
        "means --data-parallel-sharding-strategy optim, but that is",
    ),
    ("use_distributed_optimizer", False, "the optimizer is always sharded"),
    ("lr", 0.0, "lr = 0.0: must be above 0"),
    ("lr", float("nan"), "lr = nan: must be a finite number"),
    ("min_lr", 1.0, "min_lr = 1.0: must not exceed lr"),
    ("clip_grad", -1.0, "clip_grad = -1.0: must be at least 0"),
    ("adam_beta2", 1.0, "adam_beta2 = 1.0: must be in [0, 1)"),
    ("micro_batch_size", 0, "micro_batch_size = 0: must be above 0"),
    ("save_interval", 0, "save_interval = 0: must be above 0"),
    ("save_interval_in_mins", 0.0, "save_interval_in_mins = 0.0: must be above 0"),
    (
        "keep_last",
        0,
        "keep_last = 0: must be at least 1. Fix: give 1 or more; --keep-all deletes none",
    ),
    ("keep_every", 0, "keep_every = 0: must be above 0"),
    ("keep_best", -1, "keep_best = -1: must be at least 0"),
    ("save_retain_interval", 0, "save_retain_interval = 0: must be above 0"),
    ("hf_export_interval", 0, "hf_export_interval = 0: must be above 0"),
    (
        "hf_export_interval",
        5,
        "hf_export_interval = 5: exports checkpoints of these steps, and save_interval is not "
        "given. Fix: give it, or --hf-export-phase-ends alone.",
    ),
    ("fp64", True, "bf16 = True: cannot be combined with fp64"),
    ("accumulate_allreduce_grads_in_fp32", False, "gradients are always reduced in fp32"),
    ("lr_decay_iters", 0, "lr_decay_iters = 0: must be above 0"),
    ("lr_wsd_decay_tokens", -512, "lr_wsd_decay_tokens = -512: must be above 0"),
    ("lr_warmup_iters", -1, "lr_warmup_iters = -1: must be at least 0"),
    ("attention_dropout", float("inf"), "only 0.0 is built. Fix: remove it."),
    ("weight_decay", float("inf"), "weight_decay = inf: must be a finite number"),
    ("rotary_base", float("inf"), "rotary_base = inf: must be a finite number"),
    ("rope_scaling_factor", float("nan"), "rope_scaling_factor = nan: must be a finite number"),
    (
        "yarn_beta_slow",
        2.0,
        "yarn_beta_slow = 2.0: rope_type default does not use it. Fix: remove it",
    ),
    ("seed", 10**20, "must be below 2^63"),
    ("seed", -1, "seed = -1: must be at least 0"),
    ("max_skipped_steps", -3, "max_skipped_steps = -3: must be at least 0"),
    ("kv_channels", 0, "kv_channels = 0: must be at least 1"),
    (
        "recompute_modules",
        ["mlp", "layernorm"],
        "recompute_modules = layernorm: selective computes the MLP with its norm again and "
        "nothing else by itself. Fix: mlp or core_attn, or --recompute-granularity full or "
        "attention_kept",
    ),
    ("mlp_tiles", 0, "mlp_tiles = 0: must be at least 1. Fix: give 1 or more"),
    ("attention_head_chunks", -1, "attention_head_chunks = -1: must be at least 1"),
    ("loss_chunk_tokens", 0, "loss_chunk_tokens = 0: must be at least 1"),
    ("cpu_offloading_num_layers", -1, "cpu_offloading_num_layers = -1: must be at least 0"),
    (
        "cpu_offloading",
        True,
        "cpu_offloading = True: but cpu_offloading_num_layers = 0. Fix: remove one of them",
    ),
    ("finetune", True, "finetune = True: takes the weights of --load"),
    ("ckpt_step", 5, "ckpt_step = 5: chooses an iteration of --load"),
    (
        "use_checkpoint_opt_param_scheduler",
        True,
        "override_opt_param_scheduler = True: takes this run's learning",
    ),
    ("eval_interval", 0, "eval_interval = 0: must be above 0"),
    ("eval_seq_lengths", [64, 0], "eval_seq_lengths = 0: must be above 0"),
    ("eval_passkey_lengths", [-1], "eval_passkey_lengths = -1: must be above 0"),
    ("context_gain_cut", 0, "context_gain_cut = 0: must be above 0"),
    ("context_gain_documents", 0, "context_gain_documents = 0: must be above 0"),
    ("eval_passkey_trials", 0, "eval_passkey_trials = 0: must be above 0"),
    (
        "eval_passkey_depths",
        [0.5, 1.5],
        "eval_passkey_depths = 0.5 1.5: must be numbers from 0 to 1",
    ),
    (
        "eval_passkey_depths",
        [float("nan")],
        "eval_passkey_depths = nan: must be numbers from 0 to 1",
    ),
    ("eval_passkey_depths", [], "must be numbers from 0 to 1"),
    ("spike_policy", "rewind", "spike_policy = rewind: goes back to a checkpoint of --save"),
    ("spike_window", 4, "spike_window = 4: must be at least 8"),
    ("spike_threshold", 0.0, "spike_threshold = 0.0: must be above 0"),
    ("max_rewinds", 0, "max_rewinds = 0: must be at least 1"),
    ("rewind_skip_steps", 0, "rewind_skip_steps = 0: must be above 0"),
    (
        "check_weight_hash_across_dp_replicas_interval",
        0,
        "check_weight_hash_across_dp_replicas_interval = 0: must be above 0",
    ),
    ("replay_interval", 0, "replay_interval = 0: must be above 0"),
    ("train_samples", 5, "train_samples = 5, train_tokens = 1000: at most one of these"),
    (
        "global_batch_size",
        5,
        "global_batch_size = 5, global_batch_tokens = 512: at most one of these",
    ),
]


def test_an_export_interval_is_a_multiple_of_the_save_interval():
    config = valid_config()
    config.checkpoint.save_interval = 4
    config.checkpoint.hf_export_interval = 6
    assert problems_of(config) == [
        "hf_export_interval = 6: must be a multiple of save_interval = 4, whose steps are saved. "
        "Fix: for example 8."
    ]
    config.checkpoint.hf_export_interval = 8
    assert problems_of(config) == []


def test_exports_of_a_model_that_transformers_does_not_have_are_refused():
    config = valid_config()
    config.model.qk_layernorm = True
    config.model.add_qkv_bias = True
    assert problems_of(config) == []
    config.checkpoint.hf_export_phase_ends = True
    (problem,) = problems_of(config)
    assert problem.startswith("hf_export_phase_ends = True: cannot export, ") and "Fix: " in problem
    config.model.add_qkv_bias = False
    assert problems_of(config) == []


def valid_config() -> Config:
    config = load_config(
        "--override-opt-param-scheduler --use-distributed-optimizer --model tiny --bf16 "
        "--train-tokens 1000 --seq-length 128 --global-batch-tokens 512 --data-path prefix "
        "--tokenizer-model model".split()
    )
    assert problems_of(config) == []
    return config


@pytest.mark.parametrize(
    "name, value, message", CHECKS, ids=[f"{name}={value}" for name, value, _ in CHECKS]
)
def test_validate_reports(name, value, message):
    config = valid_config()
    setattr(getattr(config, field_table()[name][0]), name, value)
    problems = config.validate()
    assert any(message in problem for problem in problems), problems
    assert all(" Fix: " in problem for problem in problems)


def test_validate_reports_everything_at_once():
    config = valid_config()
    config.model.swiglu = False
    config.optimizer.clip_grad = -1.0
    config.optimizer.lr = -1.0
    assert len(config.validate()) == 4  # the fourth: min_lr now exceeds lr


def test_a_number_that_is_not_finite_is_not_held_against_its_bounds():
    config = valid_config()
    config.optimizer.lr = float("nan")
    problems = [problem for problem in config.validate() if problem.startswith("lr = ")]
    assert problems == ["lr = nan: must be a finite number. Fix: give one."]


@pytest.mark.parametrize(
    "name, value, kind",
    [("tokenizer_type", "NullTokenizer", "NullTokenizer"), ("mock_data", True, "mock_data")],
)
def test_a_passkey_needs_words(name, value, kind):
    config = valid_config()
    config.logging.eval_passkey_lengths = [1024, 4096]
    assert problems_of(config) == []
    setattr(config.data, name, value)
    message = f"eval_passkey_lengths = 1024 4096: asks in words, and {kind} has no text. Fix: "
    assert any(message in problem for problem in config.validate())


def test_lengths_of_evaluations_are_read_in_units():
    config = load_config("--eval-seq-lengths 1Ki 4Ki --eval-passkey-depths 0 0.25 1".split())
    assert config.logging.eval_seq_lengths == [
        1024,
        4096,
    ] and config.logging.eval_passkey_depths == [0, 0.25, 1]


@pytest.mark.parametrize(
    "key, fix", [("no_bf16", "bf16: false."), ("no-bf16", "bf16: false."), ("no_lr", "remove it.")]
)
def test_a_switch_that_a_file_turns_off_as_a_flag_would_is_answered(key, fix, tmp_path):
    path = write(tmp_path, f"{key}: true\n")
    with pytest.raises(ValueError) as error:
        load_config(["--config", path])
    assert str(error.value) == f"{path}: {key}: no such setting. Fix: {fix}"


@pytest.mark.parametrize(
    "key, fix",
    [
        (
            "clip_grad",
            "is a setting of the run, no phase has its own. Fix: write it beside `phases:`, for "
            "the whole run.",
        ),
        (
            "global_batch_size",
            "is a setting of the run, no phase has its own. Fix: global_batch_tokens.",
        ),
        ("train_iters", "is a setting of the run, no phase has its own. Fix: train_tokens."),
        ("learning_rate", "no such setting. Fix: lr."),
        ("seq_lenght", "no such setting. Fix: did you mean seq_length?"),
        ("num_experts", "Megatron-LM's, not here: mixture of experts is not built. Fix: "),
        ("num_workers", "Megatron-LM's, says nothing of a phase. Fix: remove it."),
    ],
)
def test_a_key_that_no_phase_has_is_answered(key, fix, tmp_path):
    path = write(tmp_path, f"phases:\n  - {{name: a, {key}: 1}}\n")
    with pytest.raises(ValueError) as error:
        load_config(["--config", path])
    assert str(error.value).startswith(f"{path}: phases[0]: {key}: {fix}")
