"""A real Slurm for the tests of this folder: one lab a kind, shared by all xdist workers, ended by the last one."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from on_lab import Slurm
from on_lab_sweeps import Make, build

from orchestrator.slurm.lab import Lab, LabOptions, missing_programs

HERE = Path(__file__).parent
LabFactory = Callable[[LabOptions], Lab]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = missing_programs()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            # In CI the tests run, and fail: a machine that lost its Slurm must not look healthy.
            if missing and not os.environ.get("CI"):
                item.add_marker(pytest.mark.skip(reason=f"Slurm tests skipped: {', '.join(missing)} not found"))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all xdist workers of this session see."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "labs"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def shared_lab(root: Path, options: LabOptions) -> Iterator[Lab]:
    """The lab in `root`. Whoever comes first starts it, whoever leaves last ends it; a dead process holds no lock."""
    lab = Lab(root)
    with root.with_suffix(".users").open("a") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        try:
            lab.up(options)
            yield lab
        finally:
            fcntl.flock(users, fcntl.LOCK_UN)
            end_if_unused(lab, users.fileno())


def end_if_unused(lab: Lab, users: int) -> None:
    with suppress(BlockingIOError):
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lab.down()


@pytest.fixture(scope="session", autouse=True)
def _no_leftovers(shared: Path) -> None:
    """End the labs of earlier sessions that were killed."""
    for facts in shared.parent.parent.glob("pytest-*/labs/*/lab.json"):
        with facts.parent.with_suffix(".users").open("a") as users:
            end_if_unused(Lab(facts.parent), users.fileno())


@pytest.fixture(scope="session")
def lab_of(shared: Path) -> Iterator[LabFactory]:
    """Gives the lab with some options; it starts when it is first asked for."""
    labs: dict[LabOptions, Lab] = {}
    with ExitStack() as stack:

        def get(options: LabOptions) -> Lab:
            if options not in labs:
                root = shared / hashlib.sha256(repr(options).encode()).hexdigest()[:8]
                labs[options] = stack.enter_context(shared_lab(root, options))
            return labs[options]

        yield get


@pytest.fixture
def slurm_of(lab_of: LabFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[[LabOptions], Slurm]:
    """Gives the commands on a lab with some options, and makes it the Slurm of this test's own environment."""

    def get(options: LabOptions) -> Slurm:
        slurm = Slurm(lab_of(options))
        for name in set(os.environ) - set(slurm.env):
            monkeypatch.delenv(name)
        monkeypatch.setenv("SLURM_CONF", slurm.env["SLURM_CONF"])
        return slurm

    return get


@pytest.fixture
def unannounced(
    request: pytest.FixtureRequest, lab_of: LabFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm announces no time limit of its own accord, so that the only notices are those that a test sends.

    A sweep with `WINDOW` asks to be told so long before the end of its job that whenever a notice comes, it is taken
    for the announcement. Slurm would send that soon after the start; this has it wait for the last second.
    """
    lab_of(request.module.OPTIONS)  # its daemons are everyone's, and not to find this command
    commands = tmp_path / "commands"
    commands.mkdir()
    (commands / "sbatch").write_text(f'#!/bin/sh\nexec {shutil.which("sbatch")} --signal=B:TERM@1 "$@"\n')
    (commands / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")


@pytest.fixture
def slurm(slurm_of: Callable[[LabOptions], Slurm]) -> Slurm:
    """The default lab, shared with other tests: use jobs of one processor, and never a whole node of it."""
    return slurm_of(LabOptions())


@pytest.fixture
def make(tmp_path: Path, slurm: Slurm) -> Make:
    """Makes the sweep of this test, on the default lab."""
    return partial(build, tmp_path, slurm)
