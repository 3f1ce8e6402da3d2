"""The page of all flags is the one that the settings and the table give, and names each of them."""

import re

from pretrain.config.flags_page import PAGE, docstrings_of_fields, make_page
from pretrain.config.load import field_table, sections_of_config
from pretrain.config.megatron_flags import synonyms, table


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
    for cls in sections_of_config().values():
        fields = set(cls.__dataclass_fields__)
        assert fields <= docstrings_of_fields(cls).keys(), fields - docstrings_of_fields(cls).keys()
