//! The memory that a coordinator on the same machine shares with this worker.

use std::io;
use std::sync::Arc;

use lockstep_model::pieces::in_pieces_mut;
use lockstep_proto::region::{Region, stamp_of};
use lockstep_proto::v1;
use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::client::blocking;
use crate::device::Gradient;
use crate::lease::Parameters;
use crate::session::TransferFailure;

/// Memory in which vectors are passed on.
#[derive(Debug)]
pub(crate) struct Shared {
    /// Version v of the parameters is in region v mod 2.
    parameters: [Region; 2],
    /// For one gradient at a time.
    gradient: Arc<Mutex<Region>>,
}

impl Shared {
    /// Opens what was offered, for parameters of so many `elements` and pushed vectors of `pushed_elements`; `None` where it
    /// is not there, as on another machine.
    pub(crate) fn open(offer: &v1::SharedMemory, elements: usize, pushed_elements: usize) -> Option<Self> {
        let token = offer.token.as_slice().try_into().ok()?;
        let [even, odd] = offer.parameters.as_slice() else { return None };
        let open = |path: &str| Region::open(path, &token, elements);
        let gradient = Region::open(&offer.gradient, &token, pushed_elements)?;
        Some(Self { parameters: [open(even)?, open(odd)?], gradient: Arc::new(Mutex::new(gradient)) })
    }

    /// A version of the parameters, if it is there.
    pub(crate) fn version(self: &Arc<Self>, Parameters { version, digest }: Parameters) -> Option<SharedVersion> {
        let version = SharedVersion { shared: self.clone(), region: (version % 2) as usize, stamp: stamp_of(&digest?) };
        version.is_there().then_some(version)
    }

    /// Puts the gradient of a lease there, once the one before was taken. The next one waits until the guard is dropped.
    pub(crate) async fn put(
        &self,
        lease: u64,
        gradient: &Gradient,
    ) -> Result<OwnedMutexGuard<Region>, TransferFailure> {
        let place = self.gradient.clone().lock_owned().await;
        let gradient = gradient.clone();
        let (place, written) = blocking(move || {
            let written = put(&place, lease, &gradient);
            (place, written)
        })
        .await?;
        written.map_err(|error| TransferFailure::Refused(format!("shared memory cannot be written: {error}")))?;
        Ok(place)
    }
}

fn put(region: &Region, lease: u64, gradient: &[f32]) -> io::Result<()> {
    if gradient.len() != region.elements() {
        let text = format!("a gradient of {} elements for a region of {}", gradient.len(), region.elements());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    region.clear()?;
    region.write(0, gradient)?;
    region.put_stamp(lease)
}

/// A version of the parameters that was there a moment ago.
#[derive(Debug)]
pub struct SharedVersion {
    shared: Arc<Shared>,
    region: usize,
    stamp: u64,
}

impl SharedVersion {
    /// Whether it is still there: what was read before is of this version then.
    pub(crate) fn is_there(&self) -> bool {
        matches!(self.region().has(self.stamp), Ok(true))
    }

    /// Fetches the elements from `start` on.
    ///
    /// # Errors
    /// If the system refuses.
    pub(crate) fn read(&self, start: usize, elements: &mut [f32]) -> io::Result<()> {
        self.region().read(start, elements)
    }

    /// All elements; `None` if others took their place meanwhile.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn read_all(&self) -> io::Result<Option<Vec<f32>>> {
        let mut vector = vec![0.0; self.region().elements()];
        let read = in_pieces_mut(&mut vector, |start, piece| self.read(start, piece));
        read.into_iter().collect::<io::Result<()>>()?;
        Ok(self.is_there().then_some(vector))
    }

    fn region(&self) -> &Region {
        &self.shared.parameters[self.region]
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    const TOKEN: [u8; 32] = [3; 32];

    #[tokio::test]
    async fn parameters_and_gradients_pass_through_what_was_offered() {
        let [even, odd, gradient] = [(); 3].map(|()| Region::create(&TOKEN, 2).unwrap());
        let offer = v1::SharedMemory {
            token: TOKEN.to_vec(),
            parameters: vec![even.path(), odd.path()],
            gradient: gradient.path(),
        };
        let shared = Arc::new(Shared::open(&offer, 2, 2).unwrap());
        let digest = Some([9; 32]);
        odd.write(0, &[1.0, 2.0]).unwrap();
        odd.put_stamp(stamp_of(&[9; 32])).unwrap();
        let version = shared.version(Parameters { version: 7, digest }).unwrap();
        let mut vector = [0.0; 2];
        version.read(0, &mut vector).unwrap();
        assert!(version.is_there() && vector == [1.0, 2.0]);
        assert_eq!(version.read_all().unwrap(), Some(vec![1.0, 2.0]));
        assert!(shared.version(Parameters { version: 8, digest }).is_none());
        assert!(shared.version(Parameters { version: 7, digest: Some([8; 32]) }).is_none());
        assert!(shared.version(Parameters { version: 7, digest: None }).is_none());
        odd.clear().unwrap();
        assert!(!version.is_there() && version.read_all().unwrap().is_none(), "another one is being written");

        let place = shared.put(3, &Gradient::from(vec![0.5, 0.25])).await.unwrap();
        assert!(shared.gradient.try_lock().is_err(), "nobody overwrites what is not taken yet");
        gradient.read(0, &mut vector).unwrap();
        assert!(gradient.has(3).unwrap() && vector == [0.5, 0.25]);
        drop(place);
        assert!(shared.put(4, &Gradient::from(vec![0.0])).await.is_err(), "a gradient of another size");

        assert!(Shared::open(&offer, 3, 2).is_none() && Shared::open(&offer, 2, 3).is_none());
        assert!(Shared::open(&v1::SharedMemory { token: vec![4; 32], ..offer }, 2, 2).is_none());
    }
}
