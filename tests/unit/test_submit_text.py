"""Option values in the job's script: any text is either passed on unchanged or rejected."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launch.config.data import DataConfig
from launch.config.recipe import Recipe
from launch.config.run import RunConfig
from launch.slurm.job import Submit, SubmitError
from launch.slurm.script import SETTINGS, render
from launch.submit import main
from shards.redact import redact

# Characters with a special meaning for a shell, sbatch or a terminal; hypothesis adds arbitrary others.
SPECIAL = "ab /'\"\\$`!*?~#&|;<>(){}[]%=-\n\r\t\x1b\x7fü\udcff\u2028:,"
text = st.text(st.one_of(st.sampled_from(SPECIAL), st.characters(exclude_characters="\0", codec="utf-8")), max_size=12)
word = text.filter(lambda value: redact(value) == value)
named = word.filter(bool)

# Shell commands that print the values of the settings, each followed by a null byte.
SHOW = r"""
printf '%s\0' "$RUN" "$PYTHON" "$SETUP" "${#SRUN[@]}" "${SRUN[@]}" "${#EXEC[@]}" "${EXEC[@]}" "${ARGS[@]}"
"""


def shown_by_bash(script: str) -> list[str]:
    """Return the values of the settings in bash, which must accept the syntax of the whole script."""
    whole = os.fsencode(script)
    checked = subprocess.run(["bash", "-n"], input=whole, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, b"")
    settings_only = whole.partition(b'\ncd "$WORKDIR"')[0]
    program = settings_only + os.fsencode(SHOW)
    done = subprocess.run(["bash", "-c", program], capture_output=True, check=True)
    assert done.stderr == b""
    return [os.fsdecode(value) for value in done.stdout.split(b"\0")[:-1]]


def sbatch_options(script: str) -> list[str]:
    """Parse the #SBATCH lines like sbatch does (`_get_argument` in SLURM's src/sbatch/opt.c)."""
    options = []
    for line in script.split("\n"):
        if not line.startswith("#"):
            if line.strip():
                break  # sbatch stops at the first command
            continue
        if not line.startswith("#SBATCH "):
            continue
        found, quote, escaped = "", "", False
        for character in line.removeprefix("#SBATCH "):
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
                continue
            elif quote:
                if character == quote:
                    quote = ""
                    continue
            elif character in "'\"":
                quote = character
                continue
            elif character == "#" or character.isspace():
                break
            found += character
        assert not quote
        options.append(found)
    return options


@settings(deadline=None, max_examples=60)
@given(out=named, data=named, setup=word, name=word, account=word, python=named, more=st.lists(word, max_size=3))
@example(out="a\nb", data="d", setup="", name="", account="", python="p", more=[])
@example(
    out="$(touch x)",
    data="`touch x`",
    setup="touch x",
    name="n'; touch x",
    account="a b#c",
    python="-p",
    more=["--", "", "-x", "a'b"],
)
@example(out="a%jb", data="\udcff", setup="x\ny", name='a"b', account="'c", python="p\\", more=["#SBATCH --wrap=x"])
@example(out="a\\b", data="d", setup="", name="a\\b", account="c", python="p", more=[])
def test_any_text_is_passed_on_unchanged_or_rejected(
    *, out: str, data: str, setup: str, name: str, account: str, python: str, more: list[str]
) -> None:
    run = Path(out).absolute()
    recipe = Recipe(run=RunConfig(out=Path(out)), data=DataConfig(data=data))
    training = ["--data", data, "--out", out, *more]
    job = Submit(name=name, setup=setup, account=account, python=python, nodes="1-2", gpus_per_node=4)
    in_lines = (str(run), name or run.name, account)
    if "\\" in str(run) or any(ord(c) < 32 or c == "\x7f" for value in in_lines for c in value):
        with pytest.raises(SubmitError):
            render(job, recipe, training)
        return
    script = render(job, recipe, training)
    found_run, found_python, found_setup, *rest = shown_by_bash(script)
    assert (found_run, found_python, found_setup) == (str(run), python, setup)
    assert rest == ["0", "0", *training]
    options = sbatch_options(script)
    assert f"--job-name={name or run.name}" in options
    assert f"--output={str(run).replace('%', '%%')}/slurm/job-%j.out" in options
    assert (f"--account={account}" in options) is bool(account)
    assert len(options) == 9 + bool(account)


@settings(deadline=None, max_examples=40)
@given(image=named, mount=named, pyxis=st.booleans())
@example("a b.sif", "/x'y", False)
def test_container_options_are_passed_on_unchanged_or_rejected(image: str, mount: str, pyxis: bool) -> None:
    image = image.removesuffix(".sif") + ("" if pyxis else ".sif")
    recipe = Recipe(run=RunConfig(out=Path("/runs/x")), data=DataConfig(data="/sets/imagenet"))
    try:
        script = render(Submit(container=image, mount=(mount,)), recipe, [])
    except SubmitError:
        assert "," in mount
        return
    rest = shown_by_bash(script)[3:]
    mounted = mount if ":" in mount else f"{mount}:{mount}"
    if pyxis:
        assert rest[0] == "3"
        assert rest[1] == f"--container-image={image}"
        assert rest[2].startswith("--container-mounts=")
        assert rest[2].endswith(f",{mounted}")
    else:
        assert rest[:2] == ["0", "8"]
        assert rest[2:5] == ["apptainer", "exec", "--nv"]
        assert rest[-2].endswith(f",{mounted}")
        assert rest[-1] == image


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["--", "--out", "runs/a\nb"], "an #SBATCH line cannot contain control characters"),
        (["--", "--out", "runs/a\\b"], "the path of SLURM's log cannot contain a backslash"),
        (["--account", "me\nyou"], "control characters"),
        (["--sbatch=--qos=a\n#SBATCH --uid=root"], "control characters"),
        (["--container", "x.sif", "--mount", "/a,b", "--", "--data", "/s"], "/a,b: a container mount cannot contain"),
        (["--container", "x.sif", "--", "--data", "/s", "--out", "/r:w"], "/r:w: a container mount cannot contain"),
        (["--", "--data", "https://me:canary@host/set"], "credentials in a URL would be saved"),
        (["--", "--data", "https://host/set?sig=canary"], "credentials in a URL"),
        (["--setup", "curl https://me:canary@host/x"], "credentials in a URL"),
        (["--container", "docker://me:canary@host/x"], "credentials in a URL"),
    ],
)
def test_values_that_a_script_cannot_represent_are_rejected_in_one_line(
    arguments: list[str],
    fact: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert fact in shown.err
    assert "canary" not in shown.err
    assert list(tmp_path.iterdir()) == []


def test_the_script_contains_no_secrets_of_the_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "canary")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--", "--out", str(tmp_path / "run")]) == 2  # no sbatch on this PATH
    script = (tmp_path / "run" / "slurm" / "train.sbatch").read_text()
    assert SETTINGS in script
    assert "canary" not in script + "".join(capsys.readouterr())


def test_a_folder_name_outside_utf_8_is_passed_on_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    out = os.fsencode(tmp_path) + b"/r\xff n"
    assert main(["--", "--out", os.fsdecode(out)]) == 2
    with open(out + b"/slurm/train.sbatch", "rb") as file:
        script = file.read()
    assert b"RUN='" + out + b"'\n" in script
    assert b'#SBATCH "--output=' + out + b'/slurm/job-%j.out"\n' in script
