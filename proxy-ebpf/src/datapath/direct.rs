//! Flows to an endpoint by its own address, past every VIP. From one port of a client, such a flow and one through a VIP
//! could not be told apart by the endpoint's answers; nor, if both are at the same port, by the endpoint itself. So the place of its answers
//! is noted, which no flow through a VIP gets then; and where one of those has it already, this one gets another source port.

use proxy_common::tables::{FlowKey, Memory, Origin, Packet, Side};
use proxy_common::{Family, proto};

use super::open::Opening;
use super::{Tables, place};
use crate::packet::{has_ports, tcp};

/// The flow that a packet begins, if it needs another source port; the place that it would have is then in `other`. Otherwise it
/// is noted.
#[inline(always)]
pub fn open<F: Family, T: Tables<F>>(
    tables: &T,
    packet: &Packet,
    (key, other): (&FlowKey<F>, &mut FlowKey<F>),
    memory: &mut Memory<F>,
) -> Option<Opening> {
    let begins = packet.proto != proto::TCP || tcp::opens(packet.flags);
    if !begins || !has_ports(packet.proto) || !tables.is_server(&key.dst, key.dport) {
        return None;
    }
    let now = tables.now();
    *other = key.turned(Side::Egress);
    if place::is_taken(tables, key, other, &mut memory.spare, now) {
        // From now on what comes from this port is looked at, and not the first packet only.
        tables.take_port(key.sport);
        let (origin, backend) = (Origin::NONE, Origin::NO_BACKEND);
        return Some(Opening { origin, service: 0, backend, masquerades: false });
    }
    if packet.proto == proto::TCP {
        // Of its own packets no other is looked at, and its answers keep the note fresh.
        place::note(tables, key, other, &mut memory.embryo, now);
    } else {
        place::note_both(tables, key, other, &mut memory.embryo, now);
    }
    None
}
