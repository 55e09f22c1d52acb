//! A memory-mapped array map: written by plain stores, without a system call.
//!
//! It is mapped window by window, where it is read or written: what is mapped counts as the agent's
//! memory, and most of a table is never used.

use std::cell::OnceCell;
use std::io;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use bytemuck::Pod;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// The kernel's array elements are this many bytes apart, or a multiple of it.
const STRIDE: usize = 8;
/// How many elements a window has: so many that each begins with a page, of up to 64 KiB.
const WINDOW: u32 = 8192;

/// An array map in memory.
pub struct Mapped<T> {
    map: OwnedFd,
    length: u32,
    windows: Box<[OnceCell<Window>]>,
    element: PhantomData<T>,
}

/// Elements that follow each other, in memory.
struct Window {
    start: NonNull<u8>,
    bytes: usize,
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nothing uses any more. Unmapping it can't fail.
        let _ = unsafe { munmap(self.start.cast(), self.bytes) };
    }
}

impl<T: Pod> Mapped<T> {
    /// An array map of `length` elements made with `BPF_F_MMAPABLE`.
    ///
    /// # Errors
    /// If there are no more file descriptors.
    pub fn new(map: impl AsFd, length: u32) -> io::Result<Self> {
        const { assert!(size_of::<T>().is_multiple_of(4), "elements are written word by word") };
        let map = map.as_fd().try_clone_to_owned()?;
        let windows = (0..length.div_ceil(WINDOW)).map(|_| OnceCell::new()).collect();
        Ok(Self { map, length, windows, element: PhantomData })
    }

    const fn stride() -> usize {
        size_of::<T>().next_multiple_of(STRIDE)
    }

    /// How many elements there are.
    pub const fn length(&self) -> u32 {
        self.length
    }

    /// Unmaps all windows. Those that are read or written to again are mapped again.
    pub fn unmap(&mut self) {
        self.windows.iter_mut().for_each(|window| drop(window.take()));
    }

    /// Maps a window.
    fn map(&self, number: u32) -> io::Result<Window> {
        let elements = WINDOW.min(self.length - number * WINDOW);
        let bytes = elements as usize * Self::stride();
        let size = NonZeroUsize::new(bytes).expect("a window has elements");
        let offset = u64::from(number * WINDOW) * Self::stride() as u64;
        let offset = offset.try_into().map_err(io::Error::other)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice; the kernel checks its size
        // against the map's.
        let start = unsafe { mmap(None, size, access, MapFlags::MAP_SHARED, &self.map, offset) }?;
        Ok(Window { start: start.cast(), bytes })
    }

    /// The window of an element, mapped from now on.
    fn window(&self, index: u32) -> io::Result<&Window> {
        assert!(index < self.length, "element {index} of {}", self.length);
        let number = index / WINDOW;
        let window = &self.windows[number as usize];
        if let Some(window) = window.get() {
            return Ok(window);
        }
        let mapped = self.map(number)?;
        Ok(window.get_or_init(|| mapped))
    }

    /// The words of an element of a window.
    fn words(window: &Window, index: u32) -> &[AtomicU32] {
        let start = (index % WINDOW) as usize * Self::stride();
        debug_assert!(start + size_of::<T>() <= window.bytes, "within the window");
        // SAFETY: within the mapping, which lives as long as the window; elements are aligned to 8. It is
        // shared memory, hence atomics, which every reader may meet.
        unsafe {
            let first = window.start.as_ptr().add(start).cast();
            std::slice::from_raw_parts(first, size_of::<T>() / 4)
        }
    }

    fn read(window: &Window, index: u32) -> T {
        let mut value = T::zeroed();
        let words = bytemuck::bytes_of_mut(&mut value).chunks_exact_mut(4);
        for (bytes, word) in words.zip(Self::words(window, index)) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
        }
        value
    }

    /// Reads an element.
    ///
    /// # Errors
    /// If it can't be mapped: there is no memory.
    ///
    /// # Panics
    /// If there is no such element.
    pub fn get(&self, index: u32) -> io::Result<T> {
        Ok(Self::read(self.window(index)?, index))
    }

    /// Writes an element: each word of it that is another one than before, in one store. Whoever reads
    /// meanwhile finds each word as it was or as it is.
    ///
    /// # Errors
    /// If it can't be mapped: there is no memory.
    ///
    /// # Panics
    /// If there is no such element.
    pub fn set(&self, index: u32, value: T) -> io::Result<()> {
        let words = bytemuck::bytes_of(&value).chunks_exact(4);
        for (bytes, word) in words.zip(Self::words(self.window(index)?, index)) {
            let new = u32::from_ne_bytes(bytes.try_into().expect("chunks of four"));
            if word.load(Ordering::Relaxed) != new {
                word.store(new, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Writes one word of an element, and touches no other.
    ///
    /// # Errors
    /// If it can't be mapped: there is no memory.
    ///
    /// # Panics
    /// If there is no such element or word.
    pub fn set_word(&self, index: u32, word: usize, value: u32) -> io::Result<()> {
        Self::words(self.window(index)?, index)[word].store(value, Ordering::Relaxed);
        Ok(())
    }

    /// Adds to one of an element's 64-bit counters, of that position, while others may.
    ///
    /// # Errors
    /// If it can't be mapped: there is no memory.
    ///
    /// # Panics
    /// If there is no such element or counter.
    #[expect(clippy::cast_ptr_alignment, reason = "elements and their counters are aligned to 8")]
    pub fn add(&self, index: u32, counter: usize, more: u64) -> io::Result<()> {
        let words = Self::words(self.window(index)?, index);
        let place = std::ptr::from_ref(&words[2 * counter..2 * counter + 2]).cast::<AtomicU64>();
        // SAFETY: two words of an element that is aligned to 8; as they are all in shared memory, they are only
        // accessed by atomics.
        unsafe { &*place }.fetch_add(more, Ordering::Relaxed);
        Ok(())
    }

    /// Reads all elements from the first up to, not including, `end`. None of them is mapped for that any
    /// longer.
    ///
    /// # Errors
    /// If one can't be mapped.
    pub fn read_to(&self, end: u32, mut each: impl FnMut(u32, T)) -> io::Result<()> {
        let end = end.min(self.length);
        for number in 0..end.div_ceil(WINDOW) {
            let passing = match self.windows[number as usize].get() {
                Some(_) => None,
                None => Some(self.map(number)?),
            };
            let window = passing.as_ref().or_else(|| self.windows[number as usize].get());
            let window = window.expect("it is mapped one way or the other");
            for index in number * WINDOW..end.min((number + 1) * WINDOW) {
                each(index, Self::read(window, index));
            }
        }
        Ok(())
    }
}

// SAFETY: the mappings are shared memory that belongs to no thread; writes go through one owner.
unsafe impl<T: Send> Send for Mapped<T> {}
