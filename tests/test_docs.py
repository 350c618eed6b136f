# SPDX-License-Identifier: Apache-2.0
"""The pages of docs/ say what is so: commands, options, links, module names, examples.

docs/nbdstream.md has a section for each command. A line of it that begins with an option in
backquotes describes that option. What is in blocks marked ``console`` is run, in order, in
one directory (`Session`).
"""

import os
import re
import signal
import subprocess
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import nbdstream
from nbdstream.cli import cli
from testbed.peers import READY_SECONDS, binary, nbdkit, temporary_directory

TOP = Path(__file__).parent.parent
PAGES = sorted([*TOP.glob("*.md"), *(TOP / "docs").glob("*.md")])
MANUAL = (TOP / "docs" / "nbdstream.md").read_text()
MIB = 1 << 20
# Pages that are linked to and not written yet: remove each when it is there.
TO_COME: set[str] = set()

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


# -- commands and options ------------------------------------------------------------------


def commands(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command by its full name; groups too, their own options."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield prefix + name, command
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")


COMMANDS = {"nbdstream": cli, **dict(commands(cli))}


def described_commands() -> dict[str, str]:
    """Sections of the manual by command."""
    text = re.search(r"^## COMMANDS\n(.*?)^## ", MANUAL, re.S | re.M)
    assert text
    parts = re.split(r"^### (.*)\n", text[1], flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def options(command: click.Command) -> set[str]:
    """Each option, all of its spellings in one string, such as ``-U, --unix``."""
    return {
        ", ".join([*parameter.opts, *parameter.secondary_opts])
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.hidden
    }


def described_options(section: str) -> set[str]:
    lines = re.findall(r"^(`-[^\n]*)\n: ", section, re.M)
    return {", ".join(re.findall(r"`(--?[\w-]+)`", line)) for line in lines}


def test_the_manual_has_a_section_for_each_command_and_no_other() -> None:
    assert set(described_commands()) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_manual_describes_each_option_and_no_other(name: str) -> None:
    assert described_options(described_commands()[name]) == options(COMMANDS[name])


@pytest.mark.parametrize("name", COMMANDS)
def test_the_manual_names_the_value_of_each_option(name: str) -> None:
    context = click.Context(COMMANDS[name])
    expected = {
        option.opts[0]: option.make_metavar(context).strip("[]")
        for option in COMMANDS[name].params
        if isinstance(option, click.Option)
        and not (option.hidden or option.is_flag or option.count)
    }
    lines = re.findall(r"^(`-[^\n]*)\n: ", described_commands()[name], re.M)
    shown = {re.findall(r"`(--?[\w-]+)`", line)[0]: re.findall(r"\*(.+)\*", line) for line in lines}
    assert {option: value[0] for option, value in shown.items() if value} == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_the_manual_says_defaults_and_what_is_required(name: str) -> None:
    """Of options whose default --help shows, unless the manual refers to another command."""
    parts = re.split(r"^(`-[^\n]*)\n: ", described_commands()[name], flags=re.M)[1:]
    texts = {re.findall(r"`(--?[\w-]+)`", line)[0]: text for line, text in batched_pairs(parts)}
    for option in COMMANDS[name].params:
        if not isinstance(option, click.Option) or option.hidden:
            continue
        text = texts[option.opts[0]]
        if option.show_default and not text.startswith("As for `"):
            assert f"Default: {option.default}." in text, option.name
        assert option.required == ("Required." in text), option.name


def batched_pairs(parts: list[str]) -> Iterator[tuple[str, str]]:
    return zip(parts[::2], parts[1::2], strict=True)


def test_the_page_on_control_has_each_command_and_no_other() -> None:
    """A line that begins with a name in bold describes a command of the control socket."""
    page = (TOP / "docs" / "control.md").read_text()
    page = page.split("\n## COMMANDS THAT QEMU HAS\n")[1].split("\n## EVENTS\n")[0]
    lines = re.findall(r"^\*\*[a-z].*", page, re.M)
    described = {name for line in lines for name in re.findall(r"\*\*([a-z-]+)\*\*", line)}
    defined = {
        name
        for path in (TOP / "nbdstream").rglob("*.py")
        for name in re.findall(r'^    @command\("([a-z-]+)"\)', path.read_text(), re.M)
    }
    assert described == defined


@each_page
def test_the_tests_that_a_page_names_exist(page: Path) -> None:
    named = set(re.findall(r"`(test_\w+)`", page.read_text()))
    sources = "".join(
        path.read_text()
        for folder in ("tests", "vm-tests", "benchmarks")
        for path in (TOP / folder).rglob("*.py")
    )
    assert not {name for name in named if f"def {name}(" not in sources}


def test_summaries_are_shown_whole_and_every_command_once() -> None:
    shown = CliRunner().invoke(cli, ["--help"], terminal_width=80).output
    assert "..." not in shown.split("Options:")[1]
    listed = re.findall(r"^  ([a-z]+)  +[A-Z]", shown, re.M)
    assert sorted(listed) == sorted(cli.list_commands(click.Context(cli)))


@each_page
def test_the_options_in_examples_exist(page: Path) -> None:
    """Of ``nbdstream COMMAND …`` in code, wherever it is said."""
    known = {name: {"--help", *", ".join(options(c)).split(", ")} for name, c in COMMANDS.items()}
    for line in re.sub(r"\\\n", " ", page.read_text()).splitlines():
        found = re.search(r"(?:^|[ `])nbdstream ((?:-v+ )?[a-z]+(?: [a-z]+)?)(.*)", line)
        if found is None or not re.match(r"\s*(\$ |```|    |nbdstream )|.*`nbdstream ", line):
            continue
        words = found[1].split()
        name = next((n for n in (" ".join(words), words[0]) if n in known), None)
        if name is None:
            continue
        mine = re.split(r"--run | -- |`|\(", found[2])[0]
        used = set(re.findall(r"(?<![\w-])(--?[a-z][a-z-]*)", mine))
        assert used <= known[name], f"{line}: {used - known[name]}"


# -- names and links -----------------------------------------------------------------------


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    local = [target for target in targets if "://" not in target]
    missing = {target for target in local if not (page.parent / target).exists()}
    assert missing <= TO_COME


@each_page
def test_files_and_modules_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    paths = re.findall(r"`([\w.-]+/[\w./-]*(?:\.py|/))`", text)
    modules = re.findall(r"`(nbdstream(?:\.[a-z]\w*)+)`", text)
    tops = (TOP, TOP / "nbdstream")
    missing = [path for path in paths if not any((top / path).exists() for top in tops)]
    missing += [name for name in modules if not _is_module_or_attribute(name)]
    assert not missing


def _is_module_or_attribute(name: str) -> bool:
    path = TOP.joinpath(*name.split("."))
    if path.is_dir() or path.with_suffix(".py").exists():
        return True
    owner, attribute = path.parent.with_suffix(".py"), path.name
    return owner.exists() and bool(
        re.search(rf"^(class|def|async def) {attribute}\b|^{attribute}\b", owner.read_text(), re.M)
    )


def test_the_durability_page_names_tests_that_exist() -> None:
    text = (TOP / "docs" / "durability.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    defined = {
        name
        for folder in ("tests", "vm-tests")
        for path in (TOP / folder).glob("*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert len(named) > 15
    assert named <= defined, named - defined


def test_the_architecture_page_names_every_module() -> None:
    text = (TOP / "docs" / "architecture.md").read_text()
    modules = [
        path.relative_to(TOP).as_posix()
        for package in ("nbdstream", "testbed")
        for path in (TOP / package).rglob("*.py")
        if not path.name.startswith("__")
    ]
    named = {
        f"{room}{module}"
        for room, table in re.findall(
            r"^### `((?:nbdstream|testbed)/.*?)`.*?\n(.*?)(?=^#|\Z)", text, re.S | re.M
        )
        for module in re.findall(r"^\| `([\w/]+\.py)` \|", table, re.M)
    }
    assert named == set(modules)


# -- examples ------------------------------------------------------------------------------


class Session:
    """A shell session as the manual shows it, in a directory that it calls /srv/vm.

    A line that begins with ``$ `` is a command, run by bash to its end; the lines up to the
    next one are its output, standard error included. In these ``…`` stands for any text within
    the line, and ``...`` for any number of lines. A command that ends in ``&`` is a server: it
    goes on, and is ready when it has printed as many lines as are shown; ``kill %N`` ends the
    N-th that runs, as bash counts them, and waits for it.
    """

    SHOWN = "/srv/vm"

    def __init__(self, directory: Path, exits: ExitStack) -> None:
        self._directory = directory
        self._exits = exits
        self._servers: dict[int, subprocess.Popen[str]] = {}
        programs = Path(binary("NBDSTREAM")).parent
        self._environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}

    def run(self, command: str, expected: list[str]) -> None:
        """Raises AssertionError if the command says something else than is shown."""
        if job := re.fullmatch(r"kill %(\d+)", command):
            self._stop(int(job[1]))
            return
        actual = command.replace(self.SHOWN, str(self._directory))
        if actual.endswith("&"):
            output = self._start(actual.removesuffix("&"), len(expected))
        else:
            output = self._process(actual).communicate()[0].splitlines()
        shown = [line.replace(str(self._directory), self.SHOWN) for line in output]
        pattern = "".join(_pattern(line) for line in expected)
        assert re.fullmatch(pattern, "".join(f"{line}\n" for line in shown)), (
            f"$ {command}\n" + "\n".join(shown)
        )

    def _process(self, command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-c", command],
            cwd=self._directory,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _start(self, command: str, lines: int) -> list[str]:
        number = max(self._servers, default=0) + 1
        server = self._servers[number] = self._process(f"exec {command}")
        self._exits.callback(self._stop, number)
        assert server.stdout is not None
        return [server.stdout.readline().rstrip("\n") for _ in range(lines)]

    def _stop(self, number: int) -> None:
        server = self._servers.pop(number, None)
        if server is None:
            return
        server.send_signal(signal.SIGTERM)
        try:
            rest, _ = server.communicate(timeout=READY_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.communicate()
            raise
        # nbdkit's complaint of connections that were given up: everything was local by then.
        rest = re.sub(r"nbdkit: .*(Broken pipe|Connection reset by peer)\n", "", rest)
        assert (server.returncode, rest) == (0, "")


def _pattern(line: str) -> str:
    if line.strip() == "...":
        return r"(?:.*\n)*"
    return re.escape(line).replace(re.escape("…"), ".*") + r"\n"


def examples(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each command in the ``console`` blocks of a page, with the lines that are to follow."""
    for block in re.findall(r"^```console\n(.*?)^```$", text, re.S | re.M):
        command, expected = "", list[str]()
        for line in block.splitlines():
            if line.startswith("$ "):
                if command:
                    yield command, expected
                command, expected = line[2:], []
            else:
                expected.append(line)
        yield command, expected


def make_base(path: Path) -> None:
    """The examples' remote image: 20 MiB and 4 MiB of data, the rest holes."""
    with open(path, "wb") as image:
        image.truncate(64 * MIB)
        for offset, length in ((0, 20 * MIB), (40 * MIB, 4 * MIB)):
            os.pwrite(image.fileno(), b"not zero" * (length // 8), offset)


@pytest.mark.timeout(120)
def test_the_examples_of_the_manual() -> None:
    found = list(examples(MANUAL))
    assert len(found) > 15
    with temporary_directory() as directory, ExitStack() as exits:
        make_base(directory / "base.img")
        socket = directory / "remote.sock"
        exits.enter_context(
            nbdkit("file", directory / "base.img", readonly=True, socket_path=socket)
        )
        session = Session(directory, exits)
        for command, expected in found:
            session.run(command, expected)


@pytest.mark.timeout(120)
def test_the_tour_of_the_readme() -> None:
    found = list(examples((TOP / "README.md").read_text()))
    assert len(found) > 8
    with temporary_directory() as directory, ExitStack() as exits:
        make_base(directory / "base.img")
        session = Session(directory, exits)
        for command, expected in found:
            session.run(command, expected)


# -- what belongs to a repository -----------------------------------------------------------


def test_the_licence_is_the_one_that_the_package_names() -> None:
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0" and project["license-files"] == ["LICENSE"]
    heading = [line.strip() for line in (TOP / "LICENSE").read_text().split("\n")[:4]]
    assert heading[1:3] == ["Apache License", "Version 2.0, January 2004"]


def test_the_package_tells_type_checkers_that_it_has_types() -> None:
    tools = tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]
    for name in tools["setuptools"]["package-data"]["nbdstream"]:
        assert (TOP / "nbdstream" / name).exists()


def test_the_changelog_has_the_version_and_says_what_is_about_security() -> None:
    latest = re.split(r"^## ", (TOP / "CHANGELOG.md").read_text(), flags=re.M)[1]
    assert nbdstream.__version__ in latest.splitlines()[0]
    assert "\n### Security\n" in latest


def test_the_tests_that_the_security_page_names_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (TOP / "docs" / "security.md").read_text()))
    code = "".join(path.read_text() for path in (TOP / "tests").glob("test_*.py"))
    assert named
    assert not {name for name in named if f"def {name}(" not in code}
