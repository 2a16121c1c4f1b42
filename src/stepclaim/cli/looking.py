"""The commands for operators: what runs there are, how one stands, who holds what, and to release a claim."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepclaim.cli import shapes
from stepclaim.cli.options import JSON, REACHING, Given, fail, with_settings
from stepclaim.models import ClaimState
from stepclaim.settings import Settings
from stepclaim.sync_store import EtcdRunStore

if TYPE_CHECKING:
    from stepclaim.models import ClaimInfo

RunArgument = Annotated[str, typer.Argument(metavar="RUN", envvar="STEPCLAIM_RUN", help="The run's id.")]


def _open(given: Given) -> EtcdRunStore:
    """Open a store that looks, and writes nothing for itself."""
    return EtcdRunStore.connect(Settings(**given), session=False)


def _unknown(given: Given, run_id: str) -> None:
    fail(f"there is no run {run_id!r} under {Settings(**given).prefix}")


@with_settings(*REACHING)
def runs(
    given: Given,
    *,
    active: Annotated[
        bool, typer.Option("--active", envvar="STEPCLAIM_ACTIVE", help="Only runs that are Running: cheap.")
    ] = False,
    limit: Annotated[
        int, typer.Option(min=1, envvar="STEPCLAIM_LIMIT", help="At most so many, the newest first.")
    ] = 50,
    as_json: JSON = False,
) -> None:
    """List the runs, newest first. Without --active this looks at every key."""
    with _open(given) as store:
        found = store.get_active_runs() if active else store.get_runs()
    chosen = found[:limit]
    if as_json:
        shapes.print_json({"total": len(found), "runs": [shapes.run_shape(run, steps=False) for run in chosen]})
        return
    shapes.print_runs(chosen)
    if len(found) > len(chosen):
        shapes.console(stderr=True).print(f"{len(found) - len(chosen)} more; --limit shows them")


@with_settings(*REACHING)
def show(given: Given, run: RunArgument, *, as_json: JSON = False) -> None:
    """Show a run with its steps, their attempts and claims."""
    with _open(given) as store:
        record = store.get_run(run)
        if record is None:
            return _unknown(given, run)
        claims = store.get_claims(run)
    if as_json:
        shapes.print_json({"run": shapes.run_shape(record, steps=True), "claims": list(claims)})
    else:
        shapes.print_run(record, claims)
    return None


@with_settings(*REACHING)
def claims(
    given: Given,
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", envvar="STEPCLAIM_RUN", help="Only this run's claims.")
    ] = None,
    *,
    held: Annotated[
        bool, typer.Option("--held", envvar="STEPCLAIM_HELD", help="Only those that somebody holds now.")
    ] = False,
    as_json: JSON = False,
) -> None:
    """List the claims: who holds which step, and what the sealed ones were sealed with."""
    with _open(given) as store:
        found = list(store.get_claims(run))
        if run is not None and not found and store.get_run_status(run) is None:
            return _unknown(given, run)
    if held:
        found = [claim for claim in found if claim.state is ClaimState.HELD]
    if as_json:
        shapes.print_json({"claims": found})
    else:
        shapes.print_claims(found, of_one_run=run is not None)
    return None


@with_settings(*REACHING)
def release(
    given: Given,
    run: RunArgument,
    step: Annotated[str, typer.Argument(metavar="STEP", envvar="STEPCLAIM_STEP", help="The step's key.")],
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", envvar="STEPCLAIM_YES", help="Don't ask.")] = False,
    as_json: JSON = False,
) -> None:
    """Remove a step's claim, held or sealed: whoever holds it loses it, and the step can be claimed again.

    On a terminal it asks first.
    """
    with _open(given) as store:
        claim = store.get_claim(run, step)
        if claim is None and store.get_run_status(run) is None:
            return _unknown(given, run)
        if claim is not None:
            if not yes and _is_terminal():
                typer.confirm(f"Release {_described(claim)}?", abort=True, err=True)
            store.release_step_claim(run, step)
    if as_json:
        shapes.print_json({"run_id": run, "step_key": step, "released": claim is not None, "claim": claim})
    elif claim is None:
        typer.echo(f"step {step!r} of run {run!r} has no claim: nothing to release")
    else:
        typer.echo(f"released {_described(claim)}")
    return None


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _described(claim: ClaimInfo) -> str:
    token = f"token {claim.fencing_token}, attempt {claim.attempt}"
    if claim.state is ClaimState.HELD:
        return f"step {claim.step_key!r}, held by {claim.owner} since {shapes.when(claim.claimed_at)} UTC ({token})"
    return f"step {claim.step_key!r}, sealed as {claim.status} for {claim.owner} ({token})"


COMMANDS: tuple[Any, ...] = (runs, show, claims, release)
