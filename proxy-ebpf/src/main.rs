//! Portal's eBPF object: the hooks and the maps, around the datapath of this package's library.
//!
//! Built for `target_arch = "bpf"` only. On the host it is an empty program, so that plain `cargo`
//! commands work without an eBPF toolchain; feature `lint` shows its modules to clippy there.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]
#![cfg_attr(
    all(feature = "lint", not(target_arch = "bpf")),
    allow(dead_code, reason = "on the host nothing calls the hooks")
)]
#![allow(
    clippy::cast_possible_truncation,
    reason = "offsets, lengths and ports are small; a checked cast would be a branch to verify"
)]

#[cfg(any(target_arch = "bpf", feature = "lint"))]
mod counters;
#[cfg(any(target_arch = "bpf", feature = "lint"))]
mod hooks;
#[cfg(any(target_arch = "bpf", feature = "lint"))]
mod maps;
#[cfg(any(target_arch = "bpf", feature = "lint"))]
mod shared;
#[cfg(any(target_arch = "bpf", feature = "lint"))]
mod tails;
#[cfg(target_arch = "bpf")]
mod terms;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
