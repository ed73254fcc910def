#!/usr/bin/env bash
# A cluster on this machine, as the commands it consists of.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'TEXT'
A coordinator and N workers on this machine, as commands of their own, each with a log.

Usage: local.sh N [ARGUMENTS OF lockstep coordinator]

The run's directory is --run, by default runs/local; logs go to its logs/. Ctrl-C finishes the step, writes a checkpoint
and releases the workers. `lockstep train` does the same in one command.

Environment:
  LOCKSTEP           the program [default: the release build of this workspace]
  WORKER_OPTIONS     options of each worker, such as "--device cpu --threads 1"
                     [default: --threads, so that all cores are shared]

Examples:
  deploy/local.sh 2
  deploy/local.sh 4 shakespeare-char-cpu --set data.input=input.txt --run runs/shakespeare
  deploy/local.sh 3 --resume --run runs/shakespeare
TEXT
}

main() {
    case ${1:-} in
        -h | --help) usage && exit ;;
        [1-9] | [1-9][0-9] | [1-9][0-9][0-9]) ;;
        *) usage >&2 && exit 2 ;;
    esac
    local workers=$1 run=runs/local number cores options
    shift
    if [[ " $*" == *" --run"* ]]; then
        run=$(printf '%s\n' "$@" | awk '/^--run=/ { print substr($0, 7) } previous == "--run" { print } { previous = $0 }')
    else
        set -- "$@" --run "$run"
    fi
    find_program
    mkdir -p "$run/logs"

    # Workers read a pipe that nobody but this script holds open, and end when it does, however it ends.
    local lifeline
    lifeline=$(mktemp -u)
    mkfifo "$lifeline"
    exec 3<>"$lifeline"

    start_coordinator "$run/logs/coordinator.log" "$@"
    cores=$(getconf _NPROCESSORS_ONLN)
    options=${WORKER_OPTIONS:---threads $((cores > workers ? cores / workers : 1))}
    for ((number = 1; number <= workers; number++)); do
        # shellcheck disable=SC2086 # options are words
        start "$program" worker --join "$address" --name "local-$number" --end-with-stdin $options \
            <"$lifeline" 2>"$run/logs/worker-$number.log"
    done
    rm "$lifeline"
    end_run
}

main "$@"
