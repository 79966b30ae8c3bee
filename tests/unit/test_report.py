"""`pipeline report`: what the page says about a run and about several runs, and that it refers to no other file."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import fat
from launch.cli import main as pipeline
from launch.config.optim import OptimConfig
from launch.config.recipe import Recipe
from launch.report.loaded_run import load_runs
from launch.report.mistakes import THUMBNAIL_BYTES, mistakes
from launch.report.options import differences
from launch.report.slow_ranks import slow_periods
from launch.report.summary import paper_accuracy, summarize
from launch.run.evaluation_record import RECORD_NAME
from launch.run.metrics_file import MAX_BYTES as MAX_METRICS
from launch.run.metrics_file import METRICS_NAME
from launch.run.saved_recipe import CLASSES_NAME, RECIPE_NAME
from launch.run.status import write_status
from shards.files.lock import STALE_SECONDS
from tests.support.run_folders import record, write_run

MAX_BYTES = 5_000_000
MAX_ELEMENTS = 20_000  # Chromium opens a page of so many within a second


class Page(HTMLParser):
    """The text of a page, its elements and everything that it refers to."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.elements = 0
        self.scripts = 0
        self.references = re.findall(r"url\(\s*['\"]?([^)'\"]+)", content)
        self.feed(content)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements += 1
        self.scripts += tag == "script" or any(name.startswith("on") for name, _ in attributes)
        self.references += [
            str(value)
            for name, value in attributes
            if name in ("src", "href", "xlink:href", "srcset", "data", "action")
        ]

    handle_startendtag = handle_starttag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def report(*runs: Path, out: Path) -> Page:
    assert pipeline(["report", *map(str, runs), "--out", str(out)]) == 0
    return Page(out.read_text())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The reports of one run and of two runs."""
    folder = tmp_path_factory.mktemp("reports")
    recipe = Recipe(optim=OptimConfig(lr=1e-3))
    first = write_run(folder / "my-run", ema=True, crash=(60, 40), evaluated=360, recipe=recipe)
    second = write_run(folder / "second", evaluated=360, recipe=Recipe(optim=OptimConfig(lr=2e-3)))
    for name, runs in (("one", [first]), ("two", [first, second])):
        report(*runs, out=folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in ("one", "two")}


def test_page_has_the_figures_of_a_run(files: dict[str, Path]) -> None:
    page = Page(files["one"].read_text())
    for text in (
        "my-run finished",
        "Best top-1 accuracy 95.00% epoch 4, step 100 (moving average)",
        "Last top-1 accuracy 90.00% weights; moving average 95.00%; epoch 4, 360 images",
        "Step 100 of 100 epoch 4 of 4",
        "2 starts",
        "Top-1 accuracy, best 95.00% (moving average)",
        "lost steps",
        "1 2023-11-14 22:13:20 UTC 1 node1 0 to 60 20 killed",
        "Confusion matrix",
        "Hardest images",
        "0123456789ab",
    ):
        assert text in page.text, text


def test_options_are_shown_with_their_defaults(files: dict[str, Path]) -> None:
    text = Page(files["one"].read_text()).text
    changed, rest = text.split("Options that differ from their defaults")[1].split("Options with their default values")
    assert "lr optim 0.001 not set" in changed
    assert "epochs" not in changed
    assert "epochs optim 300" in rest


def test_several_runs_are_compared(files: dict[str, Path]) -> None:
    page = Page(files["two"].read_text())
    for text in ("2 runs compared", "Option my-run second lr 0.001 0.002", "95.00%", "90.00%"):
        assert text in page.text, text
    assert "0123456789ab" not in page.text  # the git state is the same


@pytest.mark.parametrize("name", ["one", "two"])
def test_page_refers_to_nothing_outside_itself(files: dict[str, Path], name: str) -> None:
    content = files[name].read_text()
    page = Page(content)
    outside = {target for target in page.references if not target.startswith(("#", "data:image/jpeg;base64,"))}
    assert not outside
    assert [target for target in page.references if target.startswith("#p")]  # clip paths of the charts
    assert page.scripts == 0
    assert "default-src 'none'" in content


def test_names_in_the_page_are_unique(files: dict[str, Path]) -> None:
    """A reference to the clip path or marker of a chart that is hidden would show nothing."""
    names = re.findall(r'\bid="([^"]+)"', files["one"].read_text())
    assert len(names) > 20
    assert len(set(names)) == len(names)


def test_texts_of_a_run_are_not_interpreted(tmp_path: Path) -> None:
    markup = "<script>alert(1)</script>\x1b[31m$\\frac$ {{ 7 * 7 }}"
    run = write_run(tmp_path / markup.replace("/", "_").replace("\x1b", ""), evaluated=360)
    write_status(run, "failed", reason=markup)
    (run / CLASSES_NAME).write_text(fat.ClassList.of([f"{markup}{i}" for i in range(10)]).dumps())
    saved = json.loads((run / RECIPE_NAME).read_text())
    saved["versions"][markup] = markup
    saved["recipe"]["data"]["data"] = "s3://user:secret@host/set"
    (run / RECIPE_NAME).write_text(json.dumps(saved))
    lines = (run / METRICS_NAME).read_text().replace("some CPU", json.dumps(markup)[1:-1])
    (run / METRICS_NAME).write_text(lines)
    other = write_run(tmp_path / "other")
    for runs in ([run], [run, other]):
        page = report(*runs, out=tmp_path / "report.html")
        assert page.scripts == 0
        content = (tmp_path / "report.html").read_text()
        assert "\x1b" not in content
        assert "secret" not in content
        assert "{{ 7 * 7 }}" in page.text


def test_slow_ranks_are_shown_with_their_host_and_cause(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = [json.loads(line) for line in (run / METRICS_NAME).read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert len(train) > 8
    for number, line in enumerate(train):
        line |= {"slowest_rank": 3, "slowest_host": "<b>node-7</b>", "behind": 0.1}
        line |= {"compute": 0.6, "communication": 0.3}
        if number in (2, 3, 4):
            line |= {"behind": 0.2 + number / 10, "cause": "data" if number < 4 else "stopped"}
        if number == 6:
            line |= {"slowest_rank": 5, "behind": 0.25, "cause": "CPU quota"}
    (run / METRICS_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = slow_periods(load_runs([run])[0].timeline.final)
    begin = train[2]["step"] - train[2]["steps"]
    assert (first.rank, first.steps, first.behind) == ("3", f"{begin:,} to {train[4]['step']:,}", "60%")
    assert first.cause == "data, then stopped"
    assert (second.rank, second.cause) == ("5", "CPU quota")
    assert pipeline(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    page = Page((tmp_path / "page.html").read_text())
    assert f"Slow ranks Rank Host Steps Time Longer than the median Cause 3 <b>node-7</b> {first.steps}" in page.text
    assert "Delay of the slowest rank" in page.text
    assert "Computation and communication of rank 0" in page.text
    assert "computation communication" in page.text


def test_a_run_of_one_rank_has_only_the_curve_of_its_data_wait(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run"), out=tmp_path / "report.html")
    assert "Waiting for data" in page.text
    assert "Computation and communication" not in page.text


def test_run_without_validation_split_says_so(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", evaluations=False), out=tmp_path / "report.html")
    assert "no validation split" in page.text
    assert "accuracy (%)" not in page.text
    assert "Mistakes" not in page.text


def test_report_of_1000_classes_and_10000_lines_is_small(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=10_000, log_every=1, epochs=100, ema=True, classes=1000, evaluated=50_000)
    page = report(run, out=tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < MAX_BYTES
    assert page.elements < MAX_ELEMENTS
    assert "All 1,000 classes" in page.text
    assert "Confusion matrix" not in page.text
    assert "Top-1 in the paper 77.6 %" in page.text


def test_differences_are_those_of_options_and_versions(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("a", "b", "c")]
    (runs[2] / RECIPE_NAME).unlink()
    saved = json.loads((runs[1] / RECIPE_NAME).read_text())
    saved["recipe"]["run"]["out"] = "somewhere else"
    saved["recipe"]["data"]["loader"]["dali"]["hw_decoder_load"] = 0.5
    saved["versions"]["torch"] = "2.12"
    (runs[1] / RECIPE_NAME).write_text(json.dumps(saved))
    found = differences(load_runs(runs[:2]))
    assert [(row.name, row.values) for row in found] == [
        ("hw_decoder_load", ["not set", "0.5"]),
        ("torch", ["2.11", "2.12"]),
    ]
    assert {row.values[2] for row in differences(load_runs(runs))} == {"-"}


def test_runs_in_folders_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name / "run") for name in ("a", "b")]
    assert [run.name for run in load_runs(runs)] == [str(run) for run in runs]
    assert load_runs(runs[:1])[0].name == "run"


def test_run_that_gives_no_sign_of_life_has_died(tmp_path: Path) -> None:
    (run,) = load_runs([write_run(tmp_path / "run", status="running")])
    assert run.status is not None
    renewed = run.status.time
    assert run.state(now=renewed + 1) == "running"
    assert run.state(now=renewed + STALE_SECONDS + 1) == "died"
    (finished,) = load_runs([write_run(tmp_path / "finished")])
    assert finished.state(now=1e12) == "finished"


@pytest.mark.parametrize("name", ["status", RECIPE_NAME, CLASSES_NAME, RECORD_NAME])
@pytest.mark.parametrize("content", [None, b"", b"\xff{"])
def test_other_files_of_the_run_may_be_missing_or_damaged(tmp_path: Path, name: str, content: bytes | None) -> None:
    run = write_run(tmp_path / "run", evaluated=360)
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    (loaded,) = load_runs([run])
    assert summarize(loaded).best == "90.00%"
    expected = {RECIPE_NAME, CLASSES_NAME} if content is None else {RECIPE_NAME, CLASSES_NAME, RECORD_NAME}
    assert (name in expected) == any(name in note for note in loaded.notes)


def test_fields_of_unknown_lines_are_not_used(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    unknown = {"kind": "later-version", "time": 1.7e9, "epoch": "x", "skipped": [], "world": None, "top1": "y"}
    with (run / METRICS_NAME).open("a") as file:
        file.write(json.dumps(unknown) + "\n")
    (loaded,) = load_runs([run])
    assert summarize(loaded).best == "90.00%"


def test_metrics_above_the_size_limit_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    os.truncate(run / METRICS_NAME, MAX_METRICS + 1)
    for command in (["report", str(run), "--out", str(tmp_path / "x.html")], ["goodput", str(run)]):
        assert pipeline(command) == 2
        assert "metrics.jsonl: 1,073,741,825 bytes, more than the 1,073,741,824 bytes" in capsys.readouterr().err


def test_what_is_no_run_folder_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    out = tmp_path / "report.html"
    (tmp_path / "empty").mkdir()
    (tmp_path / "started").mkdir()
    (tmp_path / "started" / METRICS_NAME).touch()
    for wrong, fact in (
        ("empty", "contains no metrics.jsonl, so it is not a run folder; use"),
        ("missing", "contains no metrics.jsonl, so it is not a run folder; use"),
        (f"run/{METRICS_NAME}", "not a run folder; use"),
        ("started", "its metrics are empty; wait until"),
    ):
        assert pipeline(["report", str(run), str(tmp_path / wrong), "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert fact in error
        assert error.count("\n") == 1
    assert not out.exists()
    assert pipeline(["report", "--out", str(out)]) == 2
    assert "no run folder is given" in capsys.readouterr().err


def test_curves_are_written_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    out, figure = tmp_path / "report.html", tmp_path / "curves.svg"
    assert pipeline(["report", str(run), str(run), "--out", str(out), "--png", str(figure)]) == 0
    assert capsys.readouterr().out == f"wrote {out}\nwrote {figure}\n"
    assert "Top-1 accuracy" in figure.read_text()


def test_paper_is_compared_with_runs_on_1000_classes_only(tmp_path: Path) -> None:
    found = [load_runs([write_run(tmp_path / str(n), classes=n)])[0] for n in (1000, 100)]
    assert [paper_accuracy(run) for run in found] == [(77.6, "paper, FAT-B0: 77.6 %"), None]


def test_mistakes_are_counted() -> None:
    found = mistakes(record(1000, 10), [f"name{i}" for i in range(8)])
    assert sum(map(sum, found.matrix)) == found.samples == 1000
    assert sum(row[i] for i, row in enumerate(found.matrix)) == 1000 - found.wrong
    assert found.names[7:] == ["name7", "class 8", "class 9"]
    assert [row.top1 for row in found.classes] == sorted(row.top1 for row in found.classes)
    worst = found.confusions[0]
    assert worst.count == max(n for i, row in enumerate(found.matrix) for j, n in enumerate(row) if i != j)
    assert worst.fraction == worst.count / 100
    assert len(found.images) == 24


def test_thumbnails_have_a_limit_of_size() -> None:
    images = mistakes(record(1000, 10, thumbnail_side=256), None).images
    assert 0 < sum(len(image.source) for image in images) <= THUMBNAIL_BYTES
    assert any(not image.source for image in images)


def test_summary_of_a_run_before_its_first_step(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", status="running")
    lines = (run / METRICS_NAME).read_text().splitlines()
    (run / METRICS_NAME).write_text(lines[0] + "\n")
    found = summarize(load_runs([run])[0])
    assert (found.step, found.rate_note, found.best) == ("0 of 100", "no step has been logged", "-")
    assert "No step has been logged" in report(run, out=tmp_path / "report.html").text
