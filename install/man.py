# SPDX-License-Identifier: Apache-2.0
"""Man pages from docs/: there is no other source of them.

docs/nbdstream.md becomes nbdstream(1), and each command's section in it a page of its own, such
as nbdstream-serve(1). `TOPICS` become pages of sections 5 and 7. pandoc does the conversion.

    python -m install.man DIRECTORY
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbdstream

DOCS = Path(__file__).resolve().parent.parent / "docs"
# Pages that are for those who change the program, and those that are not in section 7.
_INTERNAL = {"architecture", "concurrency", "nbdstream"}
_FILE_FORMATS = {"formats"}
# Pages that are not about one command, with the section that they belong to.
TOPICS = {
    path.stem: 5 if path.stem in _FILE_FORMATS else 7
    for path in sorted(DOCS.glob("*.md"))
    if path.stem not in _INTERNAL
}
# GitHub's flavour as far as docs/ uses it, and definition lists. No mathematics, no citations.
_FLAVOUR = (
    "markdown-smart-tex_math_dollars-citations-subscript-superscript-raw_tex-raw_html"
    "+lists_without_preceding_blankline"
)

# The widest column of a table, in characters, as far as proportions go.
_COLUMN_MOST = 50


@dataclass(frozen=True)
class Page:
    """A man page as Markdown: ``name`` without its section."""

    name: str
    section: int
    text: str

    @property
    def file(self) -> str:
        return f"{self.name}.{self.section}"


def pages() -> Iterator[Page]:
    """Every page."""
    manual = (DOCS / "nbdstream.md").read_text()
    before, rest = manual.split("\n## COMMANDS\n")
    commands, after = re.split(r"^(?=## )", rest, maxsplit=1, flags=re.M)
    sections = re.split(r"^### (.+)\n", commands, flags=re.M)
    described = dict(zip(sections[1::2], sections[2::2], strict=True))
    general = described.pop("nbdstream")
    names = [name for name in described if " " not in name]
    listed = "".join(
        f"**nbdstream-{name}**(1)\n: {_summary(described[name])}\n\n" for name in names
    )
    text = f"{before}\n## OPTIONS\n{general}\n## COMMANDS\n\n{listed}{after}"
    yield Page("nbdstream", 1, _raised(text))
    for name in names:
        parts = {part: text for part, text in described.items() if part.startswith(f"{name} ")}
        yield Page(f"nbdstream-{name}", 1, _command(name, described[name], parts))
    for name, section in TOPICS.items():
        yield Page(f"nbdstream-{name}", section, _topic(name, (DOCS / f"{name}.md").read_text()))


def _command(name: str, text: str, parts: dict[str, str]) -> str:
    """A command's page; ``parts`` are the sections of its own subcommands."""
    found = re.match(r"\s*((?:    [^\n]*\n)+)(.*)", text, re.S)
    assert found is not None, name
    body = found[2] + "".join(f"\n## {part}\n\n{more}" for part, more in parts.items())
    return (
        f"# NAME\n\nnbdstream-{name} - {_summary(text)}\n\n# SYNOPSIS\n\n{found[1]}\n"
        f"# DESCRIPTION\n\n{body}\n# SEE ALSO\n\n**nbdstream**(1)\n"
    )


def _summary(text: str) -> str:
    """The first sentence of a command's section, as whatis(1) has it."""
    prose = re.sub(r"^\s*(?:    .*\n)+\s*", "", text)
    sentence = re.split(r"[.:](?:\s|$)", " ".join(prose.split("\n\n")[0].split()))[0]
    return sentence[0].lower() + sentence[1:]


def _topic(name: str, text: str) -> str:
    title, text = text.removeprefix("# ").split("\n", 1)
    text = _raised(text)
    if "\n# NAME\n" in text:
        before, line, after = re.split(r"\n# NAME\n\n[^-]*- ((?:.+\n)+)", text, maxsplit=1)
        plain = " ".join(line.replace("`", "").split())
        return f"{before}\n# NAME\n\nnbdstream-{name} - {plain}\n{after}"
    title = re.sub(r"^nbdstream [a-z]+: ", "", title)
    return f"# NAME\n\nnbdstream-{name} - {title[0].lower() + title[1:]}\n\n# DESCRIPTION\n\n{text}"


def _raised(text: str) -> str:
    """The text with headings one level up, and without the title."""
    return re.sub(r"^#(?=#+ )", "", re.sub(r"\A# .*\n", "", text), flags=re.M)


def _linked(text: str) -> str:
    """References to other pages as man pages have them."""

    def reference(found: re.Match[str]) -> str:
        words, target = found[1], found[2].partition("#")[0]
        stem = Path(target).stem
        if "://" in target:
            return f"{words} <{target}>"
        if not target:
            return words
        if stem == "nbdstream":
            page = "**nbdstream**(1)"
        elif stem in TOPICS:
            page = f"**nbdstream-{stem}**({TOPICS[stem]})"
        else:
            return words
        return page if words.endswith(".md") else f"{words} ({page})"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", reference, text)


def _proportioned(text: str) -> str:
    """The text with tables whose columns are as wide as what is in them asks for; pandoc goes
    by the dashes below the heading."""

    def wide(found: re.Match[str]) -> str:
        rows = [re.split(r"(?<!\\)\|", row.strip().strip("|")) for row in found[0].splitlines()]
        widths = [min(max(map(len, column)), _COLUMN_MOST) for column in zip(*rows, strict=False)]
        lines = found[0].splitlines()
        lines[1] = f"| {' | '.join('-' * max(width, 3) for width in widths)} |"
        return "\n".join(lines) + "\n"

    return re.sub(r"^ *\|.*\n *\|[-|: ]+\|\n(?: *\|.*\n)*", wide, text, flags=re.M)


def write(page: Page, directory: Path) -> Path:
    """Convert a page. Raises CalledProcessError."""
    path = directory / page.file
    metadata = {
        "title": page.name.upper(),
        "section": str(page.section),
        "header": "nbdstream",
        "footer": f"nbdstream {nbdstream.__version__}",
    }
    command = ["pandoc", "--standalone", f"--from={_FLAVOUR}", "--to=man", f"--output={path}"]
    command += [f"--metadata={key}={value}" for key, value in metadata.items()]
    # Pictures are for browsers.
    text = re.sub(r"^!\[.*\n", "", page.text, flags=re.M)
    subprocess.run(command, input=_proportioned(_linked(text)), text=True, check=True)
    return path


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for page in pages():
        write(page, directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
