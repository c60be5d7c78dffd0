"""A plain script that has never heard of orchestrator: gradient descent with momentum on Rosenbrock's valley.

    python jobs/command_example.py --lr=0.001 --momentum=0.9             by itself
    orc run jobs/command_example.yaml                                    as a sweep, on this machine
    orc submit jobs/command_example.yaml                                 on Slurm

It takes its parameters as arguments and appends what it has found to a file, a JSON object a line; the sweep file says
which arguments, and which file. f(x, y) = (1 - x)^2 + 100 (y - x^2)^2 has its minimum, 0, at (1, 1) (Rosenbrock 1960).
"""

from __future__ import annotations

import argparse
import json
import sys


def descend(lr: float, momentum: float, steps: int) -> list[float]:
    """The values of the function on the way from (-1, 1)."""
    x, y, moved_x, moved_y = -1.0, 1.0, 0.0, 0.0
    values = []
    for _ in range(steps):
        slope_x = -2 * (1 - x) - 400 * x * (y - x * x)
        slope_y = 200 * (y - x * x)
        moved_x, moved_y = momentum * moved_x - lr * slope_x, momentum * moved_y - lr * slope_y
        x, y = x + moved_x, y + moved_y
        if abs(x) > 1e6 or abs(y) > 1e6:  # it has left the valley
            return [*values, float("inf")]
        values.append((1 - x) ** 2 + 100 * (y - x * x) ** 2)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description="Gradient descent on Rosenbrock's valley.")
    parser.add_argument("--lr", type=float, required=True, help="how far a step goes")
    parser.add_argument("--momentum", type=float, default=0.0, help="how much of the step before it keeps")
    parser.add_argument("--steps", type=int, default=500, help="how many")
    parser.add_argument("--report", default="/dev/stdout", help="the file to which results are appended")
    given = parser.parse_args()
    values = descend(given.lr, given.momentum, given.steps)
    with open(given.report, "a") as report:  # noqa: PTH123  # as in any script
        for step, value in enumerate(values, start=1):
            if step % 100 == 0 or step == len(values):
                report.write(json.dumps({"step": step, "value": value}) + "\n")
    print(f"after {len(values)} steps: {values[-1]:.3g}", file=sys.stderr)


if __name__ == "__main__":
    main()
