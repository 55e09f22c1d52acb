//! The place of a flow's answers: the key of its backend's packets. Of two flows with one place a
//! backend, or this node, could not tell the answers apart, so the second gets another source port.
//! The insert of the reply's record, if there is none, is the lock.
//!
//! The client's own port is tried first, then some that follow from its addresses (so that a flow whose
//! record was lost finds the same again), then others in turn. A place whose flow has ended is held for
//! as long as the backend may have the connection in `TIME_WAIT`; before anyone is refused it is handed
//! out again, of those that were looked at the one whose flow ended longest ago.

use proxy_common::addr::mix;
use proxy_common::settings::PORT_STRIDE;
use proxy_common::tables::{
    EmbryoValue, Facts, FlowKey, FlowRecord, Memory, Origin, Request, State, expired,
};
use proxy_common::{Address, Family, Port};

use super::choose;
use super::live::{self, lifetime};
use super::{Refused, Tables, pending};
use crate::packet::Frame;

/// How many places are looked at before a flow is refused.
const TRIES: u32 = 64;
/// How many of them at once: in the kernel, by one program.
const AT_ONCE: u32 = 4;
/// How many of them follow from the flow's addresses.
const STEADY: u32 = 5;

/// Whose a place is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Holder {
    /// Nobody's.
    None,
    /// Of a flow that is over: its record may go.
    Over,
    /// The flow's own: its reply's record is there.
    Own,
    /// Of a flow that ended, which the backend may still have in `TIME_WAIT`.
    Ended,
    /// Of a flow whose client has not shown that it hears the backend.
    Unproved,
    /// Another flow's, or a socket's of the host.
    Other,
}

/// Which state of a record was looked at: when it was last used, and when its flow ended. It is removed only
/// if that is still so.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stamp {
    seen: u32,
    ended: u32,
}

impl Stamp {
    const NONE: Self = Self { seen: 0, ended: 0 };
}

/// What comes of asking for a place.
pub enum Answer {
    /// The flow has it.
    Taken,
    /// None yet.
    AskAgain,
    /// All that were looked at belong to flows that are alive.
    None,
}

/// Takes a place for the flow of `key`, and leaves the reply's record there. `place` is what is
/// wanted, at first with the client's own port; then what it got. `origin` is what the client's record
/// will say.
#[inline(always)]
pub fn take<F: Family, P: Frame, T: Tables<F>>(
    frame: &P,
    tables: &T,
    (key, place): (&FlowKey<F>, &mut FlowKey<F>),
    memory: &mut Memory<F>,
    request: &mut Request,
    origin: Origin,
) -> Answer {
    let reply = origin.inverse();
    for _ in 0..AT_ONCE {
        // Two values, and not one that only some variants have: what is not there, LLVM reads all the same.
        let (held, stamp) = holder(frame, tables, (key, place), memory, request);
        match held {
            Holder::Own => return Answer::Taken,
            Holder::None => {
                if settle(tables, (key, place), memory, reply, request) {
                    return Answer::Taken;
                }
            }
            Holder::Over => {
                if take_over(tables, (key, place), memory, stamp, reply, request) {
                    return Answer::Taken;
                }
            }
            Holder::Ended => request.last_resort.consider(stamp.ended, place.dport, true),
            Holder::Unproved => {
                request.last_resort.consider(stamp.seen, place.dport, false);
            }
            Holder::Other => {}
        }
        request.attempts += 1;
        place.dport = next_port(tables, place, request);
    }
    if request.attempts < TRIES {
        return Answer::AskAgain;
    }
    if request.last_resort.port != 0 {
        place.dport = Port::new(request.last_resort.port as u16);
        let (held, stamp) = holder(frame, tables, (key, place), memory, request);
        if matches!(held, Holder::Ended | Holder::Unproved | Holder::Over)
            && take_over(tables, (key, place), memory, stamp, reply, request)
        {
            return Answer::Taken;
        }
    }
    tables.exhausted(request.backend);
    Answer::None
}

/// The port to be looked at next.
#[inline(always)]
fn next_port<F: Family, T: Tables<F>>(
    tables: &T,
    place: &FlowKey<F>,
    request: &mut Request,
) -> Port {
    if request.attempts > STEADY {
        return scattered_port(tables.next_port(destination(place)), tables);
    }
    request.hash = mix(request.hash, TRIES);
    spare_port(request.hash, tables)
}

/// Inserts the reply's record. False if another CPU was faster with another flow.
#[inline(always)]
fn settle<F: Family, T: Tables<F>>(
    tables: &T,
    (key, place): (&FlowKey<F>, &FlowKey<F>),
    memory: &mut Memory<F>,
    reply: Origin,
    request: &Request,
) -> bool {
    let at = (request.now, request.microseconds);
    memory.embryo.fill(place, key, reply, State::Opening, at);
    match tables.insert_embryo(place, &memory.embryo) {
        Ok(()) => true,
        Err(Refused::Exists) => is_own(tables, key, place, &mut memory.spare),
        Err(Refused::Full) => false,
    }
}

/// Takes a place over from a flow that is over, if its record is still as it was looked at. Of two CPUs that find
/// the same place over one claims it, by a record of its own; for the other it is not free.
#[inline(always)]
fn take_over<F: Family, T: Tables<F>>(
    tables: &T,
    keys: (&FlowKey<F>, &FlowKey<F>),
    memory: &mut Memory<F>,
    stamp: Stamp,
    reply: Origin,
    request: &Request,
) -> bool {
    let (_, place) = keys;
    memory.live.other = *place;
    memory.live.other.pad = FlowKey::<F>::CLAIM;
    let claim = &memory.live.other;
    memory.embryo.fill(claim, place, Origin::NONE, State::Foreign, (request.now, 0));
    if tables.insert_embryo(claim, &memory.embryo).is_err() {
        return false;
    }
    let is_taken = is_as_before(tables, place, &mut memory.spare, stamp) && {
        tables.remove_embryo(place);
        settle(tables, keys, memory, reply, request)
    };
    tables.remove_embryo(&memory.live.other);
    is_taken
}

#[inline(always)]
fn is_as_before<F: Family, T: Tables<F>>(
    tables: &T,
    place: &FlowKey<F>,
    spare: &mut FlowKey<F>,
    stamp: Stamp,
) -> bool {
    let read = tables.embryo(place).and_then(|record| record.read(place, spare));
    read.is_none_or(|(facts, making)| Stamp { seen: facts.seen, ended: making.ended } == stamp)
}

/// Whether the record at a place is of the flow of `key`.
#[inline(always)]
fn is_own<F: Family, T: Tables<F>>(
    tables: &T,
    key: &FlowKey<F>,
    place: &FlowKey<F>,
    spare: &mut FlowKey<F>,
) -> bool {
    tables.embryo(place).is_some_and(|record| record.read(place, spare).is_some() && *spare == *key)
}

/// Looks whose a place is.
#[inline(always)]
fn holder<F: Family, P: Frame, T: Tables<F>>(
    frame: &P,
    tables: &T,
    (key, place): (&FlowKey<F>, &FlowKey<F>),
    memory: &mut Memory<F>,
    request: &Request,
) -> (Holder, Stamp) {
    let now = request.now;
    let held = match tables.flow(place) {
        Some(record) => live_holder(tables, record, key, place, memory, now),
        None => Holder::None,
    };
    if held != Holder::None {
        return (held, Stamp::NONE);
    }
    let (held, stamp) = pending_holder(tables, key, place, memory, now);
    let is_free = !matches!(held, Holder::Own | Holder::Other);
    if is_free && request.masquerades != 0 && frame.has_socket(place) {
        return (Holder::Other, stamp);
    }
    (held, stamp)
}

/// Whose a live flow's record at a place is.
#[inline(always)]
fn live_holder<F: Family, T: Tables<F>>(
    tables: &T,
    record: FlowRecord<'_, F>,
    key: &FlowKey<F>,
    place: &FlowKey<F>,
    memory: &mut Memory<F>,
    now: u32,
) -> Holder {
    let Memory { spare, embryo, .. } = memory;
    // What is another's by now leaves the place to someone who has just come.
    let Some(facts) = record.read(place, spare) else { return Holder::Other };
    if *spare == *key {
        return Holder::Own;
    }
    let idle = |facts: Facts| facts.expired(lifetime(tables, place.proto, facts.state), now);
    let half = live::half(tables, place, spare, &mut embryo.other);
    if !idle(facts) || !half.is_none_or(idle) {
        return Holder::Other;
    }
    tables.remove(place);
    if half.is_some() {
        tables.remove(spare);
    }
    Holder::None
}

/// Whose a record is that is not a live flow's at a place.
#[inline(always)]
fn pending_holder<F: Family, T: Tables<F>>(
    tables: &T,
    key: &FlowKey<F>,
    place: &FlowKey<F>,
    memory: &mut Memory<F>,
    now: u32,
) -> (Holder, Stamp) {
    let Memory { spare, embryo, .. } = memory;
    let Some(record) = tables.embryo(place) else { return (Holder::None, Stamp::NONE) };
    let Some((facts, making)) = record.read(place, spare) else {
        return (Holder::None, Stamp::NONE);
    };
    let is_own = *spare == *key;
    let idle = |facts: Facts| facts.expired(lifetime(tables, place.proto, facts.state), now);
    let is_over = if facts.is_in(State::Closed) {
        // The same client's from the same port has numbers that go on, which the backend knows.
        is_own || expired(making.ended, tables.setting(|s| &s.lifetimes.hold), now)
    } else {
        // One that nobody answers lives by its client.
        let is_left = idle(facts)
            && pending::half(tables, (place, spare), &mut embryo.other)
                .is_none_or(|(client, _)| idle(client));
        // Its own that one side goes on with only: the client begins anew.
        is_left || is_own && (idle(facts) || facts.is_in(State::Revived))
    };
    let stamp = Stamp { seen: facts.seen, ended: making.ended };
    let holder = match facts.state {
        _ if is_over => Holder::Over,
        _ if is_own => Holder::Own,
        State::Closed => Holder::Ended,
        State::Opening | State::Answered | State::Heard => Holder::Unproved,
        _ => Holder::Other,
    };
    (holder, stamp)
}

/// A place's destination, as ports are handed out in turn to each.
#[inline(always)]
fn destination<F: Family>(place: &FlowKey<F>) -> u32 {
    mix(place.src.mix(0), u32::from(place.sport.word()))
}

#[inline(always)]
fn spare_port<F: Family, T: Tables<F>>(hash: u32, tables: &T) -> Port {
    let offset = choose::scale(hash, tables.setting(|s| &s.port_count));
    Port::new((tables.setting(|s| &s.first_port) + offset) as u16)
}

/// The port whose turn it is. In such an order ports next to each other, as clients use them, are far
/// apart.
#[inline(always)]
fn scattered_port<F: Family, T: Tables<F>>(turn: u32, tables: &T) -> Port {
    let count = tables.setting(|s| &s.port_count);
    let offset = if count == 0 { 0 } else { turn.wrapping_mul(PORT_STRIDE) % count };
    Port::new((tables.setting(|s| &s.first_port) + offset) as u16)
}

/// Inserts the client's record of a flow whose reply has its place. Where another CPU has opened the flow
/// meanwhile, that flow it is: the place goes back unless it is the same, and `place` is its place.
/// Returns what the client's record says.
#[inline(always)]
pub fn enter<F: Family, T: Tables<F>>(
    tables: &T,
    (key, place): (&FlowKey<F>, &mut FlowKey<F>),
    memory: &mut Memory<F>,
    origin: Origin,
    request: &Request,
) -> Origin {
    let at = (request.now, request.microseconds);
    memory.embryo.fill(key, place, origin, State::Opening, at);
    if tables.insert_embryo(key, &memory.embryo) != Err(Refused::Exists) {
        return origin;
    }
    if let Some(record) = tables.embryo(key)
        && let Some((facts, _)) = record.read(key, &mut memory.spare)
        && pending::is_current(tables, (key, &memory.spare), facts, &mut memory.live.other, at.0)
    {
        if memory.spare != *place {
            tables.remove_embryo(place);
            *place = memory.spare;
        }
        return facts.origin;
    }
    tables.put_embryo(key, &memory.embryo);
    origin
}

/// Notes that a place which is not taken belongs to a flow that is none of ours.
#[inline(always)]
pub fn note<F: Family, T: Tables<F>>(
    tables: &T,
    key: &FlowKey<F>,
    place: &FlowKey<F>,
    embryo: &mut EmbryoValue<F>,
    now: u32,
) {
    embryo.fill(place, key, Origin::NONE.inverse(), State::Foreign, (now, 0));
    tables.put_embryo(place, embryo);
}

/// As [`note`], and the same of the flow's own packets, so that few of them are looked at.
#[inline(always)]
pub fn note_both<F: Family, T: Tables<F>>(
    tables: &T,
    key: &FlowKey<F>,
    place: &FlowKey<F>,
    embryo: &mut EmbryoValue<F>,
    now: u32,
) {
    note(tables, key, place, embryo, now);
    embryo.fill(key, place, Origin::NONE, State::Foreign, (now, 0));
    let _ = tables.insert_embryo(key, embryo);
}

/// Whether a place belongs to a flow that is translated, of another key; or has, so that the backend may have it in
/// `TIME_WAIT`.
#[inline(always)]
pub fn is_taken<F: Family, T: Tables<F>>(
    tables: &T,
    key: &FlowKey<F>,
    place: &FlowKey<F>,
    spare: &mut FlowKey<F>,
    now: u32,
) -> bool {
    if let Some(record) = tables.flow(place) {
        return record.read(place, spare).is_some() && *spare != *key;
    }
    if let Some(record) = tables.embryo(place)
        && let Some((facts, making)) = record.read(place, spare)
    {
        let is_over = if facts.is_in(State::Closed) {
            expired(making.ended, tables.setting(|s| &s.lifetimes.hold), now)
        } else {
            facts.expired(lifetime(tables, place.proto, facts.state), now)
        };
        return *spare != *key && !facts.is_in(State::Foreign) && !is_over;
    }
    false
}
