"""Settings: keywords above Settings above the environment, and every wrong value named without its secrets."""

import os
import pickle
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stepclaim import AsyncEtcdRunStore, ConfigurationError, EtcdRunStore
from stepclaim.settings import Settings

SECRET = "s3cret-Pa55"  # noqa: S105 - the tests look for it where it must not be


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Take the variables that this machine may have set away."""
    for name in list(os.environ):
        if name.upper().startswith("STEPCLAIM_"):
            monkeypatch.delenv(name)
    yield monkeypatch  # noqa: PT022 - the fixture's own clean-up follows


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    made = {name: tmp_path / f"{name}.pem" for name in ("ca_file", "cert_file", "key_file")}
    for path in made.values():
        path.write_text("x", encoding="utf-8")
    return {name: str(path) for name, path in made.items()}


def test_defaults() -> None:
    settings = Settings()
    assert settings.endpoints == ("127.0.0.1:2379",)
    assert (settings.prefix, settings.lease_ttl, settings.timeout) == ("/stepclaim", 30.0, 10.0)
    assert (settings.attempt_timeout, settings.value_limit) == (1.0, 256 * 1024)
    assert (settings.user, settings.password, settings.uses_tls) == (None, None, False)
    assert str(os.getpid()) in settings.owner_name
    assert Settings().owner_name != settings.owner_name


def test_every_setting_has_its_twin_in_the_environment(environment: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    twins: dict[str, tuple[str, Any]] = {
        "endpoints": (" a:1, b:2 ", ("a:1", "b:2")),
        "prefix": ("/mine/", "/mine"),
        "owner": ("worker-7", "worker-7"),
        "lease_ttl": ("12.5", 12.5),
        "timeout": ("3", 3.0),
        "attempt_timeout": ("0.5", 0.5),
        "value_limit": ("1000", 1000),
        "user": ("me", "me"),
        "password": (SECRET, SECRET),
        "tls": ("true", True),
        "tls_server_name": ("etcd.example", "etcd.example"),
        **{name: (path, Path(path)) for name, path in files.items()},
    }
    assert set(twins) == set(Settings.model_fields)
    for name, (text, _) in twins.items():
        environment.setenv(f"STEPCLAIM_{name.upper()}", text)
    settings = Settings()
    for name, (_, value) in twins.items():
        got = getattr(settings, name)
        assert (got.get_secret_value() if name == "password" else got) == value, name
    assert settings.owner_name == "worker-7"
    for name in twins:
        environment.setenv(f"STEPCLAIM_{name.upper()}", "")
    assert Settings() == Settings.model_construct(**{
        name: field.default for name, field in Settings.model_fields.items()
    }), "an empty variable is as good as none"  # fmt: skip


def test_keywords_stand_above_settings_above_the_environment(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("STEPCLAIM_TIMEOUT", "1")
    environment.setenv("STEPCLAIM_PREFIX", "/env")
    environment.setenv("STEPCLAIM_OWNER", "env")
    environment.setenv("STEPCLAIM_ENDPOINTS", "https://env:1")
    given = Settings(prefix="/given", timeout=2)
    resolved = Settings.resolve(given, {"timeout": 3})
    assert (resolved.timeout, resolved.prefix, resolved.owner) == (3.0, "/given", "env")
    assert (resolved.endpoints, resolved.uses_tls) == (("env:1",), True)
    assert Settings.resolve(None, {}).prefix == "/env"
    assert Settings.resolve(given, {"owner": None}).owner == "env", "None is no owner"
    named = Settings.resolve("here:2", {"lease_ttl": None})
    assert (named.endpoints, named.lease_ttl) == (("here:2",), None)
    assert not named.uses_tls, "the scheme of the variable went with its endpoints"
    assert Settings.resolve(Settings(lease_ttl=None), {}).lease_ttl is None
    assert Settings.resolve(Settings(user="u", password=SECRET), {"user": None, "password": None}).password is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a", ("a:2379",)),
        ("a:1", ("a:1",)),
        ("a:1,b:2,c", ("a:1", "b:2", "c:2379")),
        (["a:1", "b"], ("a:1", "b:2379")),
        (("a:1",), ("a:1",)),
        ("127.0.0.1:2379", ("127.0.0.1:2379",)),
        ("[::1]:2379", ("[::1]:2379",)),
        ("[::1]", ("[::1]:2379",)),
        ("http://a:1/", ("a:1",)),
        ("https://[fe80::1]:7, b", ("[fe80::1]:7", "b:2379")),
        ("etcd-0.etcd.default.svc.cluster.local:2379", ("etcd-0.etcd.default.svc.cluster.local:2379",)),
    ],
)
def test_endpoints(given: Any, expected: tuple[str, ...], environment: pytest.MonkeyPatch) -> None:
    assert Settings(endpoints=given).endpoints == expected
    assert Settings.resolve(given, {}).endpoints == expected
    if isinstance(given, str):
        environment.setenv("STEPCLAIM_ENDPOINTS", given)
        assert Settings().endpoints == expected


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("", "'' is no endpoint: give host:port"),
        ("a:1,,b:2", "'' is no endpoint"),
        ([], "give at least one host:port"),
        ("a:0", "'a:0' is no endpoint"),
        ("a:65536", "'a:65536' is no endpoint"),
        ("a:port", "'a:port' is no endpoint"),
        ("a:²", "'a:²' is no endpoint"),
        (":2379", "':2379' is no endpoint"),
        ("[]:2379", "is no endpoint"),
        ("a b:1", "'a b:1' is no endpoint"),
        ("a/b", "'a/b' is no endpoint"),
        ("a:1/b", "'a:1/b' is no endpoint"),
        ("::1", "write an IPv6 address in brackets"),
        ("fe80::1:2379", "write an IPv6 address in brackets"),
        ("unix:///run/etcd.sock", "give host:port, http://host:port or https://host:port"),
        (7, "give host:port"),
        ([7], "an endpoint is a text like 127.0.0.1:2379"),
        (None, "give host:port"),
        (f"https://root:{SECRET}@a:2379", "give user and password by settings of their own"),
    ],
)
def test_wrong_endpoints(given: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match="wrong settings: ") as wrong:
        Settings(endpoints=given)
    assert says in str(wrong.value)
    assert "endpoints: " in str(wrong.value)
    told(wrong.value)


def test_https_turns_tls_on(environment: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    for given in ("https://a:1", ["a:1", "https://b:1"], " https://a"):
        assert Settings(endpoints=given).uses_tls
        assert Settings.resolve(Settings(endpoints=given), {"timeout": 1}).uses_tls
    assert not Settings(endpoints="http://a:1").uses_tls
    environment.setenv("STEPCLAIM_ENDPOINTS", "https://a:1,https://b:1")
    assert Settings().uses_tls
    assert Settings().endpoints == ("a:1", "b:1")
    assert Settings(endpoints="a:1", ca_file=files["ca_file"]).uses_tls
    assert not Settings(endpoints="a:1").uses_tls


@pytest.mark.parametrize("text", ["none", "None", " NONE ", "off"])
def test_at_most_once_by_name(text: str, environment: pytest.MonkeyPatch) -> None:
    assert Settings(lease_ttl=text).lease_ttl is None
    environment.setenv("STEPCLAIM_LEASE_TTL", text)
    assert Settings().lease_ttl is None
    assert Settings(lease_ttl=5).lease_ttl == 5
    environment.setenv("STEPCLAIM_LEASE_TTL", "5")
    assert Settings(lease_ttl=None).lease_ttl is None


WRONG: list[tuple[str, Any]] = [
    ("prefix", ""),
    ("prefix", "///"),
    ("prefix", 7),
    ("owner", 7),
    ("lease_ttl", 0),
    ("lease_ttl", 0.5),
    ("lease_ttl", -1),
    ("lease_ttl", 86401),
    ("lease_ttl", float("nan")),
    ("lease_ttl", float("inf")),
    ("lease_ttl", "soon"),
    ("timeout", 0),
    ("timeout", -1),
    ("timeout", float("inf")),
    ("timeout", float("nan")),
    ("timeout", "long"),
    ("attempt_timeout", 0),
    ("value_limit", 0),
    ("value_limit", 2 * 1024 * 1024),
    ("value_limit", 1.5),
    ("user", 7),
    ("password", 7),
    ("tls", "perhaps"),
    ("tls_server_name", 7),
    ("ca_file", "nowhere/ca.pem"),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_is_named(name: str, value: Any, environment: pytest.MonkeyPatch) -> None:
    options: Any = {name: value}
    for make in (
        lambda: Settings(**options),
        lambda: EtcdRunStore.connect("127.0.0.1:1", **options),
        lambda: AsyncEtcdRunStore.connect("127.0.0.1:1", **options),
    ):
        with pytest.raises(ConfigurationError) as wrong:
            make()
        assert isinstance(wrong.value, ValueError)
        assert f"{name}: " in str(wrong.value)
        told(wrong.value)
    if isinstance(value, str) and value:
        environment.setenv(f"STEPCLAIM_{name.upper()}", value)
        with pytest.raises(ConfigurationError, match=f"{name}: "):
            Settings()


def test_all_wrong_values_are_named_at_once() -> None:
    with pytest.raises(ConfigurationError) as wrong:
        Settings(timeout=0, lease_ttl=0, endpoints="a:b", prefix="/")
    for name in ("timeout", "lease_ttl", "endpoints", "prefix"):
        assert f"{name}: " in str(wrong.value)
    told(wrong.value)


def test_unknown_settings_are_told(environment: pytest.MonkeyPatch) -> None:
    options: Any = {"leasettl": 3}
    with pytest.raises(ConfigurationError, match="leasettl: there is no such setting"):
        Settings(**options)
    with pytest.raises(ConfigurationError, match="leasettl"):
        EtcdRunStore.connect("127.0.0.1:1", **options)
    environment.setenv("STEPCLAIM_SOMETHING_ELSE", "3")  # other programs' business
    Settings()


def test_what_belongs_together(files: dict[str, str]) -> None:
    for options, says in (
        ({"user": "u"}, "user and password go together"),
        ({"password": SECRET}, "user and password go together"),
        ({"cert_file": files["cert_file"]}, "cert_file and key_file go together"),
        ({"key_file": files["key_file"]}, "cert_file and key_file go together"),
    ):
        with pytest.raises(ConfigurationError, match=says) as wrong:
            Settings(**options)
        told(wrong.value)


@pytest.mark.parametrize("name", ["ca_file", "cert_file", "key_file"])
def test_files_that_can_not_be_read(name: str, files: dict[str, str], tmp_path: Path) -> None:
    missing = tmp_path / "missing.pem"
    for path in (missing, tmp_path):
        with pytest.raises(ConfigurationError, match=rf"{name}: .*{path.name} can't be read") as wrong:
            Settings(**{**files, name: path})
        told(wrong.value)
    path = Path(files[name])
    path.chmod(0)
    if not os.access(path, os.R_OK):  # root may read everything
        with pytest.raises(ConfigurationError, match=f"{name}: .* can't be read"):
            Settings(**files)


def test_the_password_is_never_shown(environment: pytest.MonkeyPatch) -> None:
    settings = Settings(user="u", password=SECRET)
    assert settings.password is not None
    assert settings.password.get_secret_value() == SECRET
    again = Settings.resolve(settings, {"timeout": 1})
    for shown in (settings, again, settings.model_dump(), settings.model_dump_json()):
        assert SECRET not in repr(shown)
        assert SECRET not in str(shown)
    for options in ({"timeout": 0}, {"lease_ttl": "soon"}, {"user": None}, {"cert_file": "x"}, {"nonsense": 1}):
        with pytest.raises(ConfigurationError) as wrong:
            Settings(**{"user": "u", "password": SECRET, **options})
        told(wrong.value)
    environment.setenv("STEPCLAIM_PASSWORD", SECRET)
    with pytest.raises(ConfigurationError, match="user and password go together") as wrong:
        Settings()
    told(wrong.value)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().timeout = 3


def told(error: ConfigurationError) -> None:
    """Hold that an error is one line without secrets, also where it is logged or pickled."""
    assert "\n" not in str(error)
    assert not [noise for noise in ("pydantic", "Value error", "settings: settings") if noise in str(error)], error
    assert SECRET not in "".join(traceback.format_exception(error))
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert (type(again), str(again)) == (type(error), str(error))
