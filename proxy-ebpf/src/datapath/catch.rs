//! The second line: what goes to a VIP and leaves the node as it is. Nothing has translated it where it came in: a pod
//! whose link has no program (it was born while no agent runs, or has no link on this node), or a process of the node past the
//! socket hooks.
//!
//! It is led to a backend here, and goes in again by the catch-all link, as a packet that has just come in: the host stack lets it pass
//! and chooses its way. The VIP stands in for the client, as in a hairpin flow, since whatever has not seen the question
//! would not see the answer either: to the VIP it leaves the node as well, and is translated here. A backend
//! elsewhere sees the node's own address, as [`super::leave`] has it.

use proxy_common::tables::{
    AffinityKey, Backend, FlowKey, Memory, Origin, Packet, ServiceKey, ServiceValue, Side,
};
use proxy_common::{Family, proto};

use super::choose::{self, Asker, Failure};
use super::open::{self, Opening};
use super::{Service, Tables};
use crate::packet::{has_ports, tcp};

/// The mark of the VIP that a packet leaves for, if that is to be caught here.
#[inline(always)]
pub fn mark<F: Family, T: Tables<F>>(tables: &T, key: &FlowKey<F>) -> Option<Service> {
    if tables.setting(|s| &s.catch_all) == 0 || !has_ports(key.proto) {
        return None;
    }
    let is_vips = |mark: &Service| !mark.has(ServiceValue::NODE | ServiceValue::LOOPBACK);
    tables.service(&ServiceKey::mark(key.dst)).filter(is_vips)
}

/// The flow that a packet to a VIP begins. The place of its answers is then in `other`.
///
/// # Errors
/// Says why there is none.
#[inline(always)]
pub fn open<F: Family, T: Tables<F>>(
    tables: &T,
    (key, other): (&FlowKey<F>, &mut FlowKey<F>),
    memory: &mut Memory<F>,
    mark: &Service,
) -> Result<Opening, Failure> {
    let service = choose::frontend(tables, mark, key.dst, key.dport, key.proto)?;
    memory.affinity = AffinityKey { client: key.src, service: service.id, netns: [0; 2] };
    let draw = || open::draw(tables, &service, key);
    // It is one of the cluster: source ranges and policies for those outside are not for it (KP-57, KP-93).
    let asker =
        Asker { outside: false, allowed: open::is_allowed(tables, memory, &service, key.src) };
    let (number, backend) = choose::backend(tables, &service, asker, &memory.affinity, draw)?;
    *other = key.turned(Side::Egress);
    (other.src, other.sport) = (backend.addr, backend.port);
    other.dst = key.dst;
    let elsewhere = backend.flags & Backend::<F>::LOCAL == 0;
    let kind = Origin::TURN | if elsewhere { Origin::MASQUERADES } else { 0 };
    let origin = Origin { backend: number, client_link: 0, generation: backend.generation, kind };
    Ok(Opening { origin, service: service.id, backend: number, masquerades: false })
}

/// Whether a packet that comes in for a VIP belongs to a flow that was caught, which the second line goes on with: the
/// answer of a backend, or the client's own since its link has programs.
#[inline(always)]
pub fn has<F: Family, T: Tables<F>>(
    tables: &T,
    packet: &Packet,
    key: &FlowKey<F>,
    spare: &mut FlowKey<F>,
) -> bool {
    if tables.setting(|s| &s.catch_all) == 0
        || packet.proto == proto::TCP && tcp::opens(packet.flags)
    {
        return false;
    }
    *spare = *key;
    spare.side = Side::Egress as u8;
    tables.flow(spare).is_some() || tables.embryo(spare).is_some()
}
