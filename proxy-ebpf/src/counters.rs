//! Counters in maps that several CPUs share.

/// Changes a counter in an array map and returns what it was. Two CPUs at once may count one step less:
/// they choose the same backend, and the sweep counts loads anew.
#[inline(always)]
pub fn bump(counter: *mut u32, step: impl FnOnce(u32) -> u32) -> u32 {
    // SAFETY: callers pass an element of an array map, aligned and never freed, which is shared memory:
    // hence volatile.
    unsafe {
        let before = counter.read_volatile();
        counter.write_volatile(step(before));
        before
    }
}

/// Adds to a counter that all CPUs share, atomically. The target has no such method, since it can't also
/// return what was there before Linux 5.12.
///
/// # Safety
/// The counter must be aligned and stay mapped.
#[inline(always)]
pub unsafe fn add(counter: *mut u64, more: u64) {
    // SAFETY: the caller's promise; nothing else is touched.
    #[cfg(target_arch = "bpf")]
    unsafe {
        core::arch::asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) counter, in(reg) more, options(nostack));
    }
    #[cfg(not(target_arch = "bpf"))]
    let _ = (counter, more);
}
