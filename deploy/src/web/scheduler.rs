//! The thread that owns the engine: requests queue up before it, and text goes out to whoever asked.
//!
//! A request of several sequences takes as many places; running and waiting sequences together have so many, and whoever
//! finds none free is told at once. Sequences begin in the order in which they came. Nobody has to say that a client is
//! gone: its sequences end, running or waiting, before the next step once the receiver of their output is dropped.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::Duration;

use lockstep_model::inference::{Engine, Finish, Request, RequestError, SequenceId};
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::chat::answer::Answer;

/// A sequence to be computed, and its text.
pub(crate) struct Sequence {
    pub(crate) request: Request,
    pub(crate) answer: Answer,
}

/// What becomes of a sequence. Sequences of a request are numbered as they were submitted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    /// Its turn has come.
    Started,
    /// A token was chosen, and this text is certain with it, which may be empty.
    Token { sequence: usize, text: String },
    /// It is over, with what was held back of its text.
    Finished { sequence: usize, text: String, reason: FinishReason },
    /// It is over because the device failed, or the request was none for this model.
    Failed(String),
}

/// Why a sequence is over, in OpenAI's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum FinishReason {
    /// The model ended it, or a stop string came.
    Stop,
    /// It is as long as it may be.
    Length,
}

impl FinishReason {
    /// The word.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// Why sequences are not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// All places are taken.
    Full,
    /// The scheduler ends, or has ended.
    Stopping,
}

/// How much there is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) running: usize,
    pub(crate) queued: usize,
}

/// Takes sequences in, and has them computed.
pub(crate) struct Scheduler {
    messages: Sender<Message>,
    /// As many as may run and wait.
    places: Arc<Semaphore>,
    total_places: usize,
    running: Arc<AtomicUsize>,
    stopping: AtomicBool,
}

enum Message {
    Submit(Box<Job>),
    /// End when there is nothing more to do.
    Finish,
    /// End now.
    Stop,
}

/// A sequence that waits.
struct Job {
    request: Request,
    reply: Reply,
}

/// Where the text of a sequence goes.
struct Reply {
    number: usize,
    answer: Answer,
    outputs: mpsc::UnboundedSender<Output>,
    /// Free again when this is dropped.
    place: OwnedSemaphorePermit,
}

impl Scheduler {
    /// Starts the thread. At most `slots` sequences, which is the engine's own limit, run at once, and `queue` wait. The
    /// receiver completes when the thread ends.
    ///
    /// # Errors
    /// If the system starts no thread.
    pub(crate) fn start(engine: Engine, slots: usize, queue: usize) -> std::io::Result<(Self, oneshot::Receiver<()>)> {
        let (messages, inbox) = channel();
        let running = Arc::new(AtomicUsize::new(0));
        let mut work = Work::new(engine, slots, inbox, running.clone());
        let (alive, ended) = oneshot::channel::<()>();
        std::thread::Builder::new().name("engine".into()).spawn(move || {
            let _alive = alive;
            while work.turn() {}
        })?;
        let total_places = slots.saturating_add(queue).min(Semaphore::MAX_PERMITS);
        let places = Arc::new(Semaphore::new(total_places));
        Ok((Self { messages, places, total_places, running, stopping: AtomicBool::new(false) }, ended))
    }

    /// Takes all of `sequences`, or none. Their output ends early where the scheduler does.
    ///
    /// # Errors
    /// If there are not as many places, or no new ones are taken.
    pub(crate) fn submit(&self, sequences: Vec<Sequence>) -> Result<mpsc::UnboundedReceiver<Output>, Refusal> {
        if self.is_stopping() {
            return Err(Refusal::Stopping);
        }
        let count = u32::try_from(sequences.len()).map_err(|_| Refusal::Full)?;
        let mut places = self.places.clone().try_acquire_many_owned(count).map_err(|_| Refusal::Full)?;
        let (outputs, receiver) = mpsc::unbounded_channel();
        for (number, Sequence { request, answer }) in sequences.into_iter().enumerate() {
            let Some(place) = places.split(1) else { return Err(Refusal::Full) };
            let reply = Reply { number, answer, outputs: outputs.clone(), place };
            let job = Box::new(Job { request, reply });
            self.messages.send(Message::Submit(job)).map_err(|_| Refusal::Stopping)?;
        }
        Ok(receiver)
    }

    /// As many sequences as may run and wait.
    pub(crate) fn places(&self) -> usize {
        self.total_places
    }

    /// How many do.
    pub(crate) fn load(&self) -> Load {
        let taken = self.total_places - self.places.available_permits();
        let running = self.running.load(Ordering::Relaxed).min(taken);
        Load { running, queued: taken - running }
    }

    /// Whether new sequences are refused.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Refuses new sequences, gives those that are here as long as `grace`, and ends the thread, which `ended` tells. How many
    /// were left unfinished.
    pub(crate) async fn stop(&self, grace: Duration, ended: &mut oneshot::Receiver<()>) -> usize {
        self.stopping.store(true, Ordering::Relaxed);
        // A thread that is gone needs no word.
        let _ = self.messages.send(Message::Finish);
        if tokio::time::timeout(grace, ended).await.is_ok() {
            return 0;
        }
        let Load { running, queued } = self.load();
        let _ = self.messages.send(Message::Stop);
        running + queued
    }
}

/// The thread's own.
struct Work {
    engine: Engine,
    slots: usize,
    inbox: Receiver<Message>,
    waiting: VecDeque<Job>,
    running: BTreeMap<SequenceId, Reply>,
    /// How many run, for others to see.
    shown: Arc<AtomicUsize>,
    /// Whether to end when there is nothing more to do.
    finishing: bool,
}

impl Work {
    fn new(engine: Engine, slots: usize, inbox: Receiver<Message>, shown: Arc<AtomicUsize>) -> Self {
        Self { engine, slots, inbox, waiting: VecDeque::new(), running: BTreeMap::new(), shown, finishing: false }
    }

    /// Takes in what there is, waiting if there is nothing, and takes a step. `false` when it is over.
    fn turn(&mut self) -> bool {
        if !self.hear() {
            return false;
        }
        self.let_go();
        self.fill();
        self.shown.store(self.running.len(), Ordering::Relaxed);
        if !self.running.is_empty() {
            self.step();
        }
        self.shown.store(self.running.len(), Ordering::Relaxed);
        true
    }

    /// Receives messages, and waits for one where there is nothing to do. `false` where that is all.
    fn hear(&mut self) -> bool {
        loop {
            let idle = self.waiting.is_empty() && self.running.is_empty();
            let message = match idle {
                true if self.finishing => return false,
                true => self.inbox.recv().map_err(|_| TryRecvError::Disconnected),
                false => self.inbox.try_recv(),
            };
            match message {
                Ok(Message::Submit(job)) => self.waiting.push_back(*job),
                Ok(Message::Finish) => self.finishing = true,
                Ok(Message::Stop) | Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) => return true,
            }
        }
    }

    /// Ends the sequences that nobody listens to any more.
    fn let_go(&mut self) {
        self.waiting.retain(|job| !job.reply.outputs.is_closed());
        let engine = &mut self.engine;
        self.running.retain(|&id, reply| {
            let wanted = !reply.outputs.is_closed();
            if !wanted {
                engine.cancel(id);
            }
            wanted
        });
    }

    /// Begins sequences that wait, as long as slots are free.
    fn fill(&mut self) {
        while self.running.len() < self.slots
            && let Some(Job { request, reply }) = self.waiting.pop_front()
        {
            match self.engine.admit(request) {
                Ok(id) => {
                    reply.send(Output::Started);
                    self.running.insert(id, reply);
                }
                Err(error) => reply.send(Output::Failed(refused(&error))),
            }
        }
    }

    /// Takes a step, and hands out what it gave.
    fn step(&mut self) {
        let events = match self.engine.step() {
            Ok(events) => events,
            Err(error) => {
                tracing::error!("{error}; what was running is given up");
                for (id, reply) in std::mem::take(&mut self.running) {
                    self.engine.cancel(id);
                    reply.send(Output::Failed(error.to_string()));
                }
                return;
            }
        };
        for event in events {
            let Some(reply) = self.running.get_mut(&event.sequence) else { continue };
            if let Some(token) = event.token {
                let text = reply.answer.push(token);
                reply.send(Output::Token { sequence: reply.number, text });
            }
            let reason = match event.finish {
                _ if reply.answer.stopped() => Some(FinishReason::Stop),
                Some(Finish::End) => Some(FinishReason::Stop),
                Some(Finish::Length) => Some(FinishReason::Length),
                None => None,
            };
            if let Some(reason) = reason
                && let Some(reply) = self.running.remove(&event.sequence)
            {
                self.engine.cancel(event.sequence);
                reply.finish(reason);
            }
        }
    }
}

/// What was checked before, and is refused all the same.
fn refused(error: &RequestError) -> String {
    format!("the engine does not take the request: {error}")
}

impl Reply {
    /// Whoever asked may be gone, which [`Work::let_go`] sees.
    fn send(&self, output: Output) {
        let _ = self.outputs.send(output);
    }

    fn finish(self, reason: FinishReason) {
        let Self { number: sequence, answer, outputs, place } = self;
        // The place is free before the client knows, so that it finds one when it comes back.
        drop(place);
        let _ = outputs.send(Output::Finished { sequence, text: answer.finish(), reason });
    }
}

#[cfg(test)]
mod tests {
    use lockstep_model::config::{Gelu, GptConfig, ModelConfig};
    use lockstep_model::device::{ComputeDevice, DeviceChoice};
    use lockstep_model::inference::{Limits, Overflow, Sampling};
    use lockstep_model::layout::initial_parameters;
    use lockstep_model::tokenizer::Tokenizer;

    use super::*;

    /// A scheduler without its thread: a test takes the turns.
    fn unthreaded(slots: usize, queue: usize) -> (Scheduler, Work) {
        let gpt = GptConfig {
            vocab_size: 256,
            context: 64,
            layers: 1,
            heads: 1,
            width: 8,
            bias: false,
            tied_head: true,
            score_head: false,
            gelu: Gelu::Exact,
            norm_epsilon: 1e-5,
            dropout: 0.0,
        };
        let model = ModelConfig::Gpt(gpt);
        let device = ComputeDevice::open(DeviceChoice::Cpu).unwrap();
        let limits = Limits { sequences: slots, ..Limits::default() };
        let engine = Engine::new(&model, &initial_parameters(&model, 1), &device, limits).unwrap();
        let (messages, inbox) = channel();
        let running = Arc::new(AtomicUsize::new(0));
        let work = Work::new(engine, slots, inbox, running.clone());
        let places = Arc::new(Semaphore::new(slots + queue));
        let stopping = AtomicBool::new(false);
        (Scheduler { messages, places, total_places: slots + queue, running, stopping }, work)
    }

    fn sequence(max_tokens: usize, stops: &[&str]) -> Sequence {
        let sampling = Sampling { seed: 4, ..Sampling::default() };
        let request = Request { prompt: vec![65], max_tokens, sampling, ends: vec![], overflow: Overflow::Stop };
        let stops = stops.iter().map(|stop| stop.to_string()).collect();
        Sequence { request, answer: Answer::continuation(&Tokenizer::Bytes, stops) }
    }

    fn load(running: usize, queued: usize) -> Load {
        Load { running, queued }
    }

    fn all(outputs: &mut mpsc::UnboundedReceiver<Output>) -> Vec<Output> {
        std::iter::from_fn(|| outputs.try_recv().ok()).collect()
    }

    #[test]
    fn sequences_begin_in_their_order_and_none_too_many() {
        let (scheduler, mut work) = unthreaded(2, 1);
        let mut two = scheduler.submit(vec![sequence(3, &[]), sequence(9, &[])]).unwrap();
        let mut third = scheduler.submit(vec![sequence(3, &[])]).unwrap();
        assert_eq!(scheduler.submit(vec![sequence(3, &[])]).unwrap_err(), Refusal::Full);
        assert_eq!(scheduler.load(), load(0, 3));
        assert!(work.turn());
        assert_eq!((scheduler.load(), third.try_recv().is_err()), (load(2, 1), true));
        assert!(work.turn() && work.turn());
        assert_eq!(scheduler.load(), load(1, 1), "the first has its three tokens");
        assert!(work.turn());
        assert_eq!((scheduler.load(), third.try_recv().unwrap()), (load(2, 0), Output::Started));
        while scheduler.load() != load(0, 0) {
            assert!(work.turn());
        }
        let outputs = all(&mut two);
        let tokens = |number| {
            let is_token = |output: &&Output| matches!(output, Output::Token { sequence, .. } if *sequence == number);
            outputs.iter().filter(is_token).count()
        };
        assert_eq!((tokens(0), tokens(1)), (3, 9));
        let lengths =
            outputs.iter().filter(|output| matches!(output, Output::Finished { reason: FinishReason::Length, .. }));
        assert_eq!(lengths.count(), 2);
    }

    #[test]
    fn nobodys_sequences_end_before_the_next_step() {
        let (scheduler, mut work) = unthreaded(1, 3);
        let running = scheduler.submit(vec![sequence(50, &[])]).unwrap();
        let waiting = scheduler.submit(vec![sequence(50, &[]), sequence(50, &[])]).unwrap();
        let mut last = scheduler.submit(vec![sequence(50, &[])]).unwrap();
        assert!(work.turn());
        assert_eq!(scheduler.load(), load(1, 3));
        drop((running, waiting));
        assert!(work.turn());
        assert_eq!((scheduler.load(), work.engine.running()), (load(1, 0), 1));
        assert_eq!(last.try_recv().unwrap(), Output::Started);
    }

    #[test]
    fn a_stop_string_ends_a_sequence_with_what_stands_before_it() {
        let (scheduler, mut work) = unthreaded(1, 0);
        let text = |stops: &[&str], work: &mut Work| {
            let mut outputs = scheduler.submit(vec![sequence(40, stops)]).unwrap();
            while scheduler.load() != load(0, 0) {
                assert!(work.turn());
            }
            let (mut said, mut end) = (String::new(), None);
            for output in all(&mut outputs) {
                match output {
                    Output::Token { text, .. } => said.push_str(&text),
                    Output::Finished { text, reason, .. } => {
                        said.push_str(&text);
                        end = Some(reason);
                    }
                    Output::Started | Output::Failed(_) => {}
                }
            }
            (said, end.unwrap())
        };
        let (whole, reason) = text(&[], &mut work);
        assert_eq!(reason, FinishReason::Length);
        let stop: String = whole.chars().skip(12).take(4).collect();
        let before = whole.split_once(&stop).unwrap().0.to_string();
        assert_eq!(text(&[&stop], &mut work), (before, FinishReason::Stop));
        assert_eq!(work.engine.running(), 0);
    }

    #[tokio::test]
    async fn what_is_left_when_it_stops_is_cut_off() {
        let (scheduler, mut work) = unthreaded(1, 1);
        let mut outputs = scheduler.submit(vec![sequence(50, &[]), sequence(50, &[])]).unwrap();
        assert!(work.turn());
        let (_alive, mut ended) = oneshot::channel();
        assert_eq!(scheduler.stop(Duration::ZERO, &mut ended).await, 2);
        assert_eq!(scheduler.submit(vec![sequence(1, &[])]).unwrap_err(), Refusal::Stopping);
        assert!(!work.turn());
        drop(work);
        all(&mut outputs);
        assert_eq!(outputs.try_recv(), Err(mpsc::error::TryRecvError::Disconnected));
    }

    #[tokio::test]
    async fn what_is_here_when_it_stops_is_finished_if_there_is_time() {
        let (scheduler, mut work) = unthreaded(1, 1);
        let mut outputs = scheduler.submit(vec![sequence(5, &[]), sequence(5, &[])]).unwrap();
        let (alive, mut ended) = oneshot::channel::<()>();
        drop(alive);
        assert_eq!(scheduler.stop(Duration::MAX, &mut ended).await, 0);
        while work.turn() {}
        let finished = all(&mut outputs).into_iter().filter(|output| matches!(output, Output::Finished { .. }));
        assert_eq!((finished.count(), scheduler.load()), (2, load(0, 0)));
    }

    #[test]
    fn a_request_that_the_engine_refuses_fails_in_words() {
        let (scheduler, mut work) = unthreaded(1, 1);
        let mut wrong = sequence(5, &[]);
        wrong.request.prompt = vec![300];
        let mut outputs = scheduler.submit(vec![wrong]).unwrap();
        assert!(work.turn());
        assert!(matches!(outputs.try_recv(), Ok(Output::Failed(said)) if said.contains("300")));
        assert_eq!(scheduler.load(), load(0, 0));
    }
}
