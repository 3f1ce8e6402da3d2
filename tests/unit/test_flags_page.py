"""The page of all flags is the one that the settings and the table give, and names each of them."""

import re

from pretrain.config.config import section_types
from pretrain.config.flags_page import PAGE, make_page
from pretrain.config.flat import field_table
from pretrain.config.megatron_flags import synonyms, table
from pretrain.config.page_parts import docstrings_of_fields
from pretrain.config.settings_page import SETTINGS_PAGE, first_sentence, make_settings_page


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == make_page(), "make it again: python -m pretrain.config.flags_page"


def test_the_page_has_a_row_for_every_setting():
    rows = set(
        re.findall(r"^\| `--([\w-]+)` \|", PAGE.read_text().split("## Flags of Megatron")[0], re.M)
    )
    assert rows == {name.replace("_", "-") for name in field_table() if name != "phases"}


def test_the_page_names_every_flag_of_the_table():
    text = PAGE.read_text()
    missing = [flag for answer in table() for flag in answer.flags if f"`--{flag}`" not in text]
    assert missing == []
    assert [word for word in synonyms() if f"`--{word}`" not in text] == []


def test_every_setting_has_an_explanation():
    for cls in section_types().values():
        fields = set(cls.__dataclass_fields__)
        assert fields <= docstrings_of_fields(cls).keys(), fields - docstrings_of_fields(cls).keys()


def test_the_page_of_settings_is_up_to_date():
    text = SETTINGS_PAGE.read_text()
    assert text == make_settings_page(), "make it again: python -m pretrain.config.flags_page"


def test_the_page_of_settings_has_a_row_for_every_setting():
    rows = set(re.findall(r"^\| `(\w+)` \|", make_settings_page(), re.M))
    assert rows == {*field_table(), "name", "lr_schedule"}


def test_a_first_sentence_ends_at_a_stop_with_a_space_behind_it():
    assert first_sentence("Reads config.json, by default 0.1. More.") == (
        "Reads config.json, by default 0.1."
    )
