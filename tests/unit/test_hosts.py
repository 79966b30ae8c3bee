"""Options of `pipeline train --hosts`. tests/slurm/test_several_hosts.py trains on hosts with SSH servers."""

from __future__ import annotations

import pytest

from launch.cli import main


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--hosts", "node1,node2"), "--hosts node1,node2: expected the name or address of a host"),
        (("--hosts", "a", "@b"), "--hosts @b: expected the name or address of a host"),
        (("--hosts", "a", "a"), "--hosts a a: a host occurs twice; use --processes for several ranks"),
        (("--hosts", "a", "--ssh", ""), "--ssh: expected a command"),
        (("--hosts", "a", "--ssh", "/no/such/ssh -v"), "--ssh /no/such/ssh -v: cannot be started (No such file"),
        (("--hosts", "a", "--port", "0"), "--port 0: expected a whole number from 1 to 65,535"),
        (("--hosts", "a", "--", "--epochs", "0"), "--epochs 0: expected a whole number from 1"),
    ],
)
def test_invalid_hosts_are_rejected_before_anything_is_started(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *options]) == 2
    assert message in capsys.readouterr().err
