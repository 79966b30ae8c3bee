"""The JSON of `pipeline doctor --json`, and of RUN/doctor.json (docs/doctor.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from launch.doctor.findings import Finding
from launch.doctor.measurements.report import Report
from launch.doctor.thresholds import Thresholds


def to_json(report: Report, findings: Sequence[Finding], exclude: Sequence[str], limits: Thresholds) -> dict[str, Any]:
    """Return the findings, the hosts to exclude, the thresholds and all measurements."""
    return {
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "exclude": list(exclude),
        "limits": dataclasses.asdict(limits),
        **report.to_dict(),
    }
