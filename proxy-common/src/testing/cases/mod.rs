//! The datapath's cases: packets in, packets out, and under which name. The host runs them on ordinary
//! collections, the kernel on its maps.

mod answers;
mod doors;
mod flows;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::packets::Packet;
use crate::tables::Side::{Egress, Ingress};
use crate::tables::{ServiceValue, Side};
use crate::{Outcome, proto};

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// A Service port: a frontend and its backends.
#[derive(Clone, Debug)]
pub struct Service {
    /// Where clients send to; the unspecified address for a `NodePort`.
    pub frontend: SocketAddr,
    /// The protocol's number.
    pub proto: u8,
    /// Where they get to.
    pub backends: Vec<SocketAddr>,
    /// Those of them that are on this node.
    pub local: Vec<SocketAddr>,
    /// The frontend's flags.
    pub flags: u32,
    /// For how many ticks a client stays with its backend.
    pub affinity: u32,
    /// Who may ask, if the flags ask for that.
    pub ranges: Vec<(IpAddr, u8)>,
}

impl Service {
    /// A `ClusterIP`'s port, with all backends on other nodes.
    pub fn new(frontend: SocketAddr, proto: u8, backends: &[SocketAddr]) -> Self {
        Self {
            frontend,
            proto,
            backends: backends.to_vec(),
            local: Vec::new(),
            flags: ServiceValue::REFUSES,
            affinity: 0,
            ranges: Vec::new(),
        }
    }
}

/// A hook that sees packets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hook {
    /// Ingress of a pod's link.
    Ingress,
    /// Ingress of an uplink.
    Uplink,
    /// Egress of an uplink; in most cases it stands for a pod's link too.
    Egress,
    /// Egress of a pod's link.
    ToPod,
}

/// The link that packets of the cases are seen on, and that leads from the node to other nodes: the
/// loopback's, since the kernel's test runs are on it.
pub const LINK: u32 = 1;

/// The longest IP packet that passes there.
pub const MTU: u16 = 1400;

/// This node's own addresses, which masqueraded flows come from.
pub const NODE: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 50)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x50)),
];

/// What a packet becomes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Becomes {
    /// It is not touched.
    Same,
    /// Exactly this.
    This(Vec<u8>),
    /// This, but for its source port, which is another one, and the checksum that goes with it.
    OtherSourcePort(Packet),
    /// It is dropped; its bytes do not matter.
    Nothing,
}

impl Becomes {
    /// Compares a frame with what it was and with what it should have become.
    ///
    /// # Panics
    /// If it is something else; `place` says where.
    pub fn check(&self, place: &str, before: &[u8], after: &[u8]) {
        match self {
            Self::Same => assert!(before == after, "{place}: it was touched"),
            Self::This(wanted) => assert_eq!(after, wanted, "{place}"),
            Self::OtherSourcePort(wanted) => {
                let ports = 14 + if wanted.src.is_ipv4() { 20 } else { 40 };
                let port = u16::from_be_bytes([after[ports], after[ports + 1]]);
                assert_ne!(port, wanted.src.port(), "{place}");
                let src = SocketAddr::new(wanted.src.ip(), port);
                assert_eq!(after, Packet { src, ..wanted.clone() }.frame(), "{place}");
            }
            Self::Nothing => {}
        }
    }
}

/// One step of a case.
#[derive(Clone, Debug)]
pub enum Step {
    /// From now on there are these Services and no others.
    Services(Vec<Service>),
    /// A packet is seen.
    Packet {
        /// At which hook.
        hook: Hook,
        /// The packet.
        frame: Vec<u8>,
        /// What is done with it.
        outcome: Outcome,
        /// What it is then.
        becomes: Becomes,
    },
}

/// A story of packets.
#[derive(Clone, Debug)]
pub struct Case {
    /// What it shows.
    pub name: String,
    /// Its steps.
    pub steps: Vec<Step>,
}

/// A story, told with a family's addresses.
type Story = fn(&Cast) -> Vec<Step>;

/// The addresses of a family's stories.
#[derive(Clone, Copy)]
struct Cast {
    client: SocketAddr,
    vip: SocketAddr,
    other_vip: SocketAddr,
    pod: SocketAddr,
    other_pod: SocketAddr,
    router: IpAddr,
    /// A client that is neither a pod nor a node.
    outsider: SocketAddr,
    /// This node.
    node: IpAddr,
}

impl Cast {
    fn v4() -> Self {
        let at = |octets: [u8; 4], port| SocketAddr::from((octets, port));
        Self {
            client: at([10, 244, 0, 7], 40_000),
            vip: at([10, 96, 0, 10], 80),
            other_vip: at([10, 96, 0, 20], 80),
            pod: at([10, 244, 1, 8], 8080),
            other_pod: at([10, 244, 1, 9], 9090),
            router: [192, 0, 2, 1].into(),
            outsider: at([198, 51, 100, 7], 50_000),
            node: NODE[0],
        }
    }

    fn v6() -> Self {
        let at = |segments: [u16; 8], port| SocketAddr::from((segments, port));
        Self {
            client: at([0xfd00, 0x244, 0, 0, 0, 0, 0, 7], 40_000),
            vip: at([0xfd00, 0x96, 0, 0, 0, 0, 0, 0x10], 80),
            other_vip: at([0xfd00, 0x96, 0, 0, 0, 0, 0, 0x20], 80),
            pod: at([0xfd00, 0x244, 1, 0, 0, 0, 0, 8], 8080),
            other_pod: at([0xfd00, 0x244, 1, 0, 0, 0, 0, 9], 9090),
            router: [0x2001, 0xdb8, 0, 0, 0, 0, 0, 1].into(),
            outsider: at([0x2001, 0xdb8, 7, 0, 0, 0, 0, 7], 50_000),
            node: NODE[1],
        }
    }

    /// The VIP's TCP and UDP ports, led to these pods.
    fn serve(self, backends: &[SocketAddr]) -> Step {
        let service = |proto| Service::new(self.vip, proto, backends);
        Step::Services([proto::TCP, proto::UDP].map(service).into())
    }
}

fn hook(side: Side) -> Hook {
    match side {
        Ingress => Hook::Ingress,
        Egress => Hook::Egress,
    }
}

fn packet(packet: &Packet, outcome: Outcome, becomes: Becomes) -> Step {
    Step::Packet { hook: hook(packet.side), frame: packet.frame(), outcome, becomes }
}

/// The same step at an uplink.
fn uplink(step: Step) -> Step {
    match step {
        Step::Packet { frame, outcome, becomes, .. } => {
            Step::Packet { hook: Hook::Uplink, frame, outcome, becomes }
        }
        other @ Step::Services(_) => other,
    }
}

fn translated(from: &Packet, outcome: Outcome, to: &Packet) -> Step {
    packet(from, outcome, Becomes::This(to.frame()))
}

/// A TCP segment of the client and what the pod gets of it.
fn request(cast: &Cast, flags: u8, outcome: Outcome) -> Step {
    let sent = Packet::tcp(Ingress, cast.client, cast.vip, flags);
    translated(&sent, outcome, &Packet { dst: cast.pod, ..sent.clone() })
}

/// A TCP segment of the pod and what the client gets of it.
fn reply(cast: &Cast, flags: u8, outcome: Outcome) -> Step {
    let sent = Packet::tcp(Egress, cast.pod, cast.client, flags);
    translated(&sent, outcome, &Packet { src: cast.vip, ..sent.clone() })
}

/// All cases, of both families.
pub fn cases() -> Vec<Case> {
    let stories: [(&str, Story); 29] = [
        ("a connection from its SYN to its end", flows::connection),
        ("a connection that is reset", flows::reset_connection),
        ("a port is used again after its connection has ended", flows::port_reuse),
        ("datagrams there and back", flows::datagrams),
        ("SCTP there and back", flows::sctp),
        ("IPv4 options and IPv6 extension headers are passed over", flows::options),
        ("fragments of one datagram are rewritten alike", flows::fragments),
        ("a pod reaches itself", flows::hairpin),
        ("without endpoint a sender is refused", answers::no_endpoint),
        ("a port that the VIP does not have is refused", answers::unused_port),
        ("refusals answer what was sent", answers::refusals),
        ("other traffic is not touched", flows::other_traffic),
        ("an error of a router on the way back to the client", answers::router_error),
        ("an error of the pod itself", answers::pod_error),
        ("an error of the client about an answer", answers::client_error),
        ("one source port through two VIPs to one pod", flows::two_vips),
        ("a withdrawn backend keeps TCP and loses UDP", flows::withdrawn),
        ("a backend that refuses", flows::refused_by_backend),
        ("a VIP answers when it is pinged, and no one else", answers::ping),
        ("headers that no stack accepts", flows::malformed),
        ("from outside to a pod elsewhere the node masquerades", doors::masqueraded),
        ("an error about a masqueraded packet", doors::masqueraded_error),
        ("a redirect to a pod is not told to a client", doors::redirected),
        ("a pod reaches itself by the node's own address", doors::own_hairpin),
        ("from outside to a pod of this node the client's address stays", doors::local_pod),
        ("externalTrafficPolicy asks for a local pod only from outside", doors::external_policy),
        ("internalTrafficPolicy asks for a local pod from everyone", doors::internal_policy),
        ("source ranges let in and keep out", doors::source_ranges),
        ("ports of the node that no Service has are its own", doors::own_ports),
    ];
    let mut cases = Vec::new();
    for (family, cast) in [("IPv4", Cast::v4()), ("IPv6", Cast::v6())] {
        for (name, story) in stories {
            cases.push(Case { name: format!("{family}: {name}"), steps: story(&cast) });
        }
    }
    let steps = flows::unsummed(&Cast::v4());
    cases.push(Case { name: "IPv4: UDP without a checksum stays without".to_owned(), steps });
    cases
}
