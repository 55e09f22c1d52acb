//! tc ingress and egress of pods' host-side links and of uplinks.

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::{bpf_redirect, bpf_redirect_neigh, bpf_skb_change_head};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use proxy_common::{Family, Outcome, V4, V6};
use proxy_ebpf::datapath::{self, Client};

use super::skb::Skb;
use super::trace;
use crate::maps::{self, Tables4, Tables6};

/// The length of an Ethernet header.
const ETHERNET: usize = 14;

macro_rules! hooks {
    ($($(#[$doc:meta])+ $name:ident<$network:literal>: $story:ident($($client:ident)?);)+) => {$(
        $(#[$doc])+
        #[classifier]
        pub fn $name(ctx: TcContext) -> i32 {
            let mut skb = Skb::<$network>::new(&ctx);
            if skb.is_of_vlan() {
                return verdict::<$network>(&ctx, Outcome::NotService, 0);
            }
            match skb.ethertype() {
                V4::ETHERTYPE => match Tables4.work() {
                    Some(work) => {
                        let outcome = datapath::$story(&mut skb, &Tables4, work $(, Client::$client)?);
                        verdict::<$network>(&ctx, outcome, work.link)
                    }
                    None => verdict::<$network>(&ctx, Outcome::NotService, 0),
                },
                V6::ETHERTYPE => match Tables6.work() {
                    Some(work) => {
                        let outcome = datapath::$story(&mut skb, &Tables6, work $(, Client::$client)?);
                        verdict::<$network>(&ctx, outcome, work.link)
                    }
                    None => verdict::<$network>(&ctx, Outcome::NotService, 0),
                },
                _ => verdict::<$network>(&ctx, Outcome::NotIp, 0),
            }
        }
    )+};
}

hooks! {
    /// A pod's packets, toward a backend.
    portal_ingress<14>: ingress(Pod);
    /// Packets from outside the node, toward a backend; answers of masqueraded flows.
    portal_uplink<14>: ingress(Outside);
    /// From a backend back to a client, by a pod's link or an uplink.
    portal_egress<14>: egress();
    /// As `portal_uplink`, of a link without Ethernet headers.
    portal_l3uplink<0>: ingress(Outside);
    /// As `portal_egress`, of a link without Ethernet headers.
    portal_l3egress<0>: egress();
}

/// What the kernel does with the packet. "On" is UNSPEC and not OK, so that the programs behind ours
/// run too.
#[inline(always)]
fn verdict<const NETWORK: usize>(ctx: &TcContext, outcome: Outcome, link: u32) -> i32 {
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
        Outcome::Hairpin
        | Outcome::Reset
        | Outcome::Unreachable
        | Outcome::TooBig
        | Outcome::EchoReply => send_back(ctx),
        Outcome::Masqueraded => send_on::<NETWORK>(ctx, link),
        Outcome::FragmentUnknown
        | Outcome::Silent
        | Outcome::NoLocal
        | Outcome::NotAllowed
        | Outcome::NoRoute
        | Outcome::NoPort
        | Outcome::TableFull
        | Outcome::NotWritable
        // Not a packet's outcomes.
        | Outcome::SocketTranslated
        | Outcome::SocketRefused
        | Outcome::SocketRestored => TC_ACT_SHOT,
    }
}

/// Out of a link, to the neighbour that leads to the packet's destination there.
#[inline(always)]
fn send_on<const NETWORK: usize>(ctx: &TcContext, link: u32) -> i32 {
    if NETWORK == 0 {
        // The kernel sends on only what has a link-layer header, which it then replaces.
        // SAFETY: the helper checks all; packet pointers are not used any more.
        if unsafe { bpf_skb_change_head(ctx.skb.skb, ETHERNET as u32, 0) } != 0 {
            return TC_ACT_SHOT;
        }
    }
    // SAFETY: the helper only notes where to send the packet after the program's end; without
    // parameters it looks up the neighbour itself.
    unsafe { bpf_redirect_neigh(link, core::ptr::null_mut(), 0, 0) as i32 }
}

/// Out of the link it came from.
#[inline(always)]
fn send_back(ctx: &TcContext) -> i32 {
    // SAFETY: the context is the kernel's and outlives the program.
    let link = unsafe { (*ctx.skb.skb).ifindex };
    // SAFETY: the helper only notes where to send the packet after the program's end.
    unsafe { bpf_redirect(link, 0) as i32 }
}
