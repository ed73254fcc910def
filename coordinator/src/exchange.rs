//! What vectors pass through between network and data plane: gradients that wait for their block to be accepted or
//! discarded, the published parameters, and the memory that workers of this machine share with us.

use std::collections::HashMap;
use std::hash::BuildHasher as _;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use bytes::Bytes;
use lockstep_model::pieces::{PieceDigest, PieceSquares, in_pieces, in_pieces_mut};
use lockstep_proto::chunk;
use lockstep_proto::region::{Region, Token, stamp_of};
use lockstep_proto::v1;

use crate::engine::{LeaseId, WorkerId};

/// Vectors that may lie idle.
const MAX_SPARE: usize = 2;

/// Memory for vectors that is used again.
#[derive(Debug, Default)]
pub(crate) struct Spare(Mutex<Vec<Vec<f32>>>);

impl Spare {
    /// A vector of any length and content.
    pub(crate) fn take(&self) -> Vec<f32> {
        self.lock().pop().unwrap_or_default()
    }

    /// Takes back one that nobody needs any more.
    pub(crate) fn give_back(&self, vector: Vec<f32>) {
        let mut spare = self.lock();
        if spare.len() < MAX_SPARE {
            spare.push(vector);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Vec<f32>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gradients that were pushed and wait for their block to be accepted or discarded.
#[derive(Debug, Default)]
pub(crate) struct Staging {
    stage: Mutex<Stage>,
    /// What gradients are received in.
    pub(crate) spare: Arc<Spare>,
}

#[derive(Debug, Default)]
struct Stage {
    /// Who may leave vectors here, and where one writes its gradients that shares memory with us.
    members: HashMap<WorkerId, Option<Arc<Region>>>,
    /// By open lease; `None` until it is pushed.
    vectors: HashMap<(WorkerId, LeaseId), Option<Staged>>,
}

/// A pushed gradient.
#[derive(Debug)]
pub(crate) struct Staged {
    /// Flat, in layout order.
    pub(crate) vector: Vec<f32>,
    /// BLAKE3 of its bytes.
    pub(crate) digest: [u8; 32],
    /// Its L2 norm; not finite if an element is not.
    pub(crate) norm: f64,
}

impl Staged {
    /// A vector that came by the network.
    pub(crate) fn of(vector: Vec<f32>) -> Self {
        let looks = in_pieces(&vector, |start, piece| Look::at(start, piece, vector.len()));
        Self::looked_at(vector, looks)
    }

    /// Takes the vector of `lease` out of shared memory, into `vector`; `None` if it is not there.
    ///
    /// # Errors
    /// If the system refuses.
    pub(crate) fn read(region: &Region, lease: LeaseId, mut vector: Vec<f32>) -> io::Result<Option<Self>> {
        let elements = region.elements();
        if !region.has(lease.0)? {
            return Ok(None);
        }
        vector.resize(elements, 0.0);
        let looks = in_pieces_mut(&mut vector, |start, piece| {
            region.read(start, piece).map(|()| Look::at(start, piece, elements))
        });
        let looks = looks.into_iter().collect::<io::Result<Vec<_>>>()?;
        Ok(region.has(lease.0)?.then(|| Self::looked_at(vector, looks)))
    }

    fn looked_at(vector: Vec<f32>, looks: Vec<Look>) -> Self {
        let (digests, squares): (Vec<_>, Vec<_>) = looks.into_iter().map(|look| (look.digest, look.squares)).unzip();
        Self { digest: PieceDigest::join(&digests, vector.len()), norm: PieceSquares::norm(&squares), vector }
    }
}

/// What one piece of a gradient adds to what is known of the whole.
struct Look {
    digest: PieceDigest,
    squares: PieceSquares,
}

impl Look {
    fn at(start: usize, piece: &[f32], elements: usize) -> Self {
        Self { digest: PieceDigest::of(piece, start, elements), squares: PieceSquares::of(piece) }
    }
}

impl Staging {
    /// Lets a new member leave vectors here.
    pub(crate) fn admit(&self, worker: WorkerId) {
        self.lock().members.insert(worker, None);
    }

    /// Where a member may write its gradients.
    pub(crate) fn share(&self, worker: WorkerId, region: Arc<Region>) {
        if let Some(place) = self.lock().members.get_mut(&worker) {
            *place = Some(region);
        }
    }

    /// Where a member writes its gradients, if it may.
    pub(crate) fn region(&self, worker: WorkerId) -> Option<Arc<Region>> {
        self.lock().members.get(&worker).cloned().flatten()
    }

    /// Expects a vector for a lease, until it is taken.
    pub(crate) fn open(&self, worker: WorkerId, lease: LeaseId) {
        self.lock().vectors.insert((worker, lease), None);
    }

    /// Keeps a vector for a lease if one is expected; `false` if the worker is no member. The first one stays, whatever comes
    /// later: what was judged by its digest is what is taken.
    pub(crate) fn put(&self, worker: WorkerId, lease: LeaseId, staged: Staged) -> bool {
        let mut stage = self.lock();
        match stage.vectors.get_mut(&(worker, lease)) {
            Some(place @ None) => *place = Some(staged),
            _ => self.spare.give_back(staged.vector),
        }
        stage.members.contains_key(&worker)
    }

    /// Digest and norm of what waits for a lease.
    pub(crate) fn look(&self, worker: WorkerId, lease: LeaseId) -> Option<([u8; 32], f64)> {
        let stage = self.lock();
        let staged = stage.vectors.get(&(worker, lease))?.as_ref()?;
        Some((staged.digest, staged.norm))
    }

    /// Takes a lease's vector out, and expects none any more.
    pub(crate) fn take(&self, worker: WorkerId, lease: LeaseId) -> Option<Vec<f32>> {
        self.lock().vectors.remove(&(worker, lease)).flatten().map(|staged| staged.vector)
    }

    /// Lets go of a lease's vector, and expects none any more.
    pub(crate) fn discard(&self, worker: WorkerId, lease: LeaseId) {
        if let Some(vector) = self.take(worker, lease) {
            self.spare.give_back(vector);
        }
    }

    /// Ends a membership: forgets all that the worker left, and takes nothing more from it.
    pub(crate) fn forget_worker(&self, worker: WorkerId) {
        let mut stage = self.lock();
        stage.members.remove(&worker);
        stage.vectors.retain(|(owner, _), _| *owner != worker);
    }

    fn lock(&self) -> MutexGuard<'_, Stage> {
        // Every operation above leaves the stage whole, so a panic elsewhere cannot have broken it.
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The parameters that workers may pull.
#[derive(Clone, Debug)]
pub(crate) struct Published {
    /// Optimizer steps applied.
    pub(crate) version: u64,
    /// BLAKE3 of the elements as little-endian f32, in layout order.
    pub(crate) digest: [u8; 32],
    /// These bytes, once somebody asks for them.
    bytes: Arc<OnceLock<Bytes>>,
    /// How to get there from the version that was published before.
    pub(crate) difference: Option<Difference>,
}

/// What two versions of the parameters differ by.
#[derive(Clone, Debug)]
pub(crate) struct Difference {
    /// BLAKE3 of the version that it is added to.
    pub(crate) from: [u8; 32],
    /// For [`lockstep_model::compression::add_difference`].
    pub(crate) bytes: Bytes,
}

/// The newest parameters, for workers elsewhere and for those who share memory with us.
#[derive(Clone, Debug)]
pub(crate) struct Publication(Arc<Publisher>);

#[derive(Debug)]
struct Publisher {
    newest: RwLock<Published>,
    shared: Option<Shared>,
}

/// Memory that workers of this machine may open.
#[derive(Debug)]
struct Shared {
    token: Token,
    /// Version v is in region v mod 2.
    parameters: [Region; 2],
}

impl Publication {
    /// Publishes `parameters` as `version`.
    pub(crate) fn new(version: u64, parameters: &[f32]) -> Self {
        let publication = Self::empty(parameters.len());
        publication.set(version, parameters);
        publication
    }

    /// A place for versions of so many `elements`, of which there is none yet.
    pub(crate) fn empty(elements: usize) -> Self {
        let shared = Shared::create(elements);
        if let Err(error) = &shared {
            tracing::debug!("vectors go through the network stack on this machine, too: {error}");
        }
        let shared = shared.ok();
        let unpublished = Published { version: 0, digest: [0; 32], bytes: Arc::default(), difference: None };
        Self(Arc::new(Publisher { newest: RwLock::new(unpublished), shared }))
    }

    /// What is published now.
    pub(crate) fn get(&self) -> Published {
        self.0.newest.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Publishes `parameters` as `version` instead.
    pub(crate) fn set(&self, version: u64, parameters: &[f32]) {
        self.set_by(version, parameters, None);
    }

    /// The same; by `difference` they are what was published before, if that is known.
    pub(crate) fn set_by(&self, version: u64, parameters: &[f32], difference: Option<Vec<u8>>) {
        let draft = self.draft(version, parameters.len());
        let digests = in_pieces(parameters, |start, piece| draft.add(start, piece));
        self.publish(draft, &digests, parameters, difference);
    }

    /// Begins a version of so many `elements`, to be made ready piece by piece.
    pub(crate) fn draft(&self, version: u64, elements: usize) -> Draft<'_> {
        Draft::new(version, elements, self.0.shared.as_ref())
    }

    /// Publishes what `draft` was made of: these `parameters`, whose pieces have these `digests`, and which are by `difference`
    /// what was published before, if that is known.
    pub(crate) fn publish(
        &self,
        draft: Draft<'_>,
        digests: &[PieceDigest],
        parameters: &[f32],
        difference: Option<Vec<u8>>,
    ) {
        let published = draft.finish(digests, parameters);
        let mut newest = self.0.newest.write().unwrap_or_else(PoisonError::into_inner);
        let difference = difference.map(|bytes| Difference { from: newest.digest, bytes: bytes.into() });
        *newest = Published { difference, ..published };
    }

    /// What is published, as little-endian f32; `None` if it is not any more.
    pub(crate) fn bytes(&self, published: &Published) -> Option<Bytes> {
        if let Some(bytes) = published.bytes.get() {
            return Some(bytes.clone());
        }
        let (region, stamp) = (self.0.shared.as_ref()?.region(published.version), stamp_of(&published.digest));
        let mut vector = vec![0.0; region.elements()];
        region.read(0, &mut vector).ok()?;
        let whole = region.has(stamp).ok()?;
        whole.then(|| published.bytes.get_or_init(|| chunk::to_bytes(&vector)).clone())
    }

    /// Memory for what a worker pushes, vectors of `elements`, and how it is told of all that it may use, where there is any.
    pub(crate) fn share(&self, elements: usize) -> Option<(Arc<Region>, v1::SharedMemory)> {
        let Shared { token, parameters } = self.0.shared.as_ref()?;
        let gradient = Region::create(token, elements).ok()?;
        let offer = v1::SharedMemory {
            token: token.to_vec(),
            parameters: parameters.iter().map(Region::path).collect(),
            gradient: gradient.path(),
        };
        Some((Arc::new(gradient), offer))
    }
}

/// A version that is being made.
pub(crate) struct Draft<'a> {
    version: u64,
    elements: usize,
    region: Option<&'a Region>,
    /// Whether the region could be written.
    written: AtomicBool,
}

impl<'a> Draft<'a> {
    fn new(version: u64, elements: usize, shared: Option<&'a Shared>) -> Self {
        let region = shared.map(|shared| shared.region(version));
        let written = region.is_some_and(|region| region.clear().is_ok()).into();
        Self { version, elements, region, written }
    }

    /// Adds the piece from element `start` on; its digest.
    pub(crate) fn add(&self, start: usize, piece: &[f32]) -> PieceDigest {
        if self.region.is_some_and(|region| region.write(start, piece).is_err()) {
            self.written.store(false, Ordering::Relaxed);
        }
        PieceDigest::of(piece, start, self.elements)
    }

    fn finish(self, digests: &[PieceDigest], parameters: &[f32]) -> Published {
        let digest = PieceDigest::join(digests, self.elements);
        let stamped = |region: &Region| region.put_stamp(stamp_of(&digest)).is_ok();
        let bytes = OnceLock::new();
        if !(self.written.into_inner() && self.region.is_some_and(stamped)) {
            let _ = bytes.set(chunk::to_bytes(parameters));
        }
        Published { version: self.version, digest, bytes: Arc::new(bytes), difference: None }
    }
}

impl Shared {
    fn create(elements: usize) -> io::Result<Self> {
        let token = random_token();
        let parameters = [Region::create(&token, elements)?, Region::create(&token, elements)?];
        Ok(Self { token, parameters })
    }

    /// Where a version of the parameters is, until two versions later.
    fn region(&self, version: u64) -> &Region {
        &self.parameters[(version % 2) as usize]
    }
}

/// Different each time, on each machine.
fn random_token() -> Token {
    let mut token = Token::default();
    for (index, bytes) in token.chunks_exact_mut(8).enumerate() {
        let number = std::hash::RandomState::new().hash_one((crate::service::unix_nanos(), index));
        bytes.copy_from_slice(&number.to_ne_bytes());
    }
    token
}

#[cfg(test)]
mod tests {
    use lockstep_model::compression::{add_difference, advance};
    use lockstep_model::pieces::vector_blake3;

    use super::*;

    #[test]
    fn only_members_leave_vectors() {
        let (staging, worker, lease) = (Staging::default(), WorkerId(1), LeaseId(7));
        let staged = || Staged { vector: vec![1.0], digest: [3; 32], norm: 1.0 };
        assert!(!staging.put(worker, lease, staged()));
        staging.admit(worker);
        assert!(staging.put(worker, lease, staged()));
        assert_eq!(staging.look(worker, lease), None, "nobody asked for it");
        staging.open(worker, lease);
        assert!(staging.put(worker, lease, staged()));
        assert_eq!(staging.look(worker, lease), Some(([3; 32], 1.0)));
        staging.put(worker, lease, Staged { vector: vec![2.0], digest: [4; 32], norm: 2.0 });
        assert_eq!(staging.look(worker, lease), Some(([3; 32], 1.0)), "the first one stays");
        staging.forget_worker(worker);
        assert!(!staging.put(worker, lease, staged()));
        assert_eq!(staging.take(worker, lease), None);
    }

    #[test]
    fn what_is_published_is_there_for_others_until_two_versions_later() {
        let publication = Publication::new(4, &[1.0, -2.0]);
        let first = publication.get();
        let bytes = chunk::to_bytes(&[1.0, -2.0]);
        assert_eq!((first.version, first.digest), (4, vector_blake3(&[1.0, -2.0])));
        publication.set(5, &[3.0, 4.0]);
        assert_eq!(publication.bytes(&first), Some(bytes));
        let second = publication.get();
        assert_eq!(second.version, 5);
        publication.set(6, &[5.0, 6.0]);
        publication.set(7, &[7.0, 8.0]);
        if publication.share(2).is_some() {
            assert_eq!(publication.bytes(&second), None, "another version is in its place");
        }
        assert_eq!(publication.bytes(&publication.get()), Some(chunk::to_bytes(&[7.0, 8.0])));
        assert!(publication.get().difference.is_none());
    }

    #[test]
    fn a_difference_is_one_to_what_was_published_before() {
        let (mut published, master) = ([1.0, -2.0], [1.5, -2.0]);
        let publication = Publication::new(4, &published);
        let (draft, before) = (publication.draft(5, 2), publication.get());
        let (digests, difference) = advance(&mut published, &master, |start, piece| draft.add(start, piece));
        publication.publish(draft, &digests, &published, Some(difference));
        let now = publication.get();
        let Difference { from, bytes } = now.difference.clone().unwrap();
        assert_eq!((from, now.digest), (before.digest, vector_blake3(&published)));
        let mut held = [1.0, -2.0];
        add_difference(&bytes, &mut held);
        assert_eq!(held, master);
        publication.set(6, &[0.0, 0.0]);
        assert!(publication.get().difference.is_none(), "what is set leads on from nothing");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_worker_of_this_machine_reads_and_writes_where_it_is_told() {
        let publication = Publication::new(0, &[1.0, -2.0]);
        let (region, offer) = publication.share(2).unwrap();
        let token = offer.token.as_slice().try_into().unwrap();
        let open = |path: &str| Region::open(path, &token, 2).unwrap();
        let parameters = open(&offer.parameters[0]);
        let mut vector = [0.0; 2];
        parameters.read(0, &mut vector).unwrap();
        assert!(parameters.has(stamp_of(&publication.get().digest)).unwrap() && vector == [1.0, -2.0]);

        let gradient = open(&offer.gradient);
        gradient.write(0, &[3.0, 4.0]).unwrap();
        gradient.put_stamp(9).unwrap();
        assert!(Staged::read(&region, LeaseId(8), Vec::new()).unwrap().is_none(), "another lease's");
        let staged = Staged::read(&region, LeaseId(9), vec![7.0; 5]).unwrap().unwrap();
        assert_eq!((staged.digest, staged.norm), (vector_blake3(&[3.0, 4.0]), 5.0));
        assert_eq!(staged.vector, [3.0, 4.0]);
    }
}
