# SPDX-License-Identifier: Apache-2.0
"""The page, in Gradio: forms, and tables as HTML in which everything from the data is escaped."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

# Before Gradio is imported; it then asks nothing of other machines.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr

from mvke_tf.analysis.page import card_html
from mvke_tf.data.encoder import EncodedFeature
from mvke_tf.errors import MvkeError
from mvke_tf.explore.explorer import Entry, Explorer, Gate, ItemView, Ranking, UserView
from mvke_tf.explore.fields import hint

Tab = Callable[[Explorer, gr.Tab, threading.Lock], None]
# Of longer lists, the first are offered, and the others can be typed.
MOST_CHOICES = 1_000
# Fonts of the machine that shows the page: bold and plain are one font then. Gradio's own grey of hints, and the orange
# of its tabs, are too faint to read.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]).set(
    block_info_text_color="*body_text_color", block_info_text_color_dark="*body_text_color"
)
CSS = """
footer { display: none !important; }
button[role=tab].selected { color: var(--body-text-color) !important; font-weight: 600; }
.explore h1 { font-size: 1.5rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
.explore h2 { font-size: 1.15rem; font-weight: 600; margin: 1.2rem 0 .3rem; overflow-wrap: anywhere; }
.explore h3 { font-size: 1rem; font-weight: 600; margin: 1rem 0 .2rem; }
.explore p { margin: .3rem 0; overflow-wrap: anywhere; }
.explore .alert { border-left: .35rem solid #c2410c; padding: .3rem .8rem; white-space: pre-line; }
.message:not(:has(.alert)) { display: none; }
.explore .tables { display: flex; flex-wrap: wrap; gap: .6rem 2rem; }
.explore .scroll { overflow-x: auto; max-width: 100%; }
.explore table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
.explore caption { text-align: left; padding: .3rem 0; font-weight: 600; }
.explore th, .explore td { padding: .2rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--border-color-primary); }
.explore th { background: var(--background-fill-secondary); }
.explore .name { text-align: left; white-space: normal; min-width: 6rem; max-width: 16rem; overflow-wrap: anywhere; }
@media (max-width: 46rem) { .explore th, .explore td { padding: .2rem .35rem; } }
.explore .cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: .8rem; }
.explore .card { border: 1px solid var(--border-color-primary); border-radius: .4rem; padding: .2rem .9rem .5rem; }
.explore .card dt { margin-top: .4rem; font-size: .88rem; font-weight: 600; }
.explore .card dd { margin: 0; overflow-wrap: anywhere; }
.explore strong { font-weight: 700; }
"""


def page(explorer: Explorer) -> gr.Blocks:
    """The page on a run, one tab per question."""
    title = f"{explorer.run.folder.name}: {explorer.model.name}"
    with gr.Blocks(title=f"{title} - mvke explore", analytics_enabled=False) as blocks:
        gr.HTML(_html(f"<h1>{escape(title)}</h1>"), apply_default_css=False)
        # One request at a time is computed: a second one would only take its cores.
        turn = threading.Lock()
        for name, fill in tabs(explorer).items():
            with gr.Tab(name) as tab:
                fill(explorer, tab, turn)
    return blocks


# === Users ===


def _user_tab(explorer: Explorer, _: gr.Tab, turn: threading.Lock) -> None:
    names = [feature.name for feature in explorer.fields]

    def load(name: str | None) -> list[Any]:
        try:
            with turn:
                position = explorer.find("user", name)
                texts, view = explorer.texts(position), explorer.user(position)
        except MvkeError as error:
            return [*(gr.skip() for _ in names), alert(error), gr.skip()]
        return [*texts.values(), "", user_html(explorer, view)]

    def answer(name: str | None, *values: str | None) -> tuple[Any, Any]:
        try:
            with turn:
                texts = {feature: value or "" for feature, value in zip(names, values, strict=True)}
                view = explorer.user(explorer.find("user", name), texts)
        except MvkeError as error:
            return alert(error), gr.skip()
        return "", user_html(explorer, view)

    texts = explorer.texts(0)
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            user = _choice(explorer.users, "user", "User of the data")
            fields = [_field(explorer, feature, texts[feature.name]) for feature in explorer.fields]
            with gr.Row():
                show = gr.Button("Show", min_width=100)
                reset = gr.Button("As in the data", min_width=100)
        with gr.Column(scale=3, min_width=300):
            message = gr.HTML("", apply_default_css=False, elem_id="user-message", elem_classes="message")
            result = gr.HTML(user_html(explorer, explorer.user(0)), apply_default_css=False, elem_id="user-result")
    quick: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
    gr.on([user.change, reset.click], load, user, [*fields, message, result], **quick)
    edits = [field.submit if isinstance(field, gr.Textbox) else field.select for field in fields]
    gr.on([show.click, *edits], answer, [user, *fields], [message, result], **quick)


def _field(explorer: Explorer, feature: EncodedFeature, text: str) -> gr.Dropdown | gr.Textbox:
    words = explorer.vocabulary(feature)
    if words is not None and len(words) <= MOST_CHOICES:
        choices = [("(unknown)", ""), *((word, word) for word in dict.fromkeys([*words, text]) if word)]
        return gr.Dropdown(choices, value=text, label=feature.name, info=escape(hint(feature)), allow_custom_value=True)
    lines, most = (3, 8) if feature.is_list else (1, 1)
    return gr.Textbox(text, label=feature.name, info=escape(hint(feature)), lines=lines, max_lines=most)


def _choice(names: Sequence[str], what: str, label: str) -> gr.Dropdown:
    count = f"{len(names):,} {what}s" if len(names) != 1 else f"one {what}"
    more = f"; the first {MOST_CHOICES:,} are listed, any other can be typed" if len(names) > MOST_CHOICES else ""
    return gr.Dropdown(
        list(names[:MOST_CHOICES]), value=names[0], label=label, info=count + more, allow_custom_value=True
    )


def alert(error: Exception) -> str:
    """What is wrong, as HTML."""
    return _html(f'<p class="alert" role="alert">{escape(str(error))}</p>')


def user_html(explorer: Explorer, view: UserView) -> str:
    """What a model says of a user, as HTML."""
    parts = [f"<h2>Best items of {escape(explorer.users[view.position])}</h2>"]
    if view.changed:
        parts.append(f"<p>Edited: {escape(', '.join(view.changed))}. Changes are against the user as in the data.</p>")
    if view.unknown:
        parts.append(
            f"<p>Not known from training, and so of no effect but that of an unknown value: "
            f"{escape(', '.join(view.unknown))}.</p>"
        )
    parts += [_ranking(explorer, ranking, bool(view.changed)) for ranking in view.rankings]
    if view.gates:
        other = "as in the data" if view.changed else None
        parts += ["<h3>Gates</h3>", _tables(_gate(gate, "this user", other) for gate in view.gates)]
    return _html("".join(parts))


def _ranking(explorer: Explorer, ranking: Ranking, is_edited: bool) -> str:
    target, experts = ranking.target, ranking.experts
    heads = ["rank", "item", target.unit, *(["change", "rank before"] if is_edited else []), *experts]
    rows = []
    for entry in ranking.best:
        cells = [str(entry.rank), explorer.items[entry.position], number(entry.value)]
        if is_edited:
            cells += [number(entry.value - entry.value_before, "+"), str(entry.rank_before)]
        strongest = max(entry.contributions, key=abs, default=0.0)
        row = [escape(cell) for cell in cells]
        row += [
            f"<strong>{number(part, '+')}</strong>" if part == strongest else number(part, "+")
            for part in entry.contributions
        ]
        rows.append(row)
    html = _table(f"{target.name}, {target.unit} of the best items", heads, rows)
    if experts:
        html += f"<p>{escape(_sum_of(explorer, target.task, experts))}</p>"
    if ranking.left:
        gone = ", ".join(f"{explorer.items[entry.position]} (now rank {entry.rank})" for entry in ranking.left)
        html += f"<p>No longer among them: {escape(gone)}.</p>"
    return html


def _sum_of(explorer: Explorer, task: str, experts: Sequence[str]) -> str:
    """What the contributions of the experts sum to."""
    model, what = explorer.model, experts[0].partition(" ")[0]
    if task in model.given:
        of = f"the logit of {task} given {model.given[task]}"
    elif model.kinds[task] == "binary":
        of = "the logit"
    else:
        scale = "logarithm of the rate" if model.kinds[task] == "count" else "value"
        scale = "logarithm of 1 + value" if model.transforms[task] else scale
        of = f"the {scale}, less {number(model.offsets[task])}"
    return f"The contributions of the {what}s sum to {of}; the strongest is bold."


# === Items ===


def _item_tab(explorer: Explorer, tab: gr.Tab, turn: threading.Lock) -> None:
    def answer(name: str | None) -> tuple[Any, Any]:
        try:
            with turn:
                view = explorer.item(explorer.find("item", name))
        except MvkeError as error:
            return alert(error), gr.skip()
        return "", item_html(explorer, view)

    item = _choice(explorer.items, "item", "Item of the catalogue")
    message = gr.HTML("", apply_default_css=False, elem_id="item-message", elem_classes="message")
    result = gr.HTML("", apply_default_css=False, elem_id="item-result")
    gr.on(
        [item.change, tab.select],
        answer,
        item,
        [message, result],
        show_progress="hidden",
        queue=False,
        api_visibility="private",
    )


def item_html(explorer: Explorer, view: ItemView) -> str:
    """What a model says of an item, as HTML."""
    parts = [f"<h2>{escape(explorer.items[view.position])}</h2>"]
    if view.gates:
        parts += ["<h3>Gates</h3>", _tables(_gate(gate, "this item", "mean of all items") for gate in view.gates)]
    asked, all_users = explorer.asked_users, len(explorer.users)
    among = f"{all_users:,} users" if asked == all_users else f"{asked:,} of {all_users:,} users, evenly spread"
    wanted = (
        _table(
            f"{ranking.target.name}, users with the highest {ranking.target.unit}",
            ["rank", "user", ranking.target.unit],
            _rows(ranking.best, explorer.users),
        )
        for ranking in view.users
    )
    parts += [f"<h3>Who would want it</h3><p>Among {among}.</p>", _tables(wanted)]
    if any(view.neighbours.values()):
        near = (
            _table(f"{task}, items of the nearest vectors", ["rank", "item", "cosine"], _rows(entries, explorer.items))
            for task, entries in view.neighbours.items()
        )
        parts += ["<h3>Neighbours</h3>", _tables(near)]
    return _html("".join(parts))


def _rows(entries: Iterable[Entry], names: Sequence[str]) -> list[list[str]]:
    return [[str(entry.rank), escape(names[entry.position]), number(entry.value)] for entry in entries]


# === Experts ===


def _cards_tab(explorer: Explorer, tab: gr.Tab, turn: threading.Lock) -> None:
    def answer() -> str:
        try:
            with turn:
                return cards_html(explorer)
        except MvkeError as error:
            return alert(error)

    result = gr.HTML("", apply_default_css=False, elem_id="cards-result", min_height=120)
    gr.on([tab.select], answer, None, result, queue=False, api_visibility="private")


def cards_html(explorer: Explorer) -> str:
    """What each kernel or expert stands for, as HTML."""
    section = explorer.cards
    if section is None:
        return _html("<p>This model has no experts that a gate chooses among.</p>")
    text = "".join(f"<p>{escape(paragraph)}</p>" for paragraph in section.text)
    cards = "\n".join(map(card_html, section.cards))
    return _html(f'<h2>{escape(section.heading)}</h2>{text}<div class="cards">{cards}</div>')


def tabs(explorer: Explorer) -> dict[str, Tab]:
    """What fills each tab, by its name."""
    found: dict[str, Tab] = {"A user": _user_tab, "An item": _item_tab}
    if explorer.model.gates is not None:
        has_kernels = any(explorer.model.kernels_of(task) for task in explorer.model.task_names)
        found["The kernels" if has_kernels else "The experts"] = _cards_tab
    return found


# === HTML ===


def _html(content: str) -> str:
    return f'<div class="explore">{content}</div>'


def _tables(tables: Iterable[str]) -> str:
    """Tables side by side, where there is room."""
    return f'<div class="tables">{"".join(tables)}</div>'


def _gate(gate: Gate, this: str, other: str | None) -> str:
    rows = [[escape(this), *(number(weight) for weight in gate.weights)]]
    if other is not None:
        rows.append([escape(other), *(number(weight) for weight in gate.other)])
    return _table(f"{gate.task}, weights of the gate", ["of", *gate.experts], rows, names=0)


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1) -> str:
    """A table that scrolls sideways where it is too wide.

    Args:
        caption: Text.
        heads: Text of the first row.
        rows: HTML of the cells of all others.
        names: The column of names.
    """

    def row(tag: str, cells: Iterable[str]) -> str:
        classes = (' class="name"' if column == names else "" for column in range(len(heads)))
        cells = (f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(classes, cells, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    body = "".join(row("td", cells) for cells in rows)
    head = row("th", map(escape, heads))
    label = escape(caption, quote=True)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><caption>{label}</caption>'
        f"<thead>{head}</thead><tbody>{body}</tbody></table></div>"
    )


def number(value: float, sign: str = "-") -> str:
    """A number of a table: four decimals, or five digits of one above 100."""
    return f"{value:{sign}.4f}" if abs(value) < 100 else f"{value:{sign}.5g}"
