//! The second line: what goes to a VIP and leaves the node as it is. Nothing has translated it where it came in: a pod
//! whose link has no program (it was born while no agent runs, or has no link on this node), or a process of the node past the
//! socket hooks.
//!
//! It is led to a backend here, and goes in again by the catch-all link, as a packet that has just come in: the host stack lets it pass
//! and chooses its way. The VIP stands in for the client, as in a hairpin flow, since whatever has not seen the question
//! would not see the answer either: to the VIP it leaves the node as well, and is translated here. A backend
//! elsewhere sees the node's own address, as [`super::leave`] has it.

use bytemuck::Zeroable;
use proxy_common::tables::{
    AffinityKey, Backend, EmbryoValue, FlowKey, Memory, Origin, Packet, ServiceKey, ServiceValue,
    Side, State, expired,
};
use proxy_common::{Family, Port, proto};

use super::choose::{self, Asker, Failure};
use super::open::{self, Opening};
use super::{Service, Tables, is_nodes, live, pending};
use crate::packet::{Frame, has_ports, tcp};

/// How many ticks the agent has to learn which connection that was.
const LEARNING: u32 = 2;

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
pub fn open<F: Family, P: Frame, T: Tables<F>>(
    frame: &P,
    tables: &T,
    (key, other): (&FlowKey<F>, &mut FlowKey<F>),
    memory: &mut Memory<F>,
    mark: &Service,
) -> Result<Opening, Failure> {
    if is_beyond(frame, tables, key) {
        return Err(Failure::NotService);
    }
    let service = choose::frontend(tables, mark, key.dst, key.dport, key.proto)?;
    memory.affinity = AffinityKey { client: key.src, service: service.id, netns: [0; 2] };
    let draw = || open::draw(tables, &service, key);
    // It is one of the cluster: source ranges and policies for those outside are not for it (KP-57, KP-93).
    let allowed = open::is_allowed(tables, &mut memory.range, &service, key.src);
    let asker = Asker { outside: false, allowed };
    let (number, backend) = choose::backend(tables, &service, asker, &memory.affinity, draw)?;
    if key.proto == proto::TCP && is_nodes(tables, key.src) {
        learn(tables, key, &mut memory.embryo);
    } else if key.proto == proto::UDP && is_nodes(tables, backend.addr) {
        let place = stand_in(key.dst, key.sport, key.proto);
        note(tables, &place, &mut memory.embryo);
    }
    *other = key.turned(Side::Egress);
    (other.src, other.sport) = (backend.addr, backend.port);
    other.dst = key.dst;
    let elsewhere = backend.flags & Backend::<F>::LOCAL == 0;
    let kind = Origin::TURN | if elsewhere { Origin::MASQUERADES } else { 0 };
    let origin = Origin { backend: number, client_link: 0, generation: backend.generation, kind };
    Ok(Opening { origin, service: service.id, backend: number, masquerades: false })
}

/// Whether the client lies behind the uplink that its packet is about to leave by (a macvlan child whose gateway is another
/// machine): this host has not forwarded it, and may not reach the client.
#[inline(always)]
fn is_beyond<F: Family, P: Frame, T: Tables<F>>(frame: &P, tables: &T, key: &FlowKey<F>) -> bool {
    frame.link() != tables.setting(|s| &s.catch_all)
        && frame.route::<F>(&key.dst, &key.src).link == frame.link()
}

/// Notes that a connection was caught whose client may be behind the kernel's NAT: it is known here by another address than its
/// segments have where they come in. The agent asks the kernel for that, and notes the flow there (`kernel/caught.rs`).
#[inline(always)]
fn learn<F: Family, T: Tables<F>>(tables: &T, key: &FlowKey<F>, embryo: &mut EmbryoValue<F>) {
    let mut caught = *key;
    caught.pad = FlowKey::<F>::CAUGHT;
    tables.wish(&caught);
    note(tables, &when(), embryo);
}

/// Puts a record of nothing but a time.
#[inline(always)]
fn note<F: Family, T: Tables<F>>(tables: &T, key: &FlowKey<F>, embryo: &mut EmbryoValue<F>) {
    embryo.fill(key, key, Origin::NONE, State::Foreign, (tables.now(), 0));
    tables.put_embryo(key, embryo);
}

#[inline(always)]
fn when<F: Family>() -> FlowKey<F> {
    FlowKey { pad: FlowKey::<F>::WHEN, ..FlowKey::zeroed() }
}

#[inline(always)]
fn stand_in<F: Family>(vip: F::Addr, port: Port, proto: u8) -> FlowKey<F> {
    FlowKey { src: vip, sport: port, proto, pad: FlowKey::<F>::STAND_IN, ..FlowKey::zeroed() }
}

/// Whether a VIP stands in at that port for a client of a server of this node's own, whose answer may go there.
#[inline(always)]
pub fn stands_in<F: Family, T: Tables<F>>(
    tables: &T,
    (vip, port): (F::Addr, Port),
    proto: u8,
) -> bool {
    tables.setting(|s| &s.catch_all) != 0 && tables.embryo(&stand_in(vip, port, proto)).is_some()
}

/// Whether a packet that comes in for a VIP belongs to a flow that was caught, which the second line goes on with: the
/// answer of a backend, or the client's own since its link has programs.
#[inline(always)]
pub fn has<F: Family, T: Tables<F>>(
    tables: &T,
    packet: &Packet,
    key: &FlowKey<F>,
    memory: &mut Memory<F>,
) -> bool {
    let is_tcp = packet.proto == proto::TCP;
    if tables.setting(|s| &s.catch_all) == 0 || is_tcp && tcp::opens(packet.flags) {
        return false;
    }
    let now = tables.now();
    memory.spare = *key;
    memory.spare.side = Side::Egress as u8;
    let (key, other) = (&memory.spare, &mut memory.live.other);
    if let Some(facts) = pending::known(tables, key, other)
        && facts.origin.is(Origin::TURN)
    {
        // A connection goes on as it began; datagrams only as long as their flow lives.
        return is_tcp || !facts.expired(live::lifetime(tables, packet.proto, facts.state), now);
    }
    is_tcp && was_just_caught(tables, other, now)
}

/// Whether a connection was caught a moment ago of which it is not known yet how its segments come in.
#[inline(always)]
fn was_just_caught<F: Family, T: Tables<F>>(tables: &T, spare: &mut FlowKey<F>, now: u32) -> bool {
    let key = when();
    let read = tables.embryo(&key).and_then(|record| record.read(&key, spare));
    read.is_some_and(|(facts, _)| !expired(facts.seen, LEARNING, now))
}
