//! Doors beside the `ClusterIP`, and clients from outside.

use std::net::{IpAddr, SocketAddr};

use super::{ACK, Becomes, Cast, MTU, SYN, Service, Step, packet, translated, uplink};
use crate::tables::ServiceValue;
use crate::tables::Side::{Egress, Ingress};
use crate::testing::packets::Packet;
use crate::{Outcome, proto};

const NODE_PORT: u16 = 30_080;

impl Cast {
    /// A `NodePort` as its packets carry it, and as a frontend.
    fn node_port(&self) -> (SocketAddr, SocketAddr) {
        let any = if self.vip.is_ipv4() {
            SocketAddr::from(([0_u8; 4], NODE_PORT))
        } else {
            SocketAddr::from(([0_u16; 8], NODE_PORT))
        };
        (SocketAddr::new(self.node, NODE_PORT), any)
    }
}

/// A Service port for TCP and its double for UDP.
fn serve(service: &Service) -> Step {
    let of = |proto| Service { proto, ..service.clone() };
    Step::Services(vec![of(proto::TCP), of(proto::UDP)])
}

/// A request from outside and what the pod gets; an answer of the pod and what the client gets.
struct Exchange {
    sent: Packet,
    arrived: Packet,
    answer: Packet,
    returned: Packet,
}

/// A segment there and one back, through a node that masquerades.
fn exchange(cast: &Cast, there: u8, back: u8) -> Exchange {
    let (node_port, _) = cast.node_port();
    let sent = Packet::tcp(Ingress, cast.outsider, node_port, there);
    let seen_as = SocketAddr::new(cast.node, sent.src.port());
    let arrived = Packet { src: seen_as, dst: cast.pod, hops: 63, ..sent.clone() };
    let answer = Packet::tcp(Ingress, cast.pod, seen_as, back);
    let returned = Packet { src: node_port, dst: cast.outsider, hops: 63, ..answer.clone() };
    Exchange { sent, arrived, answer, returned }
}

fn masquerades(from: &Packet, to: &Packet) -> Step {
    uplink(translated(from, Outcome::Masqueraded, to))
}

pub fn masqueraded(cast: &Cast) -> Vec<Step> {
    let (_, frontend) = cast.node_port();
    let Exchange { sent, arrived, answer, returned } = exchange(cast, SYN, SYN | ACK);
    let more = exchange(cast, ACK, ACK);
    vec![
        serve(&Service { flags: 0, ..Service::new(frontend, proto::TCP, &[cast.pod]) }),
        masquerades(&sent, &arrived),
        masquerades(&sent, &arrived),
        masquerades(&answer, &returned),
        masquerades(&more.sent, &more.arrived),
        masquerades(&more.answer, &more.returned),
        // No router has passed it on so far that this node may.
        uplink(packet(&Packet { hops: 1, ..more.sent }, Outcome::HopLimit, Becomes::Nothing)),
    ]
}

/// "Too big" comes to the node, which looks like the sender; the client must know what it sent.
pub fn masqueraded_error(cast: &Cast) -> Vec<Step> {
    let head = if cast.vip.is_ipv4() { [3, 4] } else { [2, 0] };
    let Exchange { sent, arrived, .. } = exchange(cast, SYN, SYN | ACK);
    let error = |to: IpAddr, quoted: &Packet| {
        let quoted = Packet { hops: 64, ..quoted.clone() };
        Packet::icmp(Ingress, cast.router, to, head, quoted.quoted(1000))
    };
    let mut steps = masqueraded(cast);
    steps.push(masquerades(&error(cast.node, &arrived), &error(cast.outsider.ip(), &sent)));
    steps
}

pub fn too_big(cast: &Cast) -> Vec<Step> {
    let (node_port, frontend) = cast.node_port();
    let headers = if cast.vip.is_ipv4() { 28 } else { 48 };
    let datagram = |length: usize| {
        let bytes = vec![7; length - headers];
        Packet::udp(Ingress, cast.outsider, node_port).with_payload(&bytes)
    };
    let fits = datagram(MTU.into());
    let seen_as = SocketAddr::new(cast.node, fits.src.port());
    let arrived = Packet { src: seen_as, dst: cast.pod, hops: 63, ..fits.clone() };
    let long = datagram(usize::from(MTU) + 1);
    let head = if cast.vip.is_ipv4() { [3, 4] } else { [2, 0] };
    let told = Packet::icmp(Egress, cast.node, cast.outsider.ip(), head, long.quoted(headers))
        .with_rest(u32::from(MTU).to_be_bytes());
    vec![
        serve(&Service { flags: 0, ..Service::new(frontend, proto::TCP, &[cast.pod]) }),
        masquerades(&fits, &arrived),
        uplink(translated(&long, Outcome::TooBig, &told)),
        masquerades(&fits, &arrived),
    ]
}

pub fn local_pod(cast: &Cast) -> Vec<Step> {
    let (node_port, frontend) = cast.node_port();
    let local = vec![cast.pod];
    let service = Service { flags: 0, local, ..Service::new(frontend, proto::TCP, &[cast.pod]) };
    let there = Packet::tcp(Ingress, cast.outsider, node_port, SYN);
    let back = Packet::tcp(Egress, cast.pod, cast.outsider, SYN | ACK);
    let arrived = Packet { dst: cast.pod, ..there.clone() };
    let returned = Packet { src: node_port, ..back.clone() };
    vec![
        serve(&service),
        uplink(translated(&there, Outcome::Opened, &arrived)),
        translated(&back, Outcome::Replied, &returned),
    ]
}

/// KP-52, 53, 55: dropped from outside, led to any pod from within.
pub fn external_policy(cast: &Cast) -> Vec<Step> {
    let flags = ServiceValue::LOCAL_FOR_OUTSIDE;
    let service = Service { flags, ..Service::new(cast.vip, proto::TCP, &[cast.pod]) };
    let outside = Packet::tcp(Ingress, cast.outsider, cast.vip, SYN);
    let pod = Packet::tcp(Ingress, cast.client, cast.vip, SYN);
    vec![
        serve(&service),
        uplink(packet(&outside, Outcome::NoLocal, Becomes::Nothing)),
        translated(&pod, Outcome::Opened, &Packet { dst: cast.pod, ..pod.clone() }),
    ]
}

/// KP-59, 60.
pub fn internal_policy(cast: &Cast) -> Vec<Step> {
    let flags = ServiceValue::REFUSES | ServiceValue::LOCAL_FOR_ALL;
    let remote = Service { flags, ..Service::new(cast.vip, proto::TCP, &[cast.pod]) };
    let both = Service {
        flags,
        local: vec![cast.pod],
        ..Service::new(cast.vip, proto::TCP, &[cast.other_pod, cast.pod])
    };
    let syn = Packet::tcp(Ingress, cast.client, cast.vip, SYN);
    let udp = Packet::udp(Ingress, cast.client, cast.vip);
    vec![
        serve(&remote),
        packet(&syn, Outcome::NoLocal, Becomes::Nothing),
        serve(&both),
        translated(&syn, Outcome::Opened, &Packet { dst: cast.pod, ..syn.clone() }),
        translated(&udp, Outcome::Opened, &Packet { dst: cast.pod, ..udp.clone() }),
    ]
}

/// KP-91: also where there is no endpoint (KP-94).
pub fn source_ranges(cast: &Cast) -> Vec<Step> {
    let flags = ServiceValue::SOURCE_RANGES;
    let bits = if cast.vip.is_ipv4() { 24 } else { 64 };
    let ranges = vec![(cast.client.ip(), bits)];
    let open = Service { flags, ranges, ..Service::new(cast.vip, proto::TCP, &[cast.pod]) };
    let empty = Service { backends: Vec::new(), ..open.clone() };
    let inside = Packet::tcp(Ingress, cast.client, cast.vip, SYN);
    let outside = Packet::tcp(Ingress, cast.outsider, cast.vip, SYN);
    vec![
        serve(&empty),
        uplink(packet(&outside, Outcome::NotAllowed, Becomes::Nothing)),
        serve(&open),
        uplink(packet(&outside, Outcome::NotAllowed, Becomes::Nothing)),
        packet(&outside, Outcome::NotAllowed, Becomes::Nothing),
        translated(&inside, Outcome::Opened, &Packet { dst: cast.pod, ..inside.clone() }),
    ]
}

/// KP-27, 40: a node's other ports, and those of an external IP, are left alone.
pub fn own_ports(cast: &Cast) -> Vec<Step> {
    let (_, frontend) = cast.node_port();
    let external = Service { flags: 0, ..Service::new(cast.vip, proto::TCP, &[cast.pod]) };
    let node_port = Service { flags: 0, ..Service::new(frontend, proto::TCP, &[cast.pod]) };
    let same = |sent: &Packet| uplink(packet(sent, Outcome::NotService, Becomes::Same));
    let at = |ip, port| SocketAddr::new(ip, port);
    vec![
        Step::Services(vec![external, node_port]),
        same(&Packet::tcp(Ingress, cast.outsider, at(cast.node, 22), SYN)),
        same(&Packet::udp(Ingress, cast.outsider, at(cast.node, NODE_PORT))),
        same(&Packet::tcp(Ingress, cast.outsider, at(cast.vip.ip(), 81), SYN)),
        same(&Packet::tcp(Ingress, cast.outsider, at(cast.router, NODE_PORT), SYN)),
    ]
}
