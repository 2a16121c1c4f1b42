"""Who may come in: users and tokens, TLS and certificates, a client that the user already has; and who may not."""

import asyncio
import functools
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import etcd3
import pytest

from fix_stores import AnyStore
from servers import AuthEtcd, Certificates, EtcdServer, TlsEtcd, eventually
from stepclaim import (
    AsyncEtcdRunStore,
    AuthenticationError,
    ConfigurationError,
    EtcdRunStore,
    PermissionDeniedError,
    StepClaimError,
    UnavailableError,
)
from stepclaim.embedded import EmbeddedEtcd

OpenAt = Callable[..., AbstractAsyncContextManager[AnyStore]]

AT_ONCE = 3.0
"""Seconds that a refusal may take, of the ten that a call has."""
NOISE = ("ipv4:", "last error", "OPENSSL", "error:1", "TSI_", "grpc", "\n", "{")
"""What gRPC says around the words that help."""


@pytest.fixture(params=("threads", "asyncio"))
def open_at(request: pytest.FixtureRequest, threads: ThreadPoolExecutor) -> OpenAt:
    """Give a function that opens a store of either face: at endpoints, or on a client (`client=`)."""

    @asynccontextmanager
    async def open_one(endpoints: Any = None, *, client: Any = None, **options: Any) -> AsyncIterator[AnyStore]:
        face: Any = EtcdRunStore if request.param == "threads" else AsyncEtcdRunStore
        connect = face.connect if client is None else face.from_client
        make = functools.partial(connect, endpoints if client is None else client, **options)
        if request.param == "asyncio":
            async with make() as store:
                yield AnyStore(store, threads)
            return
        store = await asyncio.to_thread(make)
        try:
            yield AnyStore(store, threads)
        finally:
            await asyncio.to_thread(store.close)

    return open_one


async def refused(opening: AbstractAsyncContextManager[AnyStore], kind: type[StepClaimError], says: str) -> None:
    """Open a store that must be refused at once, by an error that a person can read."""
    begun = time.monotonic()
    with pytest.raises(kind, match=says) as wrong:
        async with opening:
            pass
    assert time.monotonic() - begun < AT_ONCE
    assert type(wrong.value) is kind
    readable(str(wrong.value))


def readable(message: str) -> None:
    assert not [noise for noise in NOISE if noise in message], message
    assert len(message) < 300


async def works(store: AnyStore, server: Any, *look: str) -> None:
    """Claim and complete a step, and see both in etcd."""
    run = uuid.uuid4().hex
    claim = await store.claim_step(run, "a", input_json="1")
    assert claim is not None
    await store.complete_step(claim, "Succeeded", output_json="2")
    assert not await store.try_claim_step(run, "a")
    assert (await store.get_claim(run, "a")).status == "Succeeded"
    assert uuid.UUID(run).hex in server.etcdctl(*look, "get", "--prefix", "/", "--keys-only").replace("-", "")


# --- users ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def allowed(auth_etcd: AuthEtcd, prefix: str) -> str:
    """Return a fresh prefix that the worker may write to."""
    return auth_etcd.prefix.rstrip("/") + prefix


@dataclass(frozen=True)
class TlsAuthEtcd:
    """A server with TLS and a user; it asks for no client's certificate."""

    server: EmbeddedEtcd
    files: Certificates
    user: str = "worker"
    password: str = "worker's password"  # noqa: S105 - of a server that lives for one test session

    def etcdctl(self, *args: str) -> str:
        return self.server.etcdctl(f"--cacert={self.files.ca}", *args)


@pytest.fixture(scope="module")
def tls_auth_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsAuthEtcd]:
    """Give a server that speaks TLS and has users."""
    files = Certificates.make(tmp_path_factory.mktemp("tls-auth"))
    flags = [f"--cert-file={files.server_cert}", f"--key-file={files.server_key}", "--bcrypt-cost=4"]
    with EmbeddedEtcd(extra_args=flags) as server:
        made = TlsAuthEtcd(server, files)
        made.etcdctl("user", "add", f"{made.user}:{made.password}")
        made.etcdctl("user", "add", "root:root")
        made.etcdctl("user", "grant-role", "root", "root")
        made.etcdctl("user", "grant-role", made.user, "root")
        made.etcdctl("auth", "enable")
        yield made


async def test_login_over_an_insecure_channel(open_at: OpenAt, auth_etcd: AuthEtcd, allowed: str) -> None:
    async with open_at(auth_etcd.endpoint, prefix=allowed, user=auth_etcd.user, password=auth_etcd.password) as store:
        await works(store, auth_etcd)


async def test_login_over_tls(open_at: OpenAt, tls_auth_etcd: TlsAuthEtcd, prefix: str) -> None:
    server = tls_auth_etcd
    async with open_at(
        server.server.endpoint, prefix=prefix, ca_file=server.files.ca, user=server.user, password=server.password
    ) as store:
        await works(store, server, "--user=root:root")
    wrong = open_at(server.server.endpoint, ca_file=server.files.ca, user=server.user, password="guess")  # noqa: S106
    await refused(wrong, AuthenticationError, "check user and password")


async def test_a_user_on_a_cluster_without_users(open_at: OpenAt, etcd: EtcdServer, prefix: str) -> None:
    async with open_at(etcd.endpoint, prefix=prefix, user="anybody", password="anything") as store:  # noqa: S106
        await works(store, etcd)


async def test_tokens_that_end_in_the_middle_of_use(open_at: OpenAt, auth_etcd: AuthEtcd, allowed: str) -> None:
    access = {"prefix": allowed, "user": auth_etcd.user, "password": auth_etcd.password}
    async with open_at(auth_etcd.endpoint, **access) as one, open_at(auth_etcd.endpoint, **access) as two:
        sessions = one.session.session_id, two.session.session_id
        wins: list[bool] = []
        for batch in range(3):
            keys = [f"s{batch}.{number}" for number in range(12)]
            calls = [store.try_claim_step("r", key) for key in keys for store in (one, two)]
            claims = asyncio.gather(*calls)
            await asyncio.to_thread(auth_etcd.forget_tokens)
            answers = await claims
            wins += [first + second for first, second in zip(answers[::2], answers[1::2], strict=True)]
        assert wins == [1] * 36, "exactly one claim of each step stands"
        stand = await one.get_claims("r")
        assert len(stand) == 36
        assert {claim.session for claim in stand} <= set(sessions), "no session was replaced"
        auth_etcd.forget_tokens()
        await one.record_step_start("r", "s0.0.own", "T")
        assert len(await two.get_step_statuses("r")) == 1


async def test_renewals_survive_the_end_of_their_token(open_at: OpenAt, auth_etcd: AuthEtcd, allowed: str) -> None:
    async with open_at(
        auth_etcd.endpoint, prefix=allowed, user=auth_etcd.user, password=auth_etcd.password, lease_ttl=3
    ) as store:
        session = store.session
        claim = await store.claim_step("r", "a")
        assert claim is not None
        for _ in range(2):
            await asyncio.to_thread(eventually, lambda: session.expires_in() < 2.4, 5)
            auth_etcd.forget_tokens()
            # 2.7 s can be trusted after a renewal: it counts from the request, less a margin
            await asyncio.to_thread(eventually, lambda: session.expires_in() > 2.5, 5)
        assert not session.lost.is_set()
        assert store.session is session
        assert await store.holds(claim)


async def test_a_wrong_password_is_told_at_once(open_at: OpenAt, auth_etcd: AuthEtcd, allowed: str) -> None:
    for user, password in ((auth_etcd.user, "guess-74"), ("nobody", "guess-74")):
        for session in (True, False):
            await refused(
                open_at(auth_etcd.endpoint, prefix=allowed, user=user, password=password, session=session),
                AuthenticationError,
                "invalid user ID or password; check user and password",
            )


async def test_a_password_changed_in_the_middle_of_use(open_at: OpenAt, auth_etcd: AuthEtcd, allowed: str) -> None:
    user = f"u{uuid.uuid4().hex[:8]}"
    auth_etcd.etcdctl("user", "add", f"{user}:before")
    auth_etcd.etcdctl("user", "grant-role", user, auth_etcd.user)
    async with open_at(auth_etcd.endpoint, prefix=allowed, user=user, password="before", timeout=5) as store:  # noqa: S106
        assert await store.try_claim_step("r", "a")
        auth_etcd.etcdctl("user", "delete", user)
        auth_etcd.forget_tokens()
        begun = time.monotonic()
        with pytest.raises(AuthenticationError, match="check user and password") as wrong:
            await store.try_claim_step("r", "b")
        assert time.monotonic() - begun < AT_ONCE
        readable(str(wrong.value))
        auth_etcd.etcdctl("user", "add", f"{user}:before")
        auth_etcd.etcdctl("user", "grant-role", user, auth_etcd.user)
        assert await store.try_claim_step("r", "b"), "it works again once the user is there again"


async def test_no_user_where_one_is_needed(open_at: OpenAt, auth_etcd: AuthEtcd, allowed: str) -> None:
    for session in (True, False):
        opening = open_at(auth_etcd.endpoint, prefix=allowed, session=session)
        await refused(opening, AuthenticationError, "user name is empty; give user and password")


async def test_a_user_without_permission(open_at: OpenAt, auth_etcd: AuthEtcd, prefix: str) -> None:
    for session in (True, False):
        await refused(
            open_at(
                auth_etcd.endpoint, prefix=prefix, user=auth_etcd.user, password=auth_etcd.password, session=session
            ),
            PermissionDeniedError,
            "grant its role readwrite on the prefix",
        )
    assert auth_etcd.etcdctl("get", "--prefix", prefix) == ""


# --- TLS -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Give certificates of an authority that the servers don't know."""
    return Certificates.make(tmp_path_factory.mktemp("strangers"))


def with_client_certificate(files: Certificates) -> dict[str, Path]:
    return {"ca_file": files.ca, "cert_file": files.client_cert, "key_file": files.client_key}


@pytest.mark.parametrize("name", [None, "localhost"])
async def test_tls_with_a_client_certificate(open_at: OpenAt, tls_etcd: TlsEtcd, prefix: str, name: str | None) -> None:
    async with open_at(
        f"https://{tls_etcd.endpoint}", prefix=prefix, tls_server_name=name, **with_client_certificate(tls_etcd.files)
    ) as store:
        await works(store, tls_etcd)


@pytest.mark.parametrize("session", [True, False])
async def test_tls_refusals(open_at: OpenAt, tls_etcd: TlsEtcd, strangers: Certificates, session: bool) -> None:
    ours = with_client_certificate(tls_etcd.files)
    theirs = with_client_certificate(strangers)
    cases: list[tuple[dict[str, Any], type[StepClaimError], str]] = [
        ({"ca_file": ours["ca_file"]}, AuthenticationError, "give cert_file and key_file"),
        ({**theirs, "ca_file": ours["ca_file"]}, AuthenticationError, "give cert_file and key_file"),
        ({**ours, "ca_file": theirs["ca_file"]}, AuthenticationError, "give the ca_file"),
        ({"tls": True}, AuthenticationError, "give the ca_file"),
        ({**ours, "tls_server_name": "etcd.example"}, AuthenticationError, "give tls_server_name"),
        ({}, UnavailableError, "both sides use TLS or neither does"),
    ]
    for options, kind, says in cases:
        await refused(open_at(tls_etcd.endpoint, session=session, **options), kind, says)


async def test_tls_to_a_server_without_it(open_at: OpenAt, etcd: EtcdServer, strangers: Certificates) -> None:
    for options in ({"tls": True}, {"ca_file": strangers.ca}):
        await refused(open_at(etcd.endpoint, **options), UnavailableError, "both sides use TLS or neither does")


async def test_files_that_are_no_certificates(
    open_at: OpenAt, tls_etcd: TlsEtcd, strangers: Certificates, tmp_path: Path
) -> None:
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n", encoding="utf-8")
    ours = with_client_certificate(tls_etcd.files)
    for wrong, says in (
        ({"ca_file": nonsense}, "ca_file .*nonsense.pem holds no certificate"),
        ({"ca_file": tls_etcd.files.client_key}, "ca_file .*client.key holds no certificate"),
        ({"cert_file": nonsense}, "cert_file .*nonsense.pem"),
        ({"key_file": nonsense}, "key_file .*nonsense.pem"),
        ({"key_file": strangers.client_key}, "its own private key"),
    ):
        await refused(open_at(tls_etcd.endpoint, **{**ours, **wrong}), ConfigurationError, says)


# --- a client of the user's ----------------------------------------------------------------------------------------


def etcd3_client(endpoint: str, **options: Any) -> Any:
    host, _, port = endpoint.rpartition(":")
    return closing(etcd3.client(host=host, port=int(port), **options))


async def test_from_client(open_at: OpenAt, etcd: EtcdServer, prefix: str) -> None:
    with etcd3_client(etcd.endpoint) as client:
        opening = open_at(client=client, prefix=prefix, owner="me")
    async with opening as store:  # the client is closed: its addresses are all that was taken
        assert store.session.owner == "me"
        await works(store, etcd)


async def test_from_client_with_tls(open_at: OpenAt, tls_etcd: TlsEtcd, prefix: str) -> None:
    files = tls_etcd.files
    with etcd3_client(
        tls_etcd.endpoint, ca_cert=files.ca, cert_key=files.client_key, cert_cert=files.client_cert
    ) as client:
        async with open_at(client=client, prefix=prefix) as store:
            await works(store, tls_etcd)


async def test_from_client_with_its_token(open_at: OpenAt, auth_etcd: AuthEtcd, allowed: str) -> None:
    access = {"user": auth_etcd.user, "password": auth_etcd.password}
    with etcd3_client(auth_etcd.endpoint, **access) as client:
        async with open_at(client=client, prefix=allowed, timeout=5) as store:
            await works(store, auth_etcd)
            auth_etcd.forget_tokens()
            begun = time.monotonic()
            with pytest.raises(AuthenticationError, match="invalid auth token; give user and password") as ended:
                await store.try_claim_step("r", "a")
            assert time.monotonic() - begun < AT_ONCE
            readable(str(ended.value))
        await refused(open_at(client=client, prefix=allowed), AuthenticationError, "give user and password")
        async with open_at(client=client, prefix=allowed, **access) as store:
            assert await store.try_claim_step("r", "a")
            auth_etcd.forget_tokens()
            assert await store.try_claim_step("r", "b")
            await works(store, auth_etcd)


@pytest.mark.parametrize("wrong", [None, "127.0.0.1:2379", 7, object(), {}, {"endpoints": 1}, pytest])
async def test_from_client_with_something_else(wrong: Any) -> None:
    for face in (EtcdRunStore, AsyncEtcdRunStore):
        with pytest.raises(ConfigurationError, match=r"takes an etcd3 client.*make one by etcd3.client") as told:
            face.from_client(wrong)
        readable(str(told.value))
