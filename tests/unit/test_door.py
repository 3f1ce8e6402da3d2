"""A command of tools/ refuses wrong arguments in one line each, with exit code 2."""

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
import tyro

from tools.shared.command_names import command_of
from tools.shared.door import run_door, spell_switches
from tools.shared.message_text import count_of


@dataclass(kw_only=True)
class Arguments:
    input: list[str]
    output_prefix: str
    parts: int = 1
    kind: Literal["one", "two"] = "one"
    overwrite: bool = False
    verify: bool | None = None
    prepend_bos: Annotated[bool, tyro.conf.arg(aliases=["--append-bos"])] = False
    extensions: list[str] = field(default_factory=list)


NEEDED = ("--input", "a", "b", "--output-prefix", "c")


def run(*words: str, act=lambda arguments: None) -> int:
    return run_door(Arguments, act, name="tools.test", description="A test.", argv=words)


@pytest.mark.parametrize(
    "words, expected",
    [
        (
            (*NEEDED, "--overwite"),
            "error: --overwite: no such flag. Fix: did you mean --overwrite?",
        ),
        (
            ("--inptu", "a", "--output-prefix", "c"),
            "error: --inptu: no such flag. Fix: did you mean --input?",
        ),
        (
            (*NEEDED, "--patrs", "3"),
            "error: --patrs: no such flag. Fix: did you mean --parts?",
        ),
        (
            (*NEEDED, "--nope", "3"),
            "error: --nope: no such flag. Fix: see tools.test --help.",
        ),
        ((*NEEDED, "--zzz=3"), "error: --zzz: no such flag. Fix: see tools.test --help."),
        (
            (),
            "error: --input, --output-prefix: must be given. Fix: see tools.test --help.",
        ),
        (
            (*NEEDED, "--parts", "x"),
            "error: Error parsing --parts: invalid literal for int() with base 10: 'x'. "
            "Fix: see tools.test --help.",
        ),
        (
            (*NEEDED, "--kind", "three"),
            "error: invalid choice 'three' for argument '--kind'. Expected one of ('one', 'two'). "
            "Fix: see tools.test --help.",
        ),
        (
            (*NEEDED, "--parts", "3", "more"),
            "error: Unrecognized options: more. Fix: see tools.test --help.",
        ),
    ],
)
def test_bad_arguments_are_refused_in_one_line(words, expected, capsys):
    assert run(*words) == 2
    assert capsys.readouterr().err == f"{expected}\n"


def test_two_unknown_flags_are_two_lines(capsys):
    assert run(*NEEDED, "--partz", "3", "--overwite") == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: --partz: no such flag. Fix: did you mean --parts?",
        "error: --overwite: no such flag. Fix: did you mean --overwrite?",
    ]


def test_underscores_aliases_and_switches_are_read():
    seen = []
    words = ("--input", "a", "--output_prefix=c", "--append-bos", "--no-verify", "--no-overwrite")
    assert run(*words, act=seen.append) == 0
    (arguments,) = seen
    assert arguments.output_prefix == "c"
    assert arguments.prepend_bos is True
    assert arguments.verify is False
    assert arguments.overwrite is False


@pytest.mark.parametrize("value", ["-- a list", "--- title", "--1", "---"])
def test_dashes_without_a_letter_are_a_value(value):
    seen = []
    assert run("--input", "a", "--output-prefix", value, act=seen.append) == 0
    assert seen[0].output_prefix == value


def test_a_value_of_a_switch_stays():
    words = ["--verify", "True", "--no-verify", "--verify"]
    assert spell_switches(Arguments, words) == [*words[:2], "--verify", "False", "--verify", "True"]


def test_the_exit_code_is_what_the_action_returns():
    assert run(*NEEDED, act=lambda arguments: 1) == 1


def test_each_line_of_an_error_says_that_it_is_one(capsys):
    def refuse(arguments):
        raise ValueError("one\ntwo")

    assert run(*NEEDED, act=refuse) == 2
    assert capsys.readouterr().err == "error: one\nerror: two\n"


def test_an_error_without_words_is_named_by_its_kind(capsys):
    def fail(arguments):
        raise OSError

    assert run(*NEEDED, act=fail) == 2
    assert capsys.readouterr().err == "error: OSError\n"


def test_the_help_prints_and_ends_well(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0
    assert "--output-prefix" in capsys.readouterr().out


@pytest.mark.parametrize("number, expected", [(0, "0 files"), (1, "1 file"), (2000, "2,000 files")])
def test_counts_have_the_right_plural(number, expected):
    assert count_of(number, "file") == expected


TALKER = """
import sys
from tests.unit.test_door import NEEDED, run
def act(arguments):
    for number in range(100_000):
        print(number)
sys.exit(run(*NEEDED, act=act))
"""


def test_a_reader_that_has_enough_of_the_output_is_no_error():
    talker = subprocess.Popen(
        [sys.executable, "-c", TALKER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert talker.stdout is not None and talker.stderr is not None
    assert talker.stdout.readline() == "0\n"
    talker.stdout.close()
    said = talker.stderr.read()
    assert (talker.wait(60), said) == (141, "")


def test_another_broken_pipe_is_an_error(capsys):
    def act(arguments):
        raise BrokenPipeError("a worker is gone")

    assert run(*NEEDED, act=act) == 2
    assert capsys.readouterr().err == "error: a worker is gone\n"


def test_messages_name_a_command_as_users_call_it(capsys):
    """Each row of `ithaca.sh`'s table names its command; any other module keeps its name."""
    assert command_of("tools.preprocess_data") == "bash launch/ithaca.sh preprocess"
    assert command_of("tools.plan") == "bash launch/ithaca.sh plan"
    assert command_of("tools.coordinate_check") == "bash launch/ithaca.sh coordinate-check"
    assert command_of("tools.bench step") == "bash launch/ithaca.sh bench step"
    assert command_of("tools.bench.step") == "tools.bench.step"
    assert run_door(Arguments, print, name="tools.watch", description="", argv=["--zzz"]) == 2
    fix = "Fix: see bash launch/ithaca.sh watch --help.\n"
    assert capsys.readouterr().err == f"error: --zzz: no such flag. {fix}"


def test_an_interrupt_is_one_line(capsys):
    def act(arguments):
        raise KeyboardInterrupt

    assert run(*NEEDED, act=act) == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"
