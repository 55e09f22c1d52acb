//! Doors beside the `ClusterIP`, and clients from outside.

use std::net::{IpAddr, SocketAddr};

use super::{ACK, Becomes, Cast, SYN, Service, Step, packet, translated, uplink};
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

/// What is seen of a flow from outside that the node masquerades: what the client sends, as the host stack sees it, and as
/// the pod does; the same of the pod's answer.
struct Exchange {
    sent: Packet,
    led: Packet,
    masqueraded: Packet,
    answer: Packet,
    given_back: Packet,
    returned: Packet,
}

/// A segment there and one back, through a node that masquerades.
fn exchange(cast: &Cast, there: u8, back: u8) -> Exchange {
    let (node_port, _) = cast.node_port();
    let seen_as = SocketAddr::new(cast.node, cast.outsider.port());
    let sent = Packet::tcp(Ingress, cast.outsider, node_port, there);
    let led = Packet { side: Egress, dst: cast.pod, ..sent.clone() };
    let answer = Packet::tcp(Ingress, cast.pod, seen_as, back);
    let given_back = Packet { side: Egress, dst: cast.outsider, ..answer.clone() };
    Exchange {
        masqueraded: Packet { src: seen_as, ..led.clone() },
        returned: Packet { src: node_port, ..given_back.clone() },
        sent,
        led,
        answer,
        given_back,
    }
}

impl Exchange {
    /// What the client sends, in at an uplink and out at one.
    fn there(&self, outcome: Outcome) -> [Step; 2] {
        [
            uplink(translated(&self.sent, outcome, &Packet { side: Ingress, ..self.led.clone() })),
            translated(&self.led, Outcome::Masqueraded, &self.masqueraded),
        ]
    }

    /// The same of the answer.
    fn back(&self) -> [Step; 2] {
        [
            uplink(translated(
                &self.answer,
                Outcome::Masqueraded,
                &Packet { side: Ingress, ..self.given_back.clone() },
            )),
            translated(&self.given_back, Outcome::Replied, &self.returned),
        ]
    }
}

pub fn masqueraded(cast: &Cast) -> Vec<Step> {
    let (_, frontend) = cast.node_port();
    let first = exchange(cast, SYN, SYN | ACK);
    let more = exchange(cast, ACK, ACK);
    let mut steps =
        vec![serve(&Service { flags: 0, ..Service::new(frontend, proto::TCP, &[cast.pod]) })];
    steps.extend(first.there(Outcome::Opened));
    steps.extend(first.there(Outcome::Forwarded));
    steps.extend(first.back());
    steps.extend(more.there(Outcome::Established));
    steps.extend(more.back());
    steps.extend(more.there(Outcome::Forwarded));
    steps
}

/// "Too big" comes to the node, which looks like the sender; the client must know what it sent.
pub fn masqueraded_error(cast: &Cast) -> Vec<Step> {
    let head = if cast.vip.is_ipv4() { [3, 4] } else { [2, 0] };
    let Exchange { sent, led, masqueraded: seen, .. } = exchange(cast, SYN, SYN | ACK);
    let error = |side, to: IpAddr, quoted: &Packet| {
        Packet::icmp(side, cast.router, to, head, quoted.quoted(1000))
    };
    let within = |side| error(side, cast.outsider.ip(), &led);
    let mut steps = masqueraded(cast);
    let came = error(Ingress, cast.node, &seen);
    steps.push(uplink(translated(&came, Outcome::IcmpError, &within(Ingress))));
    let went = error(Egress, cast.outsider.ip(), &sent);
    steps.push(translated(&within(Egress), Outcome::IcmpError, &went));
    steps
}

/// A node that sends packets out of the link that they came by says so to their sender, who has never heard of the pod.
pub fn redirected(cast: &Cast) -> Vec<Step> {
    let Exchange { led, .. } = exchange(cast, SYN, SYN | ACK);
    let redirect = |quoted: &Packet| {
        let client = cast.outsider.ip();
        if cast.vip.is_ipv4() {
            return Packet::icmp(Egress, cast.node, client, [5, 1], quoted.quoted(1000));
        }
        // Target and destination, and the option that quotes the packet (RFC 4861, section 4.5).
        let mut bytes = vec![0; 32];
        bytes.extend([4, 12, 0, 0, 0, 0, 0, 0]);
        bytes.extend(quoted.quoted(1000));
        Packet::icmp(Egress, cast.node, client, [137, 0], bytes)
    };
    let other = Packet { src: SocketAddr::new(cast.router, 1), ..led.clone() };
    let mut steps = masqueraded(cast);
    steps.push(packet(&redirect(&led), Outcome::Silent, Becomes::Nothing));
    steps.push(packet(&redirect(&other), Outcome::NotService, Becomes::Same));
    steps
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

/// The node's address stands in for the client.
pub fn own_hairpin(cast: &Cast) -> Vec<Step> {
    let (node_port, frontend) = cast.node_port();
    let (own, me) = (cast.pod, SocketAddr::new(cast.pod.ip(), 40_000));
    let seen_as = SocketAddr::new(node_port.ip(), me.port());
    let turned = |packet: &Packet, src, dst| Packet { side: Egress, src, dst, ..packet.clone() };
    let there = Packet::tcp(Ingress, me, node_port, SYN);
    let back = Packet::tcp(Ingress, own, seen_as, SYN | ACK);
    vec![
        Step::Services(vec![Service::new(frontend, proto::TCP, &[own])]),
        translated(&there, Outcome::Hairpin, &turned(&there, seen_as, own)),
        translated(&back, Outcome::Hairpin, &turned(&back, node_port, me)),
    ]
}
