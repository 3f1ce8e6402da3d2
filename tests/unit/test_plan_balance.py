"""What a plan says of the data ranks' work: the figures are those of the loader's own steps."""

import numpy as np
import pytest

from data.dealing import StepShape
from data.loader import Loader
from pretrain import data_outlook
from pretrain.batches import dealing_of
from pretrain.config.load import load_config
from pretrain.plan import make_plan
from pretrain.planner.documents import StepCosts
from pretrain.planner.model_size import document_cost_of
from tools.plan import Arguments, plan_run
from tools.planning.report import PhasePlan
from tools.planning.text import describe_balance

STEPS = 4
RUN = f"""--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
    --vocab-size 128 --seq-length 2048 --global-batch-size 8 --micro-batch-size 1
    --train-iters {STEPS} --lr 1e-3 --lr-decay-style constant --eval-iters 0 --no-bf16
    --mock-data""".split()
WORLD = 4


def planned(words: list[str], **arguments) -> PhasePlan:
    given = {"hardware": "h100", "world_size": WORLD} | arguments
    (phase,) = plan_run(Arguments(**given), words).phases
    return phase


@pytest.mark.parametrize(
    "packing, balance", [("concat", "deal"), ("best_fit", "deal"), ("best_fit", "window")]
)
@pytest.mark.parametrize("strategy", ["optim", "optim_grads"])
def test_the_plan_says_what_the_loader_deals(packing, balance, strategy):
    words = [*RUN, "--packing", packing, "--balance", balance]
    words += ["--data-parallel-sharding-strategy", strategy]
    found = planned(words).balance
    # The run itself, read step by step.
    plan = make_plan(load_config(words), WORLD)
    (phase,) = plan.phases
    cost = document_cost_of(plan.config.model, plan.vocab_size)
    plan.ledger.enter(0, phase.name, data_outlook.settings_of(phase, plan.corpus, cost))
    loader = Loader(
        plan.ledger.mixture(),
        micro_batch_size=1,
        global_batch_tokens=phase.global_batch_tokens,
        dp_rank=0,
        dp_size=WORLD,
        prefetch=False,
        dealing=dealing_of(phase, WORLD, cost, train=True),
    )
    dealt = []
    for clock in range(0, phase.end, phase.global_batch_tokens):
        loader.read(clock)
        dealt.append((loader.dealt.imbalance, loader.dealt.imbalance_in_order))
    assert found.steps == STEPS and found.is_dealt
    # Steps with more work count for a little more, which the means of the loader do not know.
    by_cost, in_order = np.array(dealt).mean(axis=0)
    assert found.slowest_over_mean == pytest.approx(by_cost, rel=0.02)
    assert found.slowest_over_mean_in_order == pytest.approx(in_order, rel=0.02)
    assert 1 <= found.slowest_over_mean <= found.slowest_over_mean_in_order


def test_a_run_that_deals_in_order_waits_for_what_is_in_order():
    even = planned(RUN)
    uneven = planned([*RUN, "--balance", "none"])
    assert not uneven.balance.is_dealt
    assert uneven.balance.slowest_over_mean == uneven.balance.slowest_over_mean_in_order
    wait = uneven.speed.parts_seconds.imbalance
    assert wait > even.speed.parts_seconds.imbalance
    # The wait is a part of the step, and of the training time.
    assert uneven.cost.train_seconds - even.cost.train_seconds == pytest.approx(
        STEPS * (wait - even.speed.parts_seconds.imbalance)
    )


def test_the_search_counts_the_wait_of_every_number_of_data_ranks():
    search = planned([*RUN, "--balance", "none"], search=True).search
    assert search is not None
    waits = {row.description: row.parts_seconds.imbalance for row in search.rows}
    assert len(waits) > 2
    for description, wait in waits.items():
        assert (wait > 0) == (" dp 1 " not in description), waits


def test_a_plan_says_that_its_layout_was_chosen_without_the_data():
    """The step's time knows who waits for whom; the choice of the layout did not."""
    arguments = Arguments(hardware="h100", world_size=WORLD)
    given = plan_run(arguments, RUN)
    chosen = plan_run(arguments, [*RUN, "--layout", "auto"])
    assert chosen.phases[0].balance.steps == STEPS
    found = [text for text in chosen.assumptions if text not in given.assumptions]
    assert len(found) == 3 and found[0].startswith("phase main: layout auto: tp 1 pp 1 cp 1 dp 4")
    assert "data ranks as equally loaded" in found[2]


@pytest.mark.parametrize(
    "arguments, why",
    [
        ({"document_tokens": 64}, "all documents have the length that was given"),
        ({"without_data": True}, "the data was not looked at"),
        ({"world_size": 1}, "one data rank"),
    ],
)
def test_what_is_not_known_is_taken_as_equal_and_said(arguments, why):
    phase = planned(RUN, **arguments)
    assert (phase.balance.steps, phase.balance.slowest_over_mean) == (0, 1.0)
    assert phase.speed.parts_seconds.imbalance == 0
    assert describe_balance(phase.balance) == f"work of the data ranks: taken as equal ({why})"


def test_what_would_take_too_long_is_not_drawn(monkeypatch):
    monkeypatch.setattr(data_outlook, "DRAWN_SECONDS", 0.0)
    balance = planned(RUN).balance
    assert balance.steps == 0 and "drawing a step of them would take about" in balance.why_equal


def test_the_line_says_both_dealings():
    line = describe_balance(planned(RUN).balance)
    assert line.startswith("work of the slowest data rank: 1.0") and " in order" in line
    assert "of the mean, dealt by cost (1." in line and line.endswith("the phase's first 4 steps)")


def test_steps_are_averaged_by_their_work():
    """In the first step nobody waits, in the second one rank has nothing to do."""
    shape = StepShape(dp_size=2, num_microbatches=1, micro_batch_size=1, meeting="step")
    found = StepCosts(np.array([[4.0, 4.0], [2.0, 0.0]])).slowest_over_mean(shape, is_dealt=False)
    assert found == (4 + 2) / (4 + 1)
