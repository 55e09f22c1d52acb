//! Nodes as people have them, made of [`World`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::namespace::Namespace;
use super::net::Net;
use super::world::{Cni, Node, World};

/// The routes of a node that go with its address: to pods of the other, and to anyone.
pub async fn restore(net: &Net, node: &Node, other: &Node) {
    net.route(Ipv4Addr::UNSPECIFIED.into(), 0, Ipv4Addr::new(192, 168, 50, 254).into()).await;
    net.route(Ipv4Addr::new(10, 244, other.number, 0).into(), 24, other.v4().into()).await;
    let _ = node;
}

/// The node's address is on the loopback, and its NIC has none.
pub fn unnumbered() -> World {
    let world = World::new(Cni::Routed);
    for node in &world.nodes {
        let other = &world.nodes[usize::from(1 - node.number)];
        node.namespace.netlink(async |net| {
            for (own, bits, to, bits_of_net) in [
                (node.address(false), 32, "192.168.50.0", 24),
                (node.address(true), 128, "fd00:50::", 64),
            ] {
                net.unaddress("eth0", own).await;
                net.address("lo", own, bits).await;
                net.link_route(to.parse().expect("an address"), bits_of_net, "eth0").await;
            }
            restore(&net, node, other).await;
            // The routes of IPv6 have stayed.
            net.answer_for("eth0", node.v6()).await;
        });
        node.namespace.sysctl("net/ipv6/conf/all/proxy_ndp", "1");
    }
    world
}

/// The NIC of node 0 is in a bridge, which has the node's addresses, and a container that is no pod is in it too.
pub fn bridged_nic() -> (World, Namespace) {
    let world = World::new(Cni::Bridge);
    let container = Namespace::new();
    let node = &world.nodes[0];
    // One that does not look like a pod's.
    world.wire.netlink(async |net| net.macvlan("nic0", "wire", &node.namespace).await);
    node.namespace.netlink(async |net| {
        net.remove("eth0").await;
        net.bridge("brx").await;
        net.enslave("nic0", "brx").await;
        net.pin_address("brx", "nic0").await;
        net.veth("lxc", "eth0", &container).await;
        net.enslave("lxc", "brx").await;
        for link in ["nic0", "lxc", "brx"] {
            net.up(link).await;
        }
        let other = &world.nodes[1];
        net.address("brx", node.v4().into(), 24).await;
        restore(&net, node, other).await;
        net.address("brx", node.v6().into(), 64).await;
        let pods = Ipv6Addr::new(0xfd00, 0x244, other.number.into(), 0, 0, 0, 0, 0);
        net.route(pods.into(), 64, other.v6().into()).await;
        net.route(any(true), 0, ROUTER[0][1]).await;
    });
    (world, container)
}

/// Strict filters of the source, and bridged packets through iptables.
pub fn hardened(cni: Cni) -> World {
    let world = World::new(cni);
    for node in &world.nodes {
        for link in ["all", "default", "eth0"] {
            node.namespace.sysctl(&format!("net/ipv4/conf/{link}/rp_filter"), "1");
        }
        for family in ["ip", "ip6"] {
            let name = format!("net/bridge/bridge-nf-call-{family}tables");
            node.namespace.sysctl(&name, "1");
        }
    }
    world
}

/// Who asks from behind a router that both LANs have.
pub const FAR: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, 5)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 5, 0, 0, 0, 0, 5)),
];
/// The router in the first LAN, which is the nodes' default gateway there; in the second; and before [`FAR`].
pub const ROUTER: [[IpAddr; 2]; 3] = [
    [
        IpAddr::V4(Ipv4Addr::new(192, 168, 50, 254)),
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0x50, 0, 0, 0, 0, 0, 0xfe)),
    ],
    [
        IpAddr::V4(Ipv4Addr::new(192, 168, 51, 254)),
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0x51, 0, 0, 0, 0, 0, 0xfe)),
    ],
    [
        IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1)),
        IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 5, 0, 0, 0, 0, 1)),
    ],
];
/// Node 0 in the second LAN.
pub const SECOND: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 168, 51, 1)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x51, 0, 0, 0, 0, 0, 1)),
];

/// Any address of a family.
pub fn any(v6: bool) -> IpAddr {
    if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() }
}

/// How long the prefix of a LAN is.
pub const fn bits(v6: bool) -> u8 {
    if v6 { 64 } else { 24 }
}

/// Node 0 with a NIC in each of two LANs, and someone behind a router that is in both.
pub struct TwoLans {
    /// The router and the second LAN's switch, which live as long as this.
    pub others: [Namespace; 2],
    /// Who asks.
    pub far: Namespace,
}

impl TwoLans {
    /// Gives node 0 the second NIC.
    pub fn new(world: &World) -> Self {
        let (router, far, second) = (Namespace::new(), Namespace::new(), Namespace::new());
        let node = &world.nodes[0];
        router.sysctl("net/ipv4/ip_forward", "1");
        router.sysctl("net/ipv6/conf/all/forwarding", "1");
        world.wire.netlink(async |net| {
            net.port("router", "lan0", &router, "wire").await;
        });
        second.netlink(async |net| {
            net.bridge("lan").await;
            net.port("node", "eth1", &node.namespace, "lan").await;
            net.port("router", "lan1", &router, "lan").await;
            net.up("lan").await;
        });
        router.netlink(async |net| {
            net.veth("far", "eth0", &far).await;
            for (link, own) in ["lan0", "lan1", "far"].into_iter().zip(ROUTER) {
                net.up(link).await;
                for address in own {
                    net.address(link, address, bits(address.is_ipv6())).await;
                }
            }
        });
        far.netlink(async |net| {
            net.up("eth0").await;
            for (own, gateway) in FAR.into_iter().zip(ROUTER[2]) {
                net.address("eth0", own, bits(own.is_ipv6())).await;
                net.route(any(own.is_ipv6()), 0, gateway).await;
            }
        });
        node.namespace.netlink(async |net| {
            net.up("eth1").await;
            for own in SECOND {
                net.address("eth1", own, bits(own.is_ipv6())).await;
            }
        });
        for link in ["all", "eth0", "eth1"] {
            // Loose: who comes by one NIC may be led to by the other.
            node.namespace.sysctl(&format!("net/ipv4/conf/{link}/rp_filter"), "0");
        }
        Self { others: [router, second], far }
    }
}

/// Leads what node 0 sends to anyone by the router's second leg.
pub fn default_by_second(world: &World) {
    world.nodes[0].namespace.netlink(async |net| {
        for (first, second) in ROUTER[0].into_iter().zip(ROUTER[1]) {
            net.unroute(any(first.is_ipv6()), 0, first).await;
            net.route(any(first.is_ipv6()), 0, second).await;
        }
    });
}

/// What AWS' CNI does on node 0, whose pods are on the second NIC's network: they send by it, whatever they send, but for answers to who
/// came by the first NIC for an address of the node, which is kept in the marks of the kernel's connections.
pub fn pods_of_the_second(world: &World) {
    const BIT: u32 = 0x80;
    const TABLE: u32 = 100;
    let [node, other] = &world.nodes[..] else { panic!("two nodes") };
    node.namespace.netlink(async |net| {
        for v6 in [false, true] {
            let (own, theirs) = (node.pods(v6), other.pods(v6));
            net.route_in(TABLE, any(v6), 0, ROUTER[1][usize::from(v6)]).await;
            net.route_in(TABLE, theirs, bits(v6), other.address(v6)).await;
            net.rule_from(own, bits(v6), TABLE).await;
            net.rule_to(own, bits(v6)).await;
            net.rule_of_mark(v6, BIT).await;
        }
    });
    node.namespace.firewall(
        r#"table inet t {
            chain m { type filter hook prerouting priority mangle;
                iifname "eth0" fib daddr . iif type local ct mark set ct mark or 0x80;
                iifname != "eth0" meta mark set ct mark and 0x80;
            }
        }
"#,
    );
}
