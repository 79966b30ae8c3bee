"""Options and connections of `pipeline train --hosts`. A script that runs the command here takes the place of ssh.

tests/slurm/test_several_hosts.py trains on hosts with SSH servers.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.cli import main
from launch.start import hosts as hosts_module
from launch.start.hosts import STOPPING, _processes, _stop_on_signals
from launch.start.ssh import Hosts
from shards.errors import UserError

LOCAL = """\
#!/bin/sh
for command; do :; done
{first}
exec sh -c "$command"
"""


def local(folder: Path, *names: str, first: str = "") -> Hosts:
    """Return hosts whose commands are run on this machine, after the shell command `first`."""
    script = folder / "ssh"
    script.write_text(LOCAL.format(first=first))
    script.chmod(0o755)
    return Hosts(names, (str(script),))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--hosts", "node1,node2"), "--hosts node1,node2: expected the name or address of a host"),
        (("--hosts", "a", "@b"), "--hosts @b: expected the name or address of a host"),
        (("--hosts", "a", "a"), "--hosts a a: a host occurs twice; use --processes for several ranks"),
        (("--hosts", "a", "--ssh", ""), "--ssh: expected a command"),
        (("--hosts", "a", "--ssh", "/no/such/ssh -v"), "--ssh /no/such/ssh -v: cannot be started (No such file"),
        (
            ("--hosts", "localhost", "b"),
            "--hosts localhost b: the other hosts cannot connect to the first one at localhos",
        ),
        (("--hosts", "me@127.0.0.1", "b"), "cannot connect to the first one at 127.0.0.1; use its name or address"),
        (("--hosts", "a", "--port", "0"), "--port 0: expected a whole number from 1 to 65,535"),
        (("--hosts", "a", "--", "--epochs", "0"), "--epochs 0: expected a whole number from 1"),
    ],
)
def test_invalid_hosts_are_rejected_before_anything_is_started(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *options]) == 2
    assert message in capsys.readouterr().err


def test_arguments_and_variables_reach_the_host_as_they_are(tmp_path: Path) -> None:
    values = ["two words", "it's", 'a "quote"', "a\nline", "$HOME `id` \\", "*", "", "-n", "ü"]
    variables = {"FAT_TEST": "a b\n'c' $d"}
    command = ["python3", "-c", "import os, sys; print([*sys.argv[1:], os.environ['FAT_TEST'], os.getcwd()])", *values]
    output, _ = local(tmp_path, "a").start_query(0, command, variables).communicate()
    assert output.decode().strip() == str([*values, variables["FAT_TEST"], str(Path.cwd())])


@pytest.mark.parametrize(("given", "expected"), [(3, 3), (None, 1)])
def test_output_of_a_shell_s_start_files_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: int | None, expected: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert _processes(local(tmp_path, "a", "b", first="echo Welcome"), {}, given) == expected


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ("exec sleep 100", "--hosts a: no answer within 1 seconds"),
        ("echo Welcome; exit", "--hosts a: unexpected output 'Welcome'; each host must"),
        ("echo refused >&2; exit 255", "--hosts a: refused; each host must"),
    ],
)
def test_a_host_that_does_not_answer_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, message: str
) -> None:
    monkeypatch.setattr(hosts_module, "ANSWER_SECONDS", 1.0 if "sleep" in first else 60.0)
    with pytest.raises(UserError, match=message):
        _processes(local(tmp_path, "a", "b", first=first), {}, 1)


@pytest.fixture
def connection() -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends when its standard input does."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("number", STOPPING)
@pytest.mark.parametrize("ignored", [False, True])
def test_a_signal_stops_the_hosts_unless_it_is_ignored(
    connection: subprocess.Popen[bytes], number: signal.Signals, ignored: bool
) -> None:
    """SIGHUP is ignored under nohup, and SIGINT in the background of a script."""
    assert connection.stdin is not None
    before = signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with _stop_on_signals([connection]):
            os.kill(os.getpid(), number)
            assert connection.stdin.closed == (not ignored)
        assert connection.wait(60) == 0
    finally:
        signal.signal(number, before)
