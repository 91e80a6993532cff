"""What a study has found, in one SQLite file that Optuna reads too (`optuna-dashboard sqlite:///study.db`).

An Optuna study per arm; a trial is one run. The file is written by the study's main process alone, one transaction per
trial: whatever is in it is whole.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sharpwise.compare.trial import Trial
from sharpwise.installing import needs


class Storage:
    """Trials that are done.

    Args:
        path: of the file, made if need be.

    Raises:
        ValueError: it is locked, or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        with needs("comparing", "compare"):
            import optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._path = path
        self._studies: dict[str, Any] = {}
        self.results: dict[Trial, dict[str, Any]] = {}
        with _explained(path):
            self._storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
            for name in optuna.get_all_study_names(self._storage):
                # Loaded, not `created if missing`: whoever looks at a study that goes on elsewhere must not write.
                self._studies[name] = optuna.load_study(study_name=name, storage=self._storage)
                for trial in self._studies[name].get_trials(deepcopy=False):
                    if "key" in trial.user_attrs:
                        self.results[_trial(trial.user_attrs["key"])] = trial.user_attrs["result"]

    @property
    def losses(self) -> dict[Trial, float]:
        """See `losses_of`."""
        return losses_of(self.results)

    def add(self, trial: Trial, result: Mapping[str, Any]) -> None:
        """Store what a trial found: plain values with `final_loss`, None if it diverged.

        Raises:
            ValueError: it is there already, or the file is locked or cannot be written.
        """
        from optuna.distributions import FloatDistribution
        from optuna.trial import create_trial

        if trial in self.results:
            raise ValueError(f"{trial.key} is stored already")
        numbers = {key: float(value) for key, value in trial.setting if isinstance(value, (int, float))}
        ranges: dict[str, Any] = {
            key: FloatDistribution(1e-12, 1e6, log=True) if key.endswith(".lr") else FloatDistribution(-1e6, 1e6)
            for key in numbers
        }
        loss = result["final_loss"]
        done = create_trial(
            params=numbers,
            distributions=ranges,
            value=math.inf if loss is None else loss,
            user_attrs={"key": trial.key, "result": dict(result)},
        )
        with _explained(self._path):
            self._study(trial.arm).add_trial(done)
        self.results[trial] = dict(result)

    def _study(self, arm: str) -> Any:
        import optuna

        if arm not in self._studies:
            self._studies[arm] = optuna.create_study(
                storage=self._storage, study_name=arm, direction="minimize", load_if_exists=True
            )
        return self._studies[arm]


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Raise ValueError with what to do where the database cannot be used."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import DBAPIError

    try:
        yield
    except (StorageInternalError, DBAPIError) as error:
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        if "locked" in str(reason):
            raise ValueError(
                f"{path} is locked by another process, such as one that looks into it or copies it; when that has let "
                "go of it, the same command goes on"
            ) from error
        raise ValueError(
            f"{path} cannot be used: {reason}. Bring it back from a copy; without it the study begins again"
        ) from error


def losses_of(results: Mapping[Trial, Mapping[str, Any]]) -> dict[Trial, float]:
    """End validation losses, inf where a run diverged."""
    return {t: math.inf if result["final_loss"] is None else result["final_loss"] for t, result in results.items()}


def _trial(key: str) -> Trial:
    arm, stage, setting, seed, horizon = json.loads(key)
    return Trial(arm, stage, tuple((name, _hashable(value)) for name, value in setting), seed, horizon)


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
