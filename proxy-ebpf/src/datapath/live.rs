//! A live flow wins: its record says how the packet is translated, and the packet says how the flow is
//! doing.

use bytemuck::Zeroable;
use proxy_common::tables::{
    Backend, Decision, Facts, FlowKey, FlowRecord, Memory, Origin, Packet, Side, State, expired,
};
use proxy_common::{Family, proto};

use super::{Leg, Tables};
use crate::packet::{Frame, tcp};

/// For how many ticks a connection whose backend was withdrawn must be silent before a SYN on its ports is taken
/// for a new one: anybody can send one.
const SILENCE: u32 = 4;

/// After how many ticks a short cut is asked for again.
const PAUSE: u32 = 30;

/// The live flow that the packet belongs to, if it still holds. The other direction's key is then in
/// `other`.
#[inline(always)]
pub fn find<F: Family, T: Tables<F>>(
    tables: &T,
    packet: &Packet,
    (key, other): (&FlowKey<F>, &mut FlowKey<F>),
    memory: &mut Memory<F>,
    bytes: u32,
) -> Option<Decision> {
    let mut record = tables.flow(key)?;
    let facts = record.read(key, other)?;
    let now = tables.now();
    if facts.is_cut() && facts.seen != now && !is_renewed(tables, record, other, memory, facts) {
        give_up(tables, (key, other), memory, now);
        record = tables.flow(key)?;
    }
    if packet.proto == proto::TCP {
        if tcp::opens(packet.flags) {
            // A SYN keeps nothing alive. One that can't be a retransmission begins anew.
            if is_over(tables, key, other, &mut memory.spare, facts, now) {
                retire(tables, key, other, &mut memory.spare);
                return None;
            }
            count(tables, facts.origin, 1, bytes);
        } else {
            follow(tables, record, packet.flags, (key, other), memory, facts, (now, bytes));
        }
    } else {
        // SCTP stays with its backend, as TCP does (KP-112).
        let is_cut = packet.proto == proto::UDP && is_stale(facts.origin, tables);
        if is_cut || is_idle(tables, key, other, &mut memory.spare, facts, now) {
            retire(tables, key, other, &mut memory.spare);
            return None;
        }
        refresh(tables, record, (key, other), memory, facts, (now, bytes));
    }
    Some(Decision::new(facts.origin.translated(), facts.origin))
}

/// The other direction's record of a live flow, as far as it leads back to `key`.
#[inline(always)]
pub fn half<F: Family, T: Tables<F>>(
    tables: &T,
    key: &FlowKey<F>,
    other: &FlowKey<F>,
    spare: &mut FlowKey<F>,
) -> Option<Facts> {
    let facts = tables.flow(other)?.read(other, spare)?;
    (*spare == *key).then_some(facts)
}

/// The flow's backend, if its number has not been given to another one since.
#[inline(always)]
pub fn backend<F: Family, T: Tables<F>>(origin: Origin, tables: &T) -> Option<Backend<F>> {
    let backend = tables.backend(origin.backend)?;
    (backend.generation == origin.generation).then_some(backend)
}

/// Whether it is a client's flow whose backend has been withdrawn since it was chosen (KP-109 to 113).
#[inline(always)]
pub fn is_stale<F: Family, T: Tables<F>>(origin: Origin, tables: &T) -> bool {
    if origin.is(Origin::REPLY) || origin.backend == Origin::NO_BACKEND {
        return false;
    }
    match backend(origin, tables) {
        Some(backend) => backend.flags & Backend::<F>::SERVING == 0,
        None => true,
    }
}

/// How a client's packet takes a short cut toward `to`: by what leads there now. No link if nothing is known of the way
/// any more.
#[inline(always)]
pub fn way<F: Family, T: Tables<F>>(origin: Origin, tables: &T, to: F::Addr) -> Leg {
    // A backend that was withdrawn keeps its row until the number is another's.
    let backend = tables.backend(origin.backend).filter(|backend| backend.addr == to);
    let Some(backend) = backend else { return Leg::NONE };
    tables.way(backend.way).map_or(Leg::NONE, |way| Leg {
        link: way.link,
        mtu: way.mtu.into(),
        way: backend.way,
    })
}

/// How an answer leaves to a client outside, at egress: by the link that the host's routes have from the frontend's address.
/// Where that can't be told, by the one that the host stack has chosen. A live flow's record notes it.
#[inline(always)]
pub fn way_back<F: Family, P: Frame, T: Tables<F>>(
    frame: &P,
    tables: &T,
    (key, other): (&FlowKey<F>, &FlowKey<F>),
    spare: &mut FlowKey<F>,
) -> Leg {
    let link = match frame.route::<F>(&other.dst, &other.src).link {
        0 => frame.link(),
        link => link,
    };
    if let Some(record) = tables.flow(key)
        && record.read(key, spare).is_some()
    {
        record.set_link(link);
        record.set_marked(frame.is_marked());
    }
    Leg { link, ..Leg::NONE }
}

/// Notes by which link the host stack lets a client's packet leave that is masqueraded there, and asks for a short cut if its
/// flow has none.
#[inline(always)]
pub fn note_way<F: Family, P: Frame, T: Tables<F>>(
    frame: &P,
    tables: &T,
    (key, other): (&FlowKey<F>, &FlowKey<F>),
    spare: &mut FlowKey<F>,
) {
    let Some(record) = tables.flow(key) else { return };
    if record.read(key, spare).is_none() {
        return;
    }
    let is_led = frame.is_marked() || goes_elsewhere(frame, tables, key, spare);
    record.set_link(frame.link());
    record.set_marked(is_led);
    let may_ask =
        tables.setting(|s| &s.short_cut) != 0 && !is_led && record.may_ask(tables.now(), PAUSE);
    if may_ask && half(tables, key, other, spare).is_some_and(|answers| !answers.is_cut()) {
        tables.wish(key);
    }
}

/// Whether the host's routes lead a client's packets to another gateway than the node's own to that backend, on the same link.
#[inline(always)]
fn goes_elsewhere<F: Family, P: Frame, T: Tables<F>>(
    frame: &P,
    tables: &T,
    key: &FlowKey<F>,
    spare: &mut FlowKey<F>,
) -> bool {
    // Which backend it is, the record of its answers to the client knows.
    let answers = key.turned(Side::Egress);
    let facts = tables.flow(&answers).and_then(|record| record.read(&answers, spare));
    let backend = facts.and_then(|facts| backend(facts.origin, tables));
    let Some(way) = backend.and_then(|backend| tables.way(backend.way)) else { return true };
    let hop = if way.hop == F::Addr::zeroed() { key.dst } else { way.hop };
    frame.route::<F>(&key.src, &key.dst).hop != hop
}

/// Whether the host stack has let the last packet pass that was not sent on past it, and by the way of the short cut: once a
/// tick one goes by the stack, and where it leaves its record there notes that.
#[inline(always)]
fn is_renewed<F: Family, T: Tables<F>>(
    tables: &T,
    record: FlowRecord<'_, F>,
    other: &FlowKey<F>,
    memory: &mut Memory<F>,
    facts: Facts,
) -> bool {
    memory.live.other = other.turned(Side::Egress);
    let passed = &memory.live.other;
    let Some(there) = tables.flow(passed) else { return false };
    let Some(seen) = there.read(passed, &mut memory.spare) else { return false };
    // It was noted there in the same tick, or in the next. And it left as what the short cut makes of it.
    let is_missing = expired(seen.seen, 0, facts.seen);
    let is_other = !record.leads_to(&memory.spare);
    if is_missing || is_other || there.is_marked() || tables.setting(|s| &s.short_cut) == 0 {
        return false;
    }
    // Another link may take less, and is asked for anew.
    let link = if facts.origin.is(Origin::REPLY) {
        facts.link
    } else {
        way(facts.origin, tables, other.src).link
    };
    seen.link == link
}

/// From now on all packets of both directions go by the host stack, for a while at least.
#[inline(always)]
fn give_up<F: Family, T: Tables<F>>(
    tables: &T,
    (key, other): (&FlowKey<F>, &FlowKey<F>),
    memory: &mut Memory<F>,
    now: u32,
) {
    let far = other.turned(Side::Egress);
    for leaving in [&far, other] {
        if let Some(record) = tables.flow(leaving)
            && record.read(leaving, &mut memory.spare).is_some()
        {
            record.ask_later(now.wrapping_add(PAUSE));
        }
    }
    lengthen(tables, key, memory);
    // The other end of the short cut is what answers what leaves there.
    if let Some(record) = tables.flow(&far)
        && record.read(&far, &mut memory.spare).is_some()
    {
        let end = memory.spare;
        lengthen(tables, &end, memory);
    }
}

/// A record that no packet takes a short cut by.
#[inline(always)]
fn lengthen<F: Family, T: Tables<F>>(tables: &T, key: &FlowKey<F>, memory: &mut Memory<F>) {
    if let Some(record) = tables.flow(key)
        && let Some(facts) = record.read(key, &mut memory.spare)
        && facts.is_cut()
    {
        hand_over(tables, record, facts.plain);
        memory.live.fill(key, &memory.spare, facts.origin, facts.seen);
        memory.live.state = facts.state as u8;
        tables.replace_flow(key, &memory.live);
        // What another CPU has noted meanwhile.
        if let Some(before) = record.read(key, &mut memory.spare)
            && before.state != facts.state
            && let Some(record) = tables.flow(key)
        {
            record.set_state(before.state);
        }
    }
}

/// How many ticks a direction in that state may be idle.
#[inline(always)]
pub fn lifetime<F: Family, T: Tables<F>>(tables: &T, number: u8, state: State) -> u32 {
    tables.setting(|s| s.lifetimes.of(number, state))
}

/// Whether both directions have been idle for longer than they may.
#[inline(always)]
fn is_idle<F: Family, T: Tables<F>>(
    tables: &T,
    key: &FlowKey<F>,
    other: &FlowKey<F>,
    spare: &mut FlowKey<F>,
    facts: Facts,
    now: u32,
) -> bool {
    let idle = |facts: Facts| facts.expired(lifetime(tables, key.proto, facts.state), now);
    idle(facts) && half(tables, key, other, spare).is_none_or(idle)
}

/// Whether a SYN on the flow's key begins another one.
#[inline(always)]
fn is_over<F: Family, T: Tables<F>>(
    tables: &T,
    key: &FlowKey<F>,
    other: &FlowKey<F>,
    spare: &mut FlowKey<F>,
    facts: Facts,
    now: u32,
) -> bool {
    is_idle(tables, key, other, spare, facts, now)
        || is_stale(facts.origin, tables) && is_silent(tables, key, other, spare, facts, now)
}

/// Whether nothing was heard of either direction for a while.
#[inline(always)]
fn is_silent<F: Family, T: Tables<F>>(
    tables: &T,
    key: &FlowKey<F>,
    other: &FlowKey<F>,
    spare: &mut FlowKey<F>,
    facts: Facts,
    now: u32,
) -> bool {
    let silent = |facts: Facts| facts.expired(SILENCE, now);
    silent(facts) && half(tables, key, other, spare).is_none_or(silent)
}

/// Removes both records of a flow. What they have counted is handed over.
#[inline(always)]
fn retire<F: Family, T: Tables<F>>(
    tables: &T,
    key: &FlowKey<F>,
    other: &FlowKey<F>,
    spare: &mut FlowKey<F>,
) {
    for (own, theirs) in [(other, key), (key, other)] {
        if let Some(record) = tables.flow(own)
            && let Some(facts) = record.read(own, spare)
            && *spare == *theirs
        {
            hand_over(tables, record, facts.plain);
            tables.remove(own);
        }
    }
}

/// Follows a connection to its end, so that its records do not outlive it by hours.
#[inline(always)]
fn follow<F: Family, T: Tables<F>>(
    tables: &T,
    record: FlowRecord<'_, F>,
    flags: u8,
    (key, other): (&FlowKey<F>, &FlowKey<F>),
    memory: &mut Memory<F>,
    facts: Facts,
    (now, bytes): (u32, u32),
) {
    let finished = flags & tcp::FIN != 0 || facts.is_in(State::Finished);
    if finished {
        record.set_state(State::Finished);
    }
    refresh(tables, record, (key, other), memory, facts, (now, bytes));
    let ends = flags & tcp::RST != 0
        || finished
            && half(tables, key, other, &mut memory.spare)
                .is_some_and(|half| half.is_in(State::Finished));
    if ends {
        end(tables, (key, other), memory, facts.origin, now);
    }
}

/// Notes that the flow goes on; once in a while hands over what was counted, and makes the other
/// direction's record anew if it was lost.
#[inline(always)]
fn refresh<F: Family, T: Tables<F>>(
    tables: &T,
    record: FlowRecord<'_, F>,
    (key, other): (&FlowKey<F>, &FlowKey<F>),
    memory: &mut Memory<F>,
    facts: Facts,
    (now, bytes): (u32, u32),
) {
    let origin = facts.origin;
    if facts.seen == now && !record.is_count_large() {
        count(tables, origin, 1, bytes);
        return;
    }
    record.touch(now);
    hand_over(tables, record, facts.plain);
    count(tables, origin, 1, bytes);
    if half(tables, key, other, &mut memory.spare).is_none() {
        memory.live.fill(other, key, origin.inverse(), now);
        let _ = tables.insert_flow(other, &memory.live);
    }
}

/// Adds what a record has counted, of plain packets, to its Service port's traffic and to the outcomes.
#[inline(always)]
fn hand_over<F: Family, T: Tables<F>>(tables: &T, record: FlowRecord<'_, F>, plain: Origin) {
    let (packets, bytes) = record.take_counts();
    if packets != 0 {
        tables.count(plain.outcome(), packets);
        count(tables, plain, packets, bytes);
    }
}

/// Adds to the traffic of the Service port that a flow is of.
#[inline(always)]
pub fn count<F: Family, T: Tables<F>>(tables: &T, origin: Origin, packets: u32, bytes: u32) {
    if let Some(backend) = backend(origin, tables) {
        tables.count_traffic(backend.service, packets, bytes);
    }
}

/// A connection has ended, as far as can be seen: it is no live flow any more, but remembered. Should it
/// go on, it comes back.
#[inline(always)]
fn end<F: Family, T: Tables<F>>(
    tables: &T,
    (key, other): (&FlowKey<F>, &FlowKey<F>),
    memory: &mut Memory<F>,
    origin: Origin,
    now: u32,
) {
    bury(tables, (key, other), memory, origin, now);
    bury(tables, (other, key), memory, origin.inverse(), now);
    retire(tables, key, other, &mut memory.spare);
    discount(tables, origin);
}

/// Keeps one direction's record of a flow that has ended.
#[inline(always)]
fn bury<F: Family, T: Tables<F>>(
    tables: &T,
    (key, other): (&FlowKey<F>, &FlowKey<F>),
    memory: &mut Memory<F>,
    origin: Origin,
    now: u32,
) {
    if let Some(record) = tables.embryo(key)
        && let Some((facts, _)) = record.read(key, &mut memory.spare)
        && facts.origin == origin
        && memory.spare == *other
    {
        record.end(now);
        return;
    }
    memory.embryo.fill(key, other, origin, State::Closed, (now, 0));
    tables.put_embryo(key, &memory.embryo);
}

/// A flow less, if its backend's are counted.
#[inline(always)]
pub fn discount<F: Family, T: Tables<F>>(tables: &T, origin: Origin) {
    if let Some(backend) = backend(origin, tables)
        && backend.flags & Backend::<F>::COUNTED != 0
    {
        tables.count_flow(origin.backend, false);
    }
}
