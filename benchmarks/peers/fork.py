"""Plain fork: import once, fork the processes, each trains its share; the results come back through pipes.

python benchmarks/peers/fork.py --trials 200 --processes 2
"""

from __future__ import annotations

import argparse
import itertools
import json
import os

from digits_plain import data, train_block


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    data()
    bounds = [given.trials * k // given.processes for k in range(given.processes + 1)]
    shares = [_share(first, last) for first, last in itertools.pairwise(bounds)]
    results = []
    for pid, pipe in shares:
        with os.fdopen(pipe) as file:
            results += json.load(file)
        os.waitpid(pid, 0)
    assert len(results) == given.trials
    print("best", *min(results))


def _share(first: int, last: int) -> tuple[int, int]:
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        with os.fdopen(theirs, "w") as file:
            json.dump(train_block(first, last), file)
        os._exit(0)
    os.close(theirs)
    return pid, ours


if __name__ == "__main__":
    main()
