#!/bin/bash
#SBATCH --job-name=digits-0123abcd4567.5eed5eed
#SBATCH --chdir=/home/ada/runs/digits-0123abcd4567
#SBATCH --output=/home/ada/runs/digits-0123abcd4567/logs/%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --export=PATH,HOME,USER,LOGNAME,SHELL,LANG,LC_ALL,TZ,MODULEPATH,MODULESHOME,LMOD_CMD
#SBATCH --array=0-99%20
#SBATCH --signal=B:TERM@120
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=02:00:00
#SBATCH --mem=4G
#SBATCH --partition=cpu

# Workers 0 to 99 (srun) of sweep digits-0123abcd4567, submission 0; change the sweep file, not this.
umask 077
unset ORC_NOTICE

# The notice. In the prologue it is kept for the worker; later it is passed on, again and again until the worker has
# acknowledged it. A worker whose handlers do not stand yet would die of it; no sign of them for ten seconds may be a
# folder that the worker can't see, so it is sent all the same.
orc_heard() {
  export ORC_NOTICE=TERM
  orc_woken=1
  [ -n "${orc_child:-}" ] || return 0
  rm -f "$ORC_ACK"
  orc_tries=0
  while [ ! -e "$ORC_ACK" ] && kill -0 "$orc_child" 2>/dev/null; do
    if [ -e "$ORC_READY" ] || [ "$orc_tries" -ge 20 ]; then kill -USR1 "$orc_child" 2>/dev/null; fi
    orc_tries=$((orc_tries + 1))
    sleep 0.5
  done
}

trap orc_heard TERM USR1

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
trap orc_heard TERM USR1

# With --export, sbatch sets this one, and srun would then hide from the worker what the prologue has set.
unset SLURM_EXPORT_ENV

# Named after this process, so that a later worker on this machine removes it if this script is killed.
{ read -r orc_boot </proc/sys/kernel/random/boot_id; orc_space=$(readlink /proc/self/ns/pid); } 2>/dev/null
orc_box="orc-${orc_boot%%-*}-${orc_space//[!0-9]/}-$$-XXXXXXXX"
orc_box=$(mktemp -d -t "$orc_box" 2>/dev/null) || orc_box=$(mktemp -d "/tmp/$orc_box") || exit 1
export ORC_READY="$orc_box/ready" ORC_ACK="$orc_box/heard"
orc_worker=$((0 + SLURM_ARRAY_TASK_ID))
orc_told=${ORC_NOTICE:-}
# srun passes USR1 on to the worker; a TERM would make it kill its step. Before 23.11 it does not read SLURM_CPUS_PER_TASK.
# The first node decides when the others leave, and asks for the job's requeue if it loses one. They ignore notices, from
# the start on. What is in the quotes is for each node's shell.
# shellcheck disable=SC2016
srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=4 --kill-on-bad-exit=0 --wait=0 --export=ALL \
  bash -c '[ "$SLURM_PROCID" = 0 ] || trap "" TERM USR1 USR2 INT; exec "$@"' orc /home/ada/venv/bin/python -P -m orchestrator.supervisor work --dir /home/ada/runs/digits-0123abcd4567 --submission 5eed5eed5eed5eed5eed5eed5eed5eed --worker "$orc_worker" &
orc_child=$!
[ "$orc_told" = "${ORC_NOTICE:-}" ] || orc_heard

# A trap ends `wait` early with a status of its own; the child's is the one of a `wait` that no trap has touched.
while :; do
  orc_woken=
  wait "$orc_child"
  orc_status=$?
  [ -n "$orc_woken" ] || break
done
rm -rf "$orc_box"
exit "$orc_status"
