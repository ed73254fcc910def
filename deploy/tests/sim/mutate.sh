#!/usr/bin/env bash
# Breaks the engine's rules one by one and shows that the simulator notices: applies each patch of mutations/ to a copy of
# the engine, builds the copy alone (the pure rooms need neither gRPC nor burn), and runs seeds until an invariant does
# not hold. Prints that invariant for each patch; fails if one goes unnoticed, or does not apply or build any more.
#
#   deploy/tests/sim/mutate.sh [NAME...]     the patches to try, by name (default: all)
#   SEEDS=N                                  seeds a patch (default: 2000)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../../.." && pwd)
seeds=${SEEDS:-2000}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export CARGO_TARGET_DIR=$work/target CARGO_INCREMENTAL=1

# The dependencies of the root manifest, as they are pinned there.
{
    printf '[workspace]\nresolver = "3"\nmembers = ["model", "coordinator", "worker", "sim"]\n'
    sed -n '/^\[workspace.package\]/,/^\[workspace.lints/p' "$root/Cargo.toml" | sed '$d'
    printf '[profile.release]\nopt-level = 1\n'
} >"$work/Cargo.toml"
cp "$root/Cargo.lock" "$work/"

# crate NAME DEPENDENCY...: a crate of the copy.
crate() {
    local name=$1
    shift
    mkdir -p "$work/$name/src"
    {
        printf '[package]\nname = "lockstep-%s"\nversion.workspace = true\nedition.workspace = true\n' "$name"
        printf '[dependencies]\n'
        printf '%s.workspace = true\n' "$@"
    } >"$work/$name/Cargo.toml"
}

# without_tests FILE: takes the line that names a module of tests out.
without_tests() {
    sed -i '/^#\[cfg(test)\]$/{N;/\nmod tests;$/d}' "$1"
}

crate model bytemuck libm serde sha2 thiserror
crate coordinator lockstep-model
crate worker lockstep-model
crate sim lockstep-coordinator lockstep-model lockstep-worker
modules=(batch digest number random step_filter tree)
for module in "${modules[@]}"; do
    cp "$root/model/src/$module.rs" "$work/model/src/"
done
printf 'pub mod %s;\n' "${modules[@]}" >"$work/model/src/lib.rs"
cp "$root"/worker/src/{lease,session}.rs "$work/worker/src/"
without_tests "$work/worker/src/session.rs"
printf 'pub mod lease;\npub mod session;\n' >"$work/worker/src/lib.rs"
printf 'pub mod engine;\n' >"$work/coordinator/src/lib.rs"
mkdir -p "$work/deploy/examples" "$work/deploy/tests/sim"
cp "$root/deploy/examples/simulate.rs" "$work/deploy/examples/"
cp -r "$here/simulator" "$work/deploy/tests/sim/"
printf '[[bin]]\nname = "simulate"\npath = "../deploy/examples/simulate.rs"\n' >>"$work/sim/Cargo.toml"

# engine: an engine as it should be.
engine() {
    rm -rf "$work/coordinator/src/engine"
    cp -r "$root/coordinator/src/engine" "$work/coordinator/src/"
    rm -rf "$work/coordinator/src/engine/tests"
    without_tests "$work/coordinator/src/engine/mod.rs"
}

build() {
    (cd "$work" && cargo build --release --offline --quiet) >"$work/log" 2>&1
}

engine
if ! build || ! "$CARGO_TARGET_DIR/release/simulate" --seeds "$seeds" >"$work/log" 2>&1; then
    cat "$work/log"
    echo "FAILED: the engine as it is does not build, or its seeds are not clean"
    exit 1
fi

patches=("$here"/mutations/*.patch)
if (($# > 0)); then
    patches=("${@/#/$here/mutations/}")
    patches=("${patches[@]/%/.patch}")
fi
failed=0
for patch in "${patches[@]}"; do
    name=$(basename "$patch" .patch)
    engine
    if ! (cd "$work" && patch --quiet --strip=1 --forward <"$patch") >"$work/log" 2>&1 || ! build; then
        tail -n 20 "$work/log"
        printf '%-48s DOES NOT APPLY OR BUILD: mend the patch\n' "$name"
        failed=1
    elif "$CARGO_TARGET_DIR/release/simulate" --seeds "$seeds" >"$work/out" 2>&1; then
        printf '%-48s NOT NOTICED in %s seeds\n' "$name" "$seeds"
        failed=1
    else
        printf '%-48s %s\n' "$name" "$(sed -nE 's/^seed ([0-9]+): ([a-z_]+) .*/\2 (seed \1)/p' "$work/out" | head -n 1)"
    fi
done
if ((failed)); then
    echo "FAILED"
    exit 1
fi
echo "all ${#patches[@]} broken rules are noticed"
