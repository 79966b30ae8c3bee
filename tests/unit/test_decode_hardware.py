"""The JPEG decoder of a GPU: detection of the JPEG engine, and the choice that is made once per run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nvidia.dali import fn

from launch import jpeg_decoder
from launch.config.command_line import parse
from launch.config.recipe import Recipe
from launch.feed import Feed
from launch.jpeg_decoder import choose_decoders, choose_load
from launch.machine.world import World
from pipeline.decode import hardware as decode_hardware
from pipeline.decode.dali_graph import default_hw_decoder_load
from pipeline.decode.hardware import (
    ARCH_MISMATCH,
    JpegEngine,
    find_jpeg_engine,
    mixed_decoders_note,
    query_nvjpeg,
    resolve_hw_decoder_load,
)
from pipeline.options import DaliOptions, LoaderOptions

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ENGINE = JpegEngine(usable=True, found="7 JPEG engines of 4 cores")
NONE = JpegEngine(usable=False, found="this GPU has no JPEG engine that nvJPEG can use")
DEFAULT = default_hw_decoder_load()


class NvJpeg:
    """The functions of nvJPEG that `query_nvjpeg` calls."""

    def __init__(self, *, create: int = 0, info: int = 0, engines: int = 7) -> None:
        self._create, self._info, self._engines = create, info, engines
        self.open = 0

    def nvjpegCreateEx(self, backend: int, *_: object) -> int:
        assert backend == 3  # NVJPEG_BACKEND_HARDWARE
        self.open += not self._create
        return self._create

    def nvjpegGetHardwareDecoderInfo(self, _: object, engines: Any, cores: Any) -> int:
        engines._obj.value, cores._obj.value = self._engines, 4
        return self._info

    def nvjpegDestroy(self, _: object) -> int:
        self.open -= 1
        return 0


@pytest.mark.parametrize(
    ("library", "video", "usable", "found"),
    [
        (NvJpeg(), True, True, "7 JPEG engines of 4 cores"),
        (NvJpeg(create=ARCH_MISMATCH), True, False, "no JPEG engine that nvJPEG can use"),
        (NvJpeg(create=6), True, False, "returned status 6"),
        (NvJpeg(engines=0), True, False, "no JPEG engine that nvJPEG can use"),
        (NvJpeg(info=9), True, False, "no JPEG engine that nvJPEG can use"),
        (NvJpeg(), False, False, "set NVIDIA_DRIVER_CAPABILITIES to `all` or include `video`"),
        (None, True, False, "nvJPEG cannot be loaded (libnvjpeg.so.12: no such file)"),
    ],
)
def test_the_result_follows_nvjpegs_answers(library: NvJpeg | None, video: bool, usable: bool, found: str) -> None:
    def load(name: str) -> object:
        if name == "libnvcuvid.so.1" and video:
            return object()
        if name == "second" and library is not None:
            return library
        raise OSError("libnvjpeg.so.12: no such file")

    engine = query_nvjpeg(load, ["first", "second"])
    assert engine.usable is usable
    assert found in engine.found
    assert library is None or library.open == 0


def test_the_real_nvjpeg_can_be_queried_without_a_gpu() -> None:
    assert find_jpeg_engine(CPU) == JpegEngine(usable=False, found="no GPU")
    assert "/nvjpeg/lib/libnvjpeg.so." in decode_hardware.nvjpeg_paths()[0]


@pytest.mark.parametrize(("engine", "load"), [(ENGINE, DEFAULT), (NONE, 0.0)])
def test_an_unset_load_is_dalis_default(monkeypatch: pytest.MonkeyPatch, engine: JpegEngine, load: float) -> None:
    monkeypatch.setattr(decode_hardware, "find_jpeg_engine", lambda _: engine)
    assert resolve_hw_decoder_load(LoaderOptions(), GPU).settings.hw_decoder_load == load
    assert resolve_hw_decoder_load(LoaderOptions(), CPU) == LoaderOptions()
    given = LoaderOptions(dali=DaliOptions(hw_decoder_load=1.0))
    assert resolve_hw_decoder_load(given, GPU) == given


def test_dalis_default_is_that_of_its_documentation() -> None:
    assert f"hw_decoder_load : float, optional, default = `{DEFAULT:g}`" in str(fn.decoders.image_slice.__doc__)
    assert 0 < DEFAULT < 1


def test_dividing_a_batch_is_noted() -> None:
    assert mixed_decoders_note(0.0) is mixed_decoders_note(1.0) is None
    assert "depend on a sample's position in its batch" in str(mixed_decoders_note(DEFAULT))


DIVIDED = "pixels depend on a sample's position in its batch"
CHOICES: list[tuple[list[JpegEngine], float | None, float | None, float, list[str]]] = [
    # engines of the ranks, load given, load at the start of the run, chosen load, messages
    ([ENGINE], None, None, DEFAULT, [DIVIDED]),
    ([ENGINE], 1.0, None, 1.0, []),
    ([NONE, NONE], None, None, 0.0, []),
    ([ENGINE, NONE], None, None, 0.0, ["rank 1 cannot use a JPEG engine (this GPU has no"]),
    ([ENGINE], 0.9, None, 0.9, [DIVIDED]),
    ([ENGINE, NONE], 1.0, None, 1.0, ["--hw-decoder-load 1: rank 1 cannot use"]),
    ([NONE], 0.0, None, 0.0, []),
    ([ENGINE], None, 1.0, 1.0, []),
    ([ENGINE], None, 0.0, 0.0, []),  # resumed on a better GPU: the pixels stay
    ([NONE], None, 1.0, 0.0, ["are now decoded by the CUDA decoder (rank 0 cannot"]),
    ([ENGINE], 0.0, 1.0, 0.0, ["now decoded by the CUDA decoder: pixels may differ in rounding"]),
    ([ENGINE], None, 0.9, 0.9, [DIVIDED]),
]


@pytest.mark.parametrize(("engines", "given", "began", "load", "said"), CHOICES)
def test_all_ranks_use_the_same_load_and_differences_are_reported_in_one_line(
    engines: list[JpegEngine], given: float | None, began: float | None, load: float, said: list[str]
) -> None:
    chosen, messages = choose_load(engines, requested=given, previous=began)
    assert chosen == load
    for note, expected in zip(messages, said, strict=True):
        assert expected in note
        assert "\n" not in note


def feed_of(data: Path, *options: str) -> tuple[Recipe, Feed]:
    small = ("--size", "32", "--global-batch", "16", "--epochs", "1", "--warmup-epochs", "0", "--augment", "light")
    recipe = parse(["--data", str(data), *small, *options])
    return recipe, Feed.of(recipe, World(0, 1, 0, 1, CPU, cores=2))


@pytest.mark.parametrize(
    ("given", "began", "chosen", "said"),
    [
        ({}, None, {"decode": "window", "cpu_decode": 0.0}, []),
        ({"gpu_cache": 1.0}, None, {"decode": "whole", "cpu_decode": 0.0}, []),
        ({}, {"decode": "whole", "cpu_decode": 0.25}, {"decode": "whole", "cpu_decode": 0.25}, []),
        (
            {"decode": "window", "cpu_decode": 0.5},
            {"decode": "whole", "cpu_decode": 0.25},
            {"decode": "window", "cpu_decode": 0.5},
            ["with --decode whole, and now with window: pixels", "with --cpu-decode 0.25, and now with 0.5: pixels"],
        ),
        ({"gpu_cache": 1.0}, {"decode": "window"}, {"decode": "whole"}, ["with --decode window, and now with whole"]),
    ],
)
def test_a_resumed_run_keeps_its_decode_path_and_the_rows_of_the_cpu(
    given: dict[str, Any], began: dict[str, Any] | None, chosen: dict[str, Any], said: list[str]
) -> None:
    previous = began and DaliOptions(hw_decoder_load=1.0, **began)
    found, messages = choose_decoders([ENGINE], requested=DaliOptions(**given, hw_decoder_load=1.0), previous=previous)
    assert {name: getattr(found, name) for name in chosen} == chosen
    for message, expected in zip(messages, said, strict=True):
        assert expected in message


@pytest.mark.parametrize("case", [(None, None, DEFAULT), (0.0, None, 0.0), (None, 0.9, 0.9), (0.0, 0.9, 0.9)])
def test_a_run_records_its_decoder_and_a_resumed_run_keeps_it(
    digits: Path, monkeypatch: pytest.MonkeyPatch, case: tuple[float | None, float | None, float]
) -> None:
    """On a simulated GPU. Case: load at the start of the run, load given, load used."""
    began, given, load = case
    monkeypatch.setattr(jpeg_decoder, "decodes_on_gpu", lambda _: True)
    monkeypatch.setattr(jpeg_decoder, "find_jpeg_engine", lambda _: ENGINE)
    options = [] if given is None else ["--hw-decoder-load", str(given)]
    _, feed = feed_of(digits, *options)
    previous = None if began is None else DaliOptions(hw_decoder_load=began)
    feed, _ = jpeg_decoder.choose_jpeg_decoder(feed, previous=previous)
    assert feed.recipe.data.loader.dali.hw_decoder_load == load
