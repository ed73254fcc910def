#!/usr/bin/env bash
# A model's whole way on one machine: tokenizer, pre-training, answering, a reward model, preferences, and a table of it all.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

usage() {
    cat <<'TEXT'
Trains a small model through all stages, on examples that the program makes up, and measures each stage on what was not
learned. Some 10 minutes on two cores; nothing is downloaded.

Usage: speedrun.sh [--seed N] [--workers N] [--out DIR] [--quick]

  --seed N       seed of examples and runs [default: 1]
  --workers N    workers of each run [default: 2]; the result does not depend on it
  --out DIR      where everything goes, and must not be there yet [default: runs/speedrun-SEED]
  --quick        a few examples and steps of each: tries the script, and teaches the models nothing

Environment:
  LOCKSTEP       the program [default: the release build of this workspace]
TEXT
}

# number KEY: the number that a JSON text on standard input has under a key.
number() {
    sed -n "s/^ *\"$1\": \([-0-9.e]*\),\{0,1\}\$/\1/p" | head -n 1
}

# validated RUN KEY: what a run's metrics say under a key at its first validation, and at its last.
validated() {
    sed -n "s/.*\"val_loss\".*\"$2\":\([-0-9.e]*\)[,}].*/\1/p" "$out/$1/metrics.jsonl" | sed -n '1p;$p'
}

# percent SHARE
percent() {
    awk -v share="$1" 'BEGIN { printf "%.1f %%", 100 * share }'
}

# stage NAME COMMAND...: says what is done, does it, and notes how long it took.
stage() {
    local name=$1 begun=$SECONDS
    shift
    say ""
    say "── $name: ${*##*/}"
    "$@"
    timings+="$(printf '| %s | %d s |' "$name" $((SECONDS - begun)))"$'\n'
}

# train STAGE KEY=VALUE...: a run of a stage's recipe.
train() {
    local recipe=$1 sets=()
    shift
    ((quick == 0)) || set -- "$@" schedule.steps=6 schedule.warmup_steps=1 evaluation.every_steps=3 evaluation.slots=2
    for set in "seed=$seed" "$@"; do
        sets+=(--set "$set")
    done
    "$program" train "$recipes/$recipe.toml" --workers "$workers" --run "$out/$recipe" "${sets[@]}"
}

# evaluate RUN OPTIONS...: scores of a run, as JSON.
evaluate() {
    local run=$1
    shift
    (cd "$out" && "$program" eval "$run" --json "$@")
}

# row WHAT BEFORE AFTER COMMAND: a line of the table.
row() {
    rows+="| $1 | $2 | $3 | \`$4\` |"$'\n'
}

main() {
    seed=1 workers=2 out="" quick=0
    while (($# > 0)); do
        case $1 in
            -h | --help) usage && exit ;;
            --seed) seed=${2:?} && shift 2 ;;
            --workers) workers=${2:?} && shift 2 ;;
            --out) out=${2:?} && shift 2 ;;
            --quick) quick=1 && shift ;;
            *) usage >&2 && exit 2 ;;
        esac
    done
    out=${out:-runs/speedrun-$seed}
    find_program
    program=$(cd "$(dirname "$program")" && pwd -P)/${program##*/}
    [[ ! -e $out ]] || die "$out: is there already; remove it, or give another --out"
    mkdir -p "$out"
    recipes=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
    timings="" rows=""

    # examples KIND PART COUNT
    examples() {
        local count=$(($3 >> 5 * quick))
        "$program" examples "$1" --part "$2" --count "$count" --seed "$seed" --out "$out/$1-$2.jsonl"
    }
    make_examples() {
        examples stories train 6000
        examples problems train 14000 && examples problems test 500
        examples manners train 2000 && examples manners test 300
    }
    stage examples make_examples
    stage tokenizer "$program" prepare "$out/stories-train.jsonl" --tokenizer bpe --vocab-size 512 --out "$out/stories"
    stage pre-training train pretrain "data.input=$out/stories"
    stage sft train sft "init=$out/pretrain" "data.input=$out/problems-train.jsonl"
    stage reward train reward "init=$out/sft" "data.input=$out/manners-train.jsonl"
    stage dpo train dpo "init=$out/sft" "data.input=$out/manners-train.jsonl"
    stage evaluation measure
    report | tee "$out/report.md"
    say ""
    say "talk to it: $program chat --run $out/dpo"
}

measure() {
    local pairs="--preferences manners-test.jsonl" before after preferred
    local -a read
    read=($(validated pretrain val_bits_per_byte))
    row "bits per byte of stories held back, pre-training" "$(printf '%.2f' "${read[0]}")" "$(printf '%.2f' "${read[1]}")" \
        "lockstep inspect pretrain"
    before=$(evaluate pretrain --problems problems-test.jsonl --answer-tokens 100)
    after=$(evaluate sft --problems problems-test.jsonl --answer-tokens 100)
    preferred=$(evaluate dpo --problems problems-test.jsonl --answer-tokens 100)
    row "unseen problems solved, SFT" "$(percent "$(number exact <<<"$before")")" \
        "$(percent "$(number exact <<<"$after")")" "lockstep eval sft --problems problems-test.jsonl"
    row "answers that end by themselves, SFT" "$(percent "$(number ended <<<"$before")")" \
        "$(percent "$(number ended <<<"$after")")" "the same"
    row "the same problems solved, DPO" "$(percent "$(number exact <<<"$after")")" \
        "$(percent "$(number exact <<<"$preferred")")" "lockstep eval dpo --problems problems-test.jsonl"
    row "answers that end by themselves, DPO" "$(percent "$(number ended <<<"$after")")" \
        "$(percent "$(number ended <<<"$preferred")")" "the same"

    local accuracy='rewards\/accuracies'
    read=($(validated reward "$accuracy"))
    # shellcheck disable=SC2086 # options are words
    after=$(evaluate reward $pairs | number "$accuracy")
    row "unseen pairs whose polite answer scores higher, reward model" "$(percent "${read[0]}")" "$(percent "$after")" \
        "lockstep eval reward $pairs"
    read=($(validated dpo "$accuracy"))
    # shellcheck disable=SC2086
    after=$(evaluate dpo $pairs --reference sft | number "$accuracy")
    row "unseen pairs whose polite answer has gained more, DPO" "$(percent "${read[0]}")" "$(percent "$after")" \
        "lockstep eval dpo $pairs --reference sft"
    # shellcheck disable=SC2086
    before=$(evaluate sft $pairs | number "$accuracy") after=$(evaluate dpo $pairs | number "$accuracy")
    row "unseen pairs whose polite answer is likelier, DPO" "$(percent "$before")" "$(percent "$after")" \
        "lockstep eval dpo $pairs"
}

# What was measured, as Markdown.
report() {
    printf '\n| Measured (seed %s) | Before | After | Command |\n|---|---|---|---|\n%s' "$seed" "$rows"
    printf '\n| Stage | Time |\n|---|---|\n%s| in all | %d s |\n' "$timings" "$SECONDS"
}

main "$@"
