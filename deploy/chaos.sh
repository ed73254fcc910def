#!/usr/bin/env bash
# Every run is the same run: a quiet one, and many that faults befall, compared.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'TEXT'
A quiet run of a short quickstart, then N runs under `lockstep train --chaos` with seeds 1 to N: each must end with the
quiet run's parameters to the bit, have had a fault in the middle of a step and a block leased again, and pass
`lockstep verify`.

Usage: chaos.sh N [ARGUMENTS OF lockstep train]

Environment:
  LOCKSTEP      the program [default: the release build of this workspace]
  CHAOS_EVERY   seconds between two faults, on average [default: 1.5]
  CHAOS_DIR     where runs and their logs go; those of runs that are equal are removed [default: a temporary directory]

Examples:
  deploy/chaos.sh 100
  CHAOS_EVERY=1 deploy/chaos.sh 20 quickstart-llama --set schedule.steps=30
TEXT
}

# value NAME LOG: the number or digest after this name in what a run said.
value() {
    sed -n "s/^$1  *\([0-9a-f]*\).*/\1/p" "$2" | tail -n 1
}

# train NAME ARGUMENTS...: a run in `dir`, with its log beside it.
train() {
    local name=$1
    shift
    "$program" train --run "$dir/$name" --workers 3 --set schedule.steps=100 --set checkpoint.every_steps=5 \
        --set evaluation.every_steps=25 --set evaluation.slots=12 --set sampling.every_steps=0 "$@" \
        >"$dir/$name.log" 2>&1
}

# count NAME LOG: the number after this name in what a run said, or 0 where there is no such line or no number.
count() {
    local found
    found=$(value "$1" "$2")
    [[ $found =~ ^[0-9]+$ ]] || found=0
    printf '%d\n' "$((10#$found))"
}

# judge NAME: sets `verdict` for a run that faults befell, and adds to `lost` and `repeated`.
judge() {
    local log=$dir/$1.log
    if [[ $(value params_sha256 "$log") != "$quiet" ]]; then
        verdict="other parameters than the quiet run"
    elif (($(count in\ mid-step "$log") == 0)); then
        verdict="no fault in the middle of a step"
    elif (($(count leased\ again "$log") == 0)); then
        verdict="no block was leased again"
    elif ! "$program" verify "$dir/$1" >>"$log" 2>&1; then
        verdict="not verified"
    elif [[ -z $(value draws\ lost "$log") ]]; then
        verdict="verified, and nothing said of what it was trained on"
    else
        verdict=equal
    fi
    lost=$((lost + $(count draws\ lost "$log")))
    repeated=$((repeated + $(count draws\ repeated "$log")))
}

main() {
    case ${1:-} in
        -h | --help) usage && exit ;;
        [1-9] | [1-9][0-9] | [1-9][0-9][0-9] | [1-9][0-9][0-9][0-9]) ;;
        *) usage >&2 && exit 2 ;;
    esac
    local runs=$1 every=${CHAOS_EVERY:-1.5} seed equal=0 began
    shift
    find_program
    dir=${CHAOS_DIR:-$(mktemp -d)}
    mkdir -p "$dir"

    train quiet "$@" || die "the quiet run failed: $(tail -n 3 "$dir/quiet.log")"
    quiet=$("$program" inspect "$dir/quiet" | sed -n 's/^params_sha256 *//p')
    [[ $quiet =~ ^[0-9a-f]{64}$ ]] || die "the quiet run has no parameters; see $dir/quiet.log"
    say "quiet: $quiet"
    lost=0 repeated=0
    for ((seed = 1; seed <= runs; seed++)); do
        began=$SECONDS
        if train "seed-$seed" --chaos "$seed" --chaos-every "$every" "$@"; then
            judge "seed-$seed"
        else
            verdict="failed: $(tail -n 1 "$dir/seed-$seed.log")"
        fi
        local log=$dir/seed-$seed.log
        say "seed $seed: $verdict; $(count faults "$log") faults, $(count in\ mid-step "$log") in mid-step," \
            "$(count leased\ again "$log") blocks leased again, about $(count done\ twice "$log") steps done twice," \
            "$((SECONDS - began)) s"
        if [[ $verdict == equal ]]; then
            equal=$((equal + 1))
            rm -r "$dir/seed-$seed" "$log"
        fi
    done
    printf '%s of %s equal, %s lost, %s repeated\n' "$equal" "$runs" "$lost" "$repeated"
    ((equal == runs)) || die "see $dir"
    [[ -n ${CHAOS_DIR:-} ]] || rm -r "$dir"
}

main "$@"
