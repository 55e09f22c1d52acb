//! `portal run --trace`: says which packets were refused or dropped, through aya-log. Without the flag
//! the log level is frozen at zero, and the kernel's verifier removes all of this.

use aya_ebpf::programs::TcContext;
use aya_log_ebpf::info;
use proxy_common::Outcome;

/// Logs an outcome that costs somebody a packet.
#[inline(always)]
pub fn log(ctx: &TcContext, outcome: Outcome) {
    // SAFETY: the context is the kernel's and outlives the program.
    let link = || unsafe { (*ctx.skb.skb).ifindex };
    match outcome {
        Outcome::Reset => info!(ctx, "reset, link {}", link()),
        Outcome::Unreachable => info!(ctx, "unreachable, link {}", link()),
        Outcome::Silent => info!(ctx, "silent, link {}", link()),
        Outcome::NoLocal => info!(ctx, "no_local, link {}", link()),
        Outcome::NotAllowed => info!(ctx, "not_allowed, link {}", link()),
        Outcome::NoSource => info!(ctx, "no_source, link {}", link()),
        Outcome::FragmentUnknown => info!(ctx, "fragment_unknown, link {}", link()),
        Outcome::NoPort => info!(ctx, "no_port, link {}", link()),
        Outcome::TableFull => info!(ctx, "table_full, link {}", link()),
        Outcome::NotWritable => info!(ctx, "not_writable, link {}", link()),
        _ => {}
    }
}
