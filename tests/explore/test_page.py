# SPDX-License-Identifier: Apache-2.0
"""The page: what it shows is what the explorer says, escaped; in Chromium, and as a process."""

import contextlib
import html
import os
import re
import signal
import subprocess
import sys
import threading

import httpx
import pytest

from mvke_tf.explore.explorer import Explorer
from mvke_tf.explore.page import alert, cards_html, item_html, number, tabs, user_html
from mvke_tf.explore.server import application, server
from mvke_tf.serving.rest.server import bind, url
from tests.browser import DESK, PHONE, chromium, faults
from tests.conftest import REPOSITORY
from tests.explore.conftest import TITLE, hostile_prepared, kinds_prepared

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hostile(run_of):
    """The small dataset, in which an item and a country have a script for a name."""
    return Explorer(run_of("mvke", hostile_prepared(), ("click", "buy", "stars")))


def cells(text: str) -> list[list[list[str]]]:
    """The tables of HTML: rows of the texts of their cells."""
    return [
        [
            [html.unescape(re.sub("<[^>]*>", "", cell)) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
            for row in re.findall(r"<tr>(.*?)</tr>", table)
        ]
        for table in re.findall(r"<table>(.*?)</table>", text, re.S)
    ]


def table_of(explorer, ranking) -> list[list[str]]:
    """What the table of an edited user must say."""
    return [
        [
            *(str(entry.rank), explorer.items[entry.position], number(entry.value)),
            *(number(entry.value - entry.value_before, "+"), str(entry.rank_before)),
            *(number(part, "+") for part in entry.contributions),
        ]
        for entry in ranking.best
    ]


def test_numbers():
    assert [number(value) for value in (0.12345, -2, 123.456, 1e7)] == ["0.1235", "-2.0000", "123.46", "1e+07"]
    assert [number(value, "+") for value in (0.5, -0.5, 0)] == ["+0.5000", "-0.5000", "+0.0000"]


def test_a_user_as_html(hostile):
    view = hostile.user(0, {"age": "60", "country": "Atlantis"}, top=30)
    text = user_html(hostile, view)
    for ranking, table in zip(view.rankings, cells(text), strict=True):
        assert table[0] == ["rank", "item", ranking.target.unit, "change", "rank before", *ranking.experts]
        assert table[1:] == table_of(hostile, ranking)
        for row, entry in zip(re.findall("<tr>.*?</tr>", text), ranking.best, strict=False):
            assert row.count("<strong>") <= 1 and entry.contributions
    assert "Edited: age, country." in text and "that of an unknown value: country." in text
    assert "sum to the logit; " in text and "the value, less " in text
    assert "<script" not in text and html.escape(TITLE) in text
    unedited = user_html(hostile, hostile.user(0, top=2))
    assert "change" not in unedited and "Edited" not in unedited
    few = hostile.user(0, {"age": "60", "country": "us"}, top=3)
    for ranking in few.rankings:
        for entry in ranking.left:
            assert f"{html.escape(hostile.items[entry.position])} (now rank {entry.rank})" in user_html(hostile, few)


def test_an_item_as_html(hostile):
    item = hostile.find("item", "i01")
    view = hostile.item(item, top=2)
    text = item_html(hostile, view)
    tables = cells(text)
    assert [len(table) for table in tables] == [3] * 9
    for gate, table in zip(view.gates, tables, strict=False):
        assert table[0] == ["of", *gate.experts]
        assert table[1] == ["this item", *map(number, gate.weights)]
        assert table[2] == ["mean of all items", *map(number, gate.other)]
    for ranking, table in zip(view.users, tables[3:], strict=False):
        assert table[0] == ["rank", "user", ranking.target.unit]
        assert table[1:] == [[str(e.rank), hostile.users[e.position], number(e.value)] for e in ranking.best]
    for entries, table in zip(view.neighbours.values(), tables[6:], strict=True):
        assert table[1:] == [[str(e.rank), hostile.items[e.position], number(e.value)] for e in entries]
    assert "<script" not in text and html.escape(TITLE) in text
    assert "Among 12 users." in text


def test_gates_of_users_and_scales_of_tasks(run_of):
    explorer = Explorer(run_of("mmoe", kinds_prepared()))
    text = user_html(explorer, explorer.user(0, {"hour": "9"}))
    gates = [table for table in cells(text) if table[0][0] == "of"]
    assert [[row[0] for row in gate] for gate in gates] == [["of", "this user", "as in the data"]] * 5
    assert "sum to the logit of buy given click; the strongest is bold" in text
    assert "sum to the logarithm of the rate, less" in text and "sum to the logarithm of 1 + value, less" in text
    assert "mood: good, probability of the best items" in text


def test_an_error_as_html():
    assert alert(ValueError("<b>")) == '<div class="explore"><p class="alert" role="alert">&lt;b&gt;</p></div>'


@contextlib.contextmanager
def running(explorer):
    """The address of the page in a thread of this process."""
    with bind("127.0.0.1", 0) as bound:
        bound.listen()
        process = server(application(explorer))
        thread = threading.Thread(target=process.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            yield url(bound)
        finally:
            process.should_exit = True
            thread.join()


def shown(page, place: str) -> list[list[list[str]]]:
    return page.evaluate(
        """place => [...document.querySelectorAll(place + " table")].map(table =>
            [...table.rows].map(row => [...row.cells].map(cell => cell.textContent)))""",
        place,
    )


def wait_for(page, place: str, text: str) -> None:
    page.wait_for_function(
        "([place, text]) => document.querySelector(place)?.textContent.includes(text)", arg=[place, text]
    )


def field(page, label: str):
    """The field of this label, which a hint may follow."""
    return page.get_by_label(re.compile(rf"^\s*{label}\b(?!_)")).locator("visible=true")


def choose(page, label: str, text: str) -> None:
    field(page, label).fill(text)
    field(page, label).press("Enter")


@pytest.mark.parametrize(("width", "scheme"), [(PHONE, "light"), (DESK, "dark")])
def test_the_page_in_a_browser(hostile, width, scheme):
    with running(hostile) as address, chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        asked, surprises = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("dialog", lambda dialog: (surprises.append(dialog.message), dialog.dismiss()))
        page.on("pageerror", lambda error: surprises.append(str(error)))
        page.goto(address)
        wait_for(page, "#user-result", "Best items of 1")
        assert field(page, "country").input_value() == TITLE
        field(page, "country").click()
        page.get_by_role("option", name="de").wait_for()
        assert faults(page) == []
        field(page, "country").press("Escape")

        choose(page, "User of the data", "5")
        wait_for(page, "#user-result", "Best items of 5")
        page.wait_for_function("document.querySelectorAll('#user-result table').length == 3")
        assert shown(page, "#user-result")[0][1:] == [
            row[:3] + row[5:] for row in table_of(hostile, hostile.user(4).rankings[0])
        ]
        assert field(page, "age").input_value() == hostile.texts(4)["age"] == "33"

        field(page, "recent_items").fill("i01\ni02")
        choose(page, "age", "61")
        wait_for(page, "#user-result", "Edited: age, recent_items.")
        view = hostile.user(4, {"age": "61", "recent_items": "i01\ni02"})
        assert [table[1:] for table in shown(page, "#user-result")] == [table_of(hostile, r) for r in view.rankings]
        assert faults(page) == []

        field(page, "age").fill("<b>old")
        page.get_by_role("button", name="Show").click()
        wait_for(page, "#user-message", "age: expected a number. Received: '<b>old'")
        assert [table[1:] for table in shown(page, "#user-result")] == [table_of(hostile, r) for r in view.rankings]
        assert faults(page) == []
        page.get_by_role("button", name="As in the data").click()
        page.wait_for_function("!document.querySelector('#user-message').textContent.trim()")
        assert field(page, "age").input_value() == "33"

        choose(page, "User of the data", "nobody")
        wait_for(page, "#user-message", "Expected the id of a user of the data.")

        page.get_by_role("tab", name="An item").click()
        wait_for(page, "#item-result", f"{TITLE} (i01)")
        choose(page, "Item of the catalogue", "i07")
        wait_for(page, "#item-result h2", "Item 7 (i07)")
        expected = cells(item_html(hostile, hostile.item(6)))
        assert shown(page, "#item-result") == expected
        assert faults(page) == []

        page.get_by_role("tab", name="The kernels").click()
        wait_for(page, "#cards-result h2", "What each kernel stands for")
        assert page.locator("#cards-result article h3").all_text_contents() == [
            card.heading for card in hostile.cards.cards
        ]
        assert faults(page) == []
        assert surprises == [] and {one.partition("/")[0] for one in asked} <= {"http:", "data:", "blob:"}
        assert [one for one in asked if one.startswith("http") and not one.startswith(address)] == []


def test_the_command(tiny_run):
    # It asks nothing of other machines.
    hook = "lambda event, given: event == 'socket.connect' and print('connects to', given[1], file=sys.stderr)"
    arguments = ["explore", str(tiny_run.folder), "--port", "0"]
    code = f"import sys; sys.addaudithook({hook}); from mvke_tf import cli; cli.main({arguments!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    try:
        lines = [process.stdout.readline(), process.stdout.readline()]
        found = re.fullmatch(r"Exploring \S+ at (http://127\.0\.0\.1:\d+)\n", lines[0])
        assert found and lines[1] == "Open this address in a browser. Ctrl-C stops it.\n", (
            lines,
            process.stderr.read(),
        )
        assert "tiny: mvke - mvke explore" in httpx.get(found[1], timeout=60).text
        # A name that somebody else has made lead here.
        assert httpx.get(found[1], headers={"Host": "evil.example"}, timeout=60).status_code == 400
    finally:
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "Stopped.\n"), errors
    assert "connects" not in errors


def test_a_run_that_cannot_be_shown(tiny_run, mvke):
    tiny_run.checkpoint.unlink()
    status, _, errors = mvke("explore", tiny_run.folder, "--port", "0")
    assert status == 2 and re.fullmatch(r"error: \S+ has no checkpoint yet: .* Train it: mvke train .*\n", errors)
    status, _, errors = mvke("explore", tiny_run.folder / "nothing")
    assert status == 2 and "There is no run at" in errors


def test_cards(hostile, run_of):
    section = hostile.cards
    assert [card.heading for card in section.cards][:2] == ["click: kernel 0", "click: kernel 1"]
    text = cards_html(hostile)
    assert text.count('<article class="card">') == len(section.cards) > 2
    for card in section.cards:
        assert all(html.escape(value) in text for values in card.facts.values() for value in values)
    assert "<script" not in text and all(html.escape(paragraph) in text for paragraph in section.text)
    assert list(tabs(hostile)) == ["A user", "An item", "The kernels"]
    assert list(tabs(Explorer(run_of("mmoe")))) == ["A user", "An item", "The experts"]
    none = Explorer(run_of("shared_bottom"))
    assert list(tabs(none)) == ["A user", "An item"] and none.cards is None
