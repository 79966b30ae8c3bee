"""Golden values of all parameters of many samples, for recipes that reach every branch (pipeline/augment/params.py).

Different values would change the data of every run. Digests are xxh3-64 of the arrays' bytes, dtypes and shapes.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import xxhash

from pipeline.augment.params import MixParams, SampleParams, cutmix_box, draw, mix_params
from pipeline.augment.recipe import augment_recipe


def sample_params(**options: Any) -> SampleParams:
    """Draw parameters of 2000 samples, from a few pixels wide to panoramas, with the size dtype of the index."""
    ids = np.arange(2000)
    heights = (1 + ids % 7 * 83).astype(np.uint16)
    widths = (1 + ids // 7 % 11 * 97).astype(np.uint16)
    return draw(augment_recipe("fat", **options), seed=7, epoch=3, ids=ids, heights=heights, widths=widths)


def mixes(**options: Any) -> MixParams:
    return mix_params(augment_recipe("fat", **options), seed=7, step=11, lanes=np.repeat(np.arange(1000), 2))


def digests(params: SampleParams | MixParams) -> dict[str, str]:
    arrays = {field.name: getattr(params, field.name) for field in fields(params) if field.name != "ids"}
    return {
        name: f"{array.dtype}{list(array.shape)} {xxhash.xxh3_64_hexdigest(np.ascontiguousarray(array).tobytes())}"
        for name, array in arrays.items()
    }


SAMPLES: list[tuple[dict[str, Any], dict[str, str]]] = [
    (
        {},
        {
            "windows": "int32[2000, 4] 3a730b59555e9089",
            "flips": "bool[2000] d312e05f4c54724e",
            "ops": "int64[2000, 2] b10180d2a81024cb",
            "applied": "bool[2000, 2] 5025586a7d8b515b",
            "magnitudes": "float64[2000, 2] 50918a0a6d5107a7",
            "arguments": "float64[2000, 2] 92f59f6d7b938c59",
            "erase_boxes": "int32[2000, 4] 07c338e725cbe61a",
            "erase_keys": "uint64[2000] 773109a6002c9a33",
        },
    ),
    ({"erase": 1.0}, {"erase_boxes": "int32[2000, 4] 7a84bc51c9995db7"}),
    ({"erase": 1.0, "size": 2}, {"erase_boxes": "int32[2000, 4] fabb9f7e6f87256f"}),
    ({"erase": 1.0, "size": 5}, {"erase_boxes": "int32[2000, 4] f5503d85a2ffd5e7"}),
    ({"scale": (0.0001, 0.001)}, {"windows": "int32[2000, 4] ed7a77badd0e5ea5"}),
    ({"scale": (0.5, 0.5), "ratio": (1.0, 1.0)}, {"windows": "int32[2000, 4] 6c770cb1d051aa02"}),
    ({"scale": (1.0, 1.0)}, {"windows": "int32[2000, 4] 1fbe667b0888ce72"}),
    ({"crop": "center"}, {"windows": "int32[2000, 4] 7f14a1843e6c4628"}),
    ({"flip": 0.25}, {"flips": "bool[2000] 53c4eea00ba7fc8c"}),
    (
        {"rand_augment": "rand-m2-n3-p0.3-mstd3"},
        {
            "applied": "bool[2000, 3] 7f461a6d3cda9705",
            "arguments": "float64[2000, 3] 475c19bff499b370",
            "magnitudes": "float64[2000, 3] 1c4fa0bf9ff7088c",
            "ops": "int64[2000, 3] 2cec9b6d157e8f88",
        },
    ),
    (
        {"rand_augment": "rand-m9-mstd100-inc1"},
        {"magnitudes": "float64[2000, 2] 2130b32bf6e3c52a", "arguments": "float64[2000, 2] 40869b178050797e"},
    ),
    (
        {"rand_augment": "rand-m9-mstd101-inc1"},
        {"magnitudes": "float64[2000, 2] ea12ff0b16ac24ce", "arguments": "float64[2000, 2] 00c5415150e98e15"},
    ),
    (
        {"rand_augment": None},
        {
            "ops": "int64[2000, 0] 2d06800538d394c2",
            "applied": "bool[2000, 0] 2d06800538d394c2",
            "magnitudes": "float64[2000, 0] 2d06800538d394c2",
            "arguments": "float64[2000, 0] 2d06800538d394c2",
        },
    ),
]
MIXES: list[tuple[dict[str, Any], dict[str, str]]] = [
    (
        {},
        {
            "lam": "float32[2000] 9cb47eac6e155614",
            "box": "int32[2000, 4] c7e2953325f6a26d",
            "use_cutmix": "bool[2000] 4b2442f93fb19333",
        },
    ),
    (
        {"mixup": 0.0},
        {
            "lam": "float32[2000] f556dc5e9836aeb6",
            "box": "int32[2000, 4] 5dff581b8ee30137",
            "use_cutmix": "bool[2000] dc6f518ff9f29117",
        },
    ),
    (
        {"cutmix": 0.0},
        {
            "lam": "float32[2000] ba314b9aafc99bc8",
            "box": "int32[2000, 4] 6833e4028f460f9e",
            "use_cutmix": "bool[2000] 79ab79a537a40ce7",
        },
    ),
    (
        {"mixup": 0.0, "cutmix": 0.0},
        {
            "lam": "float32[2000] f4b0a276993f2f7b",
            "box": "int32[2000, 4] 6833e4028f460f9e",
            "use_cutmix": "bool[2000] 79ab79a537a40ce7",
        },
    ),
    (
        {"mix_switch": 0.1, "cutmix": 0.7, "mixup": 0.6, "size": 31},
        {
            "lam": "float32[2000] 2b0df955141fed16",
            "box": "int32[2000, 4] 0706cb604eb5b97b",
            "use_cutmix": "bool[2000] 9a306ffab5347a42",
        },
    ),
    (
        {"mixup": 0.0, "mix_switch": 0.1},
        {
            "lam": "float32[2000] f556dc5e9836aeb6",
            "box": "int32[2000, 4] 5dff581b8ee30137",
            "use_cutmix": "bool[2000] dc6f518ff9f29117",
        },
    ),
    (
        {"cutmix": 0.0, "mix_switch": 0.9},
        {
            "lam": "float32[2000] ba314b9aafc99bc8",
            "box": "int32[2000, 4] 6833e4028f460f9e",
            "use_cutmix": "bool[2000] 79ab79a537a40ce7",
        },
    ),
]


@pytest.mark.parametrize(("options", "expected"), SAMPLES)
def test_golden_samples(options: dict[str, Any], expected: dict[str, str]) -> None:
    found = digests(sample_params(**options))
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(("options", "expected"), MIXES)
def test_golden_mixes(options: dict[str, Any], expected: dict[str, str]) -> None:
    assert digests(mixes(**options)) == expected


def test_golden_boxes_of_cutmix() -> None:
    """Boxes inside the image, across its upper left and lower right corners, of the whole image, and empty."""
    lam = np.array([0.75, 0.75, 0.75, 0.0, 1.0])
    box, kept = cutmix_box(lam, np.array([[5, 4], [1, 2], [9, 8], [5, 5], [3, 3]]), 10)
    assert box.dtype == np.int32
    assert box.tolist() == [[3, 2, 5, 5], [0, 0, 4, 5], [7, 6, 3, 4], [0, 0, 10, 10], [3, 3, 0, 0]]
    assert kept.tolist() == [0.75, 0.8, 0.88, 0.0, 1.0]
