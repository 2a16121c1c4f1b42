"""What README.md says is so: its Python runs, its keys are etcd's, its links lead somewhere, its commands are ours."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from stepclaim import EtcdRunStore, RunStatus, StepStatus

if TYPE_CHECKING:
    from servers import EtcdServer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ENDPOINT = '"127.0.0.1:2379"'
PAGES = sorted(
    path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/**/*.md"))
)


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def _promised_keys() -> list[str]:
    """Give the keys that the table names, with the prefix and with their placeholders."""
    section = README.partition("## What stands in etcd")[2].partition("\n## ")[0]
    keys = []
    for cell in re.findall(r"^\| (`/.*?) \|", section, flags=re.MULTILINE):
        first, *others = re.findall(r"`([^`]+)`", cell)
        # `/stepclaim/runs/{run}/run`, `control`: the others stand beside the first one
        keys += [first, *(first.rpartition("/")[0] + "/" + other for other in others)]
    return keys


def test_there_is_something_to_check() -> None:
    assert len(_blocks("python")) >= 2
    assert len(_blocks("sh")) >= 2
    assert len(_promised_keys()) >= 8


@pytest.mark.parametrize("number", range(len(_blocks("python"))))
def test_python_blocks_run(etcd: EtcdServer, prefix: str, number: int) -> None:
    """As a program of its own, with nothing but the endpoint changed; each begins one step and finishes it."""
    block = _blocks("python")[number]
    assert ENDPOINT in block
    clean = {name: value for name, value in os.environ.items() if not name.startswith("STEPCLAIM_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block.replace(ENDPOINT, f'"{etcd.endpoint}"')],
        env=clean | {"STEPCLAIM_PREFIX": prefix},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    runs = set(re.findall(r"order-\d+", block))
    assert runs
    with EtcdRunStore.connect(etcd.endpoint, prefix=prefix, session=False) as store:
        for run_id in runs:
            assert dict(store.get_step_statuses(run_id)) == {"send-mail": StepStatus.SUCCEEDED}


def test_keys_stand_as_the_table_names_them(etcd: EtcdServer, prefix: str) -> None:
    """After a small run with a retry every key of etcd is in the table, and every key of the table is in etcd."""
    with EtcdRunStore.connect(etcd.endpoint, prefix=prefix) as store:
        store.start_run("flow", "Flow", "run 1", "manual", idempotency_key="request-1")
        store.configure_run("run 1", "flow", "manual", "request-1")
        assert store.try_record_dispatch("run 1", "loop.0/a")
        for status in ("Failed", "Succeeded"):
            claim = store.claim_step("run 1", "loop.0/a", input_json="1")
            assert claim is not None
            store.complete_step(claim, status, output_json="2")
            if status == "Failed":
                store.retry_step("run 1", "loop.0/a")
                assert store.try_record_dispatch("run 1", "loop.0/a")
        stand = etcd.etcdctl("get", "--prefix", "--keys-only", f"{prefix}/").split()
        store.complete_run("run 1", RunStatus.SUCCEEDED)
    placeholders = {"{session}", "{run}", "{step}", "{n}", "{flow}", "{trigger}", "{key}"}
    patterns = []
    for key in _promised_keys():
        assert set(re.findall(r"\{.*?\}", key)) <= placeholders
        pattern = re.sub(r"\\\{.*?\\\}", "[^/]+", re.escape(key))
        patterns.append(re.compile(pattern.replace(re.escape("/stepclaim"), re.escape(prefix), 1)))
    missing = [each.pattern for each in patterns if not any(each.fullmatch(key) for key in stand)]
    assert not missing, stand
    untold = [key for key in stand if not any(each.fullmatch(key) for each in patterns)]
    # what belongs to control and idempotency keys may be left to the design's own table
    assert not [key for key in untold if not re.search(r"/control$|/idempotency/", key)]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))
    relative = [target for target in targets if not urlsplit(target).scheme]
    broken = [each for each in relative if not (ROOT / page.parent / each.partition("#")[0]).exists()]
    assert not broken


def test_files_that_the_readme_names_exist() -> None:
    for name in re.findall(r"`([\w./-]+\.(?:ya?ml|md|py|toml))`", README):
        assert (ROOT / name).exists(), name


def test_the_two_commands_are_those_that_ci_runs() -> None:
    commands = [block.rstrip("\n") for block in _blocks("sh")]
    demo, test = commands[:2]
    assert demo.endswith("/stepclaim demo")
    assert test.endswith(" -m pytest")
    script = ROOT / ".ci" / "run"
    if not script.exists():
        pytest.skip("there is no .ci/run here")
    assigned = dict(re.findall(r'^(demo|test)_command="(.*)"$', script.read_text(encoding="utf-8"), re.MULTILINE))
    assert assigned == {"demo": demo, "test": test}


def test_contributing_sets_up_and_tests_as_the_readme_does() -> None:
    """One in one line, the other step by step: the same environment, extras and test command."""
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    test = _blocks("sh")[1].rstrip("\n")
    set_up, _, run = test.rpartition(" && ")
    assert set_up.replace(" -q ", " ") in contributing.splitlines()
    assert re.search(rf"^{re.escape(run)}( |$)", contributing, re.MULTILINE)
