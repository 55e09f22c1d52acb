//! XDP of uplinks.

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX};
use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use bytemuck::Zeroable;
use proxy_common::{Family, Outcome, V4, V6};
use proxy_ebpf::datapath::relay::{Neighbours, relay};
use proxy_ebpf::datapath::{Leg, Tables, Verdict};
use proxy_ebpf::packet::Frame;

use super::host;
use super::raw::Raw;
use super::traffic::gateway;
use crate::counters;
use crate::maps::{Tables4, Tables6};
use crate::shared::relays;

/// Packets of flows that take a short cut, on their way from uplink to uplink, and those that are not let in.
#[xdp]
#[inline(always)] // not a function of its own, with a frame of its own
#[allow(clippy::needless_pass_by_value, reason = "the attribute hands it over")]
pub fn portal_relay(ctx: XdpContext) -> u32 {
    let mut frame = Raw::new(&ctx);
    let verdict = match frame.ethertype() {
        V4::ETHERTYPE => relay(&mut frame, &Tables4, |frame, leg, between| {
            lead::<V4, _>(frame, &Tables4, leg, between)
        }),
        V6::ETHERTYPE => relay(&mut frame, &Tables6, |frame, leg, between| {
            lead::<V6, _>(frame, &Tables6, leg, between)
        }),
        _ => None,
    };
    match verdict {
        None => XDP_PASS,
        Some(Verdict { outcome: Outcome::ShortCut, link, .. }) if link == frame.link() => XDP_TX,
        // SAFETY: the helper only notes where the packet leaves after the program's end.
        Some(Verdict { outcome: Outcome::ShortCut, link, .. }) => unsafe {
            (bpf_redirect(link, 0) as i32).cast_unsigned()
        },
        Some(Verdict { outcome, .. }) => {
            counters::count(outcome, 1);
            if outcome.turns_back() { XDP_TX } else { XDP_DROP }
        }
    }
}

/// By which addresses a leg leads, if it is by this link or both take part in sending from link to link.
#[inline(always)]
fn lead<F: Family, T: Tables<F>>(
    frame: &Raw<'_>,
    tables: &T,
    leg: Leg,
    (from, to): (&F::Addr, &F::Addr),
) -> Option<Neighbours> {
    let own = frame.link();
    if leg.link != own && !(relays(own) && relays(leg.link)) {
        return None;
    }
    let hop = if leg.way == 0 { F::Addr::zeroed() } else { gateway(tables, leg.way) };
    host::neighbours::<F>(frame.context(), leg.link, (from, to), &hop)
}
