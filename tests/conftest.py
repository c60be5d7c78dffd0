"""What all tests share."""

from __future__ import annotations

import itertools
import multiprocessing.util
import os
import shutil
import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from invariants import newest_process, processes_naming, until

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell has it for what it starts in the background; what we start would have it, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # several processes share the processors: with more threads than those, each waits for others

# No deadline: a shared machine is slow now and then, and a slow example is no wrong example.
_SHARED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("test", max_examples=100, **_SHARED)
settings.register_profile("soak", max_examples=1000, **_SHARED)
settings.load_profile("soak" if os.environ.get("ORC_SOAK") else "test")


@pytest.fixture(scope="session", autouse=True)
def _scratch() -> Iterator[Path]:
    """A temporary folder for what this process starts, so that what is left there is ours; short, for sockets."""
    multiprocessing.util.get_temp_dir()  # made now, it is elsewhere: it is removed later than this one
    before = os.environ.get("TMPDIR")
    folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    os.environ["TMPDIR"], tempfile.tempdir = str(folder), None
    yield folder
    if before is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = before
    tempfile.tempdir = None
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest, _scratch: Path) -> Iterator[None]:
    """After every test: no process of its folder, and so no port, and no temporary file of the product's."""
    newest = newest_process()
    yield
    folder = request.node.funcargs.get("tmp_path")
    if folder is not None:
        until(
            lambda: not processes_naming(folder, since=newest),
            lambda: f"the test has left running: {processes_naming(folder, since=newest)}",
        )
    until(lambda: not temporary(_scratch), lambda: f"the test has left: {temporary(_scratch)}")


def temporary(folder: Path) -> list[str]:
    """What the product has put into a temporary folder."""
    return sorted(name for name in os.listdir(folder) if name.startswith("orc"))  # noqa: PTH208 (a tenth of the time)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on a real Slurm, which mostly wait, are spread among those that compute: all processes get their share.

    They go between modules, whose fixtures would be made anew in the middle of one.
    """
    waiting = [item for item in items if "on_slurm" in item.path.parts]
    others = [item for item in items if "on_slurm" not in item.path.parts]
    found: list[pytest.Item] = []
    num_others = num_waiting = 0
    for _, module in itertools.groupby(others, key=lambda item: item.path):
        found += (part := list(module))
        num_others += len(part)
        until_now = len(waiting) * num_others // len(others)
        found += waiting[num_waiting:until_now]
        num_waiting = until_now
    items[:] = found or waiting


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that has failed shows what the sweeps in its folder have said."""
    report = yield
    folder = getattr(item, "funcargs", {}).get("tmp_path")
    if report.when == "call" and report.failed and folder is not None:
        report.sections += [(str(path), path.read_text(errors="replace")[-4000:]) for path in logs(folder)]
    return report


def logs(folder: Path) -> list[Path]:
    """Of sweeps, up to a screen of them."""
    return sorted(path for path in folder.glob("**/logs/*") if path.is_file())[:20]
