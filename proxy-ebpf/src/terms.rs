//! What every eBPF object has: an end for panics, and a licence.

/// Never reached: a panic that is reachable makes the object unloadable, and `cargo xtask build`
/// looks for one.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// What the kernel is told: many helpers are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
