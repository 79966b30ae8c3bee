"""Small source folders as users have them, each with the conversion result or the error that is correct for it."""

from tests.support.source_folders import (  # noqa: F401 - importing them fills SOURCES
    cameras_and_scanners,
    data_set_hubs,
    operating_systems,
    public_data_sets,
    tars_and_parquet,
)
from tests.support.source_folders.source import SOURCES, Source

__all__ = ["SOURCES", "Source"]
