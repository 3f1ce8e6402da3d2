"""pretrain/evaluation/passkey.py: what a trial holds, and which lengths are refused."""

from pathlib import Path

import numpy as np
import pytest

from data.batch import IGNORE
from data.excerpts import lay_out
from data.stream import DocumentStream
from data.tokenizers.tokenizer import build_tokenizer
from pretrain.evaluation.passkey import write_trial
from pretrain.evaluation.passkey_texts import check_passkey_lengths, write_texts
from pretrain.logs.lines import evaluation_line, evaluation_values
from tests.documents import Documents, Letters
from tools.train_tokenizer import Arguments, train_tokenizer


def filler_stream() -> DocumentStream:
    return DocumentStream(
        Documents(
            (50, 3, 400, 20), lambda _, length: np.array([ord("a")] * (length - 1) + [Letters.eod])
        ),
        None,
        1,
    )


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_trial_hides_the_number_at_its_depth_and_asks_for_it(depth):
    tokenizer = Letters()
    (excerpt,) = write_trial(tokenizer, filler_stream(), 300, [depth], 7, 0)
    batch = lay_out([excerpt], 300, [(0, 300)], padding=0, vocab_size=128)
    text = tokenizer.decode(batch.tokens.tolist())
    answer = tokenizer.decode(batch.labels[batch.labels != IGNORE].tolist())
    key = answer.strip()
    assert len(key) == 5 and key.isdigit() and text.endswith(f"The pass key is {key}"), (
        "all but the last are inputs"
    )
    assert (
        batch.labels[-1] == IGNORE
        and (batch.labels[-7:-1] != IGNORE).all()
        and batch.num_targets == 6
    )
    hidden = f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
    filler = 300 - len(hidden) - len("\nWhat is the pass key? The pass key is 12345")
    assert text.index(hidden) == round(depth * filler) and set(text[: text.index(hidden)]) <= {"a"}
    assert chr(Letters.eod) not in text, "no document ends within the filler"


def test_trials_follow_from_the_seed_and_share_their_number_over_depths():
    def keys(seed, trial):
        return [
            excerpt.read(295, 5).tolist()
            for excerpt in write_trial(Letters(), filler_stream(), 300, [0.1, 0.9], seed, trial)
        ]

    assert keys(7, 0) == keys(7, 0) and keys(7, 0)[0] == keys(7, 0)[1]
    assert keys(7, 0) != keys(8, 0) and keys(7, 0) != keys(7, 1)


def test_the_answer_begins_where_the_ids_part():
    class Joining(Letters):
        """Has one id for "is 1" and the like, as merges over a word's end would."""

        def encode(self, text):
            head, _, key = text.rpartition("is ")
            return (
                super().encode(head) + [1, *super().encode(key)]
                if key.isdigit()
                else super().encode(text)
            )

    _, asked, answer = write_texts(Joining(), 12345)
    assert asked[-answer:].tolist() == [1, *map(ord, "12345")]


def test_a_trained_tokenizer_writes_the_texts(tmp_path):
    folder = str(Path(__file__).parents[2] / "data")
    model = train_tokenizer(
        Arguments(input=[folder], output_prefix=str(tmp_path / "t"), vocab_size=512)
    )
    tokenizer = build_tokenizer("SentencePieceTokenizer", model, None)
    sentence, asked, answer = write_texts(tokenizer, 90817)
    assert tokenizer.decode(asked) == "\nWhat is the pass key? The pass key is 90817"
    assert (
        tokenizer.decode(asked[-answer:]).strip() == "90817"
        and tokenizer.decode(sentence).count("90817") == 2
    )
    assert check_passkey_lengths(tokenizer, [4096]) == []


def test_records_in_words_and_as_curves():
    place = {"step": 7, "tokens": 70, "phase": "long", "seq_length": 4096}
    found = place | {
        "kind": "passkey",
        "depth": 0.1,
        "accuracy": 0.5,
        "answer_loss": 1.25,
        "trials": 2,
    }
    assert evaluation_line(found) == (
        "passkey at step 7 (long, 4,096 tokens): depth 0.1, 50 % of 2 found, loss 1.2500 "
        "per answer token"
    )
    assert evaluation_values(found, has_lengths=False) == {
        "passkey/4096/0.1/accuracy": 0.5,
        "passkey/4096/0.1/answer_loss": 1.25,
    }
    gain = place | {
        "kind": "context_gain",
        "set": "code",
        "cut": 1024,
        "loss_full": 2.0,
        "loss_cut": 2.5,
        "gain": 0.5,
        "gain_low": None,
        "gain_high": None,
        "documents": 1,
        "num_targets": 9,
    }
    assert evaluation_line(gain) == (
        "context gain of code at step 7 (long, 4,096 tokens): 0.5000 nats (no interval from 1 "
        "document): loss 2.0000 with the whole context, 2.5000 with 1,024 tokens"
    )
    assert evaluation_values(gain, has_lengths=True) == {
        "context_gain/code/gain": 0.5,
        "context_gain/code/loss_full": 2.0,
        "context_gain/code/loss_cut": 2.5,
    }
    loss = place | {"kind": "loss", "set": "valid", "valid_loss": 3.0, "num_targets": 9}
    assert evaluation_values(loss, has_lengths=False) == {"valid_loss": 3.0}
    assert evaluation_values(loss | {"set": "code"}, has_lengths=True) == {
        "valid_loss/code/4096": 3.0
    }


def test_lengths_that_hold_no_trial_are_refused():
    (problem,) = check_passkey_lengths(Letters(), [64, 4096])
    assert (
        "eval_passkey_lengths = 64: half of it must hold the hidden sentence and the question"
        in problem
    )
    least = int(problem.split("at least ")[1].rstrip("."))
    assert (
        check_passkey_lengths(Letters(), [least]) == []
        and len(check_passkey_lengths(Letters(), [least - 1])) == 1
    )


def test_a_tokenizer_without_the_letters_is_refused():
    class Wordless(Letters):
        def encode(self, text):
            raise ValueError("no id for 'T'")

    (problem,) = check_passkey_lengths(Wordless(), [4096])
    assert (
        "eval_passkey_lengths = 4096: the tokenizer cannot write the question (no id for 'T'). "
        "Fix: " in problem
    )


def test_filler_of_nothing_but_ends_is_refused():
    empty = DocumentStream(
        Documents((5, 5), lambda _, length: np.full(length, Letters.eod)), None, 1
    )
    with pytest.raises(ValueError, match="nothing but ends of documents. Fix"):
        write_trial(Letters(), empty, 300, [0.5], 7, 0)
