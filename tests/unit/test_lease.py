"""The lease clock, without a clock."""

from stepclaim._core.lease import LeaseClock
from stepclaim.models import SessionState


def test_the_deadline_counts_from_before_the_request() -> None:
    clock = LeaseClock(sent_at=100.0, granted=10)
    assert clock.expires_in(100.0) == 9.0
    assert clock.state(108.9) is SessionState.ACTIVE
    assert clock.state(109.0) is SessionState.LOST


def test_the_granted_time_counts_not_the_one_asked_for() -> None:
    clock = LeaseClock(sent_at=0.0, granted=2)
    clock.renewed(sent_at=1.0, granted=60)
    assert clock.expires_in(1.0) == 59.0


def test_a_failed_renewal_makes_it_uncertain_and_a_good_one_active_again() -> None:
    clock = LeaseClock(sent_at=0.0, granted=10)
    clock.failed(now=3.5)
    assert clock.state(3.5) is SessionState.UNCERTAIN
    assert 0 < clock.wait(3.5) <= 0.5
    assert clock.expires_in(3.5) == 5.5
    clock.renewed(sent_at=4.0, granted=10)
    assert clock.state(4.1) is SessionState.ACTIVE
    assert clock.expires_in(4.0) == 9.0


def test_uncertain_ends_at_the_deadline() -> None:
    clock = LeaseClock(sent_at=0.0, granted=10)
    clock.failed(now=8.9)
    assert clock.wait(8.9) <= 0.1 + 1e-9
    assert clock.state(9.0) is SessionState.LOST


def test_the_servers_word_ends_it_at_once() -> None:
    clock = LeaseClock(sent_at=0.0, granted=10)
    clock.renewed(sent_at=1.0, granted=0)
    assert clock.state(1.0) is SessionState.LOST
    assert (clock.expires_in(1.0), clock.wait(1.0)) == (0.0, 0.0)


def test_renewals_are_due_each_third() -> None:
    clock = LeaseClock(sent_at=0.0, granted=30)
    assert clock.wait(0.0) == 10.0
    assert clock.wait(12.0) == 0.0
