//! Tables of flow records on the host.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::ptr::NonNull;

use bytemuck::Pod;

use crate::Family;
use crate::tables::{EmbryoRecord, EmbryoValue, FlowKey, FlowRecord, FlowValue};

/// A table of records. As in the kernel, what is removed stays readable, and its memory is what the next
/// record gets.
pub struct Records<F: Family, V> {
    places: BTreeMap<Vec<u8>, NonNull<V>>,
    free: Vec<NonNull<V>>,
    all: Vec<NonNull<V>>,
    family: PhantomData<F>,
}

impl<F: Family, V> Default for Records<F, V> {
    fn default() -> Self {
        let (free, all) = (Vec::new(), Vec::new());
        Self { places: BTreeMap::new(), free, all, family: PhantomData }
    }
}

impl<F: Family, V: Pod> Records<F, V> {
    /// How many records there are.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Whether there is one under a key.
    pub fn has(&self, key: &FlowKey<F>) -> bool {
        self.get(key).is_some()
    }

    /// All records.
    pub fn all(&self) -> Vec<(FlowKey<F>, V)> {
        let read = |(key, place): (&Vec<u8>, &NonNull<V>)| {
            // SAFETY: the table's own memory, which lives as long as it.
            (bytemuck::pod_read_unaligned(key), unsafe { place.read_volatile() })
        };
        self.places.iter().map(read).collect()
    }

    /// What is under a key.
    pub fn value(&self, key: &FlowKey<F>) -> Option<V> {
        // SAFETY: the table's own memory, which lives as long as it.
        self.get(key).map(|place| unsafe { place.read_volatile() })
    }

    fn get(&self, key: &FlowKey<F>) -> Option<NonNull<V>> {
        self.places.get(bytemuck::bytes_of(key)).copied()
    }

    /// Puts a record in the place of any other under its key.
    pub fn put(&mut self, key: &FlowKey<F>, value: V) {
        let place = self.free.pop().unwrap_or_else(|| {
            let fresh = NonNull::from(Box::leak(Box::new(value)));
            self.all.push(fresh);
            fresh
        });
        // SAFETY: the memory lives as long as the table, and is accessed through pointers only.
        unsafe { place.write_volatile(value) };
        self.free.extend(self.places.insert(bytemuck::bytes_of(key).to_vec(), place));
    }

    /// Removes a record.
    pub fn remove(&mut self, key: &FlowKey<F>) {
        self.free.extend(self.places.remove(bytemuck::bytes_of(key)));
    }
}

impl<F: Family> Records<F, FlowValue<F>> {
    /// The record under a key, which must not be used for longer than the table.
    pub fn flow<'a>(&self, key: &FlowKey<F>) -> Option<FlowRecord<'a, F>> {
        // SAFETY: the memory lives as long as the table, and is accessed through records only.
        self.get(key).map(|place| unsafe { FlowRecord::new(place) })
    }
}

impl<F: Family> Records<F, EmbryoValue<F>> {
    /// The record under a key, which must not be used for longer than the table.
    pub fn embryo<'a>(&self, key: &FlowKey<F>) -> Option<EmbryoRecord<'a, F>> {
        // SAFETY: as above.
        self.get(key).map(|place| unsafe { EmbryoRecord::new(place) })
    }
}

impl<F: Family, V> Drop for Records<F, V> {
    fn drop(&mut self) {
        for place in &self.all {
            // SAFETY: made by `Box::leak`, and nobody uses it for longer than the table.
            drop(unsafe { Box::from_raw(place.as_ptr()) });
        }
    }
}

// SAFETY: the memory belongs to the table, and moves with it.
unsafe impl<F: Family, V: Send> Send for Records<F, V> {}
