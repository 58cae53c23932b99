"""A page of HTML, of one of the templates beside this file: self-contained, its text escaped."""

import datetime
from importlib import resources

import jinja2
from markupsafe import Markup, escape

from rae.store.manifest import Json


def render_page(template: str, values: Json, now: datetime.datetime) -> str:
    """The page as HTML. Names, paths and messages are untrusted text: the template escapes all of them."""
    folder = resources.files("rae.pipeline")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = prose
    return environment.get_template(template).render(values, date=f"{now:%d %B %Y, %H:%M} UTC")


def prose(text: str) -> Markup:
    """Untrusted text as HTML, with what stands between backticks as code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return escape(text)
    return Markup().join(
        Markup("<code>{}</code>").format(part) if place % 2 else escape(part) for place, part in enumerate(parts)
    )
