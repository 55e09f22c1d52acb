//! tc ingress and egress of pods' host-side links and of uplinks.

use core::mem::zeroed;

use aya_ebpf::bindings::{BPF_F_INGRESS, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_redir_neigh};
use aya_ebpf::helpers::{bpf_redirect, bpf_redirect_neigh, bpf_skb_change_head};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use bytemuck::Zeroable;
use proxy_common::abi::CATCH_ALL_MAC;
use proxy_common::{Family, Outcome, V4, V6};
use proxy_ebpf::datapath::{Client, Next, Story, Tables, Verdict, fast, tell};

use super::host::{AF_INET, AF_INET6};
use super::skb::Skb;
use super::trace;
use crate::maps::{Tables4, Tables6};
use crate::{counters, tails};

/// The length of an Ethernet header.
const ETHERNET: usize = 14;
/// How long the kernel's struct is.
const NEIGHBOUR: i32 = 20;
const _: () = assert!(size_of::<bpf_redir_neigh>() == 20);

#[repr(C)]
struct EthernetHeader {
    to: [u8; 6],
    from: [u8; 6],
    ethertype: u16,
}

macro_rules! hooks {
    ($($(#[$doc:meta])+ $name:ident<$network:literal>: $fast:ident($client:ident);)+) => {$(
        $(#[$doc])+
        #[classifier]
        #[inline(always)] // a tail call from a function of its own would return to this one
        pub fn $name(ctx: TcContext) -> i32 {
            let mut skb = Skb::<$network>::new(&ctx);
            if skb.is_of_vlan() {
                return leave_alone(&ctx, Outcome::NotService);
            }
            match skb.ethertype() {
                V4::ETHERTYPE => {
                    let next =
                        fast::$fast(&mut skb, &Tables4, Client::$client, || Tables4.work());
                    go_on::<$network>(&ctx, next, false)
                }
                V6::ETHERTYPE => {
                    let next =
                        fast::$fast(&mut skb, &Tables6, Client::$client, || Tables6.work());
                    go_on::<$network>(&ctx, next, true)
                }
                _ => leave_alone(&ctx, Outcome::NotIp),
            }
        }
    )+};
}

hooks! {
    /// A pod's packets, toward a backend.
    portal_ingress<14>: ingress(Pod);
    /// Packets from outside the node, toward a backend; answers of masqueraded flows.
    portal_uplink<14>: ingress(Outside);
    /// From a backend back to a pod.
    portal_egress<14>: egress(Pod);
    /// From a backend back to a client outside the node; what the node and its pods send out of it.
    portal_upegress<14>: egress(Outside);
    /// As `portal_egress`, behind the programs of others.
    portal_last<14>: egress(Pod);
    /// As `portal_upegress`, behind the programs of others.
    portal_uplast<14>: egress(Outside);
    /// As `portal_uplink`, of a link without Ethernet headers.
    portal_l3uplink<0>: ingress(Outside);
    /// As `portal_upegress`, of a link without Ethernet headers.
    portal_l3egress<0>: egress(Outside);
}

macro_rules! stories {
    ($($name:ident<$network:literal>($tables:ident, $is_v6:literal): $story:ident;)+) => {$(
        /// A story of few packets, see `datapath::Story`.
        #[classifier]
        #[inline(always)] // a tail call from a function of its own would return to this one
        pub fn $name(ctx: TcContext) -> i32 {
            let mut skb = Skb::<$network>::new(&ctx);
            let Some(work) = $tables.work() else {
                return leave_alone(&ctx, Outcome::NotService);
            };
            match tell(Story::$story, &mut skb, &$tables, work) {
                Next::Done(done) if done.link != 0 && done.outcome.turns_back() => {
                    count(&ctx, done.outcome);
                    let_in::<$network>(&ctx, done.link, $is_v6)
                }
                next => go_on::<$network>(&ctx, next, $is_v6),
            }
        }
    )+};
}

stories! {
    portal_pod4<14>(Tables4, false): FromPod;
    portal_pod6<14>(Tables6, true): FromPod;
    portal_out4<14>(Tables4, false): FromOutside;
    portal_out6<14>(Tables6, true): FromOutside;
    portal_reply4<14>(Tables4, false): ToClient;
    portal_reply6<14>(Tables6, true): ToClient;
    portal_pending4<14>(Tables4, false): Pending;
    portal_pending6<14>(Tables6, true): Pending;
    portal_arrive4<14>(Tables4, false): Arrive;
    portal_arrive6<14>(Tables6, true): Arrive;
    portal_leave4<14>(Tables4, false): Leave;
    portal_leave6<14>(Tables6, true): Leave;
    portal_settle4<14>(Tables4, false): Settle;
    portal_settle6<14>(Tables6, true): Settle;
    portal_send4<14>(Tables4, false): Send;
    portal_send6<14>(Tables6, true): Send;
    portal_refuse4<14>(Tables4, false): Refuse;
    portal_refuse6<14>(Tables6, true): Refuse;
    portal_icmp4<14>(Tables4, false): Icmp;
    portal_icmp6<14>(Tables6, true): Icmp;
    portal_l3out4<0>(Tables4, false): FromOutside;
    portal_l3out6<0>(Tables6, true): FromOutside;
    portal_l3reply4<0>(Tables4, false): ToClient;
    portal_l3reply6<0>(Tables6, true): ToClient;
    portal_l3pending4<0>(Tables4, false): Pending;
    portal_l3pending6<0>(Tables6, true): Pending;
    portal_l3arrive4<0>(Tables4, false): Arrive;
    portal_l3arrive6<0>(Tables6, true): Arrive;
    portal_l3leave4<0>(Tables4, false): Leave;
    portal_l3leave6<0>(Tables6, true): Leave;
    portal_l3settle4<0>(Tables4, false): Settle;
    portal_l3settle6<0>(Tables6, true): Settle;
    portal_l3send4<0>(Tables4, false): Send;
    portal_l3send6<0>(Tables6, true): Send;
    portal_l3refuse4<0>(Tables4, false): Refuse;
    portal_l3refuse6<0>(Tables6, true): Refuse;
    portal_l3icmp4<0>(Tables4, false): Icmp;
    portal_l3icmp6<0>(Tables6, true): Icmp;
}

/// What comes of a packet, in this program or in the next one. Where the next is missing, which happens
/// to none that the agent has installed, the packet is left alone.
#[inline(always)]
fn go_on<const NETWORK: usize>(ctx: &TcContext, next: Next, is_v6: bool) -> i32 {
    let done = match next {
        Next::Counted(done) => done,
        Next::Done(done) => {
            count(ctx, done.outcome);
            done
        }
        Next::Story(story) => {
            tails::tail_call(ctx, story, is_v6, NETWORK != 0);
            return TC_ACT_UNSPEC;
        }
    };
    if done.link == 0 {
        action::<NETWORK>(ctx, done.outcome)
    } else {
        send_on::<NETWORK>(ctx, done, is_v6)
    }
}

/// Counts that nothing is done with the packet.
#[inline(always)]
fn leave_alone(ctx: &TcContext, outcome: Outcome) -> i32 {
    count(ctx, outcome);
    TC_ACT_UNSPEC
}

#[inline(always)]
fn count(ctx: &TcContext, outcome: Outcome) {
    counters::count(outcome, 1);
    trace::log(ctx, outcome);
}

/// What the kernel does with a packet that the stack sends on, or nobody. "On" is UNSPEC and not OK, so that the programs
/// behind ours run too.
#[inline(always)]
fn action<const NETWORK: usize>(ctx: &TcContext, outcome: Outcome) -> i32 {
    match outcome {
        Outcome::NotIp
        | Outcome::NotService
        | Outcome::Malformed
        | Outcome::Opened
        | Outcome::Forwarded
        | Outcome::Established
        | Outcome::Replied
        | Outcome::Masqueraded
        | Outcome::IcmpError
        | Outcome::Fragment => TC_ACT_UNSPEC,
        Outcome::Hairpin
        | Outcome::Reset
        | Outcome::Unreachable
        | Outcome::EchoReply => send_back::<NETWORK>(ctx),
        Outcome::FragmentUnknown
        | Outcome::Silent
        | Outcome::NoLocal
        | Outcome::NotAllowed
        | Outcome::NoSource
        | Outcome::NoPort
        | Outcome::NotWritable
        // Not without a link to leave or to come in by.
        | Outcome::ShortCut
        | Outcome::Caught
        // Not at tc.
        | Outcome::Challenged
        | Outcome::Verified
        // Not what becomes of a packet.
        | Outcome::TableFull
        | Outcome::SocketTranslated
        | Outcome::SocketRefused
        | Outcome::SocketRestored => TC_ACT_SHOT,
    }
}

/// Out of a link, to the gateway that its way names, or else to the neighbour that leads to the packet's destination there.
#[inline(always)]
fn send_on<const NETWORK: usize>(ctx: &TcContext, done: Verdict, is_v6: bool) -> i32 {
    if NETWORK == 0 {
        // The kernel sends on only what has a link-layer header, which it then replaces.
        // SAFETY: the helper checks all; packet pointers are not used any more.
        if unsafe { bpf_skb_change_head(ctx.skb.skb, ETHERNET as u32, 0) } != 0 {
            return TC_ACT_SHOT;
        }
    }
    Skb::<NETWORK>::mark_done(ctx);
    // SAFETY: plain numbers, for which zeros are valid.
    let mut neighbour: bpf_redir_neigh = unsafe { zeroed() };
    let mut length = 0;
    if done.way != 0 && fill(&mut neighbour, done.way, is_v6) {
        length = NEIGHBOUR;
    }
    let parameters = if length == 0 { core::ptr::null_mut() } else { &raw mut neighbour };
    // SAFETY: the helper reads so much of the parameters, and notes where to send the packet after the program's end;
    // without parameters it looks up the neighbour itself.
    unsafe { bpf_redirect_neigh(done.link, parameters, length, 0) as i32 }
}

/// Puts in the gateway of a way. False if it has none.
#[inline(always)]
fn fill(neighbour: &mut bpf_redir_neigh, way: u32, is_v6: bool) -> bool {
    if is_v6 {
        let hop: [u32; 4] = bytemuck::cast(gateway(&Tables6, way));
        neighbour.nh_family = AF_INET6.into();
        neighbour.__bindgen_anon_1.ipv6_nh = hop;
        hop != [0; 4]
    } else {
        let hop: u32 = bytemuck::cast(gateway(&Tables4, way));
        neighbour.nh_family = AF_INET.into();
        neighbour.__bindgen_anon_1.ipv4_nh = hop;
        hop != 0
    }
}

/// The gateway of a way; zeros if it has none.
#[inline(always)]
pub(super) fn gateway<F: Family, T: Tables<F>>(tables: &T, way: u32) -> F::Addr {
    tables.way(way).map_or_else(F::Addr::zeroed, |way| way.hop)
}

/// In by the catch-all link, as from a wire: with its address, and without what the host has noted on the way here.
#[inline(always)]
fn let_in<const NETWORK: usize>(ctx: &TcContext, link: u32, is_v6: bool) -> i32 {
    if NETWORK == 0 {
        // SAFETY: the helper checks all; packet pointers are not used any more.
        if unsafe { bpf_skb_change_head(ctx.skb.skb, ETHERNET as u32, 0) } != 0 {
            return TC_ACT_SHOT;
        }
    }
    let ethertype = if is_v6 { V6::ETHERTYPE } else { V4::ETHERTYPE };
    let header =
        EthernetHeader { to: CATCH_ALL_MAC, from: CATCH_ALL_MAC, ethertype: ethertype.to_be() };
    if ctx.store(0, &header, 0).is_err() {
        return TC_ACT_SHOT;
    }
    // SAFETY: the context is the kernel's and outlives the program.
    unsafe {
        (*ctx.skb.skb).mark = 0;
        (*ctx.skb.skb).tc_index = 0;
    }
    // SAFETY: the helper only notes where the packet comes in after the program's end.
    unsafe { bpf_redirect(link, BPF_F_INGRESS.into()) as i32 }
}

/// Out of the link it came from.
#[inline(always)]
fn send_back<const NETWORK: usize>(ctx: &TcContext) -> i32 {
    Skb::<NETWORK>::mark_done(ctx);
    // SAFETY: the context is the kernel's and outlives the program.
    let link = unsafe { (*ctx.skb.skb).ifindex };
    // SAFETY: the helper only notes where to send the packet after the program's end.
    unsafe { bpf_redirect(link, 0) as i32 }
}
