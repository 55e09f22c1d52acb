//! A new flow: its backend is chosen, its answers get a place, and both directions a record among the
//! flows that are not live. Those sit in a large LRU table, so that a flood of packets that nobody answers
//! pushes out its like and nothing else.

use proxy_common::addr::spread;
use proxy_common::tables::{
    AffinityKey, Algorithm, Backend, FlowKey, Memory, Origin, Packet, ServiceValue, Side,
    SourceRange,
};
use proxy_common::{Address, Family, proto};

use super::choose::{self, Asker, Failure};
use super::{Client, Service, Tables, live};
use crate::packet::{Frame, tcp};

/// A new flow that has a backend, and asks for a place.
#[derive(Clone, Copy)]
pub struct Opening {
    /// What its client's record will say.
    pub origin: Origin,
    /// The Service port's number; 0 if it has none.
    pub service: u32,
    /// The backend's number, also of a flow that is only masqueraded.
    pub backend: u32,
    /// Whether the node's own address is in the place of the client's.
    pub masquerades: bool,
}

/// Chooses a backend for the flow that a packet begins. The place that its answers want is then in `other`.
///
/// `mark` is the destination's.
///
/// # Errors
/// Says why there is none.
#[inline(always)]
pub fn open<F: Family, P: Frame, T: Tables<F>>(
    frame: &P,
    tables: &T,
    packet: &Packet,
    (key, other): (&FlowKey<F>, &mut FlowKey<F>),
    memory: &mut Memory<F>,
    (mark, client): (&Service, Client),
) -> Result<Opening, Failure> {
    let is_hosts = mark.has(ServiceValue::NODE) && is_hosts(frame, packet, key);
    if is_hosts || was_of_another_proxy(tables, packet) {
        return Err(Failure::Others);
    }
    let service = choose::frontend(tables, mark, key.dst, key.dport, key.proto)?;
    if service.may_be_nodes(mark) && frame.listens(key) {
        return Err(Failure::Others);
    }
    let asker = asker(tables, memory, &service, (key, client));
    memory.affinity = AffinityKey { client: key.src, service: service.id, netns: [0; 2] };
    let draw = || draw(tables, &service, key);
    let (number, backend) = choose::backend(tables, &service, asker, &memory.affinity, draw)?;
    // Pods keep their address, unless even they are to be masqueraded (KP-82).
    let may_masquerade = client == Client::Outside
        || service.has(ServiceValue::REFUSES) && tables.setting(|s| &s.masquerade_all) != 0;
    let masquerades = may_masquerade && backend.flags & Backend::<F>::LOCAL == 0;
    let client_link = if client == Client::Outside { frame.link() } else { 0 };
    let kind = if masquerades { Origin::MASQUERADES } else { 0 };
    let origin = Origin { backend: number, client_link, generation: backend.generation, kind };
    let origin = address(&backend, (key, other), origin);
    Ok(Opening { origin, service: service.id, backend: number, masquerades: false })
}

/// Counts a new flow and its first packet.
#[inline(always)]
pub fn count<F: Family, T: Tables<F>>(tables: &T, origin: Origin, service: u32, bytes: u32) {
    if let Some(backend) = live::backend(origin, tables)
        && backend.flags & Backend::<F>::COUNTED != 0
    {
        tables.count_flow(origin.backend, true);
    }
    tables.count_traffic(service, 1, bytes);
}

/// Whether a segment to the node itself belongs to one of its own connections. The node's own use ports
/// that may be a Service's or a pod's. In the middle of a connection it is asked whether a socket has it:
/// if none does, it may be a flow whose record was evicted.
#[inline(always)]
fn is_hosts<F: Family, P: Frame>(frame: &P, packet: &Packet, key: &FlowKey<F>) -> bool {
    if packet.proto != proto::TCP || tcp::opens(packet.flags) {
        return false;
    }
    // Only who was asked answers with a SYN.
    packet.flags & (tcp::SYN | tcp::RST) != 0 || frame.has_socket(key)
}

/// Whether a segment without a record may be of a connection that another proxy led to its backend before this one was
/// there: then the kernel's own table of connections knows it.
#[inline(always)]
fn was_of_another_proxy<F: Family, T: Tables<F>>(tables: &T, packet: &Packet) -> bool {
    packet.proto == proto::TCP
        && !tcp::opens(packet.flags)
        && tables.now() < tables.setting(|s| &s.takeover_until)
}

/// Puts into `other` the key of the answers of a flow to `backend`, with the client's own port. Says what the
/// client's record says.
#[inline(always)]
fn address<F: Family>(
    backend: &Backend<F>,
    (key, other): (&FlowKey<F>, &mut FlowKey<F>),
    origin: Origin,
) -> Origin {
    *other = key.turned(Side::Egress);
    (other.src, other.sport) = (backend.addr, backend.port);
    if backend.addr != key.src {
        return origin;
    }
    // A pod that reaches itself must not see itself as the client: it would answer within. The VIP stands in
    // for it, and brings the answer back to the same hook.
    other.dst = key.dst;
    other.side = Side::Ingress as u8;
    Origin { kind: Origin::TURN, ..origin }
}

/// The number that chooses a new flow's backend.
#[inline(always)]
pub fn draw<F: Family, T: Tables<F>>(tables: &T, service: &Service, key: &FlowKey<F>) -> u32 {
    if service.chooses(Algorithm::Maglev) {
        // Without this node's seed: any node that the flow comes by chooses alike.
        key.hash(0)
    } else if service.chooses(Algorithm::SourceHash) {
        spread(key.src.mix(0))
    } else if service.chooses(Algorithm::RoundRobin) {
        tables.turn(service.id)
    } else {
        tables.random() ^ key.hash(tables.setting(|s| &s.seed))
    }
}

#[inline(always)]
fn asker<F: Family, T: Tables<F>>(
    tables: &T,
    memory: &mut Memory<F>,
    service: &Service,
    (key, client): (&FlowKey<F>, Client),
) -> Asker {
    let allowed = is_allowed(tables, &mut memory.range, service, key.src);
    Asker { outside: client == Client::Outside, allowed }
}

/// Whether a client is in the Service's source ranges, if it has any.
#[inline(always)]
pub fn is_allowed<F: Family, T: Tables<F>>(
    tables: &T,
    range: &mut SourceRange<F>,
    service: &Service,
    client: F::Addr,
) -> bool {
    if !service.has(ServiceValue::SOURCE_RANGES) {
        return true;
    }
    *range = choose::source_range(service.id, client);
    tables.is_in_range(range)
}
