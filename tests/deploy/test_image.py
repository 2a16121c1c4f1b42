"""The image's recipe and the compose file, read as text: neither can be built where no base image can be had."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from typing import Any

import pytest

from .commands import command_problems, known_variables
from .documents import COMPOSE, DOCKERFILE, ROOT, applied_files, load, parse, pod_of, workloads

(COMPOSED,) = parse(COMPOSE.read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSED["services"]
WORKERS = ("worker-1", "worker-2")


def _instructions() -> list[tuple[str, str]]:
    """Read the Dockerfile's instructions with their arguments, comments and continuations gone."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(word, " ".join(rest.split())) for word, _, rest in (line.partition(" ") for line in joined)]


def _all(word: str) -> list[str]:
    return [arguments for instruction, arguments in _instructions() if instruction == word]


def _user() -> str:
    last = max(index for index, (word, _) in enumerate(_instructions()) if word == "FROM")
    (user,) = (arguments for word, arguments in _instructions()[last:] if word == "USER")
    return user


def test_user_is_a_number_and_the_same_everywhere() -> None:
    """The final stage runs as a numeric user that is not root; compose and the manifests name the same one."""
    match = re.fullmatch(r"(\d+):(\d+)", _user())
    assert match
    user, group = map(int, match.groups())
    assert user > 0
    assert {SERVICES[worker]["user"] for worker in WORKERS} == {_user()}
    (worker,) = (pod_of(m)["securityContext"] for m in workloads(load(applied_files())) if m["kind"] == "Deployment")
    assert (worker["runAsUser"], worker["runAsGroup"]) == (user, group)


def test_bases_are_one_variable() -> None:
    """Both stages stand on the same base, and it can be another one."""
    assert [base.split()[0] for base in _all("FROM")] == ["${PYTHON_IMAGE}"] * 2
    assert any(argument.startswith("PYTHON_IMAGE=") for argument in _all("ARG"))


def test_no_shell() -> None:
    """Every command is a list of words."""
    for word in ("RUN", "ENTRYPOINT", "CMD"):
        for arguments in _all(word):
            assert all(isinstance(part, str) for part in json.loads(arguments)), arguments
    assert _all("ENTRYPOINT") == ['["stepclaim"]']


def test_what_is_copied_is_there() -> None:
    """Every source exists and gets past .dockerignore, which lets through nothing else; so does the extra."""
    sources = [name for arguments in _all("COPY") if "--from=" not in arguments for name in arguments.split()[:-1]]
    assert [name for name in sources if not (ROOT / name).exists()] == []
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignore if line.startswith("!")} == set(sources)
    assert "*" in ignore
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "cli" in project["optional-dependencies"]
    assert {project["readme"], *project["license-files"], "pyproject.toml"} <= set(sources)


def test_compose_services() -> None:
    """There is etcd and two workers with names of their own, every image by a variable, and etcd on loopback alone."""
    assert set(SERVICES) == {"etcd", *WORKERS}
    assert [s["image"] for s in SERVICES.values() if not re.fullmatch(r"\$\{\w+:-[\w./-]+:[\w.]+\}", s["image"])] == []
    assert not [s["image"] for s in SERVICES.values() if ":latest" in s["image"]]
    assert len({SERVICES[worker]["environment"]["STEPCLAIM_OWNER"] for worker in WORKERS}) == len(WORKERS)
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(re.fullmatch(r"127\.0\.0\.1:\$\{\w+:-\d+\}:\d+", port) for port in ports)


@pytest.mark.parametrize("name", SERVICES)
def test_compose_service_is_confined(name: str) -> None:
    """Nothing to write to but what is named, no capabilities, a check without a shell, time to end, and a restart."""
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["healthcheck"]["test"][0] == "CMD"
    assert {"stop_grace_period", "restart"} <= set(service)
    assert all(volume.split(":")[0] in COMPOSED["volumes"] for volume in service.get("volumes", []))


@pytest.mark.parametrize("name", WORKERS)
def test_compose_worker(name: str) -> None:
    """A worker waits for a healthy etcd, is built from our Dockerfile, and uses variables and options that exist."""
    worker = SERVICES[name]
    assert worker["depends_on"] == {"etcd": {"condition": "service_healthy"}}
    assert ROOT / worker["build"]["context"] / worker["build"]["dockerfile"] == DOCKERFILE
    assert set(worker["build"]["args"]) <= {argument.partition("=")[0] for argument in _all("ARG")}
    environment = worker["environment"]
    assert set(environment) - known_variables() == set()
    assert environment["STEPCLAIM_ENDPOINTS"] == "etcd:2379"
    check = worker["healthcheck"]["test"]
    assert check[check.index("--file") + 1] == environment["STEPCLAIM_HEALTH_FILE"]
    assert command_problems(worker["command"]) + command_problems(check[2:]) == []


def _compose() -> list[str]:
    if alone := shutil.which("docker-compose"):
        return [alone]
    if docker := shutil.which("docker"):
        asked = subprocess.run([docker, "compose", "version"], capture_output=True, timeout=60, check=False)
        if asked.returncode == 0:
            return [docker, "compose"]
    pytest.skip("no compose: neither `docker-compose` nor `docker compose`")


def test_compose_accepts_the_file() -> None:
    """Compose itself reads the file, variables filled in."""
    arguments = [*_compose(), "--file", str(COMPOSE), "config"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    (config,) = parse(done.stdout)
    assert set(config["services"]) == set(SERVICES)
    assert "${" not in done.stdout
