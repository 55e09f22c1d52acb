//! Counters in maps that several CPUs share.

use aya_ebpf::btf_maps::{Array, PerCpuArray};
use aya_ebpf::macros::btf_map;
use proxy_common::Outcome;

const OUTCOMES: usize = 64;
const _: () = assert!(Outcome::ALL.len() <= OUTCOMES);

#[btf_map(name = "outcomes")]
static OUTCOME_COUNTS: PerCpuArray<u64, OUTCOMES> = PerCpuArray::new();
#[btf_map(name = "outcomes_swept")]
static OUTCOMES_SWEPT: Array<u64, OUTCOMES> = Array::new();

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

/// Counts an outcome so many times.
#[inline(always)]
pub fn count(outcome: Outcome, times: u32) {
    if let Some(count) = OUTCOME_COUNTS.get_ptr_mut(outcome.index()) {
        // SAFETY: the pointer is to this CPU's own element. A count that another program on this CPU
        // interrupts may lose one; counters are not worth a lock.
        unsafe { *count += u64::from(times) };
    }
}
