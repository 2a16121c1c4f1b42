"""The commands by name, and what is said of them all."""

from __future__ import annotations

from typing import Annotated

import typer

from stepclaim.cli import looking, running

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Who runs which step of which run, decided once for the whole cluster, in etcd.",
)

for command in (*running.COMMANDS, *looking.COMMANDS):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # noqa: PLC0415 - one command of many needs it

        typer.echo(version("stepclaim"))
        raise typer.Exit


@app.callback()
def common(
    *,
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    """Who runs which step of which run, decided once for the whole cluster, in etcd."""
