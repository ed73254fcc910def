//! The runtime's state: turns input into engine events and carries out the engine's commands.

mod progress;
mod status;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use lockstep_model::batch::Sums;
use lockstep_model::checkpoint::{Manifest, Validation};
use lockstep_model::digest::hex;
use lockstep_model::ledger::slot_sha256;
use lockstep_model::schedule::learning_rate;
use lockstep_proto::v1;
use lockstep_proto::v1::coordinator_message::Kind as Message;
use tokio::sync::mpsc;

use crate::archive;
use crate::background::Background;
use crate::config::RunConfig;
use crate::dataplane::{DataPlane, Rules, State};
use crate::engine::command::{Failure, Lease, Outcome, Task};
use crate::engine::{Command, Engine, Event, Time, WorkerId};
use crate::exchange::{Publication, Staging};
use crate::input::{Finished, Input};
use crate::ledger::LedgerFile;
use crate::metrics::{Line, Metrics, ValidationLine};
use crate::observe::{Observer, RunEvent, Sample};
use crate::pair_means::PairMeans;
use crate::plot;
use crate::references::{self, Collected, ReferenceFile};
use crate::replicas::Replicas;
use crate::report;
use crate::roster::Roster;
use crate::run::Summary;
use crate::run_dir::RunDir;
use crate::sampler;
use crate::start::{self, Start};
use crate::step_times::StepTimes;
use crate::trace::traceparent;
use crate::translate;

/// All that changes while a run goes on.
pub(crate) struct Runtime {
    config: RunConfig,
    run_dir: RunDir,
    engine: Engine,
    origin: Instant,
    staging: Arc<Staging>,
    plane: DataPlane,
    archive: Background<archive::Job>,
    sampler: Option<Background<sampler::Job>>,
    metrics: Metrics,
    ledger: LedgerFile,
    observer: Observer,
    roster: Roster,
    /// What the next checkpoint will say, kept up to date.
    manifest: Manifest,
    /// What the first version says of rows, as it comes in.
    references: Collected,
    step: StepTimes,
    /// Loss and weight of the step that the data plane is applying.
    applying: Option<(Sums, f64)>,
    /// The result that the engine is judging; counted in the step's times if it is accepted.
    judging: Option<Finished>,
    ended: Option<Outcome>,
}

impl Runtime {
    /// A runtime where `start` says, whose threads report to `inputs`.
    pub(crate) fn new(
        mut config: RunConfig,
        start: Start,
        staging: Arc<Staging>,
        inputs: mpsc::UnboundedSender<Input>,
        observer: Observer,
    ) -> anyhow::Result<Self> {
        let Start { run_dir, state, base, manifest, metrics, ledger, references, resumed } = start;
        let rules = Rules {
            layout: manifest.layout(),
            optimizer: config.optimizer_of_versions().clone(),
            kept_elements: config.kept_moments() * manifest.layout().len(),
            replicas: config.outer.is_some(),
            skip: config.skip,
            slots: config.batch.slots,
            format: config.compression.gradients,
            seed: config.seed,
        };
        let news = inputs.clone();
        let plane = DataPlane::start(rules, manifest.step, state, staging.spare.clone(), move |applied| {
            drop(news.send(Input::Applied(applied)));
        })?;
        let news = inputs.clone();
        let keep_last = config.checkpoint.keep_last;
        let whole = resumed.then_some(manifest.step);
        let archive = archive::start(run_dir.checkpoints(), keep_last, run_dir.fence(), whole, move |input| {
            drop(news.send(input));
        })?;
        let sampler = match config.sampling.prompts.is_empty() {
            true => None,
            false => Some(sampler::start(
                config.model.clone(),
                config.adapters.clone().zip(base),
                config.tokenizer.clone(),
                config.sampling.clone(),
                config.turns.clone(),
                config.seed,
                move |sample| drop(inputs.send(Input::Sampled(sample))),
            )?),
        };
        let engine = start::engine_config(&config, run_dir.identity(), &manifest, resumed);
        if let Some(references) = references {
            config.source = Arc::new(config.source.with_references(references));
        }
        Ok(Self {
            engine: Engine::new(engine, Time::default()),
            origin: Instant::now(),
            roster: Roster::new(staging.clone(), observer.clone()),
            config,
            run_dir,
            staging,
            plane,
            archive,
            sampler,
            metrics,
            ledger,
            observer,
            manifest,
            references: Collected::default(),
            step: StepTimes::none(),
            applying: None,
            judging: None,
            ended: None,
        })
    }

    /// What workers may pull.
    pub(crate) fn publication(&self) -> Publication {
        self.plane.publication()
    }

    /// What replicas remember, which workers may pull.
    pub(crate) fn replicas(&self) -> Replicas {
        self.plane.replicas()
    }

    /// When to send [`Event::Tick`].
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.engine.next_deadline().map(|deadline| self.origin + deadline.0)
    }

    /// Whether the run is over.
    pub(crate) fn is_over(&self) -> bool {
        self.ended.is_some()
    }

    /// Whether a member's control stream is still open.
    pub(crate) fn has_company(&self) -> bool {
        self.roster.has_company()
    }

    /// Ends the control streams, after what was sent on them.
    pub(crate) fn hang_up(&mut self) {
        self.roster.hang_up();
    }

    /// Tells that the run can be joined, and begins it.
    pub(crate) fn begin(&mut self) -> anyhow::Result<()> {
        self.tell(&RunEvent::Started {
            run_id: self.manifest.run_id.clone(),
            step: self.manifest.step,
            total_steps: self.config.schedule.steps,
        });
        self.decide(Event::Tick)
    }

    fn tell(&self, event: &RunEvent) {
        (self.observer)(event);
    }

    /// Turns input into an event, and carries out what the engine decides.
    pub(crate) fn hear(&mut self, input: Input) -> anyhow::Result<()> {
        match input {
            Input::Join(applicant) => {
                let asked = self.roster.ask(applicant);
                self.decide(asked)
            }
            Input::Opened { worker, out } => {
                let opened = self.roster.open(worker, out);
                self.decide(opened)
            }
            Input::Closed { worker, reason } => {
                let closed = self.roster.close(worker, reason, !self.is_over());
                self.decide(closed)
            }
            Input::Heartbeat { worker, sent_unix_nanos, clock_offset_nanos } => {
                let heard = self.roster.heartbeat(worker, sent_unix_nanos, clock_offset_nanos);
                self.decide(heard)
            }
            Input::PushBegun { worker, lease } => self.decide(Event::PushBegun { worker, lease }),
            Input::Workers { worker, workers } => self.decide(Event::Workers { worker, workers }),
            Input::Result { worker, result } => self.judge(worker, result),
            Input::Declined { worker, lease, reason } => {
                // One that was taken back meanwhile may well come to nothing.
                if self.engine.holds(worker, lease) {
                    tracing::warn!(worker = worker.0, lease = lease.0, "lease declined: {reason}");
                }
                self.decide(Event::Declined { worker, lease, reason })
            }
            Input::Applied(applied) => self.commit(applied?),
            Input::Archived { step, written: Ok(path) } => {
                self.tell(&RunEvent::Checkpoint { step, path });
                self.draw();
                self.decide(Event::CheckpointWritten { step })
            }
            Input::Archived { step, written: Err(reason) } => {
                self.run_dir.fence().check()?;
                self.decide(Event::CheckpointFailed { step, reason })
            }
            Input::Kept { worker, blocks } => self.decide(Event::Kept { worker, blocks }),
            Input::RolledBack(checkpoint) => self.roll_back(checkpoint?),
            Input::Sampled(sample) => {
                self.keep_sample(&sample)?;
                self.tell(&RunEvent::Sample(sample));
                Ok(())
            }
            Input::Status { reply } => {
                // Whoever asked may be gone.
                let _ = reply.send(self.status());
                Ok(())
            }
        }
    }

    /// Lets the engine decide on an event, and carries out its commands.
    pub(crate) fn decide(&mut self, event: Event) -> anyhow::Result<()> {
        let now = Time(self.origin.elapsed());
        for command in self.engine.handle(event, now) {
            self.carry_out(command)?;
        }
        Ok(())
    }

    fn carry_out(&mut self, command: Command) -> anyhow::Result<()> {
        match &command {
            Command::Refuse { .. } | Command::Release { .. } | Command::Disconnect { .. } => {
                tracing::info!("{command}");
            }
            _ => tracing::debug!("{command}"),
        }
        match command {
            Command::Admit { ticket, worker, class } => {
                let classes: BTreeSet<String> = self.manifest.device_classes.drain(..).chain([hex(&class.0)]).collect();
                self.manifest.device_classes = classes.into_iter().collect();
                self.roster.admit(ticket, worker);
            }
            Command::Refuse { ticket, reason } => self.roster.refuse(ticket, reason),
            Command::Lease { worker, lease } => {
                if lease.task == Task::Gradient && self.step.number != lease.step {
                    self.step = StepTimes::begin(&self.manifest.run_id, lease.step);
                }
                if lease.task == Task::Gradient {
                    self.staging.open(worker, lease.id);
                }
                let message = self.lease_message(worker, &lease);
                self.roster.send(worker, Message::Lease(message));
            }
            Command::Accept { worker, lease, step, block } => {
                self.ledger.accept(worker, lease)?;
                self.references.accept(worker, lease, block, &self.config.source)?;
                if let Some(result) = self.judging.take() {
                    self.step.compute += result.compute;
                    self.step.upload += result.upload;
                }
                if let Some(vector) = self.staging.take(worker, lease) {
                    self.plane.add(step, block, vector, &self.step.span);
                }
            }
            Command::Discard { worker, lease, reason } => {
                self.ledger.discard(worker, lease);
                self.references.discard(worker, lease);
                self.staging.discard(worker, lease);
                if reason.is_to_be_revoked() {
                    self.roster.revoke(worker, lease);
                }
            }
            Command::Quarantine { name } => self.run_dir.quarantine(&name)?,
            Command::RestartStep { .. } => {
                self.ledger.restart();
                self.plane.restart();
            }
            Command::RollBack { at_most } => {
                self.run_dir.trust_up_to(Some(at_most))?;
                if let Some(archive) = self.archive.sender() {
                    // By way of the data plane, so that checkpoints of versions before are written first.
                    self.plane.then(move || drop(archive.send(archive::Job::RollBack { at_most })));
                }
            }
            Command::Report(finding) => self.report(&finding)?,
            Command::ApplyStep { step, sums } => {
                let lr = learning_rate(&self.config.schedule, self.config.optimizer.lr, step);
                self.applying = Some((sums, lr));
                let lr_of_versions = self.config.outer.as_ref().map_or(lr, |outer| outer.lr);
                self.plane.apply(step, lr_of_versions, sums, &self.step.span);
            }
            Command::RecordValidation { step, sums } => {
                let validation = Validation::new(step, sums.mean(), self.config.bytes_per_token);
                self.manifest.validation = Some(validation);
                let Validation { loss: val_loss, bits_per_byte: val_bits_per_byte, .. } = validation;
                let pairs = PairMeans::of(self.config.objective, sums);
                self.metrics.append(Line::Validation(ValidationLine { step, val_loss, val_bits_per_byte, pairs }))?;
                self.tell(&RunEvent::Validation { validation, pairs });
            }
            Command::RecordReferences => {
                self.run_dir.fence().check()?;
                let path = self.run_dir.references();
                let collected = std::mem::take(&mut self.references);
                let (references, sha256) = collected.finish(&ReferenceFile::of(&path, &self.manifest))?;
                self.config.source = Arc::new(self.config.source.with_references(references));
                self.manifest.references_sha256 = Some(sha256);
            }
            Command::Sample { step } => {
                if let Some(sampler) = self.sampler.as_ref().and_then(Background::sender) {
                    self.plane.snapshot(move |State { parameters, .. }| {
                        // A thread that panicked takes no more jobs; dropping its owner passes the panic on.
                        let _ = sampler.send(sampler::Job { step, parameters });
                    });
                }
            }
            Command::Checkpoint { .. } => {
                self.manifest.unchecked_since = self.engine.unchecked_since().clone();
                self.manifest.ledger = self.ledger.ledger();
                self.manifest.ledger_seal = self.ledger.seal().into();
                self.manifest.metrics_seal = self.metrics.journal().seal().into();
                let mut manifest = Box::new(self.manifest.clone());
                let sealed = vec![self.ledger.handle()?, self.metrics.journal().handle()?];
                if let Some(archive) = self.archive.sender() {
                    self.plane.snapshot(move |state| {
                        manifest.filter = state.filter.clone();
                        let _ = archive.send(archive::Job::Write { manifest, state, sealed });
                    });
                }
            }
            Command::Release { worker, reason } => self.roster.release(worker, &reason),
            Command::Disconnect { worker, reason } => self.roster.disconnect(worker, reason.to_string()),
            // What nobody computes is a relay's alone.
            Command::GiveBack { .. } => {}
            Command::Finish { outcome, .. } => {
                if let Outcome::Failed {
                    reason: reason @ (Failure::Disputed { step, slots, .. } | Failure::Unreliable { step, slots, .. }),
                } = &outcome
                {
                    let slots = std::slice::from_ref(slots);
                    report::write(&self.run_dir.reports(), &self.config, &reason.to_string(), *step, slots)?;
                }
                self.ended = Some(outcome);
            }
        }
        Ok(())
    }

    /// The lease with its rows, of which the ledger keeps the digests.
    fn lease_message(&mut self, worker: WorkerId, lease: &Lease) -> v1::Lease {
        let source = &self.config.source;
        let (step_slots, learning_rates) = match lease.task {
            Task::Gradient => (self.config.batch.slots, self.config.local_learning_rates(lease.step)),
            Task::Evaluate => (self.config.evaluation.slots, Vec::new()),
            Task::Reference => (source.reference_slots(), Vec::new()),
        };
        let batch = |slot| match lease.task {
            Task::Gradient => source.training_slot(lease.step, slot),
            Task::Evaluate => source.validation_slot(slot),
            Task::Reference => source.reference_slot(slot),
        };
        let numbers = lease.block.slots(step_slots);
        let rows: Vec<_> = numbers.clone().map(|slot| (slot, batch(slot))).collect();
        let digests = rows.iter().map(|(slot, batch)| slot_sha256(*slot, batch)).collect();
        let name = self.roster.look(worker).map_or("", |(name, _)| name);
        self.ledger.lend(worker, name, lease, numbers, digests);
        let replicas = self.plane.replicas();
        let moments = |slot| replicas.blake3(slot).filter(|_| lease.task == Task::Gradient);
        v1::Lease {
            slots: rows.iter().map(|(slot, batch)| translate::slot(*slot, batch, moments(*slot))).collect(),
            seed: self.config.seed,
            traceparent: traceparent(&self.manifest.run_id, lease.step),
            step_slots,
            ..translate::lease(lease, learning_rates, self.plane.published())
        }
    }

    /// Passes a result on to the engine.
    fn judge(&mut self, worker: WorkerId, mut result: Finished) -> anyhow::Result<()> {
        let spans = std::mem::take(&mut result.spans);
        if let Some((name, clock_offset_nanos)) = self.roster.look(worker).filter(|_| !spans.is_empty()) {
            self.tell(&RunEvent::Spans { worker: worker.0, name: name.into(), clock_offset_nanos, spans });
        }
        if let Err(reason) = self.ledger.check(worker, result.lease, result.batch_sha256) {
            tracing::warn!(worker = worker.0, "{reason}");
            return self.decide(Event::Declined { worker, lease: result.lease, reason });
        }
        let done = result.block_done(worker);
        if done.task == Task::Reference && self.engine.holds(worker, result.lease) {
            let row_values = std::mem::take(&mut result.row_values);
            if !references::fits(&self.config.source, result.block, row_values.len()) {
                let reason = format!("its result for lease {} has {} rows", result.lease, row_values.len());
                return self.decide(Event::Declined { worker, lease: result.lease, reason });
            }
            self.references.offer(worker, result.lease, row_values);
        }
        self.judging = Some(result);
        let decided = self.decide(Event::BlockDone(done));
        self.judging = None;
        decided
    }

    fn draw(&self) {
        let drawn = plot::loss_curve(&self.run_dir.loss_svg(), &self.config.recipe_name, self.metrics.lines());
        if let Err(error) = drawn {
            tracing::warn!("{}: cannot draw: {error}", self.run_dir.loss_svg().display());
        }
    }

    fn keep_sample(&self, sample: &Sample) -> anyhow::Result<()> {
        use std::io::Write as _;
        let path = self.run_dir.samples();
        let (start, roll_backs) = (self.run_dir.identity().incarnation, self.engine.status().counts.roll_backs);
        let heading = sampler::heading(sample.step, start, roll_backs);
        let text = match &sample.text {
            Ok(text) => format!("{heading}\n{}{text}\n\n", sample.prompt),
            Err(error) => format!("{heading}\n{}: {error}\n\n", sample.prompt),
        };
        let file = std::fs::OpenOptions::new().create(true).append(true).open(&path);
        file.and_then(|mut file| file.write_all(text.as_bytes()))
            .with_context(|| format!("{}: cannot append", path.display()))
    }

    /// Waits for the samples under way and draws the last picture.
    pub(crate) fn finish(mut self, queue: &mut mpsc::UnboundedReceiver<Input>) -> anyhow::Result<Summary> {
        // Jobs that the data plane still holds keep the sampler's queue open, so none is lost.
        self.sampler = None;
        while let Ok(input) = queue.try_recv() {
            self.hear(input)?;
        }
        self.draw();
        let outcome = self.ended.context("the run ended without an outcome")?;
        Ok(Summary {
            outcome,
            step: self.manifest.step,
            train_loss: self.manifest.train_loss,
            validation: self.manifest.validation,
        })
    }
}
