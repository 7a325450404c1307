# SPDX-License-Identifier: Apache-2.0
"""The documentation site builds without a warning and without the network, and everybody can read it."""

import os
import re
import subprocess
import sys

import pytest

from mvke_tf import cli
from tests.browser import DESK, PHONE, chromium, faults
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

SAMPLE = ("index", "models", "comparison", "command_reference", "api/training")


def test_the_site(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (built.returncode, built.stdout, built.stderr) == (0, "", "")
    site = tmp_path / "site"
    pages = {str(path.relative_to(site)): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    pictures = [
        (name, source) for name, text in pages.items() for source in re.findall(r'<img[^>]* src="([^"]+)"', text)
    ]
    assert len(pictures) > 8
    assert [one for one in pictures if not ((site / one[0]).parent / one[1]).is_file()] == []
    # Nothing comes from elsewhere.
    assert [
        name for name, text in pages.items() if re.search(r"""(?:src|<link[^>]*href)=["']?(?:https?:)?//""", text)
    ] == []
    # Every public name, every command and its options, from the code.
    assert 'id="mvke_tf.data.declaration.Dataset.from_toml"' in pages["api/data.html"]
    assert 'href="models.html#mvke_tf.models.mvke.build_mvke"' in pages["api/index.html"]
    commands = pages["command_reference.html"]
    assert [name for name in cli.COMMANDS if f"<code>mvke {name}</code>" not in commands] == []
    assert "--embedding_dim" in commands and "--max_request_mb" in commands
    assert pages["models.html"].count("<math") > 5 and "\\text" not in pages["models.html"]
    with chromium() as browser:
        for width, scheme in ((PHONE, "light"), (DESK, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            for name in SAMPLE:
                page.goto((site / f"{name}.html").as_uri())
                page.wait_for_selector("[data-md-color-scheme]")
                assert faults(page) == [], (name, width, scheme)
