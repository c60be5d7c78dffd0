"""Optuna: RandomSampler, journal storage, worker processes as in its tutorial on parallel optimization.

python benchmarks/peers/optuna_random.py --trials 200 --processes 2 --folder FOLDER
"""

from __future__ import annotations

import argparse
import itertools
from multiprocessing import Pool
from pathlib import Path

import optuna
from digits_plain import train
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend


def objective(trial: optuna.Trial) -> float:
    """One trial."""
    return train(
        lr=trial.suggest_float("lr", 0.003, 1.0, log=True),
        momentum=trial.suggest_float("momentum", 0.0, 0.97),
        weight_decay=trial.suggest_float("weight_decay", 1e-7, 1e-2, log=True),
        seed=trial.number,
    )


def _study(journal: str) -> optuna.Study:
    return optuna.create_study(
        study_name="digits",
        storage=JournalStorage(JournalFileBackend(journal)),
        sampler=optuna.samplers.RandomSampler(),
        load_if_exists=True,
    )


def run(journal: str, trials: int) -> None:
    """What each process does."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    _study(journal).optimize(objective, n_trials=trials)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = str(given.folder / "journal.log")
    _study(journal)
    bounds = [given.trials * k // given.processes for k in range(given.processes + 1)]
    shares = [last - first for first, last in itertools.pairwise(bounds)]
    with Pool(given.processes) as pool:
        pool.starmap(run, [(journal, share) for share in shares])
    study = _study(journal)
    assert len(study.trials) == given.trials
    print("best", study.best_value, study.best_trial.number)


if __name__ == "__main__":
    main()
