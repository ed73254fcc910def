# shellcheck shell=bash
# What local.sh and ssh.sh share: the program, and a coordinator that listens on loopback until it ends.
#
# For bash 3.2, which macOS has, and newer.

say() {
    printf '%s\n' "$*" >&2
}

die() {
    say "error: $*"
    exit 1
}

# find_program: sets `program`.
find_program() {
    local workspace
    workspace=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
    program=${LOCKSTEP:-${CARGO_TARGET_DIR:-$workspace/target}/release/lockstep}
    [[ -x $program ]] || die "$program: there is no program; run \`cargo build --release\`, or name one with LOCKSTEP=PATH"
}

# start COMMAND...: starts it in the background, in a process group of its own, where Ctrl-C does not reach it; sets
# `started`.
start() {
    set -m
    "$@" 3>&- 5>&- &
    set +m
    started=$!
}

# start_coordinator LOG ARGUMENTS...: sets `coordinator` to its process and `address` to where it listens. What it says
# goes to the log and to whoever looks on.
start_coordinator() {
    local log=$1 said
    shift
    : >"$log"
    said=$(mktemp -u)
    mkfifo "$said"
    exec 5<>"$said" # so that opening an end does not wait for the other
    start tee "$log" <"$said" >&2
    listener=$started
    start "$program" coordinator --listen 127.0.0.1:0 "$@" 2>"$said"
    coordinator=$started
    exec 5>&-
    rm "$said"
    asked=0
    trap ask_to_end INT TERM HUP
    until address=$(sed -n 's/^listening on \([^;]*\);.*/\1/p' "$log") && [[ -n $address ]]; do
        kill -0 "$coordinator" 2>/dev/null || end_run
        sleep 0.1 || true # a signal ends it
    done
}

# The first signal lets the coordinator finish its step and write a checkpoint, the second one ends it at once.
ask_to_end() {
    asked=$((asked + 1))
    ((asked > 1)) || say "finishing the step; once more ends at once"
    kill -INT "$coordinator" 2>/dev/null || true
}

# end_run: waits for the coordinator and exits as it does.
end_run() {
    local status=0
    while kill -0 "$coordinator" 2>/dev/null; do
        wait "$coordinator" || true # a signal ends it
    done
    wait "$coordinator" || status=$?
    wait "$listener" || true
    exit "$status"
}
