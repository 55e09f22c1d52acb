//! Flows that are not live: not answered yet, answered once, ended; or live, but without room among
//! live flows. A flow becomes live when the client has shown that it hears its backend: TCP by
//! acknowledging the backend's number, anything else by going on after an answer.

use proxy_common::tables::{
    Decision, EmbryoRecord, Facts, FlowKey, Making, Memory, Origin, Packet, Part, Side, State,
    expired,
};
use proxy_common::{Family, Outcome, proto};

use super::live::{self, is_stale, lifetime};
use super::promote::{is_anothers, promote};
use super::{Refused, Tables};
use crate::packet::{Frame, Wire, tcp};

/// How many ticks after its end a flow that goes on is taken for alive: what two sides that close at
/// once send after their FINs comes earlier.
const AFTERMATH: u32 = 2;

/// How far behind a backend's last number a client's acknowledgement may be that shows it hears it, in
/// the middle of a connection.
const WINDOW: u32 = 65_536;

/// The keys of a packet's flow: its own direction's and the other's.
pub(super) type Keys<'a, F> = (&'a FlowKey<F>, &'a FlowKey<F>);

/// The flow that is not live which the packet belongs to, if it still holds. The other direction's key
/// is then in `other`.
#[inline(always)]
pub fn find<F: Wire, P: Frame, T: Tables<F>>(
    frame: &P,
    tables: &T,
    packet: &Packet,
    (key, other): (&FlowKey<F>, &mut FlowKey<F>),
    memory: &mut Memory<F>,
) -> Option<Found> {
    let record = tables.embryo(key)?;
    let (facts, making) = record.read(key, other)?;
    let now = tables.now();
    let origin = facts.origin;
    if facts.is_in(State::Foreign) {
        let begins = packet.proto != proto::TCP || tcp::opens(packet.flags);
        if begins && facts.expired(lifetime(tables, packet.proto, facts.state), now) {
            return None;
        }
        record.common().touch(now);
        return Some(Found::Foreign);
    }
    let keys = (key, &*other);
    let flow = Pending { record, facts, making };
    let outcome = match (packet.proto == proto::TCP, origin.is(Origin::REPLY)) {
        (true, false) => asked(frame, tables, packet, keys, memory, flow, now)?,
        (true, true) => match answered(frame, tables, packet, keys, memory, flow, now) {
            Some(outcome) => outcome,
            // Its other end was the flow's, but the connection is another one, past every VIP.
            None if packet.flags & tcp::SYN != 0 => {
                disown(tables, key, memory);
                return Some(Found::Foreign);
            }
            None => return None,
        },
        (false, false) => sent(tables, packet, keys, memory, flow, now)?,
        (false, true) => returned(tables, keys, memory, flow, now)?,
    };
    live::count(tables, origin, 1, frame.length());
    Some(Found::Ours(Decision::new(outcome, origin)))
}

/// A flow that is not live.
pub enum Found {
    /// It is to be translated.
    Ours(Decision),
    /// It is not; it was noted only.
    Foreign,
}

/// One direction's record of a flow, as it was read.
#[derive(Clone, Copy)]
struct Pending<'a, F: Family> {
    record: EmbryoRecord<'a, F>,
    facts: Facts,
    making: Making,
}

/// A segment of the client.
#[inline(always)]
fn asked<F: Wire, P: Frame, T: Tables<F>>(
    frame: &P,
    tables: &T,
    packet: &Packet,
    keys: Keys<'_, F>,
    memory: &mut Memory<F>,
    flow: Pending<'_, F>,
    now: u32,
) -> Option<Outcome> {
    let Pending { record, facts, .. } = flow;
    if tcp::opens(packet.flags) {
        if facts.state >= State::Finished
            || is_idle(tables, keys.0, facts, now)
            || is_stale(facts.origin, tables)
        {
            return None;
        }
        if facts.is_in(State::Opening) {
            record.common().touch(now);
        }
        return other_half(tables, keys, memory, facts, now).map(|_| Outcome::Forwarded);
    }
    let state = go_on(packet.flags, flow, now);
    let half = other_half(tables, keys, memory, facts, now)?;
    if packet.flags & tcp::RST != 0 {
        if is_alive(facts.state) {
            close(tables, keys, memory, facts.origin, now);
        }
    } else if is_heard(frame, packet, state, half) {
        let state = if packet.flags & tcp::FIN != 0 { State::Finished } else { State::Established };
        return promote(tables, keys, memory, facts.origin, state, now);
    } else if is_alive(facts.state) {
        if both_finished(state, half) {
            close(tables, keys, memory, facts.origin, now);
        } else if facts.seen != now {
            // There was no room; there may be now.
            return promote(tables, keys, memory, facts.origin, state, now);
        }
    }
    Some(Outcome::Forwarded)
}

/// A segment of the backend.
#[inline(always)]
fn answered<F: Wire, P: Frame, T: Tables<F>>(
    frame: &P,
    tables: &T,
    packet: &Packet,
    keys: Keys<'_, F>,
    memory: &mut Memory<F>,
    flow: Pending<'_, F>,
    now: u32,
) -> Option<Outcome> {
    let Pending { record, facts, making } = flow;
    let is_making = facts.state <= State::Heard;
    if is_making && is_idle(tables, keys.0, facts, now) && is_left(tables, keys, memory, now) {
        return None;
    }
    if facts.state >= State::Closed && packet.flags & tcp::SYN != 0 {
        let is_late = making.proof == next_number::<F, P>(frame, packet)?;
        return is_late.then_some(Outcome::Replied);
    }
    let state = if is_making && packet.flags & tcp::RST == 0 && !packet.is(Part::Later) {
        record.set_proof(next_number::<F, P>(frame, packet)?);
        // After a SYN-ACK a backend sends no more before the client has acknowledged it.
        let state = if packet.flags & tcp::SYN != 0 { State::Answered } else { State::Heard };
        record.common().set_state(state);
        record.common().touch(now);
        state
    } else {
        go_on(packet.flags, flow, now)
    };
    let half = other_half(tables, keys, memory, facts, now)?;
    if packet.flags & tcp::RST != 0 {
        if facts.state <= State::Finished {
            close(tables, keys, memory, facts.origin, now);
        }
    } else if state == State::Revived && half.0.is_in(State::Revived) {
        let origin = facts.origin.inverse();
        promote(tables, (keys.1, keys.0), memory, origin, State::Established, now)?;
    } else if is_alive(facts.state) && both_finished(state, half) {
        close(tables, keys, memory, facts.origin, now);
    }
    Some(Outcome::Replied)
}

/// Notes that a place where a flow has ended is another connection's now, which is none of ours. Where none was, nothing is noted.
#[inline(always)]
pub fn disown<F: Family, T: Tables<F>>(tables: &T, key: &FlowKey<F>, memory: &mut Memory<F>) {
    if tables.embryo(key).is_none() {
        return;
    }
    let now = tables.now();
    let other =
        key.turned(if key.side == Side::Ingress as u8 { Side::Egress } else { Side::Ingress });
    let origin = Origin::NONE.inverse();
    memory.embryo.fill(key, &other, origin, State::Foreign, (now, 0));
    tables.put_embryo(key, &memory.embryo);
}

/// A datagram of the client.
#[inline(always)]
fn sent<F: Family, T: Tables<F>>(
    tables: &T,
    packet: &Packet,
    keys: Keys<'_, F>,
    memory: &mut Memory<F>,
    flow: Pending<'_, F>,
    now: u32,
) -> Option<Outcome> {
    let Pending { record, facts, .. } = flow;
    // SCTP stays with its backend, as TCP does (KP-112).
    let is_cut = packet.proto == proto::UDP && is_stale(facts.origin, tables);
    if is_cut || is_idle(tables, keys.0, facts, now) {
        return None;
    }
    // Looked at anew: other tables were asked.
    record.read(keys.0, &mut memory.spare)?;
    record.common().touch(now);
    let (half, _) = other_half(tables, keys, memory, facts, now)?;
    let is_stream =
        half.is_in(State::Answered) || facts.seen != now && facts.is_in(State::Established);
    if is_stream {
        return promote(tables, keys, memory, facts.origin, State::Established, now);
    }
    Some(Outcome::Forwarded)
}

/// A datagram of the backend.
#[inline(always)]
fn returned<F: Family, T: Tables<F>>(
    tables: &T,
    keys: Keys<'_, F>,
    memory: &mut Memory<F>,
    flow: Pending<'_, F>,
    now: u32,
) -> Option<Outcome> {
    let Pending { record, facts, .. } = flow;
    if is_idle(tables, keys.0, facts, now) && is_left(tables, keys, memory, now) {
        return None;
    }
    // Looked at anew: another table was asked.
    record.read(keys.0, &mut memory.spare)?;
    record.common().touch(now);
    if facts.is_in(State::Opening) {
        record.common().set_state(State::Answered);
    }
    if facts.seen != now || facts.is_in(State::Opening) {
        other_half(tables, keys, memory, facts, now)?;
    }
    Some(Outcome::Replied)
}

/// Whether a direction's record says that it has been idle for longer than it may.
#[inline(always)]
fn is_idle<F: Family, T: Tables<F>>(tables: &T, key: &FlowKey<F>, facts: Facts, now: u32) -> bool {
    facts.expired(lifetime(tables, key.proto, facts.state), now)
}

/// Whether the other direction has been idle for longer than it may, too, or is not there.
#[inline(always)]
fn is_left<F: Family, T: Tables<F>>(
    tables: &T,
    (key, other): Keys<'_, F>,
    memory: &mut Memory<F>,
    now: u32,
) -> bool {
    match half(tables, (key, other), &mut memory.spare) {
        Some((facts, _)) => is_idle(tables, other, facts, now),
        None => true,
    }
}

/// What is known of the flow of a key, live or not. The other direction's key is then in `other`.
#[inline(always)]
pub fn known<F: Family, T: Tables<F>>(
    tables: &T,
    key: &FlowKey<F>,
    other: &mut FlowKey<F>,
) -> Option<Facts> {
    match tables.flow(key) {
        Some(record) => record.read(key, other),
        None => Some(tables.embryo(key)?.read(key, other)?.0),
    }
}

/// The other direction's record, as far as it leads back to `key`.
#[inline(always)]
pub fn half<F: Family, T: Tables<F>>(
    tables: &T,
    (key, other): Keys<'_, F>,
    spare: &mut FlowKey<F>,
) -> Option<(Facts, Making)> {
    let read = tables.embryo(other)?.read(other, spare)?;
    (*spare == *key).then_some(read)
}

/// Whether a flow that was found when its client's record was to be entered is one that another CPU has
/// just opened, and none that is over.
#[inline(always)]
pub fn is_current<F: Family, T: Tables<F>>(
    tables: &T,
    (key, other): Keys<'_, F>,
    facts: Facts,
    spare: &mut FlowKey<F>,
    now: u32,
) -> bool {
    facts.state < State::Finished
        && !is_idle(tables, key, facts, now)
        && !is_stale(facts.origin, tables)
        && half(tables, (key, other), spare).is_some()
}

/// Whether that is the state of a flow that would be live if there was room.
#[inline(always)]
pub(super) fn is_alive(state: State) -> bool {
    matches!(state, State::Established | State::Finished)
}

#[inline(always)]
fn both_finished(state: State, (half, _): (Facts, Making)) -> bool {
    state == State::Finished && half.is_in(State::Finished)
}

/// Notes in a direction's own record what a segment that opens nothing says of it; the state that it is
/// in then.
#[inline(always)]
fn go_on<F: Family>(flags: u8, flow: Pending<'_, F>, now: u32) -> State {
    let Pending { record, facts, making } = flow;
    let ends = flags & (tcp::FIN | tcp::RST) != 0;
    let state = match facts.state {
        State::Closed if !ends && expired(making.ended, AFTERMATH - 1, now) => State::Revived,
        State::Established if flags & tcp::FIN != 0 => State::Finished,
        same => same,
    };
    if state != facts.state {
        record.common().set_state(state);
    }
    // While nobody has shown anything, time goes on.
    if facts.seen != now && facts.state >= State::Established {
        record.common().touch(now);
    }
    state
}

/// The other direction's record, which is made anew if it was evicted. `None` if another flow has its
/// place: then this one is over.
#[inline(always)]
fn other_half<F: Family, T: Tables<F>>(
    tables: &T,
    (key, other): Keys<'_, F>,
    memory: &mut Memory<F>,
    facts: Facts,
    now: u32,
) -> Option<(Facts, Making)> {
    if let Some(record) = tables.embryo(other)
        && let Some(half) = record.read(other, &mut memory.spare)
    {
        return (memory.spare == *key).then_some(half);
    }
    if is_anothers(tables, (key, other), &mut memory.spare) {
        return None;
    }
    let origin = facts.origin.inverse();
    let state = match facts.state {
        State::Established | State::Finished => State::Established,
        // A SYN begins another one.
        State::Closed | State::Revived => State::Closed,
        _ => State::Opening,
    };
    memory.embryo.fill(other, key, origin, state, (now, 0));
    let (facts, making) =
        (memory.embryo.facts(), Making { proof: 0, opened: 0, ended: memory.embryo.ended });
    if tables.insert_embryo(other, &memory.embryo) == Err(Refused::Exists) {
        // Another CPU was faster: with the same, or with another flow.
        return half(tables, (key, other), &mut memory.spare);
    }
    Some((facts, making))
}

/// Whether a segment of the client shows that it hears the backend.
#[inline(always)]
fn is_heard<P: Frame>(
    frame: &P,
    packet: &Packet,
    state: State,
    (half, making): (Facts, Making),
) -> bool {
    if state == State::Revived {
        return half.is_in(State::Revived);
    }
    if state >= State::Established || packet.flags & tcp::ACK == 0 {
        return false;
    }
    let Some([_, acknowledged]) = tcp::numbers(frame, packet) else { return false };
    let behind = making.proof.wrapping_sub(acknowledged);
    half.is_in(State::Answered) && behind == 0 || half.is_in(State::Heard) && behind < WINDOW
}

/// The number that follows a segment of the backend: what the client acknowledges when it has got it.
#[inline(always)]
fn next_number<F: Wire, P: Frame>(frame: &P, packet: &Packet) -> Option<u32> {
    let [sequence, _] = tcp::numbers(frame, packet)?;
    Some(sequence.wrapping_add(tcp::sequence_length::<F, P>(frame, packet)?))
}

/// A connection that is not live has ended, as far as can be seen.
#[inline(always)]
fn close<F: Family, T: Tables<F>>(
    tables: &T,
    (key, other): Keys<'_, F>,
    memory: &mut Memory<F>,
    origin: Origin,
    now: u32,
) {
    for (own, theirs) in [(key, other), (other, key)] {
        if let Some(record) = tables.embryo(own)
            && record.read(own, &mut memory.spare).is_some()
            && memory.spare == *theirs
        {
            record.end(now);
        }
    }
    live::discount(tables, origin);
}
