//! Memory for results. What one step lets go of the next takes up again: fresh memory would be cleared, page by page, by the
//! system, and once more by us.

use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn_std::{AccessError, AccessPolicy, AllocationController, AllocationProperty, Bytes};

/// Elements from which on memory is worth keeping.
const WORTH_KEEPING: usize = 1 << 12;
/// What is idle may be as much as this many times the most that was ever in use.
const MOST_IDLE: usize = 2;

static IDLE: Mutex<Idle> = Mutex::new(Idle { buffers: BTreeMap::new(), elements: 0, in_use: 0, most_in_use: 0 });

/// Memory that nobody uses.
struct Idle {
    /// By their length.
    buffers: BTreeMap<usize, Vec<Vec<f32>>>,
    /// All of them together.
    elements: usize,
    in_use: usize,
    most_in_use: usize,
}

/// Elements that a tensor can be made of.
#[derive(Debug)]
pub(super) struct Buffer {
    /// At least `len` of them.
    values: Vec<f32>,
    len: usize,
}

impl Buffer {
    /// `len` elements of any value, each of which is to be overwritten.
    pub(super) fn of_any(len: usize) -> Self {
        let idle = if len < WORTH_KEEPING { None } else { idle().take(len) };
        #[cfg_attr(not(test), allow(unused_mut))]
        let mut buffer = Self { values: idle.unwrap_or_else(|| vec![0.0; len]), len };
        // So that a test notices which element is not.
        #[cfg(test)]
        buffer.fill(f32::NAN);
        buffer
    }

    /// A copy.
    pub(super) fn of(values: &[f32]) -> Self {
        let mut buffer = Self::of_any(values.len());
        buffer.copy_from_slice(values);
        buffer
    }

    /// As the memory of a tensor.
    #[allow(unsafe_code)]
    pub(super) fn into_bytes(self) -> Bytes {
        let bytes = size_of_val::<[f32]>(&self);
        // SAFETY: these are the bytes of all elements, each of which has a value.
        unsafe { Bytes::from_controller(Box::new(self), bytes) }
    }
}

impl From<Vec<f32>> for Buffer {
    fn from(values: Vec<f32>) -> Self {
        if values.len() >= WORTH_KEEPING {
            idle().lend(values.len());
        }
        Self { len: values.len(), values }
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.values[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.values.len() >= WORTH_KEEPING {
            idle().give_back(std::mem::take(&mut self.values));
        }
    }
}

impl AllocationController for Buffer {
    fn alloc_align(&self) -> usize {
        align_of::<f32>()
    }

    fn property(&self) -> AllocationProperty {
        AllocationProperty::Other
    }

    #[allow(unsafe_code)]
    unsafe fn memory_mut(&mut self, _: AccessPolicy) -> Result<&mut [MaybeUninit<u8>], AccessError> {
        let len = size_of_val::<[f32]>(self);
        // SAFETY: the slice's own bytes, borrowed as it is; the caller promises to write bytes that have a value, and any are
        // an f32.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr().cast(), len) })
    }

    #[allow(unsafe_code)]
    fn memory(&self, _: AccessPolicy) -> Result<&[MaybeUninit<u8>], AccessError> {
        let len = size_of_val::<[f32]>(self);
        // SAFETY: the slice's own bytes, borrowed as it is.
        Ok(unsafe { std::slice::from_raw_parts(self.as_ptr().cast(), len) })
    }
}

fn idle() -> MutexGuard<'static, Idle> {
    IDLE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Idle {
    /// A buffer of `len` elements or a little more; the caller makes one where there is none.
    fn take(&mut self, len: usize) -> Option<Vec<f32>> {
        let found = self.buffers.range_mut(len..=len + len / 4).next().and_then(|(_, buffers)| buffers.pop());
        if let Some(buffer) = &found {
            self.elements -= buffer.len();
            if self.buffers.get(&buffer.len()).is_some_and(Vec::is_empty) {
                self.buffers.remove(&buffer.len());
            }
        }
        self.lend(found.as_ref().map_or(len, Vec::len));
        found
    }

    fn lend(&mut self, elements: usize) {
        self.in_use += elements;
        self.most_in_use = self.most_in_use.max(self.in_use);
    }

    fn give_back(&mut self, buffer: Vec<f32>) {
        self.in_use -= buffer.len();
        if self.elements + buffer.len() > MOST_IDLE * self.most_in_use {
            // Sizes that were in use once, and are not any more.
            self.buffers.clear();
            self.elements = 0;
        }
        self.elements += buffer.len();
        self.buffers.entry(buffer.len()).or_default().push(buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_is_taken_again_by_who_needs_about_as_much() {
        let mut idle = Idle { buffers: BTreeMap::new(), elements: 0, in_use: 0, most_in_use: 0 };
        assert_eq!(idle.take(100), None);
        idle.give_back(vec![1.0; 100]);
        assert_eq!((idle.take(79), idle.take(101)), (None, None));
        assert_eq!(idle.take(80), Some(vec![1.0; 100]));
        assert_eq!((idle.take(80), idle.elements, idle.in_use), (None, 0, 79 + 101 + 100 + 80));
        assert!(idle.buffers.is_empty());
    }

    #[test]
    fn sizes_that_nobody_needs_any_more_are_let_go() {
        let mut idle = Idle { buffers: BTreeMap::new(), elements: 0, in_use: 0, most_in_use: 0 };
        for len in (0..20).map(|i| 10 << i) {
            assert_eq!(idle.take(len), None);
            idle.give_back(vec![0.0; len]);
            assert!(idle.elements <= MOST_IDLE * len, "{} idle, at most {len} in use", idle.elements);
        }
    }

    #[test]
    fn a_tensors_memory_is_what_the_buffer_holds() {
        let mut bytes = Buffer::of(&[1.0, -2.5]).into_bytes();
        assert_eq!(&bytes[..], [1f32.to_ne_bytes(), (-2.5f32).to_ne_bytes()].concat());
        bytes[..4].copy_from_slice(&7f32.to_ne_bytes());
        assert_eq!(&bytes.clone()[..4], 7f32.to_ne_bytes());
        assert_eq!(Buffer::from(vec![3.0; 5]).len(), 5);
    }
}
