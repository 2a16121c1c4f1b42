"""The commands that run something: the demo, a development server, a worker, and the check of its health file."""

from __future__ import annotations

import secrets
import signal
import time
from contextlib import ExitStack
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated, Any

import typer

from stepclaim.cli import demo as demonstration
from stepclaim.cli import demo_view, dev_server
from stepclaim.cli import worker as container_worker
from stepclaim.cli.flow import Flow
from stepclaim.cli.options import JSON, REACHING, WORKING, Given, fail, told, with_settings
from stepclaim.embedded import EmbeddedEtcd
from stepclaim.settings import Settings

DEMO_TTL = "3"

FlowArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="FLOW",
        envvar="STEPCLAIM_FLOW",
        help='A JSON file, such as {"steps": {"a": {"after": []}, "b": {"after": ["a"]}}}.',
        show_default="a, then b0 to b7 side by side, then join",
    ),
]
StepSeconds = Annotated[
    float, typer.Option(envvar="STEPCLAIM_STEP_SECONDS", help="Seconds that each step's body takes.")
]


def _flow(path: str | None) -> Flow:
    return Flow.default() if path is None else Flow.from_file(path)


@with_settings(
    *REACHING, "lease_ttl", endpoints="an embedded etcd", prefix="/stepclaim; a fresh one if --endpoints is given",
    lease_ttl=DEMO_TTL,
)  # fmt: skip
def demo(
    given: Given,
    flow: FlowArgument = None,
    *,
    workers: Annotated[int, typer.Option(envvar="STEPCLAIM_DEMO_WORKERS", help="Worker processes.")] = 8,
    runs: Annotated[int, typer.Option(envvar="STEPCLAIM_DEMO_RUNS", help="Runs of the flow.")] = 20,
    step_seconds: StepSeconds = 0.02,
    no_kill: Annotated[
        bool, typer.Option("--no-kill", envvar="STEPCLAIM_DEMO_NO_KILL", help="Leave all workers alone.")
    ] = False,
    keep: Annotated[
        bool,
        typer.Option("--keep", envvar="STEPCLAIM_DEMO_KEEP", help="Keep the embedded etcd at the end, until Ctrl-C."),
    ] = False,
    as_json: JSON = False,
) -> None:
    """Run a flow on many workers, each message delivered twice, and show that every step counts once.

    One worker is killed and one is stopped for a while, each while it holds a step.

    Ends with status 1 if a step was committed twice or is missing, or if a run did not succeed.
    """
    given.setdefault("lease_ttl", DEMO_TTL)
    chosen = _flow(flow)
    with ExitStack() as stack:
        server = None
        if "endpoints" in given:
            given.setdefault("prefix", f"/stepclaim-demo-{secrets.token_hex(4)}")
        settings = Settings(**given)
        plan = demonstration.Plan(chosen, settings, workers, runs, step_seconds, drills=not no_kill)
        view = stack.enter_context(demo_view.View(plan))
        if "endpoints" not in given:
            view.tell("starting an embedded etcd")
            server = stack.enter_context(EmbeddedEtcd())
            plan = plan.on(server.endpoint)
        report = demonstration.run(plan, view.tell, view.progress)
        view.end()
        line = demo_view.etcdctl_line(server, report)
        demo_view.print_report(report, line, as_json=as_json, gone=server is not None and not keep)
        if server is not None and keep:
            dev_server.stay(server, view.tell)
    if not report.ok:
        raise typer.Exit(1)


@told
def dev(
    *,
    port: Annotated[int, typer.Option(envvar="STEPCLAIM_DEV_PORT", help="Port for clients; 0: a free one.")] = 2379,
    data_dir: Annotated[
        Path | None,
        typer.Option(envvar="STEPCLAIM_DEV_DATA_DIR", help="Keep the data here.", show_default="a temporary directory"),
    ] = None,
) -> None:
    """Run an etcd for development on this machine until Ctrl-C, and tell how to reach it."""
    with EmbeddedEtcd(data_dir, port) as server:
        for line in dev_server.lines(server):
            typer.echo(line)
        dev_server.stay(server, lambda _: None)


@with_settings(*REACHING, *WORKING)
def worker(
    given: Given,
    flow: FlowArgument = None,
    *,
    runs: Annotated[
        int, typer.Option(min=0, envvar="STEPCLAIM_RUNS", help="Runs to start, unless another worker did.")
    ] = 20,
    step_seconds: StepSeconds = 0.2,
    until_done: Annotated[
        bool, typer.Option("--until-done", envvar="STEPCLAIM_UNTIL_DONE", help="End when those runs are over.")
    ] = False,
    health_file: Annotated[
        Path | None,
        typer.Option(envvar="STEPCLAIM_HEALTH_FILE", help="Renew this file's time while the session is ACTIVE."),
    ] = None,
) -> None:
    """Work on the demo's runs with every other such worker, until SIGTERM or Ctrl-C; what it does is logged to stdout.

    The first worker to come starts the runs.

    A worker that is told to end finishes its step, gives its claims back and ends with status 0.
    """
    stop = container_worker.StopSignal(signal.SIGTERM, signal.SIGINT)
    container_worker.work(
        Settings(**given),
        _flow(flow),
        runs,
        step_seconds,
        stop,
        until_done=until_done,
        health_file=health_file,
    )


@told
def healthy(
    *,
    file: Annotated[Path, typer.Option(envvar="STEPCLAIM_HEALTH_FILE", help="The worker's health file.")],
    max_age: Annotated[
        float,
        typer.Option(envvar="STEPCLAIM_HEALTH_MAX_AGE", help="Seconds since its renewal that are still healthy."),
    ] = 15.0,
) -> None:
    """Tell by a worker's health file whether its session is alive: status 0 if so, else 1. For containers' probes."""
    try:
        age = time.time() - file.stat().st_mtime
    except OSError as error:
        fail(f"not healthy: {file} can't be read: {error.strerror}")
        return
    if age > max_age:
        fail(f"not healthy: {file} was renewed {age:.0f} s ago, allowed are {max_age:g}")
    typer.echo(f"healthy: renewed {max(age, 0.0):.1f} s ago")


COMMANDS: tuple[Any, ...] = (demo, dev, worker, healthy)
