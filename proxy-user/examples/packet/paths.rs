//! The paths that are measured, and the packets on them.

use std::net::{IpAddr, SocketAddr};

use proxy_common::proto;
use proxy_common::tables::Side;
use proxy_common::testing::{NODE, Packet, Service};

/// Flows that are so many that no cache holds them.
const MANY: u32 = 1 << 20;
/// Of new flows there are as many as there are runs.
const ENDLESS: u32 = 1 << 28;
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
    families().iter().flat_map(of_family).collect()
}

fn of_family(family: &Addresses) -> Vec<Row> {
    let Addresses { label, client, vip, backend, node, stranger, .. } = family;
    let asks = |program, to, flags, becomes| Seen {
        program,
        packet: Packet::tcp(Side::Ingress, *client, to, flags),
        client: Client::Source,
        becomes,
    };
    let answers = |program, from, flags, becomes| Seen {
        program,
        packet: Packet::tcp(Side::Egress, from, *client, flags),
        client: Client::Destination,
        becomes,
    };
    let (to_pod, from_vip) = (Some(backend.ip()), Some(vip.ip()));
    let data = asks("portal_ingress", *vip, ACK, to_pod);
    let syn = asks("portal_ingress", *vip, SYN, to_pod);
    let handshake =
        vec![syn.clone(), answers("portal_egress", *backend, SYN | ACK, from_vip), data.clone()];
    let has_floor = !vip.is_ipv6();
    let row = |name: &str, before: &[Seen], seen: Seen, flows, has_floor| Row {
        name: format!("{label}, {name}"),
        before: before.to_vec(),
        seen,
        flows,
        has_floor,
    };
    let left = |program, from, to| Seen {
        program,
        packet: Packet::tcp(Side::Ingress, from, to, ACK),
        client: Client::Source,
        becomes: None,
    };
    let tunnel = Packet::udp(Side::Ingress, *client, SocketAddr::new(*node, 4789));
    let mut rows = vec![
        row("established, at a pod's link", &handshake, data.clone(), 1, has_floor),
        row("its answer", &handshake, answers("portal_egress", *backend, ACK, from_vip), 1, false),
        row("10,000 flows", &handshake, data.clone(), 10_000, has_floor),
        row("a new flow each", &[], syn, ENDLESS, has_floor),
        row("no Service, from a pod", &[], left("portal_ingress", *client, *stranger), 1, false),
        row("no Service, to a pod", &[], answers("portal_egress", *stranger, ACK, None), 1, false),
        row(
            "no Service, out of the node",
            &[],
            left("portal_upegress", *client, *stranger),
            1,
            false,
        ),
        row(
            "to the node, TCP",
            &[],
            left("portal_uplink", *client, SocketAddr::new(*node, 22)),
            1,
            false,
        ),
        row(
            "to the node, UDP of a tunnel",
            &[],
            Seen {
                program: "portal_uplink",
                packet: tunnel,
                client: Client::Source,
                becomes: None,
            },
            1,
            false,
        ),
    ];
    if has_floor {
        rows.push(row("1,048,576 flows", &handshake, data, MANY, true));
    }
    rows.extend(by_node_port(family));
    rows
}

/// From outside by a `NodePort` to a pod elsewhere, by the host stack: in and out.
fn by_node_port(family: &Addresses) -> Vec<Row> {
    let Addresses { label, outsider: from, backend, node, .. } = family;
    let asked = SocketAddr::new(*node, NODE_PORT);
    let seen = |program, side, (source, to), flags, client, becomes| Seen {
        program,
        packet: Packet::tcp(side, source, to, flags),
        client,
        becomes: Some(becomes),
    };
    let comes = |flags| {
        seen("portal_uplink", Side::Ingress, (*from, asked), flags, Client::Source, backend.ip())
    };
    let goes = |flags| {
        seen("portal_upegress", Side::Egress, (*from, *backend), flags, Client::Source, *node)
    };
    // Under the node's address, where the client's port stays.
    let own = SocketAddr::new(*node, from.port());
    let returns = Seen {
        packet: Packet::tcp(Side::Ingress, *backend, own, SYN | ACK),
        client: Client::Hidden,
        ..comes(0)
    };
    let back = seen(
        "portal_upegress",
        Side::Egress,
        (*backend, *from),
        SYN | ACK,
        Client::Destination,
        *node,
    );
    let handshake = vec![comes(SYN), goes(SYN), returns, back, comes(ACK), goes(ACK)];
    let row = |name: &str, before: Vec<Seen>, seen| Row {
        name: format!("{label}, {name}"),
        before,
        seen,
        flows: 1,
        has_floor: false,
    };
    vec![
        row("NodePort to a pod elsewhere, in", handshake.clone(), comes(ACK)),
        row("NodePort to a pod elsewhere, out", handshake, goes(ACK)),
    ]
}
