#!/bin/bash
#SBATCH --job-name=digits-0123abcd4567.5eed5eed.reduce
#SBATCH --chdir=/home/ada/runs/digits-0123abcd4567
#SBATCH --output=/home/ada/runs/digits-0123abcd4567/logs/reducer-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --export=PATH,HOME,USER,LOGNAME,SHELL,LANG,LC_ALL,TZ,MODULEPATH,MODULESHOME,LMOD_CMD
#SBATCH --time=00:10:00
#SBATCH --mem=4G
#SBATCH --partition=cpu
#SBATCH --cpus-per-task=1
#SBATCH --ntasks=8

# The reducer of sweep digits-0123abcd4567, submission 0; change the sweep file, not this.
umask 077
unset ORC_NOTICE

trap 'export ORC_NOTICE=TERM' TERM USR1

# A command of the prologue failed. Status 143 is TERM: that is the notice, and whatever fails after one is no news;
# the worker decides what it means. Inside a sourced file nothing is judged.
# shellcheck disable=SC2317
orc_stop() { # STATUS WHAT [FILE]
  [ -z "${3:-}" ] || return 0
  if [ "$1" -eq 143 ] || [ -n "${ORC_NOTICE:-}" ]; then
    export ORC_NOTICE=TERM
  else
    echo "orchestrator: the prologue ended with status $1 at: $2" >&2
    exit "$1"
  fi
}

export OMP_NUM_THREADS=2 MKL_NUM_THREADS=2

if ! command -v module >/dev/null 2>&1; then
  for orc_init in "${MODULESHOME:-/usr/share/modules}/init/bash" \
    /etc/profile.d/modules.sh /etc/profile.d/lmod.sh /etc/profile.d/z00_lmod.sh; do
    # shellcheck source=/dev/null
    if [ -r "$orc_init" ] && . "$orc_init" && command -v module >/dev/null 2>&1; then break; fi
  done
fi
command -v module >/dev/null 2>&1 || orc_stop 127 'launch.modules: this machine has no module command'
module load gcc/12 || orc_stop $? 'module load gcc/12'

# As they were given: nothing in them expands.
# shellcheck disable=SC2016,SC1003
{
  export TZ=UTC
}

# launch.setup; what a sourced file does inside is its own affair; its last status counts.
trap 'orc_stop $? "line $LINENO: $BASH_COMMAND" "${BASH_SOURCE[1]:-}"' ERR
ulimit -n 4096
trap - ERR
set +eu
trap 'export ORC_NOTICE=TERM' TERM USR1

# With --export, sbatch sets this one, and srun would then hide from the worker what the prologue has set.
unset SLURM_EXPORT_ENV

# A TERM makes srun kill its step. That loses nothing, for whoever reduces next does it all again.
exec srun --ntasks=8 --cpus-per-task=1 --kill-on-bad-exit=1 --export=ALL /home/ada/venv/bin/python -P -m orchestrator.worker.reducer_ranks --dir /home/ada/runs/digits-0123abcd4567 --submission 5eed5eed5eed5eed5eed5eed5eed5eed
