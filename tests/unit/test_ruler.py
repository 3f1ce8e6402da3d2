"""tools/evaluation: RULER's tasks hold what is asked for, at the length that was asked for; a model
that reads scores 1, one that guesses 0."""

import re

import pytest

from tests.documents import Letters
from tools.evaluation import needles
from tools.evaluation.fill import fill
from tools.evaluation.ruler import TASKS, match_all, match_part, write_sample
from tools.evaluation.ruler_run import RulerRun
from tools.evaluation.tables import harness_table, results_table
from tools.evaluation.task_names import choose_tasks

TEXT = " ".join(f"Sentence number {number} of the book says little." for number in range(90))
NEEDLE = re.compile(r"The secret \w+ of (\S+) is (\S+)\.")
ASSIGNMENT = re.compile(r"LET (\w+) = (\w+)\.")
WORDS_OF_NEEDLES = {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}


def sample_of(name, length=3000, number=0, seed=5, text=TEXT):
    return write_sample(name, length, number, seed, Letters().encode, text)


def answers_in(prompt: str) -> list[str]:
    """What a reader of the prompt answers, found without the generator."""
    *before, question = prompt.split("Question: ")
    text = before[-1]
    if "variables" in question:
        (value,) = re.findall(r"have the value (\d+)", question)
        held = [value]
        for name, source in ASSIGNMENT.findall(text):
            if source in held:
                held.append(name)
        return held[1:]
    asked = re.findall(r"[\w-]+-[\w-]+", question.splitlines()[0])
    return [value for key, value in NEEDLE.findall(text) if key in asked]


class Reader:
    """Answers what the prompt says; a guesser answers something else."""

    context_length = 10**6
    batch_tokens = 5000
    first_ids: list[int] = []
    tokenizer = Letters()

    def __init__(self, *, reads: bool = True):
        self.reads = reads
        self.asked = []

    def continue_prompts(self, prompts, new_tokens, should_stop=None):
        self.asked += [(len(ids), limit) for ids, limit in zip(prompts, new_tokens, strict=True)]
        answers = [answers_in(self.tokenizer.decode(ids)) for ids in prompts]
        return [", ".join(each) if self.reads else "none of them" for each in answers]


@pytest.mark.parametrize("name", TASKS)
def test_a_sample_has_its_length_and_its_answers_can_be_read_from_it(name):
    for length in (2500, 6001):
        sample = sample_of(name, length)
        tokens = len(sample.ids) + sample.answer_tokens
        assert length - 25 <= tokens <= length, (tokens, "a sentence of the haystack is 21 letters")
        assert sample.prompt == Letters().decode(sample.ids)
        assert sorted(answers_in(sample.prompt)) == sorted(sample.answers)
        assert len(", ".join(sample.answers)) < sample.answer_tokens


@pytest.mark.parametrize("name", [name for name in TASKS if name != "vt"])
def test_each_answer_stands_in_one_needle_at_its_depth(name):
    sample = sample_of(name, 6000)
    context = sample.prompt.split("\n\nQuestion: ")[0].split("\n\n", 1)[1]
    found = NEEDLE.findall(context)
    own = [value for _, value in found if value in sample.answers]
    assert len(own) == len(sample.answers) == len(sample.depths)
    expected = WORDS_OF_NEEDLES.get(name, 1)
    assert len(found) == expected or (TASKS[name].haystack == "needles" and len(found) > 20)
    # Answers are in the order of the question; depths in that of the needles.
    places = sorted(context.index(value) / len(context) for value in sample.answers)
    for place, depth in zip(places, sorted(sample.depths), strict=True):
        assert abs(place - depth) < 0.1, (place, depth)


def test_numbers_of_keys_values_and_queries_are_rulers():
    assert [len(sample_of(name).answers) for name in TASKS] == [1, 1, 1, 1, 1, 1, 4, 4, 5]
    assert re.fullmatch(r"\d{7}", sample_of("niah_single_1").answers[0])
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f-]{27}", sample_of("niah_single_3").answers[0])
    text = sample_of("niah_single_2").prompt
    assert "Sentence number 3" in text
    assert "The road is long" in sample_of("niah_single_1").prompt
    assert "The road is long" in sample_of("niah_single_2", text=None).prompt


def test_a_text_without_spaces_fills_a_length_too():
    text = "敏捷的狐狸跳过了懒狗。" * 30
    sample = sample_of("niah_single_2", text=text)
    assert 3000 - 16 <= len(sample.ids) + sample.answer_tokens <= 3000
    (answer,) = sample.answers
    place = sample.prompt.index(answer) / len(sample.prompt)
    assert abs(place - sample.depths[0]) < 0.1


def test_a_text_without_sentences_hides_needles_at_their_depth_too():
    sample = sample_of("niah_single_2", text="a list of words " * 50)
    place = sample.prompt.index(sample.answers[0]) / len(sample.prompt)
    assert abs(place - sample.depths[0]) < 0.1, (place, sample.depths)


def test_samples_follow_from_the_seed_and_ask_the_same_at_every_length():
    one = sample_of("niah_multiquery")
    assert sample_of("niah_multiquery") == one
    longer = sample_of("niah_multiquery", 9000)
    assert (longer.answers, longer.depths) == (one.answers, one.depths)
    assert longer.prompt != one.prompt
    others = (sample_of("niah_multiquery", seed=6), sample_of("niah_multiquery", number=1))
    assert all(other.answers != one.answers for other in others)


def test_a_chain_of_variables_stands_in_order_behind_a_solved_example():
    sample = sample_of("vt", 8000)
    example, text = sample.prompt.split("\n\nThe text below")
    names = [name for name, _ in ASSIGNMENT.findall(text)]
    assert names == sample.answers
    assert not set(sample.answers) & {name for name, _ in ASSIGNMENT.findall(example)}
    assert example.endswith(", ".join(answers_in(example)))


@pytest.mark.parametrize(
    "output, answers, all_of, part",
    [
        ("they are 12 and 34", ["12", "34", "56", "78"], 0.5, 1.0),
        ("ABCde, fghij", ["abcDE", "FGHIJ"], 1.0, 1.0),
        ("", ["12"], 0.0, 0.0),
        ("it is 1234567.", ["1234567"], 1.0, 1.0),
    ],
)
def test_scores_are_the_share_of_answers_that_the_output_holds(output, answers, all_of, part):
    assert match_all(output, answers) == all_of
    assert match_part(output, answers) == part


@pytest.mark.parametrize("room, units", [(9, 0), (10, 0), (19, 3), (1000, 330), (3, 0)])
def test_a_text_is_filled_to_the_last_unit_that_has_room(room, units):
    calls = []

    def write(count):
        calls.append(count)
        return "x" * (10 + 3 * count)

    found = fill(write, list, room)
    assert (found.units, len(found.ids)) == (units, 10 + 3 * units)
    assert len(calls) <= 5, calls


@pytest.mark.parametrize("room", range(300, 5000, 317))
def test_uneven_units_are_filled_too(room):
    words = [7 if number % 50 < 25 else 1 for number in range(4000)]
    found = fill(lambda count: "x" * sum(words[:count]), list, room)
    assert len(found.ids) <= room < sum(words[: found.units + 1])


def test_needles_of_a_haystack_have_neither_the_key_nor_the_value_that_is_asked_for(monkeypatch):
    """Also where the draws come to them."""
    drawn = iter(["own-key", "other-key", "1111111", "2222222"])
    monkeypatch.setattr(needles, "draw", lambda kind, generator: next(drawn))
    line = needles._OtherNeedles(TASKS["niah_multikey_2"], 0.5, {"own-key", "1111111"})(0)
    assert NEEDLE.findall(line) == [("other-key", "2222222")]


def test_a_model_that_reads_scores_one_and_one_that_guesses_zero():
    for reads, expected in ((True, 1.0), (False, 0.0)):
        model = Reader(reads=reads)
        run = RulerRun(model, seed=3, samples=3, text=TEXT)
        assert not run.check(list(TASKS), [2500])
        records = [run.run(name, 2500) for name in TASKS]
        assert [record["score"] for record in records] == [expected] * len(TASKS)
        assert [record["any_answer"] for record in records] == [expected] * len(TASKS)
        assert all(tokens + new <= 2500 for tokens, new in model.asked)
        table = results_table(records, [2500])
        assert table[0].split() == ["task", "2,500"]
        assert table[-1].split() == ["mean", "of", "RULER's", f"{expected:.3f}"]


def test_each_sample_may_add_its_own_number_of_tokens(monkeypatch):
    model = Reader(reads=False)
    run = RulerRun(model, seed=3, samples=4, text=TEXT)
    # Names are of random letters: some take more tokens than others.
    monkeypatch.setattr(run, "encode", lambda text: Letters().encode(text.replace("A", "AA")))
    model.batch_tokens = 4 * 2500
    run.run("vt", 2500)
    samples = [write_sample("vt", 2500, n, 3, run.encode, TEXT) for n in range(4)]
    limits = [sample.answer_tokens for sample in samples]
    assert len(set(limits)) > 1
    assert model.asked == [(len(sample.ids), sample.answer_tokens) for sample in samples]


def test_a_length_without_room_names_the_task_and_what_it_needs():
    problems = RulerRun(Reader(), 1, 1, TEXT).check(["niah_single_1", "vt"], [9000, 300])
    assert [problem.split(" takes ")[0] for problem in problems] == [
        "lengths = 300: niah_single_1",
        "lengths = 300: vt",
    ]
    needed = int(re.findall(r"at least ([\d,]+)", problems[0])[0].replace(",", ""))
    # The fix names the least length that is taken.
    assert not RulerRun(Reader(), 1, 1, TEXT).check(["niah_single_1"], [needed])
    assert RulerRun(Reader(), 1, 1, TEXT).check(["niah_single_1"], [needed - 1])
    assert "--tasks with the others" in problems[0], problems


def test_a_length_without_room_for_a_later_sample_is_named(monkeypatch):
    run = RulerRun(Reader(), seed=4, samples=6, text=TEXT)
    # Names are of random letters: some take more tokens than others.
    monkeypatch.setattr(run, "encode", lambda text: Letters().encode(text.replace("A", "AA")))

    def least_length(number: int) -> int:
        """Return the shortest length at which a sample is written, from below."""
        length = 400
        while True:
            try:
                write_sample("vt", length, number, 4, run.encode, TEXT)
                return length
            except ValueError:
                length += 1

    needed = [least_length(number) for number in range(6)]
    assert needed[0] < max(needed)
    assert run.check(["vt"], [max(needed)]) == []
    (problem,) = run.check(["vt"], [max(needed) - 1])
    assert f"vt takes {max(needed):,} tokens" in problem


def test_tasks_are_chosen_by_name_and_group_and_unknown_ones_refused():
    chosen = choose_tasks(["vt", "probes"], has_documents=False, has_others=False)
    assert (chosen.probes, chosen.ruler) == (["loss", "context_gain", "passkey"], ["vt"])
    default = choose_tasks([], has_documents=False, has_others=False)
    assert (default.probes, default.ruler) == ([], list(TASKS))
    nothing = choose_tasks([], has_documents=True, has_others=True)
    assert (nothing.probes, nothing.ruler) == ([], [])
    with pytest.raises(
        ValueError, match=r"^tasks = niah_singel_1: no such task. Fix: did you mean"
    ):
        choose_tasks(["niah_singel_1"], has_documents=False, has_others=False)


def test_errors_of_the_harness_stand_beside_their_metric():
    metrics = {
        "acc": 0.5,
        "acc_stderr": 0.25,
        "exact_match,strict": 1.0,
        "exact_match_stderr,strict": 0.125,
    }
    _, *rows = harness_table([{"task": "sums", "metrics": metrics}])
    assert [row.split() for row in rows] == [
        ["sums", "acc", "0.5", "0.2500"],
        ["sums", "exact_match,strict", "1", "0.1250"],
    ]
