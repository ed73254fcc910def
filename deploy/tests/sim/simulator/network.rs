//! Connections as TCP gives them: what is sent arrives in order, or the connection breaks. A partition delays what is
//! under way; between calls, and between connections, there is no order.

use std::collections::BTreeMap;
use std::time::Duration;

use lockstep_coordinator::engine::WorkerId;
use lockstep_coordinator::engine::command::Task;
use lockstep_coordinator::engine::event::KeptBlock;
use lockstep_model::batch::Sums;
use lockstep_model::tree::Block;
use lockstep_worker::lease;

use super::chance::Chance;
use super::numbers::{Params, Vector};

/// One connection of one worker. Never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ConnectionId(pub u64);

/// From worker to coordinator.
#[derive(Clone, Debug)]
pub(crate) enum Up {
    /// Asks what there is to do.
    Join,
    /// Asks to be admitted.
    Admit {
        incarnation: u64,
        name: String,
    },
    /// Opens the control stream.
    Open {
        incarnation: u64,
        worker: WorkerId,
    },
    /// On the control stream.
    Heartbeat,
    Kept(Vec<KeptBlock>),
    Result(ResultMessage),
    Declined {
        lease: u64,
        reason: String,
    },
    /// The worker closes its control stream.
    Close,
    /// The first bytes of a gradient.
    PushBegun {
        incarnation: u64,
        worker: WorkerId,
        lease: u64,
    },
    /// A gradient.
    Push {
        incarnation: u64,
        worker: WorkerId,
        lease: u64,
        vector: Vector,
    },
    /// Asks for parameters.
    Pull {
        incarnation: u64,
        version: u64,
    },
}

/// A lease done.
#[derive(Clone, Debug)]
pub(crate) struct ResultMessage {
    pub(crate) incarnation: u64,
    pub(crate) lease: u64,
    pub(crate) step: u64,
    pub(crate) version: u64,
    pub(crate) task: Task,
    pub(crate) block: Block,
    pub(crate) digest: Option<[u8; 32]>,
    pub(crate) sums: Sums,
    pub(crate) slot_sums: Vec<Sums>,
    pub(crate) compute: Duration,
}

/// From coordinator to worker.
#[derive(Clone, Debug)]
pub(crate) enum Down {
    Invitation {
        incarnation: u64,
    },
    /// The id, or why not.
    Admitted(Result<WorkerId, Refused>),
    /// The control stream is open.
    Opened,
    /// On the control stream.
    Lease(lease::Lease),
    Revoke {
        lease: u64,
    },
    HeartbeatAck,
    Release {
        reason: String,
        run_goes_on: bool,
    },
    /// The coordinator closes the control stream.
    Close,
    /// What became of a push, or a pull.
    Pushed {
        lease: u64,
        result: Result<(), Refused>,
    },
    Pulled {
        asked: u64,
        result: Result<Params, Refused>,
    },
}

/// Why a call fails.
#[derive(Clone, Debug)]
pub(crate) enum Refused {
    /// Trying again as it is does not help.
    Final(String),
    /// It does after joining again.
    Lost(String),
}

impl Up {
    /// Whether it goes over the control stream.
    fn is_control(&self) -> bool {
        matches!(self, Self::Heartbeat | Self::Kept(_) | Self::Result(_) | Self::Declined { .. } | Self::Close)
    }
}

impl Down {
    /// Whether it goes over the control stream.
    fn is_control(&self) -> bool {
        matches!(
            self,
            Self::Opened
                | Self::Lease(_)
                | Self::Revoke { .. }
                | Self::HeartbeatAck
                | Self::Release { .. }
                | Self::Close
        )
    }
}

/// One connection.
#[derive(Clone, Debug)]
pub(crate) struct Connection {
    /// Whose, by its place in the cluster.
    pub(crate) worker: usize,
    /// Since when nothing passes any more.
    pub(crate) broken_at: Option<Duration>,
    /// The member whose control stream it carries.
    pub(crate) member: Option<WorkerId>,
    /// When the last message of the control stream arrives, each way.
    last_up: Duration,
    last_down: Duration,
}

/// All connections.
#[derive(Debug)]
pub(crate) struct Network {
    connections: BTreeMap<ConnectionId, Connection>,
    opened: u64,
    latency_secs: (f64, f64),
    chance: Chance,
    /// Until when nothing passes between a worker and the coordinator.
    cut_until: Vec<Duration>,
}

impl Network {
    pub(crate) fn new(seed: u64, workers: usize, latency_secs: (f64, f64)) -> Self {
        Self {
            connections: BTreeMap::new(),
            opened: 0,
            latency_secs,
            chance: Chance::new(seed, 2),
            cut_until: vec![Duration::ZERO; workers],
        }
    }

    /// A new connection of a worker.
    pub(crate) fn connect(&mut self, worker: usize) -> ConnectionId {
        self.opened += 1;
        let id = ConnectionId(self.opened);
        let (broken_at, member, zero) = (None, None, Duration::ZERO);
        self.connections.insert(id, Connection { worker, broken_at, member, last_up: zero, last_down: zero });
        id
    }

    /// A connection.
    pub(crate) fn get(&self, id: ConnectionId) -> Option<&Connection> {
        self.connections.get(&id)
    }

    /// A connection, to change.
    pub(crate) fn get_mut(&mut self, id: ConnectionId) -> Option<&mut Connection> {
        self.connections.get_mut(&id)
    }

    /// The connections that work, in the order in which they were opened.
    pub(crate) fn working(&self) -> Vec<ConnectionId> {
        let working = self.connections.iter().filter(|(_, connection)| connection.broken_at.is_none());
        working.map(|(id, _)| *id).collect()
    }

    /// Nothing passes between a worker and the coordinator until then.
    pub(crate) fn cut(&mut self, worker: usize, until: Duration) {
        self.cut_until[worker] = until;
    }

    /// All partitions end.
    pub(crate) fn heal(&mut self) {
        self.cut_until.fill(Duration::ZERO);
    }

    /// When what would arrive at `due` does arrive, as far as partitions let it.
    pub(crate) fn passes(&self, worker: usize, due: Duration) -> Duration {
        due.max(self.cut_until[worker])
    }

    /// How long a message travels.
    pub(crate) fn latency(&mut self) -> Duration {
        self.chance.secs(self.latency_secs.0, self.latency_secs.1 * 1.001)
    }

    /// When a message sent now arrives; `None` if there is no such connection.
    pub(crate) fn send_up(&mut self, id: ConnectionId, message: &Up, now: Duration) -> Option<Duration> {
        let latency = match message {
            // Before the rest of it.
            Up::PushBegun { .. } => Duration::from_secs_f64(self.latency_secs.0),
            _ => self.latency(),
        };
        let connection = self.connections.get_mut(&id)?;
        if !message.is_control() {
            return Some(now + latency);
        }
        connection.last_up = connection.last_up.max(now + latency);
        Some(connection.last_up)
    }

    /// As [`Self::send_up`].
    pub(crate) fn send_down(&mut self, id: ConnectionId, message: &Down, now: Duration) -> Option<Duration> {
        let latency = self.latency();
        let connection = self.connections.get_mut(&id)?;
        if !message.is_control() {
            return Some(now + latency);
        }
        connection.last_down = connection.last_down.max(now + latency);
        Some(connection.last_down)
    }
}
