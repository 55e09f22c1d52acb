//! Packet memory, once its bounds are checked.

use core::marker::PhantomData;

use bytemuck::Pod;
use proxy_ebpf::packet::Window;

/// Offsets above this are refused, so that the verifier knows a bound.
const MAX_OFFSET: usize = 0x7ff;

/// The same offset, which is at most [`MAX_OFFSET`], by an instruction that the compiler may not drop:
/// verifiers before Linux 6.12 do not see a bound that was checked on a copy of the number.
#[inline(always)]
fn bounded(offset: usize) -> usize {
    #[cfg(target_arch = "bpf")]
    {
        let mut offset = offset;
        // SAFETY: it changes nothing but the register.
        unsafe {
            core::arch::asm!("{0} &= 0x7ff", inout(reg) offset, options(pure, nomem, nostack))
        };
        offset
    }
    #[cfg(not(target_arch = "bpf"))]
    offset
}

/// Bytes of the packet, which are reachable as long as nothing moves it: what does so needs the packet for itself.
pub struct Bytes<'a> {
    start: usize,
    length: usize,
    packet: PhantomData<&'a ()>,
}

/// A packet in one piece of memory, as far as it is reachable.
pub trait Memory {
    /// Where it begins. Volatile, or the compiler might read it again after a check of bounds, which the verifier would then not
    /// take for a check of this pointer.
    fn data(&self) -> usize;

    /// Where it ends.
    fn end(&self) -> usize;

    /// Bytes at an offset of which the verifier knows a bound.
    #[inline(always)]
    fn bytes(&self, offset: usize, length: usize) -> Option<Bytes<'_>> {
        let start = self.data() + offset;
        if start + length > self.end() {
            return None;
        }
        Some(Bytes { start, length, packet: PhantomData })
    }

    /// Bytes at any offset.
    #[inline(always)]
    fn bytes_at(&self, offset: usize, length: usize) -> Option<Bytes<'_>> {
        if offset > MAX_OFFSET { None } else { self.bytes(bounded(offset), length) }
    }
}

impl Bytes<'_> {
    /// Offset and lengths are constants wherever this is called, and so the check is the compiler's.
    #[inline(always)]
    fn pointer<T>(&self, offset: usize) -> Option<*mut T> {
        (offset + size_of::<T>() <= self.length).then_some((self.start + offset) as *mut T)
    }
}

impl Window for Bytes<'_> {
    #[inline(always)]
    fn load<T: Pod>(&self, offset: usize) -> Option<T> {
        // SAFETY: `pointer` checked the bounds; a Pod type is valid for any bytes. The address may be
        // misaligned, which eBPF allows in packet memory (not on the stack).
        self.pointer::<T>(offset).map(|pointer| unsafe { *pointer })
    }

    #[inline(always)]
    fn store<T: Pod>(&mut self, offset: usize, value: T) -> Option<()> {
        // SAFETY: as for `load`; the program owns the packet while it runs.
        self.pointer::<T>(offset).map(|pointer| unsafe { *pointer = value })
    }
}
