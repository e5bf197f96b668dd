"""The command line: which commands there are, and how errors become exit codes."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from clipress.errors import ClipressError, Stopped, missing_extras_named
from clipress.storage import is_first_process
from clipress.version import __version__

COMMANDS = {
    "run": "run:run",
    "auto": "auto:auto",
    "compress": "run:compress",
    "plan": "plan:plan",
    "embed": "run:embed",
    "export": "export:export",
    "bench": "bench:bench",
    "bench-server": "bench:bench_server",
    "latency-table": "bench:latency_table",
    "serve": "serve:serve",
    "triton": "serve:triton",
    "demo": "demo:demo",
    "index": "serve:index",
    "predict": "evaluate:predict",
    "eval": "evaluate:eval_",
    "show": "inspect:show",
    "import": "inspect:import_",
    "data": "data:data",
    "study": "study:study",
}


TERMINATED = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM came outside training, which ends after a step instead (compress/signals.py)."""


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM raise Terminated, so that files and locks are cleaned up; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    process = os.getpid()

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != process:  # a worker that was forked from this process
            signal.raise_signal(signal.SIGTERM)
        raise Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class LazyGroup(click.Group):
    """Imports a command when it is named; a user's mistake is one message and exit code 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, function = COMMANDS[name].partition(":")
        return getattr(importlib.import_module(f"clipress.commands.{module}"), function)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with sigterm_interrupts(), missing_extras_named():
                return super().invoke(ctx)
        except Stopped as stop:
            if is_first_process():
                click.echo(stop, err=True)
            ctx.exit(stop.exit_code)
        except Terminated:
            if is_first_process():
                click.echo("Stopped by SIGTERM. Finished work is kept; run the same command again to resume.", err=True)
            ctx.exit(TERMINATED)
        except KeyboardInterrupt:
            click.echo("Interrupted. Finished work is kept; run the same command again to resume.", err=True)
            ctx.exit(130)
        except ClipressError as error:
            shown = click.ClickException(str(error))
            shown.exit_code = error.exit_code
            raise shown from None


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(__version__, prog_name="clipress")
@click.option("--verbose", is_flag=True, help="Show warnings of the underlying libraries.")
def main(verbose: bool) -> None:
    """Make CLIP models small, fast and ready to serve.

    `run` does everything a recipe says; `compress`, `export`, `bench` and `serve` do one part each, in the same run
    folder.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    if not verbose:
        warnings.filterwarnings("ignore")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


if __name__ == "__main__":
    main()
