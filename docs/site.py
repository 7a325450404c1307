# SPDX-License-Identifier: Apache-2.0
"""Pages of the documentation site that are made from the code, and formulas without scripts: hooks of MkDocs.

`mkdocs.yml` names this file. The other pages are the Markdown files beside it.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import re
from pathlib import Path
from unittest import mock

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import mvke_tf
from mvke_tf import cli

ROOT = Path(mvke_tf.__file__).resolve().parents[1]
PACKAGE = ROOT / "mvke_tf"
# Pages that stand elsewhere, for readers of the repository.
ELSEWHERE = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
# Title of each page of the API reference, and the rooms that it shows.
ROOMS = {
    "data": ("Data", ["schema", "data", "datasets"]),
    "models": ("Models and layers", ["models", "layers", "losses", "metrics"]),
    "training": ("Runs and training", ["config", "run", "run_folder", "training"]),
    "evaluation": ("Evaluation and analysis", ["evaluation", "analysis", "explore", "inference", "figures"]),
    "serving": ("Serving", ["serving"]),
    "experiments": ("Experiments", ["experiments"]),
    "errors": ("Errors and files", ["errors", "io"]),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    made = {page: _from_elsewhere(name) for page, name in ELSEWHERE.items()}
    made |= {f"api/{page}.md": _rooms(title, rooms) for page, (title, rooms) in ROOMS.items()}
    made |= {"api/index.md": _public_names(), "command_reference.md": _commands()}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_content(html: str, **_: object) -> str:
    """Formulas as MathML, which browsers draw without a script or a font from elsewhere."""
    return re.sub(
        r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>',
        lambda found: _formula(found[2], "block" if found[1] == "div" else "inline"),
        html,
        flags=re.S,
    )


def _formula(latex: str, display: str) -> str:
    formula = convert(latex.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"), display=display)
    return f'<div class="formula" tabindex="0" role="group">{formula}</div>' if display == "block" else formula


def _from_elsewhere(name: str) -> str:
    """A page at the root of the repository, its links as seen from the folder of the pages."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(r"\]\((?:docs/)?([\w./-]+\.(?:md|svg|png)[#\w-]*)\)", lambda link: f"]({link[1].lower()})", text)


def _public_names() -> str:
    rows = [
        f"| [`{name}`][{module}.{name}] | {_first_line(module, name)} |"
        for module, names in mvke_tf._HOME.items()
        for name in names
    ]
    return "\n".join(
        [
            "# Python API",
            "",
            "What `import mvke_tf` offers. Each name is documented with its module; the pages beside this one hold all "
            "modules.",
            "",
            "| name | what |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def _first_line(module: str, name: str) -> str:
    path = PACKAGE.parent / module.replace(".", "/")
    files = [path.with_suffix(".py")] if path.with_suffix(".py").is_file() else sorted(path.rglob("*.py"))
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
                return (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
    raise LookupError(f"{module}.{name} is not defined there")


def _rooms(title: str, rooms: list[str]) -> str:
    blocks = [f"# {title}", ""]
    for room in rooms:
        path = PACKAGE / room
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        for file in files:
            nodes = ast.parse(file.read_text(encoding="utf-8")).body
            public = any(isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_") for n in nodes)
            if public:
                blocks += [
                    f"::: {'.'.join(file.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')}",
                    "",
                ]
    return "\n".join(blocks)


def _commands() -> str:
    lines = [
        "# Commands",
        "",
        f"What `mvke --help` and `mvke COMMAND --help` of version {mvke_tf.__version__} say.",
        "",
    ]
    for name in cli.COMMANDS:
        parser = _parser(name)
        usage = " ".join(parser.format_usage().split())
        lines += [f"## `mvke {name}`", "", str(parser.description or ""), "", "```text", _short(usage), "```", ""]
        for group in parser._action_groups:
            actions = [action for action in group._group_actions if action.help not in (argparse.SUPPRESS, None)]
            actions = [action for action in actions if action.dest not in ("help", "help_all")]
            if actions:
                lines += [f"**{(group.title or '').capitalize()}**", "", "| option | |", "|---|---|"]
                lines += [f"| {_option(action)} | {_help(parser, action)} |" for action in actions]
                lines += [""]
    return "\n".join(lines)


def _parser(command: str) -> argparse.ArgumentParser:
    """The parser of one command, all of its options told."""
    found: list[argparse.ArgumentParser] = []
    record = mock.patch.object(argparse.ArgumentParser, "print_help", lambda self, file=None: found.append(self))
    with record, contextlib.suppress(SystemExit):
        cli.parse([command, "--help"])
    return found[-1]


def _short(usage: str) -> str:
    """Of a usage line, what is not optional."""
    words = re.sub(r"\s*\[[^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*\]", "", usage.removeprefix("usage: "))
    return f"{words} [OPTIONS]"


def _option(action: argparse.Action) -> str:
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
    if action.choices:
        return f"{names} {', '.join(map(str, action.choices))}"
    takes = action.option_strings and action.nargs != 0
    return f"{names} {action.metavar or action.dest.upper()}" if takes else names


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = parser._get_formatter()._expand_help(action)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
