#!/usr/bin/env bash
# What the loss of workers costs: steps done in the same time by a quiet run and by one whose workers are killed.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'TEXT'
Trains quickstart with three workers for a while, first in peace, then with a worker killed (-9) now and then and started
again. Prints the steps done, and the share that was kept. Both runs must pass `lockstep verify`.

Usage: throughput.sh [SECS] [EVERY]

  SECS    how long each run takes [default: 300]
  EVERY   seconds between two kills, on average [default: 5]

Environment:
  LOCKSTEP   the program [default: the release build of this workspace]
TEXT
}

# train NAME ARGUMENTS...: a run of `secs` seconds in `dir`; sets `steps`.
train() {
    local name=$1
    shift
    timeout --foreground --signal=INT "$secs" "$program" train --run "$dir/$name" --workers 3 --set schedule.steps=1000000 \
        --set evaluation.every_steps=0 --set sampling.every_steps=0 --set checkpoint.every_steps=0 "$@" \
        >"$dir/$name.log" 2>&1 || (($? == 124)) || die "the run failed: $(tail -n 3 "$dir/$name.log")"
    "$program" verify "$dir/$name" >>"$dir/$name.log" 2>&1 || die "not verified: $(tail -n 3 "$dir/$name.log")"
    steps=$("$program" inspect "$dir/$name" | sed -n 's/^step *\([0-9]*\).*/\1/p')
}

main() {
    [[ ${1:-} != -h && ${1:-} != --help ]] || { usage && exit; }
    secs=${1:-300}
    local every=${2:-5} quiet
    find_program
    dir=$(mktemp -d)
    train quiet
    quiet=$steps
    say "in peace: $quiet steps in $secs s"
    train disturbed --chaos 1 --chaos-every "$every" --chaos-faults kill-worker
    say "a worker killed every $every s, $(grep -c 'kill -9' "$dir/disturbed.log") in all: $steps steps"
    printf '%s %% of the throughput kept\n' "$(awk -v a="$steps" -v b="$quiet" 'BEGIN { printf "%.1f", 100 * a / b }')"
    rm -r "$dir"
}

main "$@"
