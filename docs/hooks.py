"""What mkdocs runs besides its plugins: one page of reference for each module, and Sphinx roles that read as code.

The pages exist only while the documentation is built, so a new module has a page without a file in ``docs/api``.
"""

import re
from pathlib import Path

from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("bnn_models", "inference", "bnn_zoo")
ROLE = re.compile(r":(?:math|func|class|meth|mod|attr|data|exc|obj):`~?([^`]*)`")
FORMULA = re.compile(r"^\s*\.\. math::\s*(.*)$")


class Roles(Preprocessor):
    """Shows the formulas and names of docstrings as code: Markdown has no roles, and no script is loaded for TeX."""

    def run(self, lines: list[str]) -> list[str]:
        """Replaces roles within lines, and a formula with the indented lines below it by a code block.

        Args:
            lines: Lines of Markdown.

        Returns:
            The lines to show.
        """
        shown: list[str] = []
        inside = False
        for line in lines:
            formula = FORMULA.match(line)
            if formula:
                inside = True
                shown += ["", *([f"    {formula[1]}"] if formula[1] else [])]
            elif inside and line.startswith("    "):
                shown.append(line)
            else:
                if inside and line.strip():
                    inside = False
                    shown.append("")
                shown.append(ROLE.sub(r"`\1`", line))
        return shown


class RolesExtension(Extension):
    """Registers :class:`Roles` before anything else reads the text."""

    def extendMarkdown(self, md: Markdown) -> None:  # the name is markdown's own
        """Called by markdown."""
        md.preprocessors.register(Roles(md), "sphinx_roles", 100)


def modules() -> dict[str, list[str]]:
    """Finds what the reference describes.

    Returns:
        Dotted names of the public modules by package, the package itself first.
    """
    found: dict[str, list[str]] = {}
    for package in PACKAGES:
        paths = [path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / package).rglob("*.py"))]
        names = {".".join(path.parts[:-1] if path.name == "__init__" else path.parts) for path in paths}
        found[package] = sorted(name for name in names if not any(part.startswith("_") for part in name.split(".")))
    return found


@event_priority(100)  # before mkdocstrings copies the list of extensions
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the reference to the navigation, package by package, and the roles to Markdown.

    Args:
        config: The configuration as read from ``mkdocs.yml``.

    Returns:
        The same configuration, extended.
    """
    pages = [{package: [{name: f"api/{name}.md"} for name in names]} for package, names in modules().items() if names]
    config.nav = [*(config.nav or []), {"Reference": pages}]
    config.markdown_extensions = [*config.markdown_extensions, RolesExtension()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page of each module.

    Args:
        files: The files found under ``docs``.
        config: The configuration.

    Returns:
        The same files and one Markdown page per module.
    """
    for names in modules().values():
        for name in names:
            files.append(File.generated(config, f"api/{name}.md", content=f"# `{name}`\n\n::: {name}\n"))
    return files
