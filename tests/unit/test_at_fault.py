"""Layouts that are called working do work; where there is none, the setting at fault is named."""

import itertools
import re

import pytest

from pretrain.config.load import load_config
from pretrain.plan import make_plan
from pretrain.planner.auto_layout import settle_layouts
from pretrain.planner.check_phases import check_phases
from pretrain.schedule.resolve import resolve_phases

RUN = (
    "--num-layers 4 --hidden-size 96 --ffn-hidden-size 192 --num-attention-heads 12 "
    "--num-query-groups 4 --seq-length 128 --train-iters 10 --data-path prefix "
    "--tokenizer-type NullTokenizer"
)

ONE_OF_EACH = "--num-attention-heads 1 --num-query-groups 1 --num-layers 1 --hidden-size 8"


def problems_of(flags: str, world: int) -> list[str]:
    """What the plan finds, before it looks at the data."""
    with pytest.raises(ValueError) as error:
        make_plan(load_config(f"{RUN} {flags}".split()), world, only_print=True)
    return str(error.value).splitlines()


def layouts_line(flags: str, world: int) -> str:
    (line,) = [text for text in problems_of(flags, world) if "layouts that work" in text]
    return line


def check_offered(line: str, flags: str, world: int) -> int:
    """Try each offered layout through the whole check -> how many there are."""
    offered = re.findall(r"tp (\d+) pp (\d+) cp (\d+)(?: \((\d+) x (\d+)\))? dp \d+", line)
    for tp, pp, cp, inner, outer in offered:
        levels = (
            f" --cp-comm-type a2a+allgather --hierarchical-context-parallel-sizes {inner} {outer}"
            if inner
            else ""
        )
        sizes = (
            f" --tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp} "
            f"--context-parallel-size {cp}{levels}"
        )
        made = load_config(f"{RUN} {flags}{sizes}".split())
        problems = check_phases(resolve_phases(made), made, world, made.data.vocab_size)
        assert problems == [], f"tp {tp} pp {pp} cp {cp}: {problems}"
    return len(offered)


@pytest.mark.parametrize("other_problem", ["", "--lr -1", "--clip-grad -1 --ckpt-step 4"])
def test_layouts_that_work_suit_the_vocabulary_also_beside_other_problems(other_problem):
    """98 ids padded to a multiple of 3 are 99 rows, which tp 2 and 4 do not divide."""
    flags = (
        "--vocab-size 98 --make-vocab-size-divisible-by 3 --global-batch-size 16 "
        "--tensor-model-parallel-size 8"
    )
    line = layouts_line(f"{flags} {other_problem}", 8)
    assert "tp 2" not in line and "tp 4" not in line, line
    assert check_offered(line, flags, 8) == 3


def test_a_vocabulary_that_is_not_known_yet_is_said_to_be_unchecked():
    flags = (
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model /nonexistent "
        "--global-batch-size 16 --tensor-model-parallel-size 8"
    )
    assert (
        "layouts that work on 8 processes (the vocabulary is not known yet), nearest"
        in layouts_line(flags, 8)
    )


def test_layouts_that_work_cut_the_lengths_of_evaluations():
    """129 tokens of an evaluation divide over 1 and 3 ranks only."""
    flags = (
        "--vocab-size 100 --global-batch-size 16 --eval-seq-lengths 129 "
        "--tensor-model-parallel-size 8"
    )
    line = layouts_line(flags, 8)
    assert re.findall(r"cp (\d+)", line) == ["1", "1", "1"], line
    assert check_offered(line, flags, 8) == 3


def test_layouts_that_work_fit_into_the_memory():
    """The estimate of layouts with less than 8 parts of the weights is above what is allowed."""
    flags = (
        "--vocab-size 100 --hidden-size 3072 --ffn-hidden-size 12288 --global-batch-size 16 "
        "--tensor-model-parallel-size 8 --data-parallel-sharding-strategy optim"
    )
    free = layouts_line(flags, 8)
    line = layouts_line(f"{flags} --device-memory-gib 0.001", 8)
    assert line.endswith(
        "none, because of the memory of a device (without it "
        f"{free.split('nearest first: ')[1].split(';')[0]})."
    ), line


@pytest.mark.parametrize(
    "flags, world, fault",
    [
        (
            "--attention-head-chunks 5 --global-batch-size 16",
            8,
            "attention_head_chunks = 5 (without it tp 1 pp 1 cp 1 dp 8)",
        ),
        (
            f"--global-batch-size 6 --micro-batch-size 6 --seq-length 127 {ONE_OF_EACH}",
            2,
            "micro_batch_size = 6 (without it tp 1 pp 1 cp 1 dp 2)",
        ),
        (
            f"--global-batch-size 5 --seq-length 127 {ONE_OF_EACH}",
            2,
            "global_batch_size = 5 (without it tp 1 pp 1 cp 1 dp 2)",
        ),
        (
            f"--global-batch-size 3 --seq-length 127 {ONE_OF_EACH}",
            2,
            "num_layers = 1 (without it tp 1 pp 2 cp 1 dp 1)",
        ),
        (
            "--global-batch-size 1 --num-layers 1 --num-attention-heads 3 --num-query-groups 3 "
            "--eval-seq-lengths 127",
            2,
            "eval_seq_lengths = 127 (without it tp 1 pp 1 cp 2 dp 1)",
        ),
        (
            "--global-batch-size 1 --num-layers 1 --seq-length 127 "
            "--make-vocab-size-divisible-by 101",
            2,
            "make_vocab_size_divisible_by = 101 (without it tp 2 pp 1 cp 1 dp 1)",
        ),
    ],
)
def test_the_setting_that_leaves_no_layout_is_named(flags, world, fault):
    line = layouts_line(f"--vocab-size 100 {flags}", world)
    assert "nearest first: none, because of " in line, line
    assert fault in line, line


def test_where_several_settings_are_at_fault_none_is_named_alone():
    flags = (
        "--attention-head-chunks 5 --global-batch-size 1 --num-layers 1 --num-query-groups 1 "
        "--seq-length 127"
    )
    line = layouts_line(f"--vocab-size 100 --make-vocab-size-divisible-by 101 {flags}", 2)
    assert line.endswith(
        "none with this batch, length and model, and no setting alone is at fault."
    ), line


def test_every_offered_layout_passes_the_whole_check():
    """Over settings that narrow the layouts, alone and together."""
    choices = (
        ("", "--micro-batch-size 2"),
        ("", "--sequence-parallel"),
        ("", "--attention-head-chunks 3"),
        ("", "--pipeline-schedule interleaved"),
        ("", "--eval-seq-lengths 96"),
    )
    tried = 0
    for chosen in itertools.product(*choices):
        flags = f"--vocab-size 100 --global-batch-size 8 {' '.join(chosen)}"
        made = load_config(f"{RUN} {flags} --tensor-model-parallel-size 5".split())
        lines = check_phases(resolve_phases(made), made, 8, 100)
        (line,) = [text for text in lines if "layouts that work" in text]
        tried += check_offered(line, flags.replace("--pipeline-schedule interleaved", ""), 8)
    assert tried > 60


def test_a_layout_that_auto_cannot_find_has_its_fault_named_too():
    flags = "--vocab-size 100 --global-batch-size 16 --attention-head-chunks 5 --layout auto"
    (line,) = [text for text in problems_of(flags, 8) if "layout = auto: no layout" in text]
    assert (
        "layouts that work: none, because of attention_head_chunks = 5 (without it tp 1" in line
    ), line


def test_auto_chooses_no_layout_that_the_evaluations_refuse():
    """99 tokens divide over 3 ranks, not over 6, which a step of one sample would need."""
    flags = "--vocab-size 100 --global-batch-size 2 --eval-seq-lengths 99 --layout auto"
    heads = "--num-attention-heads 3 --num-query-groups 3 --num-layers 1 --seq-length 96"
    made = load_config(f"{RUN} {flags} {heads}".split())
    (phase,) = settle_layouts(resolve_phases(made), made, 6, 100, {}, 0)[0]
    assert phase.layout.sizes == (1, 1, 3), phase.layout.describe()
    made.logging.eval_seq_lengths = []
    made.schedule.global_batch_size = 1
    (phase,) = settle_layouts(resolve_phases(made), made, 6, 100, {}, 0)[0]
    assert phase.layout.sizes == (1, 1, 6), phase.layout.describe()
    made.logging.eval_seq_lengths = [99]
    with pytest.raises(
        ValueError, match="because of eval_seq_lengths = 99 .without it tp 1 pp 1 cp 6"
    ):
        settle_layouts(resolve_phases(made), made, 6, 100, {}, 0)


@pytest.mark.parametrize(
    "flags",
    [
        "--eval-seq-lengths 0",
        "--eval-passkey-lengths -5",
        "--attention-head-chunks 0",
        "--mlp-tiles 0",
        "--loss-chunk-tokens 0",
        "--cpu-offloading-num-layers -1",
        "--recompute-granularity full --cpu-offloading-num-layers 99",
        "--seq-length 0",
        "--micro-batch-size 0",
        "--make-vocab-size-divisible-by 0",
        "--num-query-groups 5",
        "--context-parallel-size 0",
        "--vocab-size 0",
    ],
)
def test_a_setting_out_of_range_beside_a_layout_that_cannot_run_is_a_message(flags):
    """Layouts are looked for although the setting makes no sense: no other exception comes of
    it."""
    run = f"--vocab-size 100 --global-batch-size 16 --tensor-model-parallel-size 8 {flags}"
    for device in ("", " --device-memory-gib 0.001"):
        assert problems_of(run + device, 8)
