//! Proof by search: a model of what a NAT does, in plain Rust and with no table of the datapath's, beside the datapath itself, over
//! random packets. The model does not know how a backend or a source port is chosen: it sees the choice, checks that it may be made, and
//! from then on foretells every byte.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use fastrand::Rng;

use super::cases::{Hook, NODE, Service};
use super::packets::{Packet, ends};
use crate::tables::Side::{Egress, Ingress};
use crate::tables::{ServiceValue, Side};
use crate::{Outcome, proto};

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;
const NODE_PORT: u16 = 30_080;

/// What is searched: a datapath that sees one packet after the other.
pub trait Datapath {
    /// A packet with the notes that the kernel carries along with it.
    type Frame;
    /// Whether notes are carried along from one look at a packet to the next.
    const CARRIES_NOTES: bool;

    /// From now on there are these Services and no others.
    fn serve(&mut self, services: &[Service]);
    /// A packet that has just come.
    fn frame(&self, bytes: &[u8]) -> Self::Frame;
    /// What it is now.
    fn bytes(&self, frame: &Self::Frame) -> Vec<u8>;
    /// It is seen: what is done with it.
    fn see(&mut self, hook: Hook, frame: &mut Self::Frame) -> Outcome;
    /// Loses some of what it has recorded of flows that are not live, as an LRU table does.
    fn lose(&mut self, rng: &mut Rng);
}

/// Who asks whom, by which protocol.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Ask {
    client: SocketAddr,
    /// Which of [`Doors`].
    door: usize,
    proto: u8,
}

/// What is known of a flow.
#[derive(Clone, Copy, Debug)]
struct Flow {
    backend: SocketAddr,
    /// Whom the backend takes for its client.
    seen_as: SocketAddr,
    /// Which side has sent its last: the client's and the backend's.
    finished: [bool; 2],
    /// Whether it began with a SYN that was seen, and nobody has ended it since.
    is_open: bool,
    /// Whether it has to go on as it is. It need not once its records were lost, or its backend withdrawn.
    is_certain: bool,
}

impl Flow {
    const fn is_over(&self) -> bool {
        self.finished[0] && self.finished[1]
    }
}

/// The addresses of one family.
struct Doors {
    /// `ClusterIPs`, of which the last has no backend, and the `NodePort`.
    frontends: [SocketAddr; 4],
    /// Backends of each.
    backends: [Vec<SocketAddr>; 4],
    clients: Vec<SocketAddr>,
    outsiders: Vec<SocketAddr>,
    stranger: SocketAddr,
    /// The `NodePort`'s backend on this node.
    local: SocketAddr,
}

impl Doors {
    const NODE_PORT: usize = 3;

    fn new(is_v6: bool) -> Self {
        let at = |net: u8, host: u8, port| {
            if is_v6 {
                SocketAddr::from(([0xfd00, net.into(), 0, 0, 0, 0, 0, host.into()], port))
            } else {
                SocketAddr::from(([10, net, 0, host], port))
            }
        };
        // Few ports and one backend behind several doors, so that flows meet.
        let clients =
            |net| (0..6).map(|n| at(net, 10 + n / 2, 40_000 + u16::from(n % 2))).collect();
        let [one, two, local] = [at(2, 1, 8080), at(2, 2, 8080), at(3, 1, 8080)];
        Self {
            frontends: [
                at(1, 1, 80),
                at(1, 2, 80),
                at(1, 3, 80),
                SocketAddr::new(NODE[usize::from(is_v6)], NODE_PORT),
            ],
            backends: [vec![one, two], vec![one], vec![], vec![one, local]],
            clients: clients(4),
            outsiders: clients(5),
            stranger: at(9, 9, 53),
            local,
        }
    }

    fn services(&self) -> Vec<Service> {
        let of = |door: usize, proto| {
            let frontend = self.frontends[door];
            let is_node_port = door == Self::NODE_PORT;
            let zero = if frontend.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
            let shown = if is_node_port { SocketAddr::new(zero, NODE_PORT) } else { frontend };
            let flags = if is_node_port { 0 } else { ServiceValue::REFUSES };
            let local = if is_node_port { vec![self.local] } else { Vec::new() };
            Service { local, flags, ..Service::new(shown, proto, &self.backends[door]) }
        };
        (0..4).flat_map(|door| [proto::TCP, proto::UDP].map(|proto| of(door, proto))).collect()
    }
}

/// The model beside a datapath.
struct Search<'a, D> {
    datapath: &'a mut D,
    rng: Rng,
    doors: Doors,
    flows: BTreeMap<Ask, Flow>,
}

/// Lets a datapath see so many random packets of one family.
///
/// # Panics
/// If one does not become what the model says; the seed and the packet's number are in the message.
pub fn search(datapath: &mut impl Datapath, is_v6: bool, seed: u64, packets: u64) {
    let doors = Doors::new(is_v6);
    datapath.serve(&doors.services());
    let rng = Rng::with_seed(seed);
    let mut search = Search { datapath, rng, doors, flows: BTreeMap::new() };
    for number in 0..packets {
        search.step(&format!("seed {seed}, packet {number}"));
    }
    assert!(search.flows.len() > 4, "flows were found");
}

/// Whether nobody serves the packet.
const fn is_refused(outcome: Outcome) -> bool {
    matches!(outcome, Outcome::Reset | Outcome::Unreachable | Outcome::Silent | Outcome::NotService)
}

impl<D: Datapath> Search<'_, D> {
    /// A packet comes and is seen.
    fn see(&mut self, hook: Hook, packet: &[u8]) -> (Outcome, D::Frame, Vec<u8>) {
        let mut frame = self.datapath.frame(packet);
        let outcome = self.datapath.see(hook, &mut frame);
        let bytes = self.datapath.bytes(&frame);
        (outcome, frame, bytes)
    }

    /// A packet that was seen goes on and is seen where it leaves.
    fn leave(&mut self, mut frame: D::Frame) -> (Outcome, Vec<u8>) {
        let outcome = self.datapath.see(Hook::Egress, &mut frame);
        (outcome, self.datapath.bytes(&frame))
    }

    fn step(&mut self, place: &str) {
        match self.rng.u8(0..200) {
            0..90 => self.ask(place),
            90..160 => self.answer(place),
            160..175 => self.leave_alone(place),
            175..185 => self.ask_in_pieces(place),
            185..194 => self.report(place),
            194..197 => self.lose(),
            _ => self.withdraw(),
        }
    }

    fn packet(
        &mut self,
        side: Side,
        (src, dst): (SocketAddr, SocketAddr),
        proto: u8,
        flags: u8,
    ) -> Packet {
        let packet = match proto {
            proto::TCP => Packet::tcp(side, src, dst, flags),
            _ => Packet::udp(side, src, dst),
        };
        let packet = if self.rng.u8(0..8) == 0 { packet.with_options() } else { packet };
        match self.rng.usize(0..64) {
            length if flags & SYN == 0 && length > 32 => packet.with_payload(&vec![7; length]),
            _ => packet,
        }
    }

    /// Who asks, and the flow that is known of it.
    fn asker(&mut self) -> Ask {
        let door = self.rng.usize(0..4);
        let is_outside = door == Doors::NODE_PORT;
        let clients = if is_outside { &self.doors.outsiders } else { &self.doors.clients };
        let client = clients[self.rng.usize(0..clients.len())];
        Ask { client, door, proto: if self.rng.bool() { proto::TCP } else { proto::UDP } }
    }

    /// A segment's flags. Of a flow from outside that nothing is known of, only a SYN is masqueraded without a note.
    fn flags(&mut self, ask: &Ask) -> u8 {
        let flags = [SYN, ACK, ACK, ACK, ACK | FIN, RST][self.rng.usize(0..6)];
        let is_known = self.flows.get(ask).is_some_and(|flow| flow.is_certain);
        let needs_note = ask.door == Doors::NODE_PORT && !is_known;
        if needs_note && !D::CARRIES_NOTES { SYN } else { flags }
    }

    fn ask(&mut self, place: &str) {
        let ask = self.asker();
        let flags = self.flags(&ask);
        let frontend = self.doors.frontends[ask.door];
        let sent = self.packet(Ingress, (ask.client, frontend), ask.proto, flags);
        let hook = if ask.door == Doors::NODE_PORT { Hook::Uplink } else { Hook::Ingress };
        let (outcome, frame, bytes) = self.see(hook, &sent.frame());
        // A SYN may begin another connection where the last one may have ended.
        let goes_on = |flow: &Flow| {
            let begins = ask.proto == proto::TCP && flags == SYN && !flow.is_open;
            flow.is_certain && !begins
        };
        let bound = self.flows.get(&ask).copied().filter(goes_on);
        if is_refused(outcome) {
            assert!(bound.is_none(), "{place}: {outcome:?} in the middle of {ask:?}, {bound:?}");
            let may_be = self.doors.backends[ask.door].is_empty() || flags & (RST | FIN) != 0;
            assert!(may_be, "{place}: {outcome:?} for {ask:?}");
            return;
        }
        let [src, dst] = ends(&bytes);
        let led = Packet { src, dst, ..sent };
        assert_eq!(bytes, led.frame(), "{place}: {ask:?} became something else");
        assert_eq!(src.ip(), ask.client.ip(), "{place}: {ask:?}");
        let is_masqueraded = self.is_masqueraded(&ask, dst);
        let seen_as = if is_masqueraded { self.masquerade(place, &led, frame) } else { src };
        match bound {
            Some(flow) => {
                let before = (flow.backend, flow.seen_as);
                assert_eq!((dst, seen_as), before, "{place}: {ask:?} goes on");
            }
            None => self.learn(place, (ask, flags), dst, seen_as),
        }
        self.note_flags(ask, 0, flags);
    }

    fn is_masqueraded(&self, ask: &Ask, backend: SocketAddr) -> bool {
        ask.door == Doors::NODE_PORT && backend != self.doors.local
    }

    /// What was led to a pod elsewhere leaves the node: whom the backend takes for its client.
    fn masquerade(&mut self, place: &str, led: &Packet, frame: D::Frame) -> SocketAddr {
        let (outcome, bytes) = self.leave(frame);
        let [src, dst] = ends(&bytes);
        let node = NODE[usize::from(dst.is_ipv6())];
        assert_eq!((src.ip(), dst), (node, led.dst), "{place}: {outcome:?}");
        assert_eq!(bytes, Packet { src, ..led.clone() }.frame(), "{place}: masqueraded");
        src
    }

    /// A flow was given a backend and a source: nobody else's, and one that it may have.
    fn learn(
        &mut self,
        place: &str,
        (ask, flags): (Ask, u8),
        backend: SocketAddr,
        seen_as: SocketAddr,
    ) {
        let is_new = self.flows.get(&ask).is_none_or(|flow| flow.backend != backend);
        let may = self.doors.backends[ask.door].contains(&backend);
        assert!(may || !is_new, "{place}: {ask:?} is led to {backend}");
        let meets = |(other, flow): (&Ask, &Flow)| {
            *other != ask
                && other.proto == ask.proto
                && (flow.backend, flow.seen_as) == (backend, seen_as)
        };
        let met: Vec<Ask> =
            self.flows.iter().filter(|pair| meets(*pair)).map(|(other, _)| *other).collect();
        for other in met {
            let flow = self.flows.get_mut(&other).expect("it was found");
            let is_free = !flow.is_certain || flow.is_over();
            assert!(is_free, "{place}: {ask:?} and {other:?} are one to {backend}");
            flow.is_certain = false;
        }
        // A SYN may begin another one once the backend is withdrawn and all is silent for a while.
        let (is_open, is_certain) = (flags == SYN, may);
        let flow = Flow { backend, seen_as, finished: [false; 2], is_open, is_certain };
        self.flows.insert(ask, flow);
    }

    fn note_flags(&mut self, ask: Ask, side: usize, flags: u8) {
        let Some(flow) = self.flows.get_mut(&ask).filter(|_| ask.proto == proto::TCP) else {
            return;
        };
        if flags & RST != 0 {
            flow.finished = [true; 2];
        }
        flow.finished[side] |= flags & FIN != 0;
        flow.is_open &= flags & (FIN | RST) == 0;
    }

    /// A flow that is known, at random.
    fn known(&mut self) -> Option<(Ask, Flow)> {
        let number = self.rng.usize(0..self.flows.len().max(1));
        self.flows.iter().nth(number).map(|(ask, flow)| (*ask, *flow))
    }

    fn answer(&mut self, place: &str) {
        let Some((ask, flow)) = self.known() else { return };
        let flags = [SYN | ACK, ACK, ACK, ACK | FIN, RST][self.rng.usize(0..5)];
        // A backend answers a SYN, and begins no connection from its side.
        let flags = if flow.is_open { flags } else { flags & !SYN };
        let is_masqueraded = self.is_masqueraded(&ask, flow.backend);
        let side = if is_masqueraded { Ingress } else { Egress };
        let sent = self.packet(side, (flow.backend, flow.seen_as), ask.proto, flags);
        let frontend = self.doors.frontends[ask.door];
        let wanted = Packet { src: frontend, dst: ask.client, ..sent.clone() };
        let (outcome, bytes) = if is_masqueraded {
            let (outcome, frame, bytes) = self.see(Hook::Uplink, &sent.frame());
            if bytes == sent.frame() {
                (outcome, bytes)
            } else {
                let unmasked = Packet { dst: ask.client, ..sent.clone() };
                let is_given_back = bytes == unmasked.frame();
                assert!(is_given_back || !flow.is_certain, "{place}: {ask:?} is given back");
                self.leave(frame)
            }
        } else {
            let is_pods = ask.door != Doors::NODE_PORT;
            let hook = if is_pods { Hook::ToPod } else { Hook::Egress };
            let (outcome, _, bytes) = self.see(hook, &sent.frame());
            (outcome, bytes)
        };
        if !flow.is_certain && bytes != wanted.frame() {
            // It was lost, wholly or by half, or is another flow's by now.
            self.note_others(ask, flow, flags);
            return;
        }
        assert_eq!(
            bytes,
            wanted.frame(),
            "{place}: {outcome:?} for the answer to {ask:?}, {flow:?}"
        );
        self.note_flags(ask, 1, flags);
    }

    /// What an answer says of all flows that it may have been of. After the end of one, an answer to a SYN that was not seen is of a
    /// connection past every VIP, and nobody's from then on.
    fn note_others(&mut self, ask: Ask, flow: Flow, flags: u8) {
        let place = (flow.backend, flow.seen_as, ask.proto);
        let is_there =
            |(other, flow): &(&Ask, &Flow)| (flow.backend, flow.seen_as, other.proto) == place;
        let others: Vec<Ask> =
            self.flows.iter().filter(is_there).map(|(other, _)| *other).collect();
        for other in others {
            self.note_flags(other, 1, flags);
            let flow = self.flows.get_mut(&other).expect("it was found");
            flow.is_certain &= flags & SYN == 0;
        }
    }

    /// What belongs to no flow.
    fn leave_alone(&mut self, place: &str) {
        let client = self.doors.clients[self.rng.usize(0..self.doors.clients.len())];
        let stranger = self.doors.stranger;
        let (side, hook, ends) = match self.rng.u8(0..3) {
            0 => (Ingress, Hook::Ingress, (client, stranger)),
            1 => (Egress, Hook::ToPod, (stranger, client)),
            _ => (Egress, Hook::Egress, (self.doors.backends[0][0], stranger)),
        };
        let sent = self.packet(side, ends, proto::UDP, 0);
        let (outcome, _, bytes) = self.see(hook, &sent.frame());
        assert_eq!((outcome, bytes), (Outcome::NotService, sent.frame()), "{place}: {sent:?}");
    }

    /// A datagram in two pieces, which stay together.
    fn ask_in_pieces(&mut self, place: &str) {
        let client = self.doors.clients[self.rng.usize(0..self.doors.clients.len())];
        let ask = Ask { client, door: self.rng.usize(0..2), proto: proto::UDP };
        let Some(flow) = self.flows.get(&ask).copied().filter(|flow| flow.is_certain) else {
            return;
        };
        let sent = Packet::udp(Ingress, ask.client, self.doors.frontends[ask.door])
            .with_payload(&[7; 100]);
        let wanted = Packet { src: flow.seen_as, dst: flow.backend, ..sent.clone() }.fragments(24);
        for (piece, wanted) in sent.fragments(24).iter().zip(wanted) {
            let (outcome, _, bytes) = self.see(Hook::Ingress, piece);
            assert_eq!(bytes, wanted, "{place}: {outcome:?} for a piece of {ask:?}");
        }
    }

    /// The backend reports that it has no such port: to the client it is the frontend's report about what he sent.
    fn report(&mut self, place: &str) {
        let Some((ask, flow)) = self.known() else { return };
        if !flow.is_certain || ask.door == Doors::NODE_PORT || ask.proto != proto::UDP {
            return;
        }
        let frontend = self.doors.frontends[ask.door];
        let head = if frontend.is_ipv4() { [3, 3] } else { [1, 4] };
        let about = |dst, src| Packet::udp(Ingress, src, dst).quoted(1000);
        let sent = Packet::icmp(
            Egress,
            flow.backend.ip(),
            ask.client.ip(),
            head,
            about(flow.backend, flow.seen_as),
        );
        let wanted =
            Packet::icmp(Egress, frontend.ip(), ask.client.ip(), head, about(frontend, ask.client));
        let (outcome, _, bytes) = self.see(Hook::ToPod, &sent.frame());
        assert_eq!(bytes, wanted.frame(), "{place}: {outcome:?} for a report about {ask:?}");
    }

    fn lose(&mut self) {
        self.datapath.lose(&mut self.rng);
        self.flows.values_mut().for_each(|flow| flow.is_certain = false);
    }

    /// A backend goes, or comes back.
    fn withdraw(&mut self) {
        let two =
            SocketAddr::new(Doors::new(self.doors.stranger.is_ipv6()).backends[0][1].ip(), 8080);
        let backends = &mut self.doors.backends[0];
        if backends.len() > 1 {
            backends.truncate(1);
        } else {
            backends.push(two);
        }
        let services = self.doors.services();
        self.datapath.serve(&services);
        for flow in self.flows.values_mut().filter(|flow| flow.backend == two) {
            flow.is_certain = false;
        }
    }
}
