"""The coordinate check and the sweep: a model at several widths, what is measured, what is said."""

import dataclasses
import math
import re

import pytest
import torch

from model.config import ModelConfig
from parallel.layout import single_process_layout
from pretrain.batches import settings_of
from pretrain.checkpointing import checkpoint
from pretrain.checkpointing.progress import Progress
from pretrain.config.config_yaml import dump_yaml
from pretrain.config.flags import spell
from pretrain.config.load import load_config
from pretrain.plan import Plan, make_plan
from tests.unit.test_width_scaling import PLAIN
from tools.bench.contenders import one_process
from tools.coordinate_check import RUN, Arguments, main, without_effect
from tools.outputs.files import is_own_picture
from tools.width_check.activations import KINDS, MEASURED_TOKENS, draw_measured
from tools.width_check.tables import (
    best_rate,
    last_growth,
    losses_line,
    mean_losses,
    spread,
    steps_between,
)
from tools.width_check.widths import Trainer, at_width, read_data

SMALL = "-- --seq-length 16 --global-batch-size 4 --micro-batch-size 2 --vocab-size 40".split()


def test_sizes_grow_with_the_width_and_heads_keep_theirs():
    model = ModelConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=176,
        num_attention_heads=4,
        num_query_groups=2,
    )
    wide = at_width(model, 256, 64, mup=True)
    assert (wide.ffn_hidden_size, wide.num_attention_heads, wide.num_query_groups) == (704, 16, 8)
    assert wide.head_size == 16 and wide.score_scale is None
    assert wide.width_ratio == wide.fan_in_ratio("ffn") == wide.fan_in_ratio("heads") == 4
    assert at_width(model, 256, 64, mup=False).width_ratio == 1


def test_a_width_that_the_model_cannot_have_is_refused():
    with pytest.raises(ValueError, match="widths = 40: the model has num_attention_heads = 8 at"):
        at_width(PLAIN, 40, 40, mup=True)


def small_plan() -> Plan:
    return make_plan(load_config(spell([*RUN, *SMALL[1:]])), 1, only_print=True)


def test_the_first_steps_are_read_of_a_run_that_has_gone_on():
    gone_on = small_plan()
    settings = settings_of(gone_on.phases[0], gone_on.corpus)
    for clock, name in ((0, gone_on.phases[0].name), (256, "later")):
        gone_on.ledger.enter(clock, name, settings)
    with one_process() as layout:
        expected = read_data(small_plan(), layout, 2).steps
        found = read_data(gone_on, layout, 2).steps
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.tokens, other.tokens)


def test_a_check_shows_every_kind_with_and_without_and_draws(tmp_path, capsys):
    plot = tmp_path / "check.png"
    words = f"--widths 64 128 --steps 2 --seeds 1 --tolerance 100 --plot {plot}".split()
    assert main([*words, *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = {}
    for line in lines:
        if found := re.match(r"(with muP|without), (size|change) +64 +128 +spread +last$", line):
            title = found.groups()
        elif found := re.match(r"  (\w+) +([\d.]+) +([\d.]+) *([\d.]+) % *([-+][\d.]+) %$", line):
            shown[*title, found[1]] = [float(value) for value in found.groups()[1:]]
    assert len(shown) == 2 * 2 * len(KINDS)
    # At the base width muP is nothing; at another the updates are smaller.
    for what in ("size", "change"):
        for kind in KINDS:
            assert shown["with muP", what, kind][0] == shown["without", what, kind][0]
    assert shown["with muP", "change", "stream"][1] < shown["without", "change", "stream"][1] / 1.5
    assert is_own_picture(plot)
    # A picture of ours may be drawn again; nothing is flat within nothing.
    words[words.index("100")] = "0"
    assert main([*words, *SMALL]) == 1
    assert "not flat within 0 % with muP: embedding" in capsys.readouterr().out


def test_a_sweep_marks_the_best_rate_of_each_width(tmp_path, capsys):
    plot = tmp_path / "sweep.png"
    words = "--sweep --widths 64 128 --steps 4 --learning-rates 1e-5 1e-2 --seeds 1".split()
    assert main([*words, "--plot", str(plot), *SMALL]) == 0
    out = capsys.readouterr().out
    assert out.count("*") == 2 + 4, out  # a legend and two widths, twice
    assert re.search("with muP: best rates [01] apart; without: ", out) and is_own_picture(plot)


def test_a_sweep_shows_the_mean_of_its_seeds_and_the_best_of_each():
    of_seeds = [{0.1: 2.0, 0.2: 1.0}, {0.1: 1.5, 0.2: 3.0}, {0.1: math.nan, 0.2: math.inf}]
    losses = mean_losses(of_seeds[:2])
    assert losses == {0.1: 1.75, 0.2: 2.0}
    words = losses_line(256, losses, of_seeds).split()
    assert words == ["256", "1.7500*", "2.0000", "0.2", "0.1", "none"]


def test_measured_tokens_are_bounded_and_in_order():
    assert [places.tolist() for places in draw_measured([3, 2])] == [[0, 1, 2], [0, 1]]
    drawn = draw_measured([100_000, 50_000])
    assert [len(places) for places in drawn] == [MEASURED_TOKENS // 2] * 2
    for places, tokens in zip(drawn, (100_000, 50_000), strict=True):
        assert (places.diff() > 0).all() and 0 <= places[0] and places[-1] < tokens
    # Of more microbatches than tokens each has one.
    assert [len(places) for places in draw_measured([5] * 4, limit=3)] == [1] * 4


def test_sizes_and_changes_are_those_of_the_measured_tokens():
    """Beside the embedding's rows, and the logits by hand from the last of the stream."""
    plan = small_plan()
    model = at_width(plan.config.model, 128, 64, mup=True)
    places = [torch.tensor([3, 17]), torch.tensor([0])]
    with one_process() as layout:
        data = dataclasses.replace(read_data(plan, layout, 2), measured=places)
        trainer = Trainer(plan, model, layout, seed=0)
        rows = []
        kept = []
        for steps in ([], data.steps):
            for _ in trainer.losses(steps, 0.01):
                pass
            kept.append(trainer.activations(data))
            (stage,) = trainer.state.stages
            # After a pass the stage holds whole weights; a state dict has the shards.
            shards = stage.state_dict().items()
            weights = {name: shard.full_tensor().clone() for name, shard in shards}
            tokens = [batch.tokens[at] for batch, at in zip(data.probe, places, strict=True)]
            rows.append(weights["embedding.weight"][torch.cat(tokens)])
        after = {kind: list(tensors) for kind, tensors in kept[1].items()}
        found = trainer.mean_squares(data, kept[0])
    # Of two layers and two microbatches, three tokens; and nothing is held afterwards.
    assert {kind: len(tensors) for kind, tensors in after.items()} == dict(
        embedding=2, attention=4, mlp=4, stream=2, logits=2
    )
    assert set(kept[0]) == set(KINDS) and not any(kept[0].values())
    assert float(rows[1].square().mean()) == pytest.approx(found["embedding"].size, rel=1e-5)
    moved = (rows[1] - rows[0]).square().mean()
    assert float(moved) == pytest.approx(found["embedding"].change, rel=1e-5)
    stream = torch.cat(after["stream"])
    normed = stream / (stream.square().mean(1, keepdim=True) + model.norm_epsilon).sqrt()
    logits = (normed * weights["final_norm.weight"] / 2) @ weights["output.weight"][:40].T
    assert float(logits.square().mean()) == pytest.approx(found["logits"].size, rel=1e-5)


def test_a_run_with_checkpoints_is_checked_at_another_learning_rate(tmp_path, capsys):
    run = tmp_path / "run"
    words = spell([*RUN, *SMALL[1:], "--save", str(run)])
    config = load_config(words)
    plan = make_plan(config, 1, only_print=True)
    phase = plan.phases[0]
    plan.ledger.enter(0, phase.name, settings_of(phase, plan.corpus))
    checkpoint.save(
        run,
        3,
        {"model.embedding.weight": torch.zeros(1)},
        Progress(
            step=3,
            clock=3 * 64,
            phase=dataclasses.asdict(phase),
            longest_seq_length=16,
            data=plan.ledger.to_json(3 * 64),
            tokenizer=plan.tokenizer_description,
        ),
        dump_yaml(config),
        {},
        single_process_layout(torch.device("cpu")).world,
    )
    given = load_config([*words, "--lr", "1e-3"])
    with pytest.raises(ValueError, match="learning rate at token 192"):
        make_plan(given, 1, only_print=True)
    file = tmp_path / "run.yaml"
    file.write_text(dump_yaml(config))
    check = f"--config {file} --widths 64 128 --steps 1 --seeds 1 --tolerance 9".split()
    assert main([*check, "--", "--lr", "1e-3"]) == 0
    said = capsys.readouterr()
    assert (
        "1 step at learning rate 0.001, root mean squares over 1 seed\n" in said.out
        and not said.err
    )


def test_steps_beyond_the_first_phase_are_told(capsys):
    words = "--widths 64 128 --steps 3 --seeds 1 --tolerance 9".split()
    assert main([*words, *SMALL, "--train-iters", "2"]) == 0
    said = capsys.readouterr()
    assert said.err == (
        "warning: steps = 3: phase 'main', the run's first, has 2; the others read on in its data, "
        "at its length\n"
    )


def test_spreads_and_best_rates_by_hand():
    assert spread({64: 2.0, 128: 3.0, 256: 7.0}) == 0.75
    assert spread({64: 0.0, 128: 0.0}) == float("inf")
    assert last_growth({128: 4.0, 64: 1.0, 256: 5.0}) == 0.25
    assert last_growth({64: 0.0, 128: 1.0}) == float("inf")
    losses = {64: {0.1: 2.0, 0.2: 1.0, 0.4: float("nan")}, 128: {0.1: 1.0, 0.2: 2.0, 0.4: 3.0}}
    assert best_rate(losses[64]) == 0.2
    assert steps_between([0.1, 0.2, 0.4], losses) == 1
    # A width without a finite loss has no best rate, and is no proof that rates agree.
    diverged = {0.1: float("nan"), 0.2: float("inf"), 0.4: float("nan")}
    assert best_rate(diverged) is None
    assert steps_between([0.1, 0.2, 0.4], {**losses, 256: diverged}) is None


@pytest.mark.parametrize(
    "given, lines",
    [
        (dict(seeds=2, tolerance=0.2), []),
        (dict(learning_rates=[0.5]), ["learning_rates = [0.5]: has no effect without --sweep"]),
        (dict(sweep=True, learning_rates=[0.5]), []),
        (
            dict(sweep=True, seeds=2, tolerance=0.2),
            ["tolerance = 0.2: has no effect with --sweep"],
        ),
    ],
)
def test_a_setting_that_is_not_read_is_named(given, lines):
    assert without_effect(Arguments(**given)) == lines


@pytest.mark.parametrize(
    "words, problem",
    [
        ("--widths 64", "widths = 64: must be two or more different widths above 0."),
        ("--widths 64 64 128", "widths = 64 64 128: must be two or more different widths"),
        ("--widths 64 64", "widths = 64 64: must be two or more different widths above 0."),
        ("--widths 128 192", "mup_base_hidden_size = 128: must divide hidden_size = 192."),
        ("--widths 64 40", "widths = 40: the model has num_attention_heads = 8"),
        ("--steps 0", "steps = 0: must be at least 1."),
        ("--sweep --learning-rates 0", "learning_rates = 0.0: must be above 0 and rise."),
        ("--sweep --learning-rates 2 1", "learning_rates = 2.0 1.0: must be above 0 and rise."),
        ("--tolerance nan", "tolerance = nan: must be a number of at least 0."),
        ("--plot {folder}/text", "plot = {folder}/text"),
    ],
)
def test_bad_input_is_one_error_before_any_training(words, problem, tmp_path, capsys):
    (tmp_path / "text").write_text("of somebody")
    assert main(words.format(folder=tmp_path).split()) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"error: {problem.format(folder=tmp_path)}")
    assert said.err.count("\n") == 1 and "Fix: " in said.err
