"""The sentences, words and questions that RULER's tasks are written with.

The wording is this repository's own; what is hidden, where and how often is RULER's.
"""

from random import Random
from uuid import UUID

NOISE = (
    "The road is long.",
    "The river is cold.",
    "The hills are high.",
    "We walk on.",
    "The night is still.",
)
"""Sentences without a meaning for any question, repeated as often as a text needs them."""

NEEDLE = "The secret {kind} of {key} is {value}."

NEEDLE_PROMPT = """The text below hides secret {kinds}. Remember them: you will be asked for them.

{context}

Question: {question}
Answer: {beginning}"""
ONE_NEEDLE = ("What is the secret {kind} of {keys}?", "The secret {kind} of {keys} is")
SEVERAL_NEEDLES = (
    "What are all the secret {kind}s of {keys}?",
    "All the secret {kind}s of {keys} are",
)
"""A question, and how its answer begins: the model goes on from there."""

FIRST_ASSIGNMENT = "LET {name} = {value}."
NEXT_ASSIGNMENT = "LET {name} = {source}."
VARIABLES_PROMPT = """The text below gives values to variables, some of them through others.

{context}

Question: Which variables have the value {value}?
Answer: The {count} variables with the value {value} are:"""

LOWEST_NUMBER = 1_000_000
HIGHEST_NUMBER = 9_999_999
LOWEST_VALUE = 10_000
HIGHEST_VALUE = 99_999
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NAME_LETTERS = 5
"""Letters of a variable's name."""

_ADJECTIVES = """
able amber ancient autumn blue bold brave brief bright broad calm careful cheerful clean clear
clever cold common crisp curious dark deep distant early eager earnest even fair faithful famous
fast fine firm fresh friendly full gentle glad golden grand great green happy hidden high honest
humble idle keen kind large late light little lively lonely long loud loyal lucky mellow merry mild
modern modest narrow near neat noble northern odd old open orange pale patient plain polite
proud pure quick quiet rapid rare ready red rich round royal rural sharp short silent silver
simple slow small smooth soft solid southern steady strong sunny sweet swift tall tender tidy
tiny true vast violet vivid warm wide wild wise wooden yellow young
""".split()
_NOUNS = """
acorn anchor apple arrow badger bakery banner barrel basket beacon beaver bell bench bridge brook
bucket button cabin camel candle canyon carpet castle cherry circle cliff cloud clover coast comet
compass copper corner cotton cradle crane curtain daisy desert dolphin dragon eagle elbow engine
falcon feather fiddle field finger forest fountain fox garden glacier hammer harbor harvest hedge
heron hill honey island jacket jungle kettle kitchen kite ladder lantern leaf lemon library lily
lion marble market meadow mirror monkey mountain needle nest ocean orchard otter owl paddle palace
panda paper parrot pebble pencil pepper piano pillow planet plum pocket pond puzzle rabbit
raven ribbon river robin rocket saddle salmon school shadow shell ship signal sparrow spider
spoon spring stone storm stream summer swan table temple thunder tiger tower train tree tunnel
valley village violin wagon walnut walrus wheel whale willow window winter wolf zebra
""".split()


def draw(kind: str, generator: Random) -> str:
    """Draw a key or value: a `word` of an adjective and a noun, a `number` or a `uuid`."""
    if kind == "word":
        return f"{generator.choice(_ADJECTIVES)}-{generator.choice(_NOUNS)}"
    if kind == "number":
        return str(generator.randint(LOWEST_NUMBER, HIGHEST_NUMBER))
    assert kind == "uuid", kind
    return str(UUID(int=generator.getrandbits(128), version=4))


def draw_others(kind: str, count: int, taken: set[str], generator: Random) -> list[str]:
    """Draw keys or values that are neither in `taken` nor equal to each other; add them to it."""
    found = []
    while len(found) < count:
        one = draw(kind, generator)
        if one not in taken:
            taken.add(one)
            found.append(one)
    return found


def draw_names(count: int, taken: set[str], generator: Random) -> list[str]:
    """Draw names of variables that are neither in `taken` nor equal; add them to it."""
    found = []
    while len(found) < count:
        name = "".join(generator.choices(LETTERS, k=NAME_LETTERS))
        if name not in taken:
            taken.add(name)
            found.append(name)
    return found


def join_words(words: list[str]) -> str:
    """Join words as a sentence does: a; a and b; a, b and c."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
