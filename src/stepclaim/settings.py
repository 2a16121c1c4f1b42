"""Everything that can be set, by keyword, or by STEPCLAIM_* in the environment."""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import TYPE_CHECKING, Annotated, Any, Self, TypedDict

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from stepclaim.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

_DEFAULT_PORT = 2379

Endpoints = str | list[str] | tuple[str, ...]
"""host:port, several of them in one text separated by commas, or a list."""


class Overrides(TypedDict, total=False):
    """Keywords that stand above settings and environment."""

    owner: str | None
    prefix: str
    lease_ttl: float | None
    timeout: float
    attempt_timeout: float
    value_limit: int
    user: str | None
    password: str | None
    ca_file: str | Path | None
    cert_file: str | Path | None
    key_file: str | Path | None
    tls: bool
    tls_server_name: str | None


class Settings(BaseSettings):
    """A store's settings. Each has an environment twin: `lease_ttl` is STEPCLAIM_LEASE_TTL.

    Raises `ConfigurationError` naming every setting that is wrong.
    """

    model_config = SettingsConfigDict(
        env_prefix="STEPCLAIM_", env_ignore_empty=True, frozen=True, extra="forbid", hide_input_in_errors=True
    )

    endpoints: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(f"127.0.0.1:{_DEFAULT_PORT}",), description="etcd's members as host:port, separated by commas"
    )
    prefix: str = Field(default="/stepclaim", description="what every key begins with")
    owner: str = Field(default="", description="who claims; by default host, pid and a random part")
    lease_ttl: float | None = Field(
        default=30.0, description="seconds a dead worker's claims live on; none: at-most-once, claims stay"
    )
    timeout: float = Field(default=10.0, gt=0, allow_inf_nan=False, description="each call's deadline in seconds")
    attempt_timeout: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="seconds before a silent member is given up for another"
    )
    value_limit: int = Field(default=256 * 1024, gt=0, le=1024 * 1024, description="bytes that one field may have")
    user: str | None = Field(default=None, description="etcd user")
    password: SecretStr | None = Field(default=None, description="its password")
    ca_file: Path | None = Field(
        default=None, description="the authority that signed etcd's certificates; turns TLS on"
    )
    cert_file: Path | None = Field(default=None, description="client certificate")
    key_file: Path | None = Field(default=None, description="its private key")
    tls: bool = Field(default=False, description="TLS with the system's authorities where no ca_file is given")
    tls_server_name: str | None = Field(default=None, description="the name to expect in etcd's certificate")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            wrong = "; ".join(map(_told, error.errors(include_input=False)))
            raise ConfigurationError(f"wrong settings: {wrong}") from error

    @field_validator("endpoints", mode="before")
    @classmethod
    def _split_endpoints(cls, value: object) -> object:
        if isinstance(value, str):
            value = value.split(",")
        if not isinstance(value, (list, tuple)):
            raise ValueError("give host:port, or several of them")  # noqa: TRY004 - pydantic collects ValueErrors
        return tuple(_endpoint(part) for part in value)

    @model_validator(mode="before")
    @classmethod
    def _tls_by_scheme(cls, values: Any) -> Any:
        endpoints = values.get("endpoints") if isinstance(values, dict) else None
        parts = endpoints.split(",") if isinstance(endpoints, str) else endpoints
        if isinstance(parts, (list, tuple)) and any(str(part).strip().startswith("https://") for part in parts):
            return {**values, "tls": True}
        return values

    @field_validator("prefix")
    @classmethod
    def _clean_prefix(cls, value: str) -> str:
        cleaned = value.rstrip("/")
        if not cleaned:
            raise ValueError("must not be empty: give something like /stepclaim")
        return cleaned

    @field_validator("lease_ttl", mode="before")
    @classmethod
    def _none_by_name(cls, value: object) -> object:
        if isinstance(value, str) and value.strip().casefold() in ("none", "off"):
            return None
        return value

    @field_validator("lease_ttl")
    @classmethod
    def _sane_ttl(cls, value: float | None) -> float | None:
        if value is not None and not 1 <= value <= 24 * 3600:
            raise ValueError("give 1 to 86400 seconds, or none for at-most-once")
        return value

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not self.endpoints:
            raise ValueError("endpoints: give at least one host:port")
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together")
        if (self.user is None) != (self.password is None):
            raise ValueError("user and password go together")
        for name in ("ca_file", "cert_file", "key_file"):
            path: Path | None = getattr(self, name)
            if path is not None and (path.is_dir() or not os.access(path, os.R_OK)):
                raise ValueError(f"{name}: {path} can't be read")
        return self

    @property
    def uses_tls(self) -> bool:
        """Whether the channel is encrypted."""
        return self.tls or self.ca_file is not None or self.cert_file is not None

    @property
    def owner_name(self) -> str:
        """The owner, or a name made of host, pid and a random part."""
        return self.owner or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"

    @classmethod
    def resolve(cls, given: Settings | Endpoints | None, overrides: Overrides) -> Settings:
        """Put keywords above settings above the environment."""
        if isinstance(given, Settings):
            base: dict[str, Any] = {name: getattr(given, name) for name in given.model_fields_set}
        elif given is None:
            base = {}
        else:
            base = {"endpoints": given}
        said = {name: value for name, value in overrides.items() if not (name == "owner" and value is None)}
        return cls(**{**base, **said})


def _told(wrong: Mapping[str, Any]) -> str:
    """Tell one wrong setting in plain words."""
    name = ".".join(map(str, wrong["loc"]))
    if wrong["type"] == "extra_forbidden":
        return f"{name}: there is no such setting"
    said = wrong["msg"].removeprefix("Value error, ")
    return f"{name}: {said}" if name else said


def _endpoint(text: object) -> str:
    if not isinstance(text, str):
        raise ValueError("an endpoint is a text like 127.0.0.1:2379")  # noqa: TRY004 - pydantic collects ValueErrors
    bare = text.strip()
    if "@" in bare:
        raise ValueError("an endpoint is host:port only: give user and password by settings of their own")
    scheme, separator, rest = bare.partition("://")
    if separator:
        if scheme not in ("http", "https"):
            raise ValueError(f"{bare!r} is no endpoint: give host:port, http://host:port or https://host:port")
        bare = rest.rstrip("/")
    host, colon, port = bare.rpartition(":")
    if not colon or bare.endswith("]"):
        host, port = bare, str(_DEFAULT_PORT)
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(f"{text!r} is no endpoint: write an IPv6 address in brackets, such as [::1]:2379")
    usable = port.isascii() and port.isdigit() and 0 < int(port) < 65536  # noqa: PLR2004
    if not host.strip("[]") or not usable or "/" in host or any(letter.isspace() for letter in host):
        raise ValueError(f"{text!r} is no endpoint: give host:port, such as 127.0.0.1:2379")
    return f"{host}:{port}"
