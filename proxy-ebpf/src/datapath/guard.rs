//! Before the host stack: what tc would drop is dropped, and in a flood of new connections clients are asked to show that their
//! address is their own before anything is kept of them.
//!
//! A SYN is answered by one that acknowledges a number that nobody has sent. Who asked resets by that very number (RFC 9293,
//! 3.10.7.3), and asks again: Linux within milliseconds, others when their timer says so. Then this one connection is let in. Who
//! is not there does not answer; who is there and did not ask resets too, and nobody asks again in his name but who forged it once
//! before. The number is a keyed hash of addresses, ports and the time, so that until then there is nothing to be kept. Unlike behind a SYN
//! cookie, the connection itself is the backend's from its first segment on (docs/decisions/0030).

use bytemuck::Zeroable;
use proxy_common::siphash::siphash;
use proxy_common::tables::{
    Arrivals, FlowKey, Packet, ServiceKey, ServiceValue, Side, SourceRange, expired,
};
use proxy_common::{Address, Family, Outcome, proto};

use super::choose::{self, Asker, Failure};
use super::{Service, Tables, Verdict, open, refuse, rewrite};
use crate::packet::{Frame, Plain, Wire, tcp};

/// How long an answer may take is between one and two times so many ticks, as a power of two.
const ROUND_TRIP: u32 = 2;
/// For how many ticks a connection is let in whose client has answered: until he asks again.
const TRUST: u32 = 8;

/// What becomes of a packet of no live flow that comes in by an uplink; `None` if it passes.
#[inline(always)]
pub fn reject<F: Wire, P: Frame, T: Tables<F>>(
    frame: &mut P,
    tables: &T,
    plain: Plain,
    key: &FlowKey<F>,
) -> Option<Verdict> {
    let limit = tables.setting(|s| &s.guard.limit);
    let resets = limit != 0 && plain.is(proto::TCP) && plain.has(tcp::RST);
    if !plain.begins() && !resets {
        return None;
    }
    let service = asked_for(tables, key)?;
    let outcome = if resets {
        verify(frame, tables, key)?
    } else if let Some(outcome) = refused(tables, &service, key) {
        outcome
    } else if plain.is(proto::TCP) && is_flood(tables, limit, key) && !is_to_many(frame) {
        Outcome::Challenged
    } else {
        return None;
    };
    if is_known(tables, key) {
        return None;
    }
    Some(Verdict::of(match outcome {
        Outcome::Challenged => challenge(frame, tables, key),
        outcome => outcome,
    }))
}

/// The Service port that a packet is for, if no socket of the node's can have it.
#[inline(always)]
fn asked_for<F: Family, T: Tables<F>>(tables: &T, key: &FlowKey<F>) -> Option<Service> {
    let mark = tables.service(&ServiceKey::mark(key.dst))?;
    let service = choose::frontend(tables, &mark, key.dst, key.dport, key.proto).ok()?;
    let is_ours = !mark.has(ServiceValue::LOOPBACK) && !service.may_be_nodes(&mark);
    is_ours.then_some(service)
}

/// Whether the Service's policies drop what a client outside sends, and by which name.
#[inline(always)]
fn refused<F: Family, T: Tables<F>>(
    tables: &T,
    service: &Service,
    key: &FlowKey<F>,
) -> Option<Outcome> {
    let mut range = SourceRange::zeroed();
    let allowed = open::is_allowed(tables, &mut range, service, key.src);
    match choose::eligible::<F>(service, Asker { outside: true, allowed }) {
        Err(Failure::Dropped(outcome)) => Some(outcome),
        _ => None,
    }
}

/// Whether more clients ask at once than are let in unasked, and this one has not answered yet.
#[inline(always)]
fn is_flood<F: Family, T: Tables<F>>(tables: &T, limit: u32, key: &FlowKey<F>) -> bool {
    if limit == 0 {
        return false;
    }
    let now = tables.now();
    tables.count_arrival(now) > limit
        && tables.verified(key).is_none_or(|since| expired(since, TRUST, now))
}

/// Whether a frame is for many hosts, so that the answer would come from an address that is none.
#[inline(always)]
fn is_to_many<P: Frame>(frame: &P) -> bool {
    frame.load::<[u8; 2]>(0).is_none_or(|[first, _]| first & 1 != 0)
}

/// At tc: whether a SYN comes in a flood and has a shape that is not looked at before the host stack, as forgers can give it.
#[inline(always)]
pub fn evades<F: Wire, P: Frame, T: Tables<F>>(frame: &mut P, tables: &T, packet: &Packet) -> bool {
    let limit = tables.setting(|s| &s.guard.limit);
    if limit == 0 || packet.proto != proto::TCP || !tcp::opens(packet.flags) {
        return false;
    }
    let Arrivals { tick, count } = tables.arrivals();
    tick == tables.now() && count > limit && F::plain(frame, Side::Ingress).is_none()
}

/// Whether there is a flow that the packet may belong to, in either direction: the second line's are known by the other.
#[inline(always)]
fn is_known<F: Family, T: Tables<F>>(tables: &T, key: &FlowKey<F>) -> bool {
    let leaving = FlowKey { side: Side::Egress as u8, ..*key };
    tables.embryo(key).is_some()
        || tables.flow(&leaving).is_some()
        || tables.embryo(&leaving).is_some()
}

/// A client's reset by the number that it was asked by.
#[inline(always)]
fn verify<F: Wire, P: Frame, T: Tables<F>>(
    frame: &P,
    tables: &T,
    key: &FlowKey<F>,
) -> Option<Outcome> {
    let number: [u8; 4] = frame.load(P::NETWORK + F::HEADER + tcp::NUMBERS)?;
    let number = u32::from_be_bytes(number);
    let now = tables.now();
    let window = now >> ROUND_TRIP;
    // Its last bit says whether it is of this window or of the one before.
    if number != challenge_number(tables, key, window.wrapping_sub((window ^ number) & 1)) {
        return None;
    }
    tables.verify(key, now);
    Some(Outcome::Verified)
}

/// Makes a SYN the challenge that goes back to its sender. Not if that would be an acknowledgement: then the next window has another
/// number.
#[inline(always)]
fn challenge<F: Wire, P: Frame, T: Tables<F>>(
    frame: &mut P,
    tables: &T,
    key: &FlowKey<F>,
) -> Outcome {
    let Some(asked) = frame.load::<tcp::Header>(P::NETWORK + F::HEADER) else {
        return Outcome::Malformed;
    };
    let number = challenge_number(tables, key, tables.now() >> ROUND_TRIP);
    if number == u32::from_be_bytes(asked.sequence).wrapping_add(1) {
        return Outcome::Silent;
    }
    let answer = tcp::Header {
        sport: asked.dport,
        dport: asked.sport,
        sequence: [0; 4],
        acknowledgement: number.to_be_bytes(),
        offset: 5 << 4,
        flags: tcp::SYN | tcp::ACK,
        window: [0; 2],
        checksum: 0,
        urgent: [0; 2],
    };
    match refuse::answer(frame, key, answer).and_then(|()| rewrite::turn_around(frame)) {
        Some(()) => Outcome::Challenged,
        None => Outcome::NotWritable,
    }
}

/// The number that a client is asked by in that window of time. The last bit is the window's.
#[inline(always)]
fn challenge_number<F: Family, T: Tables<F>>(tables: &T, key: &FlowKey<F>, window: u32) -> u32 {
    let [a, b, c, d] = tables.setting(|s| &s.guard.key).map(u64::from);
    let ports: u32 = bytemuck::cast([key.sport, key.dport]);
    let [from_low, from_high] = key.src.halves();
    let [to_low, to_high] = key.dst.halves();
    let rest = u64::from(ports) | u64::from(window) << 32;
    let hash = siphash([a | b << 32, c | d << 32], [from_low, from_high, to_low, to_high, rest]);
    hash as u32 & !1 | window & 1
}
