"""What all commands share: the settings as options with their environment twins, and errors told in one sentence."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from stepclaim.errors import ConfigurationError, StepClaimError
from stepclaim.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

Given: TypeAlias = dict[str, Any]
"""The settings that were given as options; those that were not come from the environment or are the defaults."""

REACHING = (
    "endpoints", "prefix", "timeout", "user", "password", "ca_file", "cert_file", "key_file", "tls", "tls_server_name",
)  # fmt: skip
"""The settings of a command that looks."""

WORKING = ("owner", "lease_ttl", "attempt_timeout", "value_limit")
"""What a command that claims needs besides."""

JSON = Annotated[bool, typer.Option("--json", envvar="STEPCLAIM_JSON", help="Print JSON for machines.")]


def with_settings(*names: str, **defaults: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command, whose first parameter is `given`, an option for each of these settings.

    `defaults` are those that differ from the settings' own, as --help tells them.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        _, *own = inspect.signature(command, eval_str=True).parameters.values()

        @functools.wraps(command)
        def run(**values: Any) -> None:
            chosen = {name: values.pop(name) for name in names}
            told(command)({name: value for name, value in chosen.items() if value is not None}, **values)

        options = [_option(name, defaults.get(name)) for name in names]
        parameters = [*own, *options]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        del run.__wrapped__  # typer would read its hints
        return run

    return decorate


def told(command: Callable[..., None]) -> Callable[..., None]:
    """Have a command tell the package's errors in one sentence: exit status 2 for what was given wrong, else 1."""

    @functools.wraps(command)
    def run(*args: Any, **values: Any) -> None:
        try:
            command(*args, **values)
        except StepClaimError as error:
            fail(str(error), 2 if isinstance(error, ConfigurationError) else 1)

    return run


def fail(sentence: str, status: int = 1) -> None:
    """Tell what is wrong, on the error output, and end."""
    sys.stderr.write(f"stepclaim: {sentence}\n")
    raise typer.Exit(status)


def _option(name: str, default: str | None) -> inspect.Parameter:
    field = Settings.model_fields[name]
    about = field.description or name
    shown: dict[str, Any] = {
        "envvar": f"STEPCLAIM_{name.upper()}",
        "help": about if about.startswith("etcd") else about[0].upper() + about[1:],
        "show_default": default or _shown(field.default),
        "rich_help_panel": "Settings",
    }
    annotation: Any
    if name == "tls":
        annotation = Annotated[bool | None, typer.Option("--tls/--no-tls", **shown)]
    else:  # as text: the settings read it, with the same rules and errors as in the environment
        annotation = Annotated[str | None, typer.Option(f"--{name.replace('_', '-')}", metavar="TEXT", **shown)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _shown(default: Any) -> str | bool:
    match default:
        case None | bool():
            return False
        case tuple():
            return ",".join(default)
        case float():
            return f"{default:g}"
    return str(default) or False
