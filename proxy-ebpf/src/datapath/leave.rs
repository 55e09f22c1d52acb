//! What leaves the node without being an answer to anyone.
//!
//! - Pods that talk to someone outside the cluster, with the node's address in the place of their own
//!   (`--masquerade-pods`): at egress of the uplink that the host stack has chosen. Such a flow has no
//!   Service and no backend.
//! - The node's own flows, and those that the kernel's own NAT gave the node's address. They are not
//!   translated, but the place of their answers is noted, so that no flow of ours gets it. Where one of
//!   ours has it already, they get another source port.

use proxy_common::tables::{
    FlowKey, Memory, Origin, Packet, Part, ServiceKey, ServiceValue, Side, State,
};
use proxy_common::{Family, Port, proto};

use super::choose::{self, Failure};
use super::open::Opening;
use super::{Tables, place};
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
    // Only a SYN opens a connection: all else of TCP that has no record is not ours.
    if packet.proto == proto::TCP && !tcp::opens(packet.flags) {
        return Err(Failure::NotService);
    }
    let source = match exit(tables, memory, key, frame.link()) {
        Some(exit) => exit,
        None => own_source(tables, (key, other), memory)?,
    };
    *other = key.turned(Side::Ingress);
    other.dst = source;
    Ok(Opening { origin: Origin::NONE, service: 0, masquerades: true })
}

/// The address that takes a pod's place on its way out of the cluster; `None` if it keeps its own.
#[inline(always)]
fn exit<F: Family, T: Tables<F>>(
    tables: &T,
    memory: &mut Memory<F>,
    key: &FlowKey<F>,
    link: u32,
) -> Option<F::Addr> {
    if !is_masqueraded(tables, memory, key.src, key.dst) {
        return None;
    }
    tables.exit(link)
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
    let mark = tables.service(&ServiceKey::mark(key.src)).ok_or(Failure::NotService)?;
    if !mark.has(ServiceValue::NODE) {
        return Err(Failure::NotService);
    }
    let now = tables.now();
    *other = key.turned(Side::Ingress);
    if place::is_taken(tables, key, other, &mut memory.spare, now) {
        return Ok(key.src);
    }
    place::note(tables, key, other, &mut memory.embryo, now);
    memory.embryo.fill(key, other, Origin::NONE, State::Foreign, (now, 0));
    let _ = tables.insert_embryo(key, &memory.embryo);
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
    if packet.proto == proto::TCP || !has_ports(packet.proto) {
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
