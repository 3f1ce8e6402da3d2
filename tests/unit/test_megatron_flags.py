"""Every flag of Megatron-LM gets an answer that names it, and no near miss does harm."""

import difflib
import re
from pathlib import Path

import pytest

from pretrain.config import megatron_flags
from pretrain.config.effects import effect_warnings
from pretrain.config.flags import spell
from pretrain.config.flat import field_table
from pretrain.config.load import load_config
from pretrain.schedule.resolve import resolve_phases

ARGUMENTS = Path(__file__).with_name("megatron_arguments.txt")
RUN = (
    "--model tiny --mock-data --vocab-size 100 --seq-length 8 --global-batch-size 1 --train-iters 1"
).split()


def arguments() -> list[tuple[str, str]]:
    """(flag, how many values it takes: none, = one, + several) of each argument of Megatron-LM."""
    lines = ARGUMENTS.read_text().splitlines()
    return [
        re.fullmatch(r"(.+?)([=+]?)", line).groups() for line in lines if not line.startswith("#")
    ]


def answers(*words: str) -> tuple[str, list[str]]:
    """(the error, the warnings) of a run with these words on its command line."""
    try:
        config = load_config(spell([*RUN, *words]))
    except ValueError as error:
        return str(error), []
    return "", effect_warnings(config)


def is_ours(flag: str) -> bool:
    name = flag.removeprefix("--").replace("-", "_")
    return name in field_table() or name.removeprefix("no_") in field_table()


def test_every_argument_of_megatron_is_a_setting_or_has_an_answer():
    unanswered = [
        flag for flag, _ in arguments() if not is_ours(flag) and megatron_flags.find(flag) is None
    ]
    assert not unanswered, unanswered
    assert len(arguments()) > 900, "the list of arguments is whole"


def test_no_argument_of_megatron_is_called_unknown_or_answered_by_a_guess():
    """Each alone, with as many values as it takes, in both spellings."""
    for flag, values in arguments():
        words = {"": [], "=": ["7"], "+": ["7", "8"]}[values]
        for spelled in (flag, "--" + flag[2:].replace("-", "_")):
            error, _ = answers(spelled, *words)
            assert "no such flag" not in error, f"{spelled}: {error}"
            assert "did you mean" not in error, f"{spelled}: {error}"


def test_what_is_refused_or_ignored_is_called_by_its_name():
    for flag, values in arguments():
        if is_ours(flag):
            continue
        words = {"": [], "=": ["other"], "+": ["other", "words"]}[values]
        given = megatron_flags.find(spell([flag])[0], " ".join(words) or "true")
        said = given.problem or given.warning
        if given.answer.kind == "translated" or given.answer.accepts_value(given.value):
            assert said is None, f"{flag}: {said}"
        else:
            assert said.startswith(spell([flag])[0]), f"{flag}: {said}"
            assert "Megatron-LM's" in said, f"{flag}: {said}"


@pytest.mark.parametrize(
    "flag, harm",
    [
        ("--num-experts", "--num-layers"),
        ("--fp16", "--fp64"),
        ("--skip-train", "--skip-data"),
        ("--no-rope-fusion", "--norm-epsilon"),
    ],
)
def test_harmful_guesses_of_the_past_are_gone(flag, harm):
    """Each was answered by "did you mean `harm`?", which difflib finds by its default cutoff."""
    known = ["--" + name.replace("_", "-") for name in field_table()]
    assert difflib.get_close_matches(flag, known, 1) != [], (
        "the old suggestion is still there to be avoided"
    )
    error, warnings = answers(flag)
    assert harm + "?" not in error, error
    assert harm not in " ".join(warnings), warnings


@pytest.mark.parametrize(
    "words, message",
    [
        ("--fp16", "--fp16: Megatron-LM's, not here: training in fp16 is not built. Fix: --bf16."),
        (
            "--num-experts 8",
            "--num-experts = 8: Megatron-LM's, not here: mixture of experts is not built. Fix:",
        ),
        (
            "--expert-model-parallel-size 2",
            "--expert-model-parallel-size = 2: Megatron-LM's, here it is always 1: mixture",
        ),
        (
            "--ckpt-format torch",
            "--ckpt-format = torch: Megatron-LM's, here it is always torch_dist: checkpoints are",
        ),
        (
            "--recompute-method block",
            "--recompute-method = block: Megatron-LM's, here it is always uniform: ",
        ),
        (
            "--recompute-num-layers 4",
            "--recompute-num-layers = 4: Megatron-LM's, here it is always 1: ",
        ),
        (
            "--cpu-offloading-weights",
            "--cpu-offloading-weights: Megatron-LM's, not here: weights stay on the device",
        ),
        (
            "--create-attention-mask-in-dataloader",
            "not here: there is no mask, documents are cu_seqlens",
        ),
        (
            "--dataloader-type cyclic",
            "--dataloader-type = cyclic: Megatron-LM's, here it is always single: ",
        ),
        ("--exit-signal SIGUSR2", "these save and stop, and any other signal kills. Fix: let"),
        ("--override-ckpt-iteration 5", "the clock of a checkpoint is its own"),
        (
            "--no-use-mcore-models",
            "--no-use-mcore-models: Megatron-LM's, here it is always true: the model is",
        ),
        (
            "--test-data-path a b",
            "--test-data-path = a b: Megatron-LM's, not here: nothing is measured on a test set",
        ),
        (
            "--moe-router-topk 2 --no-lr",
            "--moe-router-topk = 2: Megatron-LM's, not here: mixture of experts",
        ),
        (
            "--moe-router-topk 2 --no-lr",
            "--no-lr: no such flag. Fix: leave it out; --lr takes a value.",
        ),
    ],
)
def test_what_is_not_here_is_refused_by_name(words, message):
    error, _ = answers(*words.split())
    assert message in error, error


@pytest.mark.parametrize(
    "words",
    [
        "--no-gradient-accumulation-fusion",
        "--no-bias-swiglu-fusion",
        "--no-rope-fusion",
        "--no-persist-layer-norm",
        "--dataloader-type single",
        "--tensorboard-log-interval 1",
        "--check-for-nan-in-loss-and-grad",
        "--expert-model-parallel-size 1",
        "--local-rank 3",
        "--local_rank=3",
        "--use-mcore-models",
        "--no-one-logger",
        "--transformer-impl transformer_engine",
        "--ckpt-format torch_dist",
        "--attention-softmax-in-fp32",
        "--overlap-grad-reduce --overlap-param-gather",
        "--no-create-attention-mask-in-dataloader",
        "--exit-signal SIGTERM",
        "--exit-signal SIGUSR1",
        "--use-torch-fsdp2",
        "--weight-decay-incr-style constant",
        "--rotary-seq-len-interpolation-factor 1.0",
        "--disable-gloo-process-groups",
        "--no-masked-softmax-fusion",
        "--ckpt-fully-parallel-load",
        "--no-fp16",
    ],
)
def test_what_is_true_here_is_accepted_in_silence(words):
    assert answers(*words.split()) == ("", [])


@pytest.mark.parametrize(
    "words, message",
    [
        (
            "--num-workers 8",
            "--num-workers = 8: Megatron-LM's, has no effect here: data is read in process",
        ),
        (
            "--async-strategy nvrx",
            "--async-strategy = nvrx: Megatron-LM's, has no effect here: --async-save writes from",
        ),
        (
            "--no-load-rng",
            "--no-load-rng: Megatron-LM's, has no effect here: there is no random state",
        ),
        (
            "--no-save-rng",
            "--no-save-rng: Megatron-LM's, has no effect here: there is no random state",
        ),
        (
            "--no-check-for-nan-in-loss-and-grad",
            "a step whose gradient norm is not finite is always skipped",
        ),
        (
            "--no-mmap-bin-files",
            "--no-mmap-bin-files: Megatron-LM's, has no effect here: corpora are always",
        ),
        ("--tensorboard-log-interval 10", "has no effect here: every step is written"),
        (
            "--timing-log-level 2",
            "--timing-log-level = 2: Megatron-LM's, has no effect here: metrics.jsonl has",
        ),
        ("--no-overlap-grad-reduce", "FSDP2 always overlaps"),
    ],
)
def test_what_changes_no_number_is_warned_of(words, message):
    error, warnings = answers(*words.split())
    assert error == "", error
    assert len(warnings) == 1, warnings
    assert message in warnings[0], warnings


def test_keys_of_a_yaml_file_are_answered_as_flags_are(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "num_workers: 4\nfp16: false\nnum_experts: null\nno_rope_fusion: true\n"
        "ckpt_format: torch_dist\n"
    )
    config = load_config(["--config", str(path)])
    assert effect_warnings(config) == [
        "num_workers = 4: Megatron-LM's, has no effect here: data is read in process, a step "
        "ahead, in one thread"
    ]
    path.write_text("fp16: true\nmoe_router_topk: 2\nnum_layrs: 3\n")
    with pytest.raises(ValueError) as error:
        load_config(["--config", str(path)])
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"{path}: fp16: Megatron-LM's, not here: "), lines
    assert lines[1].startswith(f"{path}: moe_router_topk = 2: Megatron-LM's, not here: "), lines
    assert lines[2] == f"{path}: num_layrs: no such setting. Fix: did you mean num_layers?"


@pytest.mark.parametrize(
    "word, meant",
    [
        ("--learning-rate", "--lr"),
        ("--learning_rate", "--lr"),
        ("--epochs", "--train-tokens"),
        ("--max-steps", "--train-iters"),
        ("--warmup-steps", "--lr-warmup-iters"),
        ("--output-dir", "--save"),
        ("--gradient-accumulation-steps", "--global-batch-size"),
        ("--max-grad-norm", "--clip-grad"),
        ("--tp", "--tensor-model-parallel-size"),
        ("--rope-theta", "--rotary-base"),
    ],
)
def test_words_of_other_programs_name_the_flag(word, meant):
    error, _ = answers(word, "1")
    assert error == f"{spell([word])[0]}: no such flag. Fix: {meant}."


def test_a_key_that_other_programs_use_names_the_setting(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 3e-4\n")
    with pytest.raises(ValueError, match="learning_rate: no such setting. Fix: lr.$"):
        load_config(["--config", str(path)])


def test_a_misspelled_flag_of_megatron_is_not_taken_for_one_of_ours():
    error, _ = answers("--num-expert", "8")
    assert error.startswith(
        "--num-expert: no such flag. Fix: did you mean --num-experts? --num-experts: Megatron-LM's"
    )


def test_synonyms_are_no_names_of_flags():
    wrong = [
        word for word in megatron_flags.synonyms() if is_ours(word) or megatron_flags.find(word)
    ]
    assert wrong == []
    unknown = {flag for flag in megatron_flags.synonyms().values() if not is_ours(flag)}
    assert unknown == {"--config"}


def test_an_answer_does_not_hide_a_setting():
    hidden = [flag for answer in megatron_flags.table() for flag in answer.flags if is_ours(flag)]
    assert hidden == []


@pytest.mark.parametrize(
    "words, per_rank",
    [
        ("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2", 2),
        ("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 4", 1),
        ("--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 1", 2),
    ],
)
def test_layers_per_virtual_stage_become_stages_per_rank(words, per_rank):
    """Megatron-LM makes num_layers (8 in tiny) / pipeline size / this virtual stages."""
    config = load_config([*RUN, *words.split()])
    assert config.layout.num_virtual_stages_per_pipeline_rank == per_rank
    assert config.validate() == []


@pytest.mark.parametrize(
    "words, message",
    [
        (
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3",
            "num_layers_per_virtual_pipeline_stage = 3: must divide the num_layers = 8 into",
        ),
        (
            "--num-layers-per-virtual-pipeline-stage 0",
            "num_layers_per_virtual_pipeline_stage = 0: must divide",
        ),
        (
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2 "
            "--num-virtual-stages-per-pipeline-rank 4",
            "means num_virtual_stages_per_pipeline_rank = 2, but that is 4",
        ),
    ],
)
def test_layers_per_virtual_stage_that_make_no_stages_are_refused(words, message):
    error, _ = answers(*words.split())
    assert message in error, error


LLAMA3_SCRIPT = """
    --use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336
    --num-attention-heads 32 --group-query-attention --num-query-groups 8 --kv-channels 128
    --seq-length 8192 --max-position-embeddings 8192 --position-embedding-type rope
    --rotary-base 1000000 --rotary-percent 1.0 --attention-dropout 0.0 --hidden-dropout 0.0
    --swiglu --init-method-std 0.0134 --attention-backend auto
    --untie-embeddings-and-output-weights --disable-bias-linear --normalization RMSNorm
    --norm-epsilon 1e-5 --no-bias-swiglu-fusion --no-rope-fusion
    --no-gradient-accumulation-fusion --no-persist-layer-norm --micro-batch-size 1
    --global-batch-size 128 --train-samples 1953125 --lr-decay-samples 1949218
    --lr-warmup-samples 3906 --lr 0.00015 --min-lr 0.00001 --lr-decay-style cosine --clip-grad
    1.0 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --bf16 --grad-reduce-in-bf16
    --cross-entropy-loss-fusion --calculate-per-token-loss --manual-gc
    --empty-unused-memory-level 1 --tensor-model-parallel-size 1 --context-parallel-size 2
    --cp-comm-type a2a --pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage
    4 --sequence-parallel --use-distributed-optimizer --overlap-grad-reduce
    --overlap-param-gather --tp-comm-overlap --no-create-attention-mask-in-dataloader
    --num-workers 1 --no-mmap-bin-files --dataloader-type single --num-dataset-builder-threads 1
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model dir --vocab-size 128256 --data-path
    prefix --data-cache-path cache --split 99,1,0 --transformer-impl transformer_engine
    --log-interval 1 --eval-iters 32 --eval-interval 100 --save-interval 1000 --log-throughput
    --log-params-norm --log-num-zeros-in-grad --log-timers-to-tensorboard
    --log-memory-to-tensorboard --timing-log-level 0 --tensorboard-dir tb
    --tensorboard-log-interval 1 --profile --profile-step-start 4 --profile-step-end 6
    --ckpt-format torch_dist --ckpt-fully-parallel-save --ckpt-fully-parallel-load
    --ckpt-assume-constant-structure --async-save --distributed-timeout-minutes 60
    --no-check-for-nan-in-loss-and-grad --exit-signal-handler --exit-duration-in-mins 230
    --use-checkpoint-args --no-load-rng --save out --load out
    """.split()


def test_a_public_llama3_script_runs_with_every_flag_accepted_or_warned_of():
    """The flags of the Llama-3 8B launch scripts that go around for Megatron-LM."""
    config = load_config(spell(LLAMA3_SCRIPT))
    assert config.validate() == []
    assert {phase.layout.sharding_strategy for phase in resolve_phases(config)} == {"optim"}
    assert config.layout.num_virtual_stages_per_pipeline_rank == 2, (
        "32 layers on 4 ranks in stages of 4"
    )
    warned = [text.split(":")[0].split(" = ")[0] for text in effect_warnings(config)]
    assert warned == [
        "sequence_parallel",
        "--grad-reduce-in-bf16",
        "--cross-entropy-loss-fusion",
        "--empty-unused-memory-level",
        "--tp-comm-overlap",
        "--num-workers",
        "--no-mmap-bin-files",
        "--num-dataset-builder-threads",
        "--log-params-norm",
        "--log-num-zeros-in-grad",
        "--log-timers-to-tensorboard",
        "--log-memory-to-tensorboard",
        "--timing-log-level",
        "--ckpt-assume-constant-structure",
        "--no-check-for-nan-in-loss-and-grad",
        "--no-load-rng",
    ]


@pytest.mark.parametrize(
    "words, fix",
    [
        ("--attention-backend fused", "Fix: cudnn, which is cuDNN's attention."),
        ("--optimizer sgd", "Fix: adam (AdamW) or muon; no other optimizer is built."),
        ("--optimizer dist_muon", "Fix: muon, whose state and work are always shared out."),
        ("--muon-fp32-matmul-prec high", "Fix: medium (bf16) or highest (fp32); TF32 is not used."),
        ("--normalization LayerNorm", "Fix: RMSNorm; LayerNorm is not built."),
        ("--normalization rmsnorm", "Fix: RMSNorm."),
        ("--lr-decay-style wsd", "Fix: WSD."),
        ("--lr-decay-style polynomial", "Fix: one of them."),
        (
            "--tokenizer-type GPT2BPETokenizer",
            "Fix: HuggingFaceTokenizer with the tokenizer's folder.",
        ),
        ("--accept-changes dat", "Fix: data."),
        ("--lr fast", "Fix: give a value of that kind."),
    ],
)
def test_a_value_that_is_none_here_is_answered(words, fix):
    error, _ = answers(*words.split())
    name = words.split()[0].removeprefix("--").replace("-", "_")
    assert error.startswith(f"command line: {name} = "), error
    assert error.endswith(fix), error


def test_values_of_the_table_belong_to_settings_and_are_none_of_theirs():
    for setting, theirs in megatron_flags.values().items():
        assert setting in field_table(), setting
        for value in theirs:
            error, _ = answers(f"--{setting.replace('_', '-')}", value)
            assert f"{setting} = '{value}': must be one of" in error, error
