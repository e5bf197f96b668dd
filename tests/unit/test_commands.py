"""Help pages, and behaviour common to all commands."""

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from clipress.cli import COMMANDS, main

PAGES = [(), *((name,) for name in COMMANDS), *(("data", name) for name in ("images", "prompts", "download", "filter"))]


def help_page(*command):
    result = CliRunner().invoke(main, [*command, "--help"], env={"COLUMNS": "200"}, prog_name="clipress")
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.mark.parametrize("command", PAGES, ids=" ".join)
def test_every_help_page_fits_in_80_columns(command):
    assert max(map(len, help_page(*command).splitlines())) <= 80


@pytest.mark.parametrize("command", PAGES, ids=" ".join)
def test_every_help_page_says_what_the_command_does_and_every_option_has_help(command):
    found = main
    for name in command:
        found = found.get_command(click.Context(found), name)
    assert found.help
    bare = {"split", "form", "processes"}  # Their choices or names are self-explanatory.
    for option in found.params:
        if isinstance(option, click.Option) and option.name not in bare:
            assert option.help, option.name


@pytest.mark.parametrize("group", [(), ("data",)])
def test_no_line_in_a_list_of_commands_is_truncated(group):
    listed = help_page(*group).split("Commands:\n")[1]
    assert "..." not in listed and all(name in listed for (*path, name) in PAGES[1:] if tuple(path) == group)


def test_help_imports_nothing_heavy():
    """Print all pages in one process and check its imported modules."""
    code = (
        "import sys; from clipress.cli import main\n"
        f"for page in {PAGES!r}:\n"
        "    try: main([*page, '--help'])\n"
        "    except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'onnxruntime', 'onnx', 'open_clip', 'modelopt', 'numpy', 'pydantic', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_an_unknown_command_is_one_message():
    result = CliRunner().invoke(main, ["bnech"])
    assert result.exit_code == 2 and "No such command 'bnech'" in result.output
