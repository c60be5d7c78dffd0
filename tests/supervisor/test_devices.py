"""Trials side by side on the GPUs of one machine."""

from __future__ import annotations

import pytest

from orchestrator.config.spec import Launch
from orchestrator.errors import OrcError
from orchestrator.supervisor.options import devices, devices_of_trial


def shares(launch: Launch, visible: str | None) -> list[list[str | None]]:
    """Of each slot, its ranks' GPUs."""
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    return [
        [
            devices(launch, environment, slot=slot, local_rank=rank, num_ranks=launch.ranks_per_node)
            for rank in range(launch.ranks_per_node)
        ]
        for slot in range(launch.trials_per_node)
    ]


def test_without_gpus_asked_for_the_job_sees_what_there_is() -> None:
    assert shares(Launch(trials_per_node=2), "0,1") == [[None], [None]]


@pytest.mark.parametrize(
    ("launch", "visible", "expected"),
    [
        (Launch(gpus=1), "3", [["3"]]),
        (Launch(gpus=1, trials_per_node=3), "4,5,6", [["4"], ["5"], ["6"]]),
        (Launch(gpus=1, trials_per_node=3, trials_per_gpu=2), "4,5", [["4"], ["4"], ["5"]]),
        (Launch(gpus=2, ranks_per_node=2), "0,1,2,3", [["0,1", "2,3"]]),
        (Launch(gpus=1, ranks_per_node=2, trials_per_node=2), None, [["0", "1"], ["2", "3"]]),
        (Launch(gpus=1, trials_per_node=2), "GPU-8f,MIG-3a", [["GPU-8f"], ["MIG-3a"]]),
    ],
)
def test_each_rank_has_gpus_of_its_own_unless_trials_share_them(
    launch: Launch, visible: str | None, expected: list[list[str]]
) -> None:
    assert shares(launch, visible) == expected
    found = {name for slot in expected for rank in slot for name in rank.split(",")}
    assert len(found) == launch.gpus_per_node


@pytest.mark.parametrize("visible", ["", "0", "0,1,2"])
def test_a_job_with_fewer_gpus_is_told_so(visible: str) -> None:
    with pytest.raises(
        OrcError,
        match=f"ask for 4 GPUs on each machine, and this job has {len(visible) // 2 + 1 if visible else 0} here",
    ):
        shares(Launch(gpus=1, trials_per_node=4), visible)


def test_programs_see_all_gpus_of_their_trial() -> None:
    launch = Launch(gpus=1, ranks_per_node=2, trials_per_node=2)
    environment = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    found = [devices_of_trial(launch, environment, slot=slot, num_ranks=2) for slot in range(2)]
    assert found == ["4,5", "6,7"]
    assert devices_of_trial(Launch(), environment, slot=0, num_ranks=1) is None
