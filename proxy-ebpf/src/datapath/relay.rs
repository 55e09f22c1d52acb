//! What comes in by an uplink, before the host stack knows of it (XDP): plain packets of flows that take a short cut are sent on at
//! once, and what is not to be let in is rejected ([`guard`]). All else passes untouched, and tc does with it what it does without.

use bytemuck::Zeroable;
use proxy_common::tables::{FlowKey, Origin, Side};
use proxy_common::{Outcome, proto};

use super::{Client, Leg, Story, Tables, Verdict, fast, guard, interest, live, rewrite};
use crate::packet::{Frame, Wire};

/// The addresses of an Ethernet header: to whom, and from whom.
pub type Neighbours = [[u8; 6]; 2];

/// Translates and addresses a packet, if it is to be sent on, or says why it is not let in; `None` if it passes, untouched. `lead` says by which addresses a
/// leg leads from one address to another; `None` if it does not lead there by itself.
#[inline(always)]
pub fn relay<F: Wire, P: Frame, T: Tables<F>>(
    frame: &mut P,
    tables: &T,
    lead: impl FnOnce(&P, Leg, (&F::Addr, &F::Addr)) -> Option<Neighbours>,
) -> Option<Verdict> {
    let (plain, key) = F::plain(frame, Side::Ingress)?;
    interest::comes_in(tables, plain, &key, Client::Outside)?;
    let now = tables.now();
    let Some(record) = tables.flow(&key) else {
        return guard::reject(frame, tables, plain, &key);
    };
    let mut other = FlowKey::zeroed();
    let facts = record.read_plain(&key, &mut other)?;
    let origin = facts.plain;
    let goes = facts.is_cut() && !origin.is(Origin::TURN) && facts.seen == now;
    let goes = goes && fast::is_in_the_middle(facts, plain);
    if !goes || plain.is(proto::UDP) && live::is_stale(origin, tables) {
        return None;
    }
    let leg = fast::leg(tables, record, facts, Story::FromOutside, &other)?;
    if rewrite::is_too_big::<F, P>(frame, P::NETWORK + F::HEADER, key.proto, leg.mtu) {
        return None;
    }
    let change = rewrite::Change::of(&key, &other)?;
    let neighbours = lead(frame, leg, (&other.dst, &other.src))?;
    record.count(frame.length())?;
    let is_sent = rewrite::translate_plain(frame, plain, &other, &change)
        .and_then(|()| F::hop(frame, P::NETWORK))
        .and_then(|()| frame.store(0, neighbours));
    Some(match is_sent {
        Some(()) => Verdict { outcome: Outcome::ShortCut, link: leg.link, way: leg.way },
        None => Verdict::of(Outcome::NotWritable),
    })
}
