#!/usr/bin/env bash
# Optuna 4.9.0, Python 3.11, SQLite storage: `optimize(catch=...)` does not catch that a trial was failed elsewhere.
#
# Likely guess: `study.optimize(objective, n_trials=1, catch=(Exception,))` returns whatever happens to the trial, or it
#               raises UpdateFinishedTrialError, the public exception for a trial that is finished already.
# Behaviour:    where another process has set the running trial to FAIL (as `fail_stale_trials` does to a worker whose
#               heartbeat was late), `optimize` ends with a bare AssertionError, which is outside of `catch` and names
#               neither the trial nor the reason. A worker that outlives its grace period ends so after a good result.
# Seen:
#   AssertionError: Should not reach.
#   state of the trial: FAIL
set -euo pipefail
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'optuna==4.9.0'
cd "$folder"
venv/bin/python - <<'P' | tee seen
import optuna

optuna.logging.set_verbosity(optuna.logging.ERROR)
place = {"study_name": "study", "storage": "sqlite:///trials.db"}
study = optuna.create_study(**place)


def objective(trial):
    optuna.load_study(**place).tell(trial.number, state=optuna.trial.TrialState.FAIL)  # another process
    return 1.0


try:
    study.optimize(objective, n_trials=1, catch=(Exception,))
    print("returned")
except BaseException as error:
    print(f"{type(error).__name__}: {error}")
print("state of the trial:", study.trials[0].state.name)
P
diff seen <(sed -n '/^# Seen:/,/^set /s/^#   //p' "$script")
