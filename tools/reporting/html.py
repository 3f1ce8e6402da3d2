"""Fill the template of a page: one style for all pages, in light and in dark."""

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tools.reporting.axes import style_rules

BASE = Path(__file__).parent
"""Folder of base.html, which every page extends."""


def render(template: Path, **values: Any) -> str:
    """Make the page as HTML. Every value is escaped, unless it is Markup.

    Args:
        template: a file that extends base.html.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, BASE]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    # Declarations of CSS are ours.
    light, dark = map(Markup, style_rules())
    return environment.get_template(template.name).render(light=light, dark=dark, **values)
