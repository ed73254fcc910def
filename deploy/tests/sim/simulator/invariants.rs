//! What must hold in every run, whatever fails: one small function each. It sees what happens next and what was before.

use lockstep_coordinator::engine::command::{Failure, Lease, Outcome, ReleaseReason, Task};
use lockstep_coordinator::engine::{Command, EngineConfig, Event};
use lockstep_model::random::{Draws, Stream};
use lockstep_model::tree::{Block, TreeSum};

use super::history::{History, Open, Seen};

/// An invariant: what is wrong, if it does not hold.
type Invariant = fn(&History, &Seen<'_>) -> Result<(), String>;

macro_rules! invariants {
    ($($name:ident,)*) => { &[$((stringify!($name), $name)),*] };
}

/// All of them, by name.
const INVARIANTS: &[(&str, Invariant)] = invariants![
    every_slot_counts_once,
    only_results_of_open_leases_count,
    only_current_gradients_count,
    what_counts_is_right,
    losses_are_right,
    versions_follow_one_another,
    a_run_goes_back_to_the_newest_checkpoint,
    every_version_is_the_quiet_runs,
    validation_losses_are_the_quiet_runs,
    a_validation_loss_is_recorded_once,
    references_come_first_and_once,
    references_are_right,
    leases_go_to_the_connected,
    leases_are_for_the_present_version,
    nobody_has_two_leases_to_compute,
    nothing_is_leased_or_counted_while_parameters_change,
    nothing_is_leased_below_the_least_number_of_workers,
    every_lease_ends_once,
    audited_blocks_count_when_two_agree,
    wrong_looking_gradients_count_when_computed_twice,
    only_wrong_workers_are_quarantined,
    the_outvoted_are_quarantined,
    the_quarantined_stay_out,
    nothing_unchecked_of_the_quarantined_remains,
    earlier_incarnations_are_not_heard,
    a_checkpoint_holds_the_present_version,
    vectors_do_not_pile_up,
    a_run_ends_on_disk,
    nothing_follows_the_end,
    a_run_ends_as_the_quiet_run,
];

/// An invariant that does not hold.
#[derive(Clone, Debug)]
pub(crate) struct Violation {
    pub(crate) invariant: &'static str,
    pub(crate) what: String,
}

/// Checks all invariants against what happens next.
///
/// # Errors
/// The first that does not hold.
pub(crate) fn check(history: &History, seen: &Seen<'_>) -> Result<(), Violation> {
    for (invariant, holds) in INVARIANTS {
        holds(history, seen).map_err(|what| Violation { invariant, what })?;
    }
    Ok(())
}

/// `Err` in words unless something holds.
fn ensure(holds: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what()) }
}

fn overlap(one: Block, other: Block) -> bool {
    one.contains(other) || other.contains(one)
}

fn every_slot_counts_once(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    let complete = |slots| {
        let mut tree = TreeSum::new(slots);
        let all = history.counted.iter().all(|block| tree.insert(*block, (), |(), (), _| ()).is_ok());
        ensure(all && tree.is_complete(), || format!("{:?} of {slots} slots counted", history.counted))
    };
    match seen {
        Seen::Decided(Command::Accept { block, .. }) => {
            let again = history.counted.iter().find(|counted| overlap(**counted, *block));
            ensure(again.is_none(), || format!("block {block} counts beside {again:?}"))
        }
        Seen::Decided(Command::ApplyStep { .. }) => complete(history.config.slots),
        Seen::Decided(Command::RecordValidation { .. }) => complete(history.config.eval_slots),
        Seen::Decided(Command::RecordReferences) => complete(history.config.reference_slots),
        _ => Ok(()),
    }
}

fn only_results_of_open_leases_count(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    let Seen::Decided(Command::Accept { worker, lease, step, block }) = seen else { return Ok(()) };
    let open = history.open.get(&(*worker, *lease));
    let fits = open.is_some_and(|open| open.answered && (open.lease.step, open.lease.block) == (*step, *block));
    ensure(fits, || format!("accepted under {open:?}"))
}

fn only_current_gradients_count(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    let Seen::Added { block, vector } = seen else { return Ok(()) };
    let Some(vector) = vector else { return Err(format!("no vector for block {block}")) };
    let current = (vector.made_with, vector.step, vector.block) == (history.params, history.version + 1, *block);
    ensure(current, || format!("{vector:?} is added for {block} of step {}", history.version + 1))
}

fn what_counts_is_right(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    let Seen::Added { block, vector: Some(vector) } = seen else { return Ok(()) };
    let right = history.numbers.compute(history.params, history.version + 1, Task::Gradient, *block).vector;
    let same = right.is_some_and(|right| right.value.to_bits() == vector.value.to_bits());
    ensure(same, || format!("{} is added for block {block} where {right:?} is right", vector.value))
}

fn losses_are_right(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    let Seen::Decided(Command::ApplyStep { step, sums }) = seen else { return Ok(()) };
    let root = Block::root(history.config.slots);
    let right = history.numbers.compute(history.params, *step, Task::Gradient, root).sums;
    ensure(*sums == right, || format!("{sums:?} for step {step} where {right:?} is right"))
}

fn versions_follow_one_another(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    match seen {
        Seen::Decided(Command::ApplyStep { step, .. } | Command::RestartStep { step }) => {
            ensure(*step == history.version + 1, || format!("step {step} after version {}", history.version))
        }
        Seen::Applied { step, .. } => ensure(history.changing && *step == history.version + 1, || {
            format!("version {step} after {}, asked for: {}", history.version, history.changing)
        }),
        _ => Ok(()),
    }
}

fn a_run_goes_back_to_the_newest_checkpoint(_: &History, seen: &Seen<'_>) -> Result<(), String> {
    let Seen::Restored { step, newest, .. } = seen else { return Ok(()) };
    ensure(step == newest, || format!("back at step {step}, though the newest trustworthy checkpoint is of {newest}"))
}

fn every_version_is_the_quiet_runs(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    let (step, params, skipped) = match seen {
        Seen::Applied { step, params, skipped } => (*step, *params, Some(*skipped)),
        Seen::Restored { step, params, .. } => (*step, *params, None),
        _ => return Ok(()),
    };
    let quiet = history.quiet.versions.get(step as usize).copied();
    ensure(quiet == Some(params), || format!("version {step} is {params:x}, in the quiet run {quiet:x?}"))?;
    let right = skipped.is_none_or(|skipped| history.quiet.skipped[step as usize] == skipped);
    ensure(right, || format!("step {step} skipped: {skipped:?}, in the quiet run the contrary"))
}

fn validation_losses_are_the_quiet_runs(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    let Seen::Validated { step, sums, .. } = seen else { return Ok(()) };
    let quiet = history.quiet.versions.get(*step as usize).map(|params| history.numbers.validation(*params, *step));
    ensure(quiet == Some(*sums), || format!("{sums:?} at step {step}, in the quiet run {quiet:?}"))
}

fn a_validation_loss_is_recorded_once(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    match seen {
        Seen::Validated { step, already, .. } => ensure(!already, || format!("that of step {step} a second time")),
        Seen::Over { validations, .. } => {
            let recorded: Vec<u64> = validations.iter().map(|(step, _)| *step).collect();
            let due = (0..=history.quiet.last()).filter(|step| is_evaluated(history, *step));
            let due: Vec<u64> = due.collect();
            ensure(recorded == due, || format!("recorded at {recorded:?}, due at {due:?}"))
        }
        _ => Ok(()),
    }
}

/// Whether the validation loss of a boundary is due: every so many steps and at the last, unless the run halts there.
fn is_evaluated(history: &History, step: u64) -> bool {
    let EngineConfig { eval_slots, evaluate_every_steps: every, total_steps, .. } = history.config;
    let due = every > 0 && (step.is_multiple_of(every) || step == total_steps);
    eval_slots > 0 && due && history.quiet.halts_at != Some(step)
}

fn references_come_first_and_once(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    let Seen::Decided(Command::Lease { lease, .. }) = seen else { return Ok(()) };
    let is_reference = lease.task == Task::Reference;
    ensure(is_reference != history.referenced, || format!("{lease}, though referenced: {}", history.referenced))
}

fn references_are_right(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    let Seen::Decided(Command::Accept { worker, lease, block, .. }) = seen else { return Ok(()) };
    let of_reference = history.open.get(&(*worker, *lease)).is_some_and(|open| open.lease.task == Task::Reference);
    let Some(done) = history.result(*worker, *lease).filter(|_| of_reference) else { return Ok(()) };
    let right = history.numbers.compute(history.numbers.initial(), 0, Task::Reference, *block).slot_sums;
    let name = history.members.get(worker).map_or("", |member| &member.name);
    let honest = !history.wrong.contains(name) || history.config.audit > 0.0;
    ensure(!honest || done.slot_sums == right, || format!("{:?} where {right:?} is right", done.slot_sums))
}

fn leases_go_to_the_connected(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    let Seen::Decided(Command::Lease { worker, lease }) = seen else { return Ok(()) };
    let member = history.members.get(worker);
    ensure(member.is_some_and(|member| member.connected), || format!("{lease} to worker {worker}: {member:?}"))
}

fn leases_are_for_the_present_version(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    let Seen::Decided(Command::Lease { lease, .. }) = seen else { return Ok(()) };
    let Lease { step, version, task, block, .. } = *lease;
    let slots = history.numbers.slots_of(task);
    let at = match task {
        Task::Gradient => step == version + 1,
        Task::Evaluate => step == version,
        Task::Reference => (step, version) == (0, 0),
    };
    let fits = block.exists(slots) && block.slots(slots).len() <= history.config.max_slots_per_lease as usize;
    let wanted = !history.counted.iter().any(|counted| overlap(*counted, block));
    ensure(at && version == history.version && fits && wanted, || {
        format!("{lease}, with version {} published and {:?} counted", history.version, history.counted)
    })
}

fn nobody_has_two_leases_to_compute(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    let Seen::Decided(Command::Lease { worker, lease }) = seen else { return Ok(()) };
    let all = (*worker, lockstep_coordinator::engine::LeaseId(0))..=(*worker, lease.id);
    let others: Vec<&Open> = history.open.range(all).map(|(_, open)| open).filter(|open| !open.answered).collect();
    let free = others.len() <= 1 && others.iter().all(|open| open.travels);
    let another = others.iter().all(|open| open.lease.block != lease.block);
    ensure(free && another, || format!("worker {worker} gets {lease} beside {others:?}"))
}

fn nothing_is_leased_or_counted_while_parameters_change(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    match seen {
        Seen::Decided(command @ (Command::Lease { .. } | Command::Accept { .. } | Command::ApplyStep { .. })) => {
            ensure(!history.changing, || format!("{command} while parameters change"))
        }
        _ => Ok(()),
    }
}

fn nothing_is_leased_below_the_least_number_of_workers(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    let Seen::Decided(Command::Lease { .. }) = seen else { return Ok(()) };
    let least = if history.stop_requested { 1 } else { history.config.min_workers };
    let connected = history.connected();
    ensure(connected >= least as usize, || format!("{connected} workers are here, {least} needed"))
}

fn every_lease_ends_once(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    match seen {
        Seen::Decided(Command::Discard { worker, lease, reason }) => {
            let known = history.open.contains_key(&(*worker, *lease)) || history.answering == Some((*worker, *lease));
            ensure(known, || format!("lease {lease} of worker {worker} is not open, and discarded: {reason}"))
        }
        Seen::Decided(command @ (Command::ApplyStep { .. } | Command::RollBack { .. } | Command::Finish { .. })) => {
            let open: Vec<&Open> = history.open.values().take(3).collect();
            ensure(open.is_empty(), || format!("{command}, with open leases {open:?}"))
        }
        Seen::Settled { .. } => {
            let orphan = history.open.keys().find(|(worker, _)| !history.members.contains_key(worker));
            ensure(orphan.is_none(), || format!("{orphan:?} is open, and its worker is no member"))
        }
        _ => Ok(()),
    }
}

/// Whether a block is drawn for an audit, by the words of the configuration.
fn is_audited(config: &EngineConfig, Lease { step, task, block, .. }: Lease) -> bool {
    if task == Task::Reference {
        return config.audit > 0.0;
    }
    let evaluation = if task == Task::Evaluate { 1 << 63 } else { 0 };
    let node = u64::from(block.level) << 32 | u64::from(block.index) | evaluation;
    config.audit > 0.0 && Draws::new(config.audit_seed, Stream::Audit).unit(step, node) < config.audit
}

fn audited_blocks_count_when_two_agree(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    let Seen::Decided(Command::Accept { worker, lease, .. }) = seen else { return Ok(()) };
    let Some(open) = history.open.get(&(*worker, *lease)) else { return Ok(()) };
    let confirmed = !is_audited(&history.config, open.lease) || history.is_confirmed(*worker, *lease);
    ensure(confirmed, || format!("{} counts by {:?} alone", open.lease, history.opinions(*worker, *lease)))
}

fn wrong_looking_gradients_count_when_computed_twice(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    let Seen::Decided(Command::Accept { worker, lease, .. }) = seen else { return Ok(()) };
    let norm = history.result(*worker, *lease).and_then(|done| done.norm);
    let looks_wrong = norm.is_some_and(|norm| !norm.is_finite());
    let opinions = history.opinions(*worker, *lease);
    ensure(!looks_wrong || opinions.len() > 1, || format!("lease {lease} with norm {norm:?} counts by {opinions:?}"))
}

fn only_wrong_workers_are_quarantined(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    let Seen::Decided(Command::Release { worker, reason: ReleaseReason::Quarantined { .. } }) = seen else {
        return Ok(());
    };
    let member = history.members.get(worker);
    ensure(member.is_some_and(|member| history.wrong.contains(&member.name)), || format!("{member:?} is quarantined"))
}

fn the_outvoted_are_quarantined(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    let Seen::Settled { .. } = seen else { return Ok(()) };
    let free = history.outvoted.iter().find(|name| !history.quarantined.contains(*name));
    ensure(free.is_none(), || format!("{free:?} computed something else than two others, and goes on"))
}

fn the_quarantined_stay_out(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    match seen {
        Seen::Decided(Command::Admit { ticket, .. }) => {
            let name = history.joining.get(ticket);
            let out = name.is_some_and(|name| history.quarantined.contains(name));
            ensure(!out, || format!("{name:?} is admitted"))
        }
        Seen::Settled { .. } if !history.quarantined.is_empty() => {
            let inside = history.members.values().find(|member| history.quarantined.contains(&member.name));
            ensure(inside.is_none(), || format!("{inside:?} is still a member"))
        }
        _ => Ok(()),
    }
}

fn nothing_unchecked_of_the_quarantined_remains(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    let Seen::Decided(Command::ApplyStep { step, .. }) = seen else { return Ok(()) };
    if history.config.audit == 0.0 {
        return Ok(());
    }
    let mut unchecked = history.unchecked_since.iter().filter(|(name, _)| history.quarantined.contains(*name));
    let remains = unchecked.find(|(_, since)| *since <= step);
    ensure(remains.is_none(), || format!("step {step} is applied on top of unchecked blocks since {remains:?}"))
}

fn earlier_incarnations_are_not_heard(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    let Seen::Heard { meant_for: Some(meant_for), event } = seen else { return Ok(()) };
    let now = history.incarnation;
    ensure(*meant_for == now, || format!("start {now} hears what was meant for start {meant_for}: {event:?}"))
}

fn a_checkpoint_holds_the_present_version(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    let Seen::Decided(Command::Checkpoint { step }) = seen else { return Ok(()) };
    let fits = *step == history.version && !history.changing && history.writing.is_none();
    ensure(fits, || format!("of {step} at version {}, with {:?} being written", history.version, history.writing))
}

fn vectors_do_not_pile_up(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    let Seen::Settled { staged } = seen else { return Ok(()) };
    // Beside what is leased: what was on its way when its lease ended.
    let most = history.open.len() + 2 * history.members.len() + 2;
    ensure(*staged <= most, || format!("{staged} vectors wait, of {} open leases", history.open.len()))
}

fn a_run_ends_on_disk(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    match seen {
        Seen::Decided(Command::Finish { step, outcome: Outcome::Completed | Outcome::Stopped { .. } }) => {
            let saved = history.saved == Some(*step);
            ensure(saved, || format!("at step {step}, with a checkpoint of {:?}", history.saved))
        }
        _ => Ok(()),
    }
}

fn nothing_follows_the_end(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    match seen {
        Seen::Heard { event: Event::Tick, .. } => Ok(()),
        Seen::Decided(Command::Refuse { .. } | Command::Release { .. } | Command::Discard { .. }) => Ok(()),
        // One who comes late is told to go.
        Seen::Decided(Command::Disconnect { .. }) => Ok(()),
        Seen::Decided(command) => ensure(!history.finished, || format!("{command} after the end")),
        _ => Ok(()),
    }
}

fn a_run_ends_as_the_quiet_run(history: &History, seen: &Seen<'_>) -> Result<(), String> {
    let Seen::Over { outcome, .. } = seen else { return Ok(()) };
    let halts = matches!(outcome, Outcome::Failed { reason: Failure::BadSteps { .. } });
    let same = halts == history.quiet.halts_at.is_some() && history.version == history.quiet.last();
    ensure(same, || format!("{outcome} at step {}, the quiet run at step {}", history.version, history.quiet.last()))
}
