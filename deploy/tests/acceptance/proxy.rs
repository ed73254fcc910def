//! A proxy on loopback between workers and a coordinator, which cuts connections and holds them up.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

/// Forwards what comes to `address` until dropped.
pub(crate) struct Proxy {
    /// Where workers connect.
    pub(crate) address: String,
    shared: Arc<Shared>,
}

struct Shared {
    target: String,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    links: Vec<Link>,
    /// Pieces forwarded on all links so far.
    passed: u64,
    /// The bytes in them, from workers and to workers.
    passed_bytes: [u64; 2],
    closed: bool,
}

/// A connection through the proxy, which is two.
struct Link {
    ends: [TcpStream; 2],
    held: bool,
    open: bool,
}

impl Proxy {
    /// A proxy before `target`.
    pub(crate) fn before(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
        let address = listener.local_addr().expect("a listener has an address").to_string();
        let shared = Shared { target: target.into(), state: Mutex::default(), changed: Condvar::new() };
        let shared = Arc::new(shared);
        let accepting = shared.clone();
        thread::spawn(move || {
            for worker in listener.incoming().map_while(Result::ok) {
                if accepting.state().closed {
                    break;
                }
                // Where nobody listens the connection ends at once, as it would without a proxy.
                if let Ok(coordinator) = TcpStream::connect(&accepting.target) {
                    accepting.link([worker, coordinator]);
                }
            }
        });
        Self { address, shared }
    }

    /// Bytes forwarded on all links so far: from workers, and to workers.
    pub(crate) fn passed_bytes(&self) -> [u64; 2] {
        self.shared.state().passed_bytes
    }

    /// The links that are open, by number.
    pub(crate) fn open_links(&self) -> Vec<usize> {
        let state = self.shared.state();
        (0..state.links.len()).filter(|link| state.links[*link].open).collect()
    }

    /// Breaks a link.
    pub(crate) fn cut(&self, link: usize) {
        self.shared.close(link);
    }

    /// Keeps back what comes on a link, in both directions.
    pub(crate) fn hold(&self, link: usize) {
        self.shared.state().links[link].held = true;
    }

    /// Lets pass what was kept back.
    pub(crate) fn let_go(&self, link: usize) {
        self.shared.state().links[link].held = false;
        self.shared.changed.notify_all();
    }

    /// Waits until so many more pieces have passed on any link.
    pub(crate) fn wait_for_passing(&self, pieces: u64) {
        let state = self.shared.state();
        let until = state.passed + pieces;
        let waited = self.shared.changed.wait_while(state, |state| state.passed < until);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.state().closed = true;
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(&self.address);
        let links = self.shared.state().links.len();
        (0..links).for_each(|link| self.shared.close(link));
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn link(self: &Arc<Self>, ends: [TcpStream; 2]) {
        for end in &ends {
            end.set_nodelay(true).expect("a socket takes options");
        }
        let copies = [0, 1].map(|end| ends[end].try_clone().expect("a socket can be shared"));
        let mut state = self.state();
        let link = state.links.len();
        for (from, to) in [(0, 1), (1, 0)] {
            let pair = [from, to].map(|end| ends[end].try_clone().expect("a socket can be shared"));
            let shared = self.clone();
            thread::spawn(move || shared.forward(link, from, pair));
        }
        state.links.push(Link { ends: copies, held: false, open: true });
    }

    fn forward(&self, link: usize, direction: usize, [mut from, mut to]: [TcpStream; 2]) {
        let mut piece = vec![0; 1 << 16];
        while let Ok(read @ 1..) = from.read(&mut piece) {
            let waited = self.changed.wait_while(self.state(), |state| state.links[link].held);
            let mut state = waited.unwrap_or_else(PoisonError::into_inner);
            state.passed += 1;
            state.passed_bytes[direction] += read as u64;
            drop(state);
            self.changed.notify_all();
            if to.write_all(&piece[..read]).is_err() {
                break;
            }
        }
        self.close(link);
    }

    fn close(&self, link: usize) {
        let mut state = self.state();
        let link = &mut state.links[link];
        (link.open, link.held) = (false, false);
        for end in &link.ends {
            // The other side may have closed it.
            let _ = end.shutdown(Shutdown::Both);
        }
        self.changed.notify_all();
    }
}
