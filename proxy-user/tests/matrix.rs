//! Kinds of nodes × doors × families × short cuts (docs/conformance.md, "Worlds"): everyone is served by every door, and open
//! connections go on, also by the short cut where there is to be one.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use portal::testing::client::{Connection, tcp, udp};
use portal::testing::cluster::{VIPS, at};
use portal::testing::namespace::Namespace;
use portal::testing::stage::{Stage, beside};
use portal::testing::world::{CNIS, Cni, World};
use portal::testing::worlds::{
    TwoLans, bridged_nic, default_by_second, hardened, pods_of_the_second, unnumbered,
};
use portal::testing::{eventually, within};

/// A kind of node, and who asks from outside if it is not the world's outsider; with what must not go before it.
struct Place {
    world: World,
    far: Option<Namespace>,
    _others: Vec<Namespace>,
}

impl From<World> for Place {
    fn from(world: World) -> Self {
        Self { world, far: None, _others: Vec::new() }
    }
}

/// Every door of a stage: from outside by `NodePorts`, from a pod and from the node by VIPs.
fn all_doors_serve(stage: &Stage) -> Vec<Connection> {
    stage.assert_served();
    let client = stage.cluster.pod(0, "client");
    let vips = (0..2).flat_map(|number| VIPS.map(|vip| at(beside(vip, number))));
    let mut connections = Vec::new();
    for vip in vips {
        connections.push(eventually("a pod is served", || tcp(&client.namespace, vip).ok()));
        assert_eq!(udp(&client.namespace, vip, b"x").unwrap().from, vip);
        for protocol in ["tcp", "udp"] {
            assert!(stage.cluster.probe(0, protocol, vip).is_ok(), "the node, {protocol} to {vip}");
        }
    }
    let is_there = |door: &&SocketAddr| {
        let node = &stage.cluster.world.nodes[0].namespace;
        node.run(|| std::net::UdpSocket::bind((door.ip(), 0)).is_ok())
    };
    let doors = stage.doors.iter().filter(is_there);
    connections.extend(doors.map(|door| tcp(&stage.outsider, *door).unwrap()));
    connections
}

/// The connections go on, by the short cut if there is one.
fn go_on(stage: &Stage, connections: &mut [Connection], is_cut: bool) {
    let count = || stage.cluster.outcomes(0, "short_cut");
    let mut rounds = 0;
    within(Duration::from_mins(1), "they go on", || {
        for connection in &mut *connections {
            // More than fits in a packet.
            assert_eq!(connection.echo(&[7; 4000]).unwrap(), [7; 4000]);
        }
        rounds += 1;
        let is_done = if is_cut { count() > 200 } else { rounds == 20 };
        is_done.then_some(())
    });
    assert_eq!(count() > 0, is_cut);
}

fn is_served_everywhere(place: impl Fn() -> Place) {
    for (short_cut, is_cut) in [("--short-cut=auto", true), ("--short-cut=off", false)] {
        let Place { world, far, _others } = place();
        let mut stage = Stage::new(world, Path::new(env!("CARGO_BIN_EXE_portal")), &[short_cut]);
        stage.outsider = far.unwrap_or(stage.outsider);
        let mut connections = all_doors_serve(&stage);
        go_on(&stage, &mut connections, is_cut);
    }
}

/// The rules of a CNI that masquerades what pods send out of the pods' range.
fn masquerading(world: World) -> World {
    for node in &world.nodes {
        node.namespace.firewall(
            "table inet t {
                chain p { type nat hook postrouting priority srcnat;
                    ip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16 masquerade;
                    ip6 saddr fd00:244::/32 ip6 daddr != fd00:244::/32 masquerade;
                }
            }
        ",
        );
    }
    world
}

#[test]
fn plain_nodes() {
    CNIS.into_iter().for_each(|cni| is_served_everywhere(|| World::new(cni).into()));
}

#[test]
fn an_overlay() {
    let overlay = || {
        let world = World::new(Cni::Routed);
        world.overlay();
        world
    };
    is_served_everywhere(|| overlay().into());
    is_served_everywhere(|| masquerading(overlay()).into());
}

#[test]
fn a_nic_without_an_address() {
    is_served_everywhere(|| unnumbered().into());
}

#[test]
fn a_nic_in_a_bridge() {
    is_served_everywhere(|| {
        let (world, container) = bridged_nic();
        Place { world, far: None, _others: vec![container] }
    });
}

#[test]
fn hardened_nodes() {
    CNIS.into_iter().for_each(|cni| is_served_everywhere(|| hardened(cni).into()));
}

#[test]
fn two_nics_and_a_default_route_by_the_other_one() {
    is_served_everywhere(|| {
        let world = World::new(Cni::Bridge);
        let TwoLans { others, far } = TwoLans::new(&world);
        default_by_second(&world);
        Place { world, far: Some(far), _others: others.into() }
    });
}

/// AWS: a second NIC for pods, rules by their addresses and by the marks of connections.
#[test]
fn pods_on_the_network_of_the_second_nic() {
    is_served_everywhere(|| {
        let world = World::new(Cni::Routed);
        let TwoLans { others, far } = TwoLans::new(&world);
        pods_of_the_second(&world);
        Place { world, far: Some(far), _others: others.into() }
    });
}

/// What leads to the other node's pods takes shorter packets than the way to clients.
#[test]
fn a_smaller_mtu_on_the_way_to_pods() {
    is_served_everywhere(|| {
        let world = World::new(Cni::Routed);
        world.overlay();
        let [node, _] = &world.nodes[..] else { panic!("two nodes") };
        node.namespace.netlink(async |net| net.mtu("vxlan0", 1300).await);
        world.into()
    });
}
