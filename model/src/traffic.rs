//! What a device was asked to do: what was copied to it and from it, and which kernels it ran.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use burn::tensor::TensorData;
use serde::{Deserialize, Serialize};

static UPLOADS: Counter = Counter::new();
static READS: Counter = Counter::new();

/// Counts since some moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Copies to the device.
    pub uploads: Copies,
    /// Copies from it.
    pub reads: Copies,
    /// How often each kernel was launched, by its name; empty on devices without kernels.
    pub launches: BTreeMap<String, u64>,
}

/// Tensors that were copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copies {
    /// How many.
    pub tensors: u64,
    /// Their size in bytes.
    pub bytes: u64,
}

/// What this process asks of its devices while `work` is done.
pub fn counted<T>(work: impl FnOnce() -> T) -> (T, Traffic) {
    let (uploads, reads) = (UPLOADS.read(), READS.read());
    let (result, launches) = observed(work);
    (result, Traffic { uploads: UPLOADS.read().since(uploads), reads: READS.read().since(reads), launches })
}

/// Counts `data`, which goes to a device.
pub(crate) fn upload(data: TensorData) -> TensorData {
    UPLOADS.count(&data);
    data
}

/// Counts `data`, which came from a device.
pub(crate) fn read(data: &TensorData) {
    READS.count(data);
}

struct Counter {
    tensors: AtomicU64,
    bytes: AtomicU64,
}

impl Counter {
    const fn new() -> Self {
        Self { tensors: AtomicU64::new(0), bytes: AtomicU64::new(0) }
    }

    fn count(&self, data: &TensorData) {
        self.tensors.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(data.as_bytes().len() as u64, Ordering::Relaxed);
    }

    fn read(&self) -> Copies {
        Copies { tensors: self.tensors.load(Ordering::Relaxed), bytes: self.bytes.load(Ordering::Relaxed) }
    }
}

impl Copies {
    fn since(self, before: Self) -> Self {
        Self { tensors: self.tensors - before.tensors, bytes: self.bytes - before.bytes }
    }
}

#[cfg(feature = "wgpu")]
fn observed<T>(work: impl FnOnce() -> T) -> (T, BTreeMap<String, u64>) {
    use std::sync::{Arc, Mutex, PoisonError};

    use burn::cubecl::config::{TypeNameFormatLevel, type_name_format};
    use burn::cubecl::logging::{LaunchObservation, LaunchObserver};

    #[derive(Default)]
    struct Launches(Mutex<BTreeMap<&'static str, u64>>);

    impl LaunchObserver for Launches {
        fn launched(&self, kernel: &'static str) {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(kernel).or_default() += 1;
        }
    }

    let launches = Arc::new(Launches::default());
    let observation = LaunchObservation::new(launches.clone());
    let result = work();
    drop(observation);
    let mut named = BTreeMap::new();
    for (kernel, count) in &*launches.0.lock().unwrap_or_else(PoisonError::into_inner) {
        *named.entry(type_name_format(kernel, TypeNameFormatLevel::Balanced)).or_default() += count;
    }
    (result, named)
}

#[cfg(not(feature = "wgpu"))]
fn observed<T>(work: impl FnOnce() -> T) -> (T, BTreeMap<String, u64>) {
    (work(), BTreeMap::new())
}
