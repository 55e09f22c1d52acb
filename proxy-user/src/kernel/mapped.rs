//! A memory-mapped array map: written by plain stores, without a system call.

use std::io;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use bytemuck::Pod;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// The kernel's array elements are this many bytes apart, or a multiple of it.
const STRIDE: usize = 8;
const PAGE: usize = 4096;

/// An array map in memory.
pub struct Mapped<T> {
    start: NonNull<u8>,
    bytes: usize,
    length: u32,
    element: PhantomData<T>,
}

impl<T: Pod> Mapped<T> {
    /// Maps an array map of `length` elements made with `BPF_F_MMAPABLE`.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new(map: impl AsFd, length: u32) -> io::Result<Self> {
        let bytes = (length as usize * Self::stride()).next_multiple_of(PAGE);
        let size = NonZeroUsize::new(bytes).ok_or_else(|| io::Error::other("an empty map"))?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice; the kernel checks its size
        // against the map's.
        let start = unsafe { mmap(None, size, access, MapFlags::MAP_SHARED, map, 0) }?;
        Ok(Self { start: start.cast(), bytes, length, element: PhantomData })
    }

    const fn stride() -> usize {
        size_of::<T>().next_multiple_of(STRIDE)
    }

    /// How many elements there are.
    pub const fn length(&self) -> u32 {
        self.length
    }

    fn element(&self, index: u32) -> *mut T {
        assert!(index < self.length, "element {index} of {}", self.length);
        // SAFETY: within the mapping, by the assertion; elements are aligned to 8.
        unsafe { self.start.as_ptr().add(index as usize * Self::stride()).cast() }
    }

    /// Reads an element.
    ///
    /// # Panics
    /// If there is no such element.
    pub fn get(&self, index: u32) -> T {
        // SAFETY: `element` is within the mapping; any bytes are a valid Pod value. Volatile, since
        // it is shared memory.
        unsafe { self.element(index).read_volatile() }
    }

    /// Writes an element.
    ///
    /// # Panics
    /// If there is no such element.
    pub fn set(&self, index: u32, value: T) {
        // SAFETY: as for reading. Programs that read meanwhile are not led here yet, or find the same
        // bytes but for a flag.
        unsafe { self.element(index).write_volatile(value) }
    }
}

impl<T> Drop for Mapped<T> {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nothing uses any more. Unmapping it can't fail.
        let _ = unsafe { munmap(self.start.cast(), self.bytes) };
    }
}

// SAFETY: the mapping is shared memory that belongs to no thread; writes go through one owner.
unsafe impl<T: Send> Send for Mapped<T> {}
