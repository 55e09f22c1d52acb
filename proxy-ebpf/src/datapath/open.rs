//! A new flow: chosen, recorded as an embryo, and promoted when its backend answers.
//!
//! Embryos sit in a small LRU table, so a flood of packets that nobody answers pushes out embryos and
//! nothing else. The insert of the reply's record, if there is none, is the lock: of two flows that
//! a backend could not tell apart, the second gets another source port.

use proxy_common::addr::{mix, spread};
use proxy_common::tables::{
    AffinityKey, Algorithm, Backend, FlowKey, FlowValue, ServiceValue, Side, State, Work,
};
use proxy_common::{Address, Family, Outcome, Port, proto};

use super::choose::{self, Asker, Failure};
use super::{Client, Refused, Service, Tables, flow};
use crate::packet::tcp;

/// How many source ports are tried before a flow is refused.
const PORT_TRIES: u32 = 16;

/// Finds the flow in the making that the packet belongs to, or opens one. The other direction's key and
/// the link to leave by are then in the work area.
///
/// `mark` is the destination's; `link` is the one that the packet has come by.
///
/// # Errors
/// Says why there is none.
#[inline(always)]
pub fn open<F: Family, T: Tables<F>>(
    tables: &T,
    work: &mut Work<F>,
    mark: &Service,
    client: Client,
    link: u32,
) -> Result<Outcome, Failure> {
    if embryo(tables, work) {
        return Ok(Outcome::Forwarded);
    }
    // The node's own connections use ports that may be a Service's or a pod's: their answers are not ours.
    if mark.has(ServiceValue::NODE)
        && work.packet.proto == proto::TCP
        && work.packet.flags & (tcp::SYN | tcp::ACK) != tcp::SYN
    {
        return Err(Failure::NotService);
    }
    let key = &work.key;
    let service = choose::frontend(tables, mark, key.dst, key.dport, key.proto)?;
    let hash = key.hash(tables.setting(|s| &s.seed));
    let asker = asker(tables, work, &service, client);
    work.affinity = AffinityKey { client: work.key.src, service: service.id, netns: [0; 2] };
    let draw = || draw(tables, &service, &work.key, hash);
    let (number, backend) = choose::backend(tables, &service, asker, &work.affinity, draw)?;
    // Pods keep their address, unless even they are to be masqueraded (KP-82).
    let masquerades = client == Client::Outside
        || service.has(ServiceValue::REFUSES) && tables.setting(|s| &s.masquerade_all) != 0;
    let reply_link = if client == Client::Outside { link } else { FlowValue::<F>::BY_STACK };
    record(tables, work, (number, &backend), masquerades.then_some(reply_link), hash)?;
    insert(tables, work, hash)?;
    if service.chooses(Algorithm::LeastConn) {
        tables.count_flow(number, true);
    }
    work.mtu = backend.mtu.into();
    Ok(Outcome::Opened)
}

/// Opens a flow of a pod to someone outside the cluster, who sees `exit` in its place.
///
/// # Errors
/// Says why that can't be.
#[inline(always)]
pub fn leave<F: Family, T: Tables<F>>(
    tables: &T,
    work: &mut Work<F>,
    exit: F::Addr,
) -> Result<(), Failure> {
    let hash = work.key.hash(tables.setting(|s| &s.seed));
    let (to, port) = (work.key.dst, work.key.dport);
    masquerade(work, (to, port), exit, spare_port(hash, tables));
    let timeout = unanswered(tables, work.packet.proto);
    work.forward.tag = work.key.tag();
    fill(work, tables.now(), timeout, State::Embryo, Origin::NONE);
    insert(tables, work, hash)
}

/// Notes a flow of someone outside to a pod, which stays as it is in both directions: its answer, if one
/// comes, finds its record.
#[inline(always)]
pub fn admit<F: Family, T: Tables<F>>(tables: &T, work: &mut Work<F>) {
    let answer = &mut work.forward.other;
    (answer.src, answer.sport) = (work.key.dst, work.key.dport);
    (answer.dst, answer.dport) = (work.key.src, work.key.sport);
    answer.proto = work.key.proto;
    answer.side = Side::Egress as u8;
    answer.pad = [0; 2];
    work.reply.other = work.key;
    let now = tables.now();
    if let Some(record) = tables.embryo(&work.forward.other) {
        record.touch(now);
        return;
    }
    let timeout = unanswered(tables, work.packet.proto);
    fill(work, now, timeout, State::Embryo, Origin::NONE);
    work.reply.tag = work.forward.other.tag();
    let _ = tables.insert_embryo(&work.forward.other, &work.reply);
}

/// Inserts both records of a new flow among those not answered yet. The other direction's key and the
/// link to leave by are then in the work area.
#[inline(always)]
fn insert<F: Family, T: Tables<F>>(
    tables: &T,
    work: &mut Work<F>,
    hash: u32,
) -> Result<(), Failure> {
    lock(work, hash, tables)?;
    // A record left over from a flow that has ended would hide the new one. Losing a race for the
    // place is harmless: the winner's record is of the same flow.
    tables.remove_embryo(&work.key);
    let _ = tables.insert_embryo(&work.key, &work.forward);
    work.other = work.forward.other;
    (work.link, work.mtu) = (work.forward.link, 0);
    Ok(())
}

/// Fills in both records of a flow to a backend. It is masqueraded if the backend is elsewhere and a link
/// for its answers is given.
#[inline(always)]
fn record<F: Family, T: Tables<F>>(
    tables: &T,
    work: &mut Work<F>,
    (number, backend): (u32, &Backend<F>),
    reply_link: Option<u32>,
    hash: u32,
) -> Result<(), Failure> {
    let timeout = unanswered(tables, work.packet.proto);
    let mut origin = Origin {
        service: work.affinity.service,
        backend: number,
        generation: backend.generation,
        link: 0,
        reply_link: 0,
    };
    if let Some(reply_link) = reply_link
        && backend.flags & Backend::<F>::LOCAL == 0
    {
        if backend.link == 0 {
            return Err(Failure::Dropped(Outcome::NoRoute));
        }
        (origin.link, origin.reply_link) = (backend.link, reply_link);
        masquerade(work, (backend.addr, backend.port), backend.source, spare_port(hash, tables));
    } else {
        address(work, backend);
    }
    work.forward.tag = work.key.tag();
    fill(work, tables.now(), timeout, State::Embryo, origin);
    Ok(())
}

/// The number that chooses a new flow's backend. `hash` is the flow's.
#[inline(always)]
fn draw<F: Family, T: Tables<F>>(
    tables: &T,
    service: &Service,
    key: &FlowKey<F>,
    hash: u32,
) -> u32 {
    if service.chooses(Algorithm::Maglev) {
        // Without this node's seed: any node that the flow comes by chooses alike.
        key.hash(0)
    } else if service.chooses(Algorithm::SourceHash) {
        spread(key.src.mix(0))
    } else if service.chooses(Algorithm::RoundRobin) {
        tables.turn(service.id)
    } else {
        tables.random() ^ hash
    }
}

/// How many ticks a flow lives that only one side has been heard of.
#[inline(always)]
fn unanswered<F: Family, T: Tables<F>>(tables: &T, number: u8) -> u32 {
    if number == proto::TCP {
        tables.setting(|s| &s.syn_timeout)
    } else {
        tables.setting(|s| &s.udp_timeout)
    }
}

#[inline(always)]
fn asker<F: Family, T: Tables<F>>(
    tables: &T,
    work: &mut Work<F>,
    service: &Service,
    client: Client,
) -> Asker {
    let allowed = if service.has(ServiceValue::SOURCE_RANGES) {
        work.range = choose::source_range(service.id, work.key.src);
        tables.is_in_range(&work.range)
    } else {
        true
    };
    let is_pod = tables.setting(|s| &s.local_by_cidr) != 0 && tables.is_pod(&work.key.src);
    Asker { outside: client == Client::Outside && !is_pod, allowed }
}

/// Whether the packet belongs to a flow in the making whose backend has not been withdrawn.
#[inline(always)]
pub fn embryo<F: Family, T: Tables<F>>(tables: &T, work: &mut Work<F>) -> bool {
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
    (work.link, work.mtu) = flow::way(record, tables);
    if record.seen() != now {
        record.set_seen(now);
        // The reply's record holds the place of a flow that may never be answered. Without it the flow
        // must be opened anew.
        let Some(reply) = tables.embryo(&work.other) else { return false };
        reply.set_seen(now);
    }
    true
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
    /// The link that the client's packets leave by.
    link: u32,
    /// The link that the backend's packets leave by.
    reply_link: u32,
}

impl Origin {
    /// Of a flow that has no Service, and goes by the host stack.
    const NONE: Self =
        Self { service: 0, backend: u32::MAX, generation: 0, link: 0, reply_link: 0 };
}

/// The keys of both directions of a flow to someone who takes `source` at `port` for its client.
#[inline(always)]
fn masquerade<F: Family>(work: &mut Work<F>, to: (F::Addr, Port), source: F::Addr, port: Port) {
    let reply = &mut work.forward.other;
    (reply.src, reply.sport) = to;
    (reply.dst, reply.dport) = (source, port);
    reply.proto = work.key.proto;
    reply.side = Side::Ingress as u8;
    reply.pad = [0; 2];
    work.reply.other = work.key;
}

/// Fills in all of both records but the keys and the tags.
#[inline(always)]
fn fill<F: Family>(work: &mut Work<F>, now: u32, timeout: u32, state: State, origin: Origin) {
    for record in [&mut work.forward, &mut work.reply] {
        record.link = origin.link;
        record.other_link = origin.reply_link;
        record.seen = now;
        record.timeout = timeout;
        record.service = origin.service;
        record.backend = origin.backend;
        record.generation = origin.generation;
        record.state = state as u8;
    }
    (work.reply.link, work.reply.other_link) = (origin.reply_link, origin.link);
    work.forward.flags = 0;
    work.reply.flags = FlowValue::<F>::IS_REPLY;
}

/// Inserts the reply's record under a source port that no other flow to this backend uses, the
/// client's own if possible.
#[inline(always)]
fn lock<F: Family, T: Tables<F>>(work: &mut Work<F>, hash: u32, tables: &T) -> Result<(), Failure> {
    let mut hash = hash;
    for attempt in 0..PORT_TRIES {
        work.reply.tag = work.forward.other.tag();
        if vacate(work, tables) {
            match tables.insert_embryo(&work.forward.other, &work.reply) {
                Ok(()) => return Ok(()),
                Err(Refused::Full) => return Err(Failure::Dropped(Outcome::TableFull)),
                // Another CPU was faster.
                Err(Refused::Exists) => {}
            }
        }
        // At random in the end, or each retransmission would try the same ports.
        let salt = if attempt < PORT_TRIES / 2 { PORT_TRIES } else { tables.random() };
        hash = mix(hash, salt);
        work.forward.other.dport = spare_port(hash, tables);
    }
    Err(Failure::Dropped(Outcome::NoPort))
}

/// Makes the reply's place free; false if a flow that is alive has it. What makes way goes with its
/// other half: left alone, either would take a packet of the new flow for its own.
#[inline(always)]
fn vacate<F: Family, T: Tables<F>>(work: &mut Work<F>, tables: &T) -> bool {
    let key = &work.forward.other;
    let now = tables.now();
    if let Some(found) = tables.flow(key) {
        found.read_other(&mut work.quoted);
        let is_over = found.state() == State::Closed as u8
            || found.expired(now)
                && tables.flow(&work.quoted).is_none_or(|other| other.expired(now));
        if !is_over && !found.leads_to(&work.key) {
            return false;
        }
        tables.remove(key);
        tables.remove(&work.quoted);
    }
    if let Some(found) = tables.embryo(key) {
        if !found.leads_to(&work.key) && !found.expired(now) {
            return false;
        }
        tables.remove_embryo(key);
    }
    true
}

#[inline(always)]
fn spare_port<F: Family, T: Tables<F>>(hash: u32, tables: &T) -> Port {
    let offset = choose::scale(hash, tables.setting(|s| &s.port_count));
    Port::new((tables.setting(|s| &s.first_port) + offset) as u16)
}

/// If the packet is a backend's first: moves the flow's records among the answered ones and says what
/// becomes of the packet. The other direction's key is then in the work area. `None` if the packet
/// belongs to no flow in the making.
#[inline(always)]
pub fn promote<F: Family, T: Tables<F>>(tables: &T, work: &mut Work<F>) -> Option<Outcome> {
    let record = tables.embryo(&work.key)?;
    if record.flags() & FlowValue::<F>::IS_REPLY == 0 || record.expired(tables.now()) {
        return None;
    }
    record.read_other(&mut work.other);
    let origin = Origin {
        service: record.service(),
        backend: record.backend(),
        generation: record.generation(),
        link: record.other_link(),
        reply_link: record.link(),
    };
    (work.link, work.mtu) = (origin.reply_link, 0);
    if !record.verified(&work.key) {
        return None;
    }
    if work.packet.flags & tcp::RST != 0 {
        // The backend refused: nothing to keep, the embryo ends by itself.
        return Some(Outcome::Replied);
    }
    // One answer is cheap to come by: until the client is heard of again, it counts for little.
    let timeout = unanswered(tables, work.packet.proto);
    work.forward.other = work.key;
    work.reply.other = work.other;
    (work.reply.tag, work.forward.tag) = (work.key.tag(), work.other.tag());
    fill(work, tables.now(), timeout, State::Answered, origin);
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
