//! The paths that are measured, and the packets on them.

use std::net::{IpAddr, SocketAddr};

use proxy_common::proto;
use proxy_common::tables::Side;
use proxy_common::testing::{NODE, Packet, Service};

/// Flows that are so many that no cache holds them.
const MANY: u32 = 1 << 20;
/// Of new flows there are as many as there are runs.
pub const ENDLESS: u32 = 1 << 28;
const SYN: u8 = 2;
const ACK: u8 = 16;
const NODE_PORT: u16 = 30_080;

/// Who of a packet's two sides is the client.
#[derive(Clone, Copy)]
pub enum Client {
    /// The one that it comes from.
    Source,
    /// The one that it goes to.
    Destination,
    /// It is not in the packet.
    Hidden,
}

/// A packet at a program. The flow's number is in the client's address and port.
#[derive(Clone)]
pub struct Seen {
    /// The program.
    pub program: &'static str,
    /// The packet.
    pub packet: Packet,
    /// Who of the two is the client, whose address and port the flow's number goes into.
    pub client: Client,
    /// Whom it goes to, or comes from, once it is translated; nobody if it is left alone.
    pub becomes: Option<IpAddr>,
}

/// What is measured.
pub struct Row {
    /// Its name.
    pub name: String,
    /// What the flows' packets before are.
    pub before: Vec<Seen>,
    /// The packet that is measured.
    pub seen: Seen,
    /// Of how many flows.
    pub flows: u32,
    /// Whether the floor does the same.
    pub has_floor: bool,
}

/// Addresses of one family.
#[derive(Clone, Copy)]
struct Addresses {
    label: &'static str,
    client: SocketAddr,
    /// Another client, outside.
    outsider: SocketAddr,
    vip: SocketAddr,
    backend: SocketAddr,
    node: IpAddr,
    stranger: SocketAddr,
}

fn at(text: &str) -> SocketAddr {
    text.parse().expect("an address and a port")
}

fn families() -> [Addresses; 2] {
    let v4 = Addresses {
        label: "IPv4",
        client: at("10.50.0.0:16384"),
        outsider: at("203.0.0.0:16384"),
        vip: at("10.96.0.10:80"),
        backend: at("10.244.9.7:8080"),
        node: NODE[0],
        stranger: at("198.51.100.7:443"),
    };
    let v6 = Addresses {
        label: "IPv6",
        client: at("[fd50::]:16384"),
        outsider: at("[2001:db8:1::]:16384"),
        vip: at("[fd96::10]:80"),
        backend: at("[fd44::9:7]:8080"),
        node: NODE[1],
        stranger: at("[2001:db8::7]:443"),
    };
    [v4, v6]
}

/// The Services: a VIP and a `NodePort` in each family.
pub fn services() -> Vec<Service> {
    let of = |family: &Addresses| {
        let backend = family.backend;
        let zero = SocketAddr::new(
            if backend.is_ipv6() { at("[::]:0").ip() } else { at("0.0.0.0:0").ip() },
            NODE_PORT,
        );
        [
            Service::new(family.vip, proto::TCP, &[backend]),
            Service::new(zero, proto::TCP, &[backend]),
        ]
    };
    families().iter().flat_map(of).collect()
}

/// All that is measured.
pub fn rows() -> Vec<Row> {
    let of = |family: &Addresses| [by_vip(family), strangers(family), by_node_port(family)];
    families().iter().flat_map(of).flatten().collect()
}

impl Addresses {
    fn asks(
        &self,
        program: &'static str,
        to: SocketAddr,
        flags: u8,
        becomes: Option<IpAddr>,
    ) -> Seen {
        let packet = Packet::tcp(Side::Ingress, self.client, to, flags);
        Seen { program, packet, client: Client::Source, becomes }
    }

    fn answers(&self, from: SocketAddr, flags: u8, becomes: Option<IpAddr>) -> Seen {
        let packet = Packet::tcp(Side::Egress, from, self.client, flags);
        Seen { program: "portal_egress", packet, client: Client::Destination, becomes }
    }

    /// One flow's packet.
    fn row(&self, name: &str, before: &[Seen], seen: Seen) -> Row {
        let name = format!("{}, {name}", self.label);
        Row { name, before: before.to_vec(), seen, flows: 1, has_floor: false }
    }
}

/// Of a pod by a VIP, and back.
fn by_vip(family: &Addresses) -> Vec<Row> {
    let Addresses { vip, backend, .. } = *family;
    let (to_pod, from_vip) = (Some(backend.ip()), Some(vip.ip()));
    let asks = |flags| family.asks("portal_ingress", vip, flags, to_pod);
    let answers = |flags| family.answers(backend, flags, from_vip);
    let handshake = [asks(SYN), answers(SYN | ACK), asks(ACK)];
    // The floor has IPv4 only.
    let has_floor = vip.is_ipv4();
    let of = |name, flows| Row { flows, has_floor, ..family.row(name, &handshake, asks(ACK)) };
    let begins = family.row("a new flow each", &[], asks(SYN));
    let mut rows = vec![
        of("established, at a pod's link", 1),
        family.row("its answer", &handshake, answers(ACK)),
        of("10,000 flows", 10_000),
        Row { flows: ENDLESS, has_floor, ..begins },
    ];
    if has_floor {
        rows.push(of("1,048,576 flows", MANY));
    }
    rows
}

/// Of no Service.
fn strangers(family: &Addresses) -> Vec<Row> {
    let Addresses { client, node, stranger, .. } = *family;
    let left = |program, to| family.asks(program, to, ACK, None);
    let to_node = |port| SocketAddr::new(node, port);
    let tunnel = Packet::udp(Side::Ingress, client, to_node(4789));
    let tunnel = Seen { packet: tunnel, ..left("portal_uplink", to_node(4789)) };
    vec![
        family.row("no Service, from a pod", &[], left("portal_ingress", stranger)),
        family.row("no Service, to a pod", &[], family.answers(stranger, ACK, None)),
        family.row("no Service, out of the node", &[], left("portal_upegress", stranger)),
        family.row("to the node, TCP", &[], left("portal_uplink", to_node(22))),
        family.row("to the node, UDP of a tunnel", &[], tunnel),
    ]
}

/// From outside by a `NodePort` to a pod elsewhere, by the host stack: in and out.
fn by_node_port(family: &Addresses) -> Vec<Row> {
    let Addresses { outsider, backend, node, .. } = *family;
    let seen = |program, side, (from, to), flags, client, becomes| Seen {
        program,
        packet: Packet::tcp(side, from, to, flags),
        client,
        becomes: Some(becomes),
    };
    let asked = SocketAddr::new(node, NODE_PORT);
    // Under the node's address, where the client's port stays.
    let own = SocketAddr::new(node, outsider.port());
    let comes = |flags| {
        let ends = (outsider, asked);
        seen("portal_uplink", Side::Ingress, ends, flags, Client::Source, backend.ip())
    };
    let goes = |flags| {
        let ends = (outsider, backend);
        seen("portal_upegress", Side::Egress, ends, flags, Client::Source, node)
    };
    let (answer, to) = (SYN | ACK, outsider.ip());
    let returns = seen("portal_uplink", Side::Ingress, (backend, own), answer, Client::Hidden, to);
    let ends = (backend, outsider);
    let back = seen("portal_upegress", Side::Egress, ends, answer, Client::Destination, node);
    let handshake = [comes(SYN), goes(SYN), returns, back, comes(ACK), goes(ACK)];
    vec![
        family.row("NodePort to a pod elsewhere, in", &handshake, comes(ACK)),
        family.row("NodePort to a pod elsewhere, out", &handshake, goes(ACK)),
    ]
}
