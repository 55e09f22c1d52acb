//! tc ingress and egress of a pod's host-side link.

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use proxy_common::{Family, Outcome, V4, V6};
use proxy_ebpf::datapath;

use super::skb::Skb;
use super::trace;
use crate::maps::{self, Tables4, Tables6};

macro_rules! hooks {
    ($($(#[$doc:meta])+ $name:ident: $story:ident;)+) => {$(
        $(#[$doc])+
        #[classifier]
        pub fn $name(ctx: TcContext) -> i32 {
            let mut skb = Skb::new(&ctx);
            let outcome = match skb.ethertype() {
                V4::ETHERTYPE => match Tables4.work() {
                    Some(work) => datapath::$story(&mut skb, &Tables4, work),
                    None => Outcome::NotService,
                },
                V6::ETHERTYPE => match Tables6.work() {
                    Some(work) => datapath::$story(&mut skb, &Tables6, work),
                    None => Outcome::NotService,
                },
                _ => Outcome::NotIp,
            };
            verdict(&ctx, outcome)
        }
    )+};
}

hooks! {
    /// From a client toward a backend.
    portal_ingress: ingress;
    /// From a backend back to a client.
    portal_egress: egress;
}

/// What the kernel does with the packet. "On" is UNSPEC and not OK, so that the programs behind ours
/// run too.
#[inline(always)]
fn verdict(ctx: &TcContext, outcome: Outcome) -> i32 {
    maps::count(outcome);
    trace::log(ctx, outcome);
    match outcome {
        Outcome::NotIp
        | Outcome::NotService
        | Outcome::Malformed
        | Outcome::Opened
        | Outcome::Forwarded
        | Outcome::Established
        | Outcome::Replied
        | Outcome::IcmpError
        | Outcome::Fragment => TC_ACT_UNSPEC,
        Outcome::Hairpin | Outcome::Reset | Outcome::Unreachable => send_back(ctx),
        Outcome::FragmentUnknown
        | Outcome::Silent
        | Outcome::NoPort
        | Outcome::TableFull
        | Outcome::NotWritable
        // Not a packet's outcomes.
        | Outcome::SocketTranslated
        | Outcome::SocketRefused
        | Outcome::SocketRestored => TC_ACT_SHOT,
    }
}

/// Out of the link it came from.
#[inline(always)]
fn send_back(ctx: &TcContext) -> i32 {
    // SAFETY: the context is the kernel's and outlives the program.
    let link = unsafe { (*ctx.skb.skb).ifindex };
    // SAFETY: the helper only notes where to send the packet after the program's end.
    unsafe { bpf_redirect(link, 0) as i32 }
}
