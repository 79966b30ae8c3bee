"""Small source folders in the ways people really have them, each with what its owner means by it."""

from tests.support.source_folders import archives, computers, containers, devices, hubs  # noqa: F401 - they fill SOURCES
from tests.support.source_folders.source import SOURCES, Source

__all__ = ["SOURCES", "Source"]
