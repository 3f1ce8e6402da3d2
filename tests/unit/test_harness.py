"""tools/evaluation: lm-evaluation-harness on a model of ours; its task files; what is said without
it."""

import json
import random
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from parallel.layout import single_process_layout
from tests.huggingface.chat_folders import FOX, write_model, write_tokenizer
from tools.evaluation import harness
from tools.evaluation.harness_model import Answers, make_harness_model
from tools.evaluation.harness_tasks import questions
from tools.evaluation.opened import OpenedModel
from tools.inference.open_model import open_model
from tools.inference.scores import TextScores

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm_eval")
CONTEXT = 96
PAIRS = [(FOX, " and runs"), ("", FOX), ("The dog ", "12"), ("12 34 " * 40, "56 12")]
NAMES = ["local_addition", "local_repeat", "local_text"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("harness") / "hf"
    return write_tokenizer(write_model(place, max_position_embeddings=CONTEXT))


def our_model(folder):
    layout = single_process_layout(torch.device("cpu"))
    model = OpenedModel(open_model(str(folder), layout, precision="fp32"), 1000)
    return make_harness_model(model)


def their_model(folder):
    return harness.transformers_model(str(folder), "float32", "cpu")


def requests_of(kind: str, arguments: list[tuple]) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def log_softmax_of(folder, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [t, V] by transformers, without the harness."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)


@needs_harness
def test_likelihoods_are_sums_of_log_probabilities(folder):
    ours = our_model(folder)
    tokenizer = ours.model.tokenizer
    found = ours.loglikelihood(requests_of("loglikelihood", PAIRS[:2]))
    context = tokenizer.encode(FOX)
    for (total, is_greedy), ids, begin in zip(
        found,
        ([*tokenizer.encode(FOX + " and runs")], [tokenizer.bos, *context]),
        (len(context), 1),
        strict=True,
    ):
        logs = log_softmax_of(folder, ids[:-1])[begin - 1 :]
        targets = torch.tensor(ids[begin:])
        assert abs(total - float(logs.gather(1, targets[:, None]).sum())) < 1e-4
        assert is_greedy == bool((logs.argmax(dim=-1) == targets).all())


@needs_harness
def test_answers_are_those_of_the_harness_own_model(folder):
    """Also of a context and a text beyond the model's context."""
    ours = our_model(folder)
    theirs = their_model(folder)
    found = ours.loglikelihood(requests_of("loglikelihood", PAIRS))
    expected = theirs.loglikelihood(requests_of("loglikelihood", PAIRS))
    texts = [(FOX,), (f"{FOX}. " * 30,)]
    rolling = ours.loglikelihood_rolling(requests_of("loglikelihood_rolling", texts))
    expected_rolling = theirs.loglikelihood_rolling(requests_of("loglikelihood_rolling", texts))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    pairs = [(one, other) for (one, _), (other, _) in zip(found, expected, strict=True)]
    pairs += list(zip(rolling, expected_rolling, strict=True))
    for one, other in pairs:
        assert abs(one - other) < 1e-4 * max(1, abs(other) / 100), (one, other)
    assert ours.truncated == 1
    until = {"until": ["o"], "max_gen_toks": 12}
    asked = [(FOX, until), ("12 34 " * 60, dict(max_gen_toks=5, until=[]))]
    assert ours.generate_until(requests_of("generate_until", asked)) == theirs.generate_until(
        requests_of("generate_until", asked)
    )


@needs_harness
def test_local_tasks_have_the_scores_of_the_harness_own_model(folder):
    found = []
    for model in (our_model(folder), their_model(folder)):
        manager = harness.open_tasks(NAMES, None)
        found.append(harness.run_tasks(model, NAMES, manager, 1, limit=10))
    for ours, theirs in zip(*found, strict=True):
        assert (ours["task"], ours["questions"]) == (theirs["task"], theirs["questions"])
        for name, value in theirs["metrics"].items():
            assert ours["metrics"][name] == pytest.approx(value, rel=1e-4), name
    assert [record["questions"] for record in found[0]] == [10, 10, 8]


@needs_harness
def test_an_unknown_task_and_sampling_are_refused(folder):
    with pytest.raises(ValueError, match="^lm_eval_tasks = no_such: no such task. Fix: one of loc"):
        harness.open_tasks(["no_such"], None)
    asked = requests_of("generate_until", [(FOX, {"do_sample": True, "temperature": 1.0})])
    with pytest.raises(ValueError, match="do_sample = true: only greedy"):
        our_model(folder).generate_until(asked)


def test_the_questions_in_the_repository_are_those_that_the_script_writes():
    for make in (questions.addition, questions.repeat):
        lines = (questions.FOLDER / f"{make.__name__}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == make(random.Random(questions.SEED))
        assert len(lines) == questions.QUESTIONS


def test_sums_have_one_right_choice():
    for question in questions.addition(random.Random(2)):
        first, _, second, _ = question["question"].lower().split()
        total = questions.NUMBERS.index(first) + questions.NUMBERS.index(second)
        assert question["choices"][question["label"]] == questions.NUMBERS[total]
        assert len(set(question["choices"])) == questions.CHOICES


class MinusOne:
    """Finds every token as likely."""

    context_length = 10
    batch_tokens = 100

    def score(self, texts):
        return [
            TextScores(torch.full((len(text) - 1,), -1.0), torch.zeros(len(text) - 1).bool())
            for text in texts
        ]


def test_only_the_tokens_of_the_continuation_count():
    """None of an empty one."""
    requests = [(None, [1, 2, 3], []), (None, [1], [2, 3])]
    found = Answers(MinusOne())._loglikelihood_tokens(requests)
    assert found == [(0.0, True), (-2.0, False)]


def test_an_empty_stop_text_stops_nothing(monkeypatch):
    harness_utils = SimpleNamespace(
        handle_stop_sequences=lambda until, eos: until,
        normalize_gen_kwargs=lambda settings, tokens: settings | {"max_gen_toks": tokens},
    )
    monkeypatch.setitem(sys.modules, "lm_eval.models.utils", harness_utils)

    def continuation(stops: list[str]) -> str:
        """Return the answer of a model that adds "a.b.c" letter by letter."""
        said = "a.b.c"

        def continue_prompts(prompts, new_tokens, should_stop):
            ends = [end for end in range(len(said)) if should_stop(said[:end])]
            return [said[: ends[0]] if ends else said]

        model = SimpleNamespace(
            context_length=1000,
            first_ids=[],
            tokenizer=SimpleNamespace(encode=lambda text: [1]),
            continue_prompts=continue_prompts,
        )
        return Answers(model)._continue("asked", {"until": stops})

    assert continuation([""]) == "a.b.c"
    assert continuation(["", "."]) == continuation(["."]) == "a"
