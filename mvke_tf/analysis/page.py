# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page: pictures as data URIs, no external resource, sane on phone and desktop."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence
from html import escape

import pandas as pd

# Pictures of more pixels across are not shrunk to fit a phone, but scroll.
WIDE = 700
_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 1rem; max-width: 64rem; box-sizing: border-box; overflow-wrap: break-word;
       font: 1rem/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { margin-top: 2.5rem; border-top: 1px solid #ccc; padding-top: 1rem; }
.verdict { border-left: .35rem solid #0072B2; background: #f2f6fa; padding: .2rem 1rem; margin: 1rem 0; }
.verdict .try { font-weight: 600; }
figure { margin: 1rem 0; overflow-x: auto; }
figure img { display: block; height: auto; max-width: 100%; }
figcaption { display: none; color: #444; font-size: .92rem; position: sticky; left: 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: .8rem; }
.card { border: 1px solid #ccc; border-radius: .4rem; padding: .2rem .9rem; font-size: .92rem; }
.card h3 { margin: .5rem 0 .2rem; font-size: 1rem; } .card dl { margin: .2rem 0 .5rem; }
.card dt { margin-top: .4rem; color: #555; font-size: .85rem; } .card dd { margin: 0; }
.table { overflow-x: auto; margin: .5rem 0; max-height: 32rem; overflow-y: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { position: sticky; top: 0; background: #eee; }
summary { cursor: pointer; color: #005a8c; }
nav a { margin-right: 1rem; white-space: nowrap; } nav { line-height: 2; }
@media (max-width: 46rem) { figure img.wide { max-width: none; width: 46rem; }
                            figure.wide figcaption { display: block; } }
"""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Args:
        name: Name of its file, without ending.
        content: The PNG file.
        alt: What it shows, in words, for those who cannot see it.
    """

    name: str
    content: bytes
    alt: str


@dataclasses.dataclass(frozen=True)
class Card:
    """A small box beside others of its kind: a heading, and `{what: values}`, a line per value."""

    heading: str
    facts: dict[str, Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of the page.

    Args:
        heading: Its heading.
        text: Paragraphs.
        pictures: Pictures.
        tables: `{caption: frame}`, folded up.
        quotes: Boxes of lines, the first a headline: the verdicts.
        cards: Small boxes side by side.
    """

    heading: str
    text: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    tables: dict[str, pd.DataFrame] = dataclasses.field(default_factory=dict)
    quotes: tuple[str, ...] = ()
    cards: tuple[Card, ...] = ()


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole page as HTML.

    Args:
        title: Title and first heading.
        sections: In order.
    """
    links = "".join(f'<a href="#s{number}">{escape(section.heading)}</a>' for number, section in enumerate(sections))
    body = "\n".join(_section(number, section) for number, section in enumerate(sections))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<nav aria-label="sections">{links}</nav>
<main>
{body}
</main>
</body>
</html>
"""


def _section(number: int, section: Section) -> str:
    parts = [f'<h2 id="s{number}">{escape(section.heading)}</h2>']
    parts += [_quote(quote) for quote in section.quotes]
    parts += [f"<p>{escape(text)}</p>" for text in section.text]
    if section.cards:
        parts.append('<div class="cards">\n' + "\n".join(map(card_html, section.cards)) + "\n</div>")
    parts += [_picture(picture) for picture in section.pictures]
    parts += [
        f"<details><summary>Table: {escape(caption)}</summary>\n"
        f'<div class="table" tabindex="0">\n{_table(frame)}\n</div></details>'
        for caption, frame in section.tables.items()
    ]
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _quote(text: str) -> str:
    first, *lines = text.splitlines()
    rows = [
        f'<p class="{"try" if line.strip().startswith("Try:") else "line"}">{escape(line.strip())}</p>'
        for line in lines
    ]
    return f'<div class="verdict">\n<h3>{escape(first)}</h3>\n' + "\n".join(rows) + "\n</div>"


def card_html(card: Card) -> str:
    """A card; everything in it is escaped."""
    facts = "\n".join(
        f"<dt>{escape(what)}</dt>{''.join(f'<dd>{escape(value)}</dd>' for value in values)}"
        for what, values in card.facts.items()
    )
    return f'<article class="card">\n<h3>{escape(card.heading)}</h3>\n<dl>\n{facts}\n</dl>\n</article>'


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.content).decode("ascii")
    alt = escape(picture.alt, quote=True)
    image = f'src="data:image/png;base64,{data}" alt="{alt}"'
    # Of a PNG file the width.
    if int.from_bytes(picture.content[16:20], "big") <= WIDE:
        return f"<figure><img {image}></figure>"
    hint = "<figcaption>Scroll sideways to see all of the picture.</figcaption>"
    return f'<figure class="wide" tabindex="0" role="group">{hint}<img class="wide" {image}></figure>'


def _table(frame: pd.DataFrame) -> str:
    return frame.to_html(index=False, border=0, float_format=lambda value: f"{value:.4f}", na_rep="", justify="right")
