"""W&B's keys that have no place here: those without an effect are passed over, those with one are refused."""

from __future__ import annotations

from orchestrator.config.document import Sheet
from orchestrator.config.yaml12 import Path

__all__ = ["HARMLESS", "HARMLESS_IN_METRIC", "REFUSED", "set_aside"]

HARMLESS = ("apiVersion", "kind", "controller", "project", "entity")
HARMLESS_IN_METRIC = ("impute", "impute_while_running")
REFUSED: dict[Path, str] = {
    ("early_terminate",): "stopping trials early is not available yet; without this key every trial runs to its end",
    ("metrics",): "several objectives are not available; give one as metric",
    ("scheduler",): "schedulers of one's own are not available; give method: grid or random",
    ("job",): "W&B's launch jobs are not available; give program or command",
    ("image_uri",): "W&B's launch images are not available; give program or command, and launch.apptainer for an image",
    ("metric", "target"): "ending a sweep at a target is not available; without this key every trial runs",
}


def set_aside(sheet: Sheet) -> None:
    """Take out W&B's keys that mean nothing here, and refuse those that would change the result."""
    for key in HARMLESS:
        sheet.tree.pop(key, None)
    metric = sheet.tree.get("metric")
    for path, reason in REFUSED.items():
        section = sheet.tree if len(path) == 1 else metric
        if isinstance(section, dict) and str(path[-1]) in section:
            sheet.blame(path, reason, key=True)
            del section[str(path[-1])]
    if isinstance(metric, dict):
        for key in HARMLESS_IN_METRIC:
            metric.pop(key, None)
