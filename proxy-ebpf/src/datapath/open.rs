//! A new flow: chosen, recorded as an embryo, and promoted when its backend answers.
//!
//! Embryos sit in a small LRU table, so a flood of packets that nobody answers pushes out embryos and
//! nothing else. The insert of the reply's record, if there is none, is the lock: of two flows that
//! a backend could not tell apart, the second gets another source port.

use proxy_common::addr::mix;
use proxy_common::tables::{
    Backend, FlowKey, FlowRecord, FlowValue, ServiceKey, Side, State, Work,
};
use proxy_common::{Family, Outcome, Port, proto};

use super::{Refused, Service, Tables, flow};
use crate::packet::tcp;

/// How many source ports are tried before a flow is refused.
const PORT_TRIES: u32 = 16;

/// Why no flow was opened.
pub enum Failure {
    /// The VIP has no such port, or the port has no endpoint.
    NoBackend,
    /// All source ports that were tried are taken.
    NoPort,
}

/// Finds the flow in the making that the packet belongs to, or opens one. The other direction's key is
/// then in the work area.
///
/// # Errors
/// Says why there is none.
#[inline(always)]
pub fn open<F: Family, T: Tables<F>>(tables: &T, work: &mut Work<F>) -> Result<Outcome, Failure> {
    if embryo(tables, work) {
        return Ok(Outcome::Forwarded);
    }
    let frontend = ServiceKey::new(work.key.dst, work.key.dport, work.key.proto);
    let Some(service) = tables.service(&frontend) else { return Err(Failure::NoBackend) };
    let hash = work.key.hash(tables.setting(|s| &s.seed));
    let Some((number, backend)) = select(service, hash, tables) else {
        return Err(Failure::NoBackend);
    };
    address(work, &backend);
    let timeout = if work.packet.proto == proto::TCP {
        tables.setting(|s| &s.syn_timeout)
    } else {
        tables.setting(|s| &s.udp_timeout)
    };
    let origin = Origin { service: service.id, backend: number, generation: backend.generation };
    fill(work, tables.now(), timeout, State::Embryo, origin);
    lock(work, hash, tables)?;
    // A record left over from a flow that has ended would hide the new one. Losing a race for the
    // place is harmless: the winner's record is of the same flow.
    tables.remove_embryo(&work.key);
    let _ = tables.insert_embryo(&work.key, &work.forward);
    work.other = work.forward.other;
    Ok(Outcome::Opened)
}

/// Whether the packet belongs to a flow in the making whose backend has not been withdrawn.
#[inline(always)]
fn embryo<F: Family, T: Tables<F>>(tables: &T, work: &mut Work<F>) -> bool {
    let Some(record) = tables.embryo(&work.key) else { return false };
    record.read_other(&mut work.other);
    let now = tables.now();
    if !record.verified(&work.key) || record.expired(now) {
        return false;
    }
    if flow::is_stale(record, tables) {
        tables.remove_embryo(&work.other);
        return false;
    }
    record.touch(now);
    true
}

/// One of the Service's backends, chosen by `hash`: the same flow finds the same backend again as
/// long as the Service does not change.
#[inline(always)]
pub fn select<F: Family, T: Tables<F>>(
    service: Service,
    hash: u32,
    tables: &T,
) -> Option<(u32, Backend<F>)> {
    if service.range.count == 0 {
        return None;
    }
    let index = scale(hash, service.range.count);
    let number = tables.slot(service.range.first.wrapping_add(index))?;
    Some((number, tables.backend(number)?))
}

/// Scales a hash to a number below `count`, without a division.
#[inline(always)]
fn scale(hash: u32, count: u32) -> u32 {
    ((u64::from(hash) * u64::from(count)) >> 32) as u32
}

/// The keys of both directions of a flow to `backend`, each in the other's record.
#[inline(always)]
fn address<F: Family>(work: &mut Work<F>, backend: &Backend<F>) {
    let reply = &mut work.forward.other;
    reply.src = backend.addr;
    reply.sport = backend.port;
    reply.dport = work.key.sport;
    reply.proto = work.key.proto;
    reply.pad = [0; 2];
    // A pod that reaches itself must not see itself as the client: it would answer within. The VIP
    // stands in for it, and brings the answer back to the same hook.
    if backend.addr == work.key.src {
        reply.dst = work.key.dst;
        reply.side = Side::Ingress as u8;
    } else {
        reply.dst = work.key.src;
        reply.side = Side::Egress as u8;
    }
    work.reply.other = work.key;
}

/// Where a flow leads.
#[derive(Clone, Copy)]
struct Origin {
    service: u32,
    backend: u32,
    generation: u16,
}

/// Fills in all of both records but the keys and the reply's tag.
#[inline(always)]
fn fill<F: Family>(work: &mut Work<F>, now: u32, timeout: u32, state: State, origin: Origin) {
    work.forward.tag = work.reply.other.tag();
    for record in [&mut work.forward, &mut work.reply] {
        record.seen = now;
        record.timeout = timeout;
        record.service = origin.service;
        record.backend = origin.backend;
        record.generation = origin.generation;
        record.state = state as u8;
    }
    work.forward.flags = 0;
    work.reply.flags = FlowValue::<F>::IS_REPLY;
}

/// Inserts the reply's record under a source port that no other flow to this backend uses, the
/// client's own if possible.
#[inline(always)]
fn lock<F: Family, T: Tables<F>>(work: &mut Work<F>, hash: u32, tables: &T) -> Result<(), Failure> {
    let mut hash = hash;
    for _ in 0..PORT_TRIES {
        work.reply.tag = work.forward.other.tag();
        if try_lock(work, tables) {
            return Ok(());
        }
        hash = mix(hash, PORT_TRIES);
        work.forward.other.dport = spare_port(hash, tables);
    }
    Err(Failure::NoPort)
}

/// Inserts the reply's record; false if another flow has its place.
#[inline(always)]
fn try_lock<F: Family, T: Tables<F>>(work: &Work<F>, tables: &T) -> bool {
    let key = &work.forward.other;
    let now = tables.now();
    if tables.flow(key).is_some_and(|found| !may_replace(found, &work.key, now)) {
        return false;
    }
    if tables.insert_embryo(key, &work.reply) != Err(Refused::Exists) {
        return true;
    }
    if tables.embryo(key).is_some_and(|found| !may_replace(found, &work.key, now)) {
        return false;
    }
    tables.remove_embryo(key);
    tables.insert_embryo(key, &work.reply).is_ok()
}

/// Whether a reply's record that is in the way may be replaced: it is the same client's, whose other
/// half was lost, or its flow has ended.
#[inline(always)]
fn may_replace<F: Family>(found: FlowRecord<'_, F>, client: &FlowKey<F>, now: u32) -> bool {
    found.leads_to(client) || found.expired(now) || found.state() == State::Closed as u8
}

#[inline(always)]
fn spare_port<F: Family, T: Tables<F>>(hash: u32, tables: &T) -> Port {
    let offset = scale(hash, tables.setting(|s| &s.port_count));
    Port::new((tables.setting(|s| &s.first_port) + offset) as u16)
}

/// If the packet is a backend's first: moves the flow's records among the answered ones and says what
/// becomes of the packet. The other direction's key is then in the work area. `None` if the packet
/// belongs to no flow in the making.
#[inline(always)]
pub fn promote<F: Family, T: Tables<F>>(tables: &T, work: &mut Work<F>) -> Option<Outcome> {
    let record = tables.embryo(&work.key)?;
    if record.flags() & FlowValue::<F>::IS_REPLY == 0 {
        return None;
    }
    record.read_other(&mut work.other);
    let origin = Origin {
        service: record.service(),
        backend: record.backend(),
        generation: record.generation(),
    };
    if !record.verified(&work.key) {
        return None;
    }
    if work.packet.flags & tcp::RST != 0 {
        // The backend refused: nothing to keep, the embryo ends by itself.
        return Some(Outcome::Replied);
    }
    let timeout = if work.packet.proto == proto::TCP {
        tables.setting(|s| &s.tcp_timeout)
    } else {
        tables.setting(|s| &s.udp_stream_timeout)
    };
    work.forward.other = work.key;
    work.reply.other = work.other;
    work.reply.tag = work.key.tag();
    fill(work, tables.now(), timeout, State::Established, origin);
    Some(establish(tables, work))
}

/// Inserts both records, or none, and removes the embryos.
#[inline(always)]
fn establish<F: Family, T: Tables<F>>(tables: &T, work: &Work<F>) -> Outcome {
    if tables.insert_flow(&work.key, &work.reply) == Err(Refused::Full) {
        return Outcome::TableFull;
    }
    if tables.insert_flow(&work.other, &work.forward) == Err(Refused::Full) {
        tables.remove(&work.key);
        return Outcome::TableFull;
    }
    tables.remove_embryo(&work.key);
    tables.remove_embryo(&work.other);
    Outcome::Established
}
