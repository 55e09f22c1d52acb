//! What leaves the node by an uplink, at its egress, without being an answer to anyone.
//!
//! - Flows of Services that came in from outside and go on to a backend elsewhere: the host stack has let them pass and has
//!   chosen the link. The node's address takes the client's place, so that the answers come back; unless the kernel's own NAT
//!   has done that already, and it shows.
//! - Pods that talk to someone outside the cluster, with the node's address in the place of their own
//!   (`--masquerade-pods`). Such a flow has no Service and no backend.
//! - What goes to a VIP and was not translated where it came in: [`catch`].
//! - The node's own flows, and those that the kernel's own NAT gave the node's address. They are not
//!   translated, but the place of their answers is noted, so that no flow of ours gets it. Where one of
//!   ours has it already, they get another source port.

use proxy_common::tables::{
    ExitKey, FlowKey, Memory, Origin, Packet, Part, ServiceKey, Side, State,
};
use proxy_common::{Family, Outcome, Port, proto};

use super::choose::{self, Failure};
use super::open::Opening;
use super::{Tables, catch, is_nodes, live, pending, place};
use crate::packet::{Frame, Wire, has_ports, tcp};

/// The flow that a packet to someone else begins. The place that it wants is then in `other`.
///
/// # Errors
/// [`Failure::NotService`] if the packet is not to be translated; or says why it can't be.
#[inline(always)]
pub fn open<F: Family, P: Frame, T: Tables<F>>(
    frame: &P,
    tables: &T,
    packet: &Packet,
    (key, other): (&FlowKey<F>, &mut FlowKey<F>),
    memory: &mut Memory<F>,
) -> Result<Opening, Failure> {
    // Only a SYN opens a connection: of TCP all else that has no record is not ours, but for what was led here.
    let is_first = packet.proto != proto::TCP || tcp::opens(packet.flags);
    if !is_first && !frame.is_led() {
        return Err(Failure::NotService);
    }
    if is_first && let Some(mark) = catch::mark(tables, key) {
        return catch::open(frame, tables, (key, other), memory, &mark);
    }
    *other = key.turned(Side::Egress);
    let mut opening = Opening {
        origin: Origin::NONE,
        service: 0,
        backend: Origin::NO_BACKEND,
        masquerades: true,
    };
    let source = if let Some(origin) = led(frame, tables, other, &mut memory.spare) {
        if origin.client_link != 0 {
            opening.origin = Origin::MASQUERADED;
        }
        opening.backend = origin.backend;
        let source = of_way(frame, tables, origin).or_else(|| exit(frame, tables, key));
        source.ok_or(Failure::Dropped(Outcome::NoSource))?
    } else if !is_first {
        return Err(Failure::NotService);
    } else if is_masqueraded(tables, memory, key.src, key.dst)
        && let Some(exit) = exit(frame, tables, key)
    {
        exit
    } else {
        own_source(tables, (key, other), memory)?
    };
    *other = key.turned(Side::Ingress);
    other.dst = source;
    Ok(opening)
}

/// What is known of the flow of a Service that a packet belongs to, whose answers have the key `answers`, if it is to be
/// masqueraded.
#[inline(always)]
fn led<F: Family, P: Frame, T: Tables<F>>(
    frame: &P,
    tables: &T,
    answers: &FlowKey<F>,
    spare: &mut FlowKey<F>,
) -> Option<Origin> {
    let facts = pending::known(tables, answers, spare)?;
    // What was led to a backend now is of the flow, even if that seems to be over.
    let is_alive = frame.is_led() || facts.state < State::Closed;
    let origin = facts.origin;
    let is_led = origin.has_backend() && origin.is(Origin::REPLY) && origin.is(Origin::MASQUERADES);
    (is_led && is_alive).then_some(origin)
}

/// The source of the node's own packets to the flow's backend, if they leave by this link.
#[inline(always)]
fn of_way<F: Family, P: Frame, T: Tables<F>>(
    frame: &P,
    tables: &T,
    origin: Origin,
) -> Option<F::Addr> {
    let way = tables.way(live::backend(origin, tables)?.way)?;
    (way.link == frame.link()).then_some(way.source)
}

/// The node's address that takes the place of the packet's source: as the kernel's own MASQUERADE chooses it, on the link
/// that it leaves by, toward the gateway there; IPv6's toward the destination (RFC 6724).
#[inline(always)]
fn exit<F: Family, P: Frame, T: Tables<F>>(
    frame: &P,
    tables: &T,
    key: &FlowKey<F>,
) -> Option<F::Addr> {
    let route = frame.route::<F>(&key.src, &key.dst);
    let has_gateway = F::ICMP == proto::ICMP && route.link == frame.link();
    let toward = if has_gateway { route.hop } else { key.dst };
    tables.exit(&ExitKey::new(frame.link(), toward, F::BITS.into()))
}

/// Whether a pod that talks to `other` gets the node's address.
#[inline(always)]
fn is_masqueraded<F: Family, T: Tables<F>>(
    tables: &T,
    memory: &mut Memory<F>,
    pod: F::Addr,
    other: F::Addr,
) -> bool {
    if tables.setting(|s| &s.masquerade_pods) == 0 || !tables.is_pod(&pod) {
        return false;
    }
    // The ranges left alone are those of no Service.
    memory.range = choose::source_range(0, other);
    !tables.is_in_range(&memory.range)
}

/// The source of a flow that leaves with an address of the node's own, if it needs another port.
///
/// # Errors
/// [`Failure::NotService`] if it does not. Then it is noted.
#[inline(always)]
fn own_source<F: Family, T: Tables<F>>(
    tables: &T,
    (key, other): (&FlowKey<F>, &mut FlowKey<F>),
    memory: &mut Memory<F>,
) -> Result<F::Addr, Failure> {
    if !is_nodes(tables, key.src) {
        return Err(Failure::NotService);
    }
    let now = tables.now();
    *other = key.turned(Side::Ingress);
    if place::is_taken(tables, key, other, &mut memory.spare, now) {
        return Ok(key.src);
    }
    place::note_both(tables, key, other, &mut memory.embryo, now);
    // Its answers keep the note fresh.
    tables.take_port(key.sport);
    Err(Failure::NotService)
}

/// Notes a datagram that comes in for a pod by its own address, so that its answer goes out as it is: with
/// TCP an answer shows, with others it must be known.
#[inline(always)]
pub fn admit<F: Family, T: Tables<F>>(
    tables: &T,
    packet: &Packet,
    (key, other): (&FlowKey<F>, &mut FlowKey<F>),
    memory: &mut Memory<F>,
) {
    // Nobody outside is a VIP.
    if packet.proto == proto::TCP
        || !has_ports(packet.proto)
        || tables.service(&ServiceKey::mark(key.src)).is_some()
    {
        return;
    }
    if !is_masqueraded(tables, memory, key.dst, key.src) {
        return;
    }
    let now = tables.now();
    *other = key.turned(Side::Egress);
    if let Some(record) = tables.embryo(other)
        && let Some((facts, _)) = record.read(other, &mut memory.spare)
        && facts.is_in(State::Foreign)
    {
        record.common().touch(now);
        return;
    }
    if !place::is_taken(tables, key, other, &mut memory.spare, now) {
        place::note(tables, key, other, &mut memory.embryo, now);
    }
}

/// Gives an ICMP echo of a masqueraded flow ports: its identifier stands for the pod's. False if it is no
/// echo of that direction: requests go out, and their answers come in.
#[inline(always)]
pub fn identify<F: Wire, P: Frame, T: Tables<F>>(
    frame: &P,
    tables: &T,
    packet: &Packet,
    key: &mut FlowKey<F>,
) -> bool {
    if packet.proto != F::ICMP || tables.setting(|s| &s.masquerade_pods) == 0 {
        return false;
    }
    if packet.is(Part::Later) {
        return true;
    }
    let [request, reply] = F::ECHO;
    let Some([kind, code]) = frame.load::<[u8; 2]>(packet.l4()) else { return false };
    let Some(id) = frame.load::<Port>(packet.l4() + F::ECHO_ID) else { return false };
    if key.side == Side::Egress as u8 {
        key.sport = id;
        [kind, code] == [request, 0]
    } else {
        key.dport = id;
        [kind, code] == [reply, 0]
    }
}
