#!/usr/bin/env bash
# A coordinator here, and a worker on each host of a list, through ssh.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'TEXT'
A coordinator on this machine and a worker on each host of a list, reached through ssh.

Usage: ssh.sh HOSTS COMMAND

  start [ARGUMENTS OF lockstep coordinator]
                        train; Ctrl-C finishes the step, writes a checkpoint and releases the workers
  status                how the run is getting on, and each host
  logs [HOST]           what the workers, or one of them, said; the coordinator's log is HOSTS.logs/coordinator.log
  add HOST [OPTIONS]    add a host, or change its worker's options
  remove HOST           take a host away
  stop                  as Ctrl-C, from elsewhere

HOSTS is a file with a host a line, as `ssh` takes it, and options of its worker: "lab-3 --device wgpu:0 --threads 4".
`start` follows it: a line added or removed is a worker more or less in the running run. Ports, names and keys are set
up in ~/.ssh/config; no host may ask for a password.

The program is copied to ~/.cache/lockstep on each host, which needs this machine's kind of processor and system. A
worker reaches the coordinator through its own ssh connection, at a port of the host's loopback, and nothing else is
opened. A lost connection is made anew; a worker ends with it.

Environment:
  LOCKSTEP      the program [default: the release build of this workspace]
  LOCKSTEP_SSH  the command for ssh [default: ssh]

Examples:
  deploy/ssh.sh hosts start my.toml --run runs/lab
  deploy/ssh.sh hosts add lab-4 --threads 8
  deploy/ssh.sh hosts logs lab-4
TEXT
}

# Waits after a lost connection, in seconds.
retry_secs=5

# remote HOST ARGUMENTS...: ssh that asks nothing and notices within 45 s that the other side is gone.
remote() {
    # shellcheck disable=SC2086 # the command is words
    ${LOCKSTEP_SSH:-ssh} -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ExitOnForwardFailure=yes "$@"
}

# wanted: the lines of HOSTS without comments, each host once, words parted by single spaces.
wanted() {
    awk '{ sub(/#.*/, ""); $1 = $1 } NF && !seen[$1]++' "$hosts"
}

# tell TEXT: to the host's log, which standard error is in a link, and to people.
tell() {
    say "$1"
    say "$1" 2>&4
}

# copy HOST: sees to it that the program is on the host, and prints its path there.
copy() {
    local name
    name=lockstep-$( (sha256sum "$program" 2>/dev/null || shasum -a 256 "$program") | cut -c 1-16)
    # Two hosts may share a home directory: the name is taken last.
    # shellcheck disable=SC2016 # expanded there
    local place='dir=${XDG_CACHE_HOME:-$HOME/.cache}/lockstep' there
    there=$(remote "$1" "$place; test -x \"\$dir/$name\" && echo \"\$dir/$name\" || true" </dev/null) || return
    if [[ -z $there ]]; then
        tell "$1: copying the program, $(($(wc -c <"$program") >> 20)) MiB"
        there=$(remote "$1" "$place; mkdir -p \"\$dir\" && cat >\"\$dir/.$name.\$\$\" && chmod +x \"\$dir/.$name.\$\$\" &&
            mv \"\$dir/.$name.\$\$\" \"\$dir/$name\" && echo \"\$dir/$name\"" <"$program") || return
    fi
    printf '%s\n' "$there"
}

# link HOST OPTIONS...: a worker on the host until it is released; reads the lifeline.
link() {
    local host=$1 there port status
    shift
    while :; do
        # Which ports are free there is not known here; a taken one is like a lost connection.
        port=$((20000 + RANDOM % 20000))
        status=0
        if there=$(copy "$host"); then
            remote -R "127.0.0.1:$port:$address" "$host" \
                "exec '$there' worker --join 127.0.0.1:$port --name '$host' --end-with-stdin $*" || status=$?
        else
            status=255
        fi
        case $status in
            0) break ;;
            255)
                tell "$host: no connection; trying again in $retry_secs s"
                sleep "$retry_secs"
                ;;
            *)
                tell "$host: the worker ended with status $status; see $logs/$host.log, then remove the host and add it again"
                break
                ;;
        esac
    done
}

# follow: starts a link for each wanted line without one, and ends those of lines that are no longer wanted. A link that
# ended by itself keeps its place, so that it is not started again.
follow() {
    local lines line index
    lines=$(wanted)
    for index in "${!linked[@]}"; do
        line=${linked[index]}
        if [[ $'\n'$lines$'\n' != *$'\n'$line$'\n'* ]]; then
            [[ -z ${processes[index]} ]] || say "${line%% *}: ending its worker"
            end_link "$index"
        fi
    done
    while read -r line; do
        [[ -n $line ]] || continue
        for index in "${!linked[@]}"; do
            [[ ${linked[index]} != "$line" ]] || continue 2
        done
        if [[ $line =~ ^[A-Za-z0-9][A-Za-z0-9@._-]*( |$) ]]; then
            say "${line%% *}: starting a worker"
            # shellcheck disable=SC2086 # a host and options are words
            start link $line <"$lifeline" 2>>"$logs/${line%% *}.log"
        else
            say "$hosts: \"$line\" does not begin with a host"
            started=""
        fi
        linked+=("$line")
        processes+=("$started")
    done <<<"$lines"
}

end_link() {
    [[ -z ${processes[$1]} ]] || kill -TERM -- "-${processes[$1]}" 2>/dev/null || true
    unset "linked[$1]" "processes[$1]"
}

# Whether a coordinator is there, even if the script that started it is not.
is_going_on() {
    [[ -r $logs/pid && $(ps -o args= -p "$(cat "$logs/pid")" 2>/dev/null) == *" coordinator "* ]]
}

require_run() {
    is_going_on || die "$hosts: no run is going on with these hosts; begin one with \`$0 $hosts start\`"
}

run() {
    [[ -r $hosts ]] || die "$hosts: there is no such file; write a host a line"
    ! is_going_on || die "$hosts: a run is going on with these hosts; end it with \`$0 $hosts stop\`"
    find_program
    mkdir -p "$logs"
    linked=()
    processes=()
    # Links read a pipe that nobody but this script holds open: workers end when it does, however it ends.
    lifeline=$logs/lifeline
    rm -f "$lifeline"
    mkfifo "$lifeline"
    exec 3<>"$lifeline" 4>&2
    trap 'for index in "${!linked[@]}"; do end_link "$index"; done; rm -f "$lifeline" "$logs/pid" "$logs/address"' EXIT

    start_coordinator "$logs/coordinator.log" "$@"
    echo "$address" >"$logs/address"
    echo "$coordinator" >"$logs/pid"
    while kill -0 "$coordinator" 2>/dev/null; do
        follow
        sleep 1 || true # a signal ends it
    done
    end_run
}

status() {
    require_run
    find_program
    "$program" status "$(cat "$logs/address")"
    wanted | while read -r host _; do
        printf '%s: %s\n' "$host" "$(tail -n 1 "$logs/$host.log" 2>/dev/null || echo "starting")"
    done
}

# edit HOST LINE: HOSTS with the host's line replaced; an empty line removes it.
edit() {
    local new
    new=$(mktemp "$hosts.XXXXXX")
    awk -v host="$1" '{ word = $1; sub(/#.*/, "", word) } word != host' "$hosts" >"$new"
    [[ -z $2 ]] || printf '%s\n' "$2" >>"$new"
    mv "$new" "$hosts"
}

main() {
    (($# >= 2)) || { usage >&2 && exit 2; }
    hosts=$1
    logs=$hosts.logs
    local command=$2
    shift 2
    case $command in
        start) run "$@" ;;
        status) status ;;
        logs)
            if (($# > 0)); then tail -n 20 "$logs/$1.log"; else tail -n 20 "$logs"/*.log; fi
            ;;
        add)
            [[ -e $hosts ]] || : >"$hosts"
            edit "${1:?say which host}" "$*"
            ;;
        remove)
            wanted | awk -v host="${1:?say which host}" '$1 == host { found = 1 } END { exit !found }' ||
                die "$hosts: $1 is not in it"
            edit "$1" ""
            ;;
        stop)
            require_run
            kill -INT "$(cat "$logs/pid")"
            ;;
        *) usage >&2 && exit 2 ;;
    esac
}

main "$@"
