//! Nodes as people have them: addresses that come and go, NICs in bridges or without addresses, several ways back to a client.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;

use portal::testing::client::{Connection, tcp, udp};
use portal::testing::cluster::{Cluster, VIPS};
use portal::testing::eventually;
use portal::testing::namespace::Namespace;
use portal::testing::objects::{NODE_PORT, node_ports};
use portal::testing::world::{Cni, Node, Pod, World};

fn start(world: World, arguments: &[&str]) -> Cluster {
    let cidr = ["--cluster-cidr", "10.244.0.0/16,fd00:244::/32"];
    Cluster::start_in(world, Path::new(env!("CARGO_BIN_EXE_portal")), &[&cidr, arguments].concat())
}

/// Two Services with a `NodePort` each, one with a pod on node 0 and one with a pod on node 1; and someone outside.
struct Stage {
    cluster: Cluster,
    outsider: Namespace,
    /// Where node 0 has them.
    doors: Vec<SocketAddr>,
}

impl Stage {
    fn new(world: World, arguments: &[&str]) -> Self {
        let outsider = world.outsider();
        let cluster = start(world, arguments);
        let pods: [Pod; 2] = [0, 1].map(|node| cluster.server(node, &format!("on-n{node}")));
        let mut doors = Vec::new();
        for (number, pod) in (0..).zip(&pods) {
            let vips = VIPS.map(|vip| beside(vip, number));
            let mut spec = node_ports();
            for port in spec["spec"]["ports"].as_array_mut().unwrap() {
                port["nodePort"] = (NODE_PORT + number).into();
            }
            cluster.expose_with(&format!("s{number}"), &vips, &[pod], &spec);
            vips.iter().for_each(|vip| cluster.wait_backends(*vip, 1));
            let own = [false, true].map(|v6| cluster.world.nodes[0].address(v6));
            doors.extend(own.map(|address| SocketAddr::new(address, NODE_PORT + number)));
        }
        Self { cluster, outsider, doors }
    }

    /// Whether everybody is served by every door of node 0, of the families that it has.
    fn assert_served(&self) {
        let families = self.families();
        for door in self.doors.iter().filter(|door| families.contains(&door.is_ipv6())) {
            let served =
                eventually(&format!("{door} is served"), || tcp(&self.outsider, *door).ok());
            assert!(served.server.starts_with("on-n"));
            eventually("by UDP too", || udp(&self.outsider, *door, b"x").ok());
        }
    }

    fn families(&self) -> BTreeSet<bool> {
        let has = |v6: &bool| {
            let address = self.cluster.world.nodes[0].address(*v6);
            self.cluster.world.nodes[0]
                .namespace
                .run(|| std::net::UdpSocket::bind((address, 0)).is_ok())
        };
        [false, true].into_iter().filter(has).collect()
    }
}

/// Another address, beside one.
fn beside(ip: IpAddr, number: u16) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => Ipv4Addr::from_bits(ip.to_bits() + u32::from(number)).into(),
        IpAddr::V6(ip) => std::net::Ipv6Addr::from_bits(ip.to_bits() + u128::from(number)).into(),
    }
}

/// The routes of a node that go with its address: to pods of the other, and to anyone.
async fn restore(net: &portal::testing::net::Net, node: &Node, other: &Node) {
    net.route(Ipv4Addr::UNSPECIFIED.into(), 0, Ipv4Addr::new(192, 168, 50, 254).into()).await;
    net.route(Ipv4Addr::new(10, 244, other.number, 0).into(), 24, other.v4().into()).await;
    let _ = node;
}

/// Case 1: networkd, DHCP or ifup take the address away and put it back.
#[test]
fn an_address_that_comes_and_goes_breaks_no_connection() {
    let world = World::new(Cni::Bridge);
    // With an IPv6 address it would be an uplink all the time.
    for node in &world.nodes {
        node.namespace.netlink(async |net| net.unaddress("eth0", node.v6().into()).await);
    }
    let stage = Stage::new(world, &[]);
    stage.assert_served();
    let [node, other] = &stage.cluster.world.nodes[..] else { panic!("two nodes") };
    let doors: Vec<SocketAddr> =
        stage.doors.iter().filter(|door| door.is_ipv4()).copied().collect();
    let ends = doors.iter().flat_map(|door| [*door; 20]);
    let mut connections: Vec<Connection> =
        ends.map(|door| tcp(&stage.outsider, door).unwrap()).collect();
    for round in 0..6_u8 {
        node.namespace.netlink(async |net| {
            net.unaddress("eth0", node.v4().into()).await;
            net.address("eth0", node.v4().into(), 24).await;
            restore(&net, node, other).await;
        });
        for connection in &mut connections {
            assert_eq!(connection.echo(&[round]).unwrap(), [round]);
        }
        doors.iter().for_each(|door| assert!(tcp(&stage.outsider, *door).is_ok(), "round {round}"));
    }
}

/// Case 4: the node's address is on the loopback, and its NIC has none.
#[test]
fn a_nic_without_an_address_is_an_uplink_if_routes_lead_out_by_it() {
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
                net.link_route(to.parse().unwrap(), bits_of_net, "eth0").await;
            }
            restore(&net, node, other).await;
            // The routes of IPv6 have stayed.
            net.answer_for("eth0", node.v6()).await;
        });
        node.namespace.sysctl("net/ipv6/conf/all/proxy_ndp", "1");
    }
    Stage::new(world, &[]).assert_served();
}

/// Case 2: the NIC is in a bridge, which has the node's address, and a container that is no pod is in it too.
#[test]
fn the_nics_bridge_is_an_uplink_whatever_else_is_in_it() {
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
        net.address("brx", node.v4().into(), 24).await;
        restore(&net, node, &world.nodes[1]).await;
    });
    Stage::new(world, &[]).assert_served();
}
