//! Nodes as people have them: addresses that come and go, NICs in bridges or without addresses, several ways back to a client.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use portal::testing::agent::http;
use portal::testing::capture::{Capture, Seen};
use portal::testing::client::{Connection, exchange, is_refused, ping, tcp, udp, udp_socket};
use portal::testing::cluster::{VIPS, at};
use portal::testing::forged::Forger;
use portal::testing::namespace::Namespace;
use portal::testing::neighbour::Neighbour;
use portal::testing::objects::{self, NODE_PORT};
use portal::testing::stage::{Stage, beside};
use portal::testing::world::{CNIS, Cni, OUTSIDER4, OUTSIDER6, Pod, World};
use portal::testing::worlds::{
    FAR, ROUTER, TwoLans, any, bits, bridged_nic, default_by_second, hardened, restore, unnumbered,
};
use portal::testing::{eventually, server, within};
use serde_json::json;

fn stage(world: World, arguments: &[&str]) -> Stage {
    Stage::new(world, Path::new(env!("CARGO_BIN_EXE_portal")), arguments)
}

/// Case 1: networkd, DHCP or ifup take the address away and put it back.
#[test]
fn an_address_that_comes_and_goes_breaks_no_connection() {
    let world = World::new(Cni::Bridge);
    // With an IPv6 address it would be an uplink all the time.
    for node in &world.nodes {
        node.namespace.netlink(async |net| net.unaddress("eth0", node.v6().into()).await);
    }
    let stage = stage(world, &[]);
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
        for door in &doors {
            eventually("new connections too", || tcp(&stage.outsider, *door).ok());
        }
    }
}

/// Case 4: the node's address is on the loopback, and its NIC has none.
#[test]
fn a_nic_without_an_address_is_an_uplink_if_routes_lead_out_by_it() {
    let world = unnumbered();
    stage(world, &[]).assert_served();
}

/// Case 2: the NIC is in a bridge, which has the node's address, and a container that is no pod is in it too.
#[test]
fn the_nics_bridge_is_an_uplink_whatever_else_is_in_it() {
    let (world, _container) = bridged_nic();
    stage(world, &[]).assert_served();
}

/// Case 8: the way back to a client is by another NIC than the one that he came by.
#[test]
fn answers_go_by_the_nic_that_leads_to_the_client() {
    let world = World::new(Cni::Bridge);
    let lans = TwoLans::new(&world);
    default_by_second(&world);
    let stage = Stage { outsider: lans.far.clone(), ..stage(world, &[]) };
    stage.assert_served();
    // A connection goes on when the way changes under it.
    let mut connections: Vec<Connection> =
        stage.doors.iter().map(|door| tcp(&lans.far, *door).unwrap()).collect();
    stage.cluster.world.nodes[0].namespace.netlink(async |net| {
        for (first, second) in ROUTER[0].into_iter().zip(ROUTER[1]) {
            net.unroute(any(first.is_ipv6()), 0, second).await;
            net.route(any(first.is_ipv6()), 0, first).await;
        }
        net.remove("eth1").await;
    });
    for connection in &mut connections {
        assert_eq!(connection.echo(b"still here").unwrap(), b"still here");
    }
}

/// A rule by the source wins over the default route: by the frontend's address, whatever the pod's asks for, as AWS' CNI has it
/// for pods of a second NIC.
#[test]
fn answers_go_by_what_rules_say_of_the_frontends_address() {
    for of_pods in [false, true] {
        let world = World::new(Cni::Routed);
        let lans = TwoLans::new(&world);
        let stage = Stage { outsider: lans.far.clone(), ..stage(world, &[]) };
        let node = &stage.cluster.world.nodes[0];
        if !of_pods {
            default_by_second(&stage.cluster.world);
        }
        for v6 in [false, true] {
            let leg = ROUTER[usize::from(of_pods)][usize::from(v6)];
            let source = if of_pods { stage.pods[0].address(v6) } else { node.address(v6) };
            node.namespace.netlink(async |net| net.route_from(source, 100, leg).await);
        }
        let second = Capture::start(&node.namespace, "eth1");
        stage.assert_served();
        let doors = |packet: &Seen| stage.doors.iter().any(|door| door.ip() == packet.src);
        let strays: Vec<_> = second.seen().into_iter().filter(doors).collect();
        assert!(strays.is_empty(), "of pods: {of_pods}: {strays:?}");
    }
}

/// As with flannel: what goes from node to node's pods takes a tunnel, what goes to a node does not.
#[test]
fn pods_and_nodes_reach_node_ports_of_other_nodes_over_an_overlay() {
    for cni in [Cni::Bridge, Cni::Routed] {
        let world = World::new(cni);
        world.overlay();
        let stage = stage(world, &[]);
        let client = stage.cluster.pod(1, "client");
        for door in &stage.doors {
            for from in
                [&client.namespace, &stage.cluster.world.nodes[1].namespace, &stage.outsider]
            {
                let mut connection = eventually("it is served", || tcp(from, *door).ok());
                assert_eq!(connection.echo(b"x").unwrap(), b"x");
                assert!(udp(from, *door, b"x").is_ok());
            }
        }
    }
}

/// Case 7: an endpoint that is the node's own address, and does not say on which node it is.
#[test]
fn a_server_of_the_node_itself_needs_no_node_name() {
    let stage = stage(World::new(Cni::Bridge), &[]);
    let (cluster, node) = (&stage.cluster, &stage.cluster.world.nodes[0]);
    for v6 in [false, true] {
        server::tcp(&node.namespace, "host", node.address(v6), 8085);
        server::udp(&node.namespace, "host", node.address(v6), 8085);
        let mut slice = objects::slice(
            &format!("s0-{}", if v6 { "v6" } else { "v4" }),
            "s0",
            &[("tcp", "TCP", 8085), ("udp", "UDP", 8085)],
            &[json!({"addresses": [node.address(v6)]})],
        );
        slice["addressType"] = if v6 { "IPv6" } else { "IPv4" }.into();
        cluster.api.put(slice);
        let door = SocketAddr::new(node.address(v6), NODE_PORT);
        let own: IpAddr = if v6 { OUTSIDER6.into() } else { OUTSIDER4.into() };
        let seen_as = eventually("the node's server answers", || {
            let connection = tcp(&stage.outsider, door).ok()?;
            (connection.server == "host").then_some(connection.seen_as.ip())
        });
        assert_eq!(seen_as, own);
        let answer = udp(&stage.outsider, door, b"x").unwrap();
        assert_eq!((answer.server.as_str(), answer.seen_as.ip()), ("host", own));
        let pod = &stage.pods[0].namespace;
        assert_eq!(
            tcp(pod, SocketAddr::new(beside(VIPS[usize::from(v6)], 0), 80)).unwrap().server,
            "host"
        );
    }
}

/// Case 14: a socket of the node has the number of a `NodePort`, and asks someone outside.
#[test]
fn answers_to_the_nodes_own_sockets_reach_them() {
    let stage = stage(World::new(Cni::Bridge), &[]);
    let node = &stage.cluster.world.nodes[0];
    for (v6, own) in [(false, IpAddr::V4(OUTSIDER4)), (true, IpAddr::V6(OUTSIDER6))] {
        server::udp(&stage.outsider, "outside", own, 53);
        for number in [NODE_PORT, NODE_PORT + 1] {
            let socket = udp_socket(&node.namespace, v6, number).unwrap();
            for _ in 0..3 {
                let answer = exchange(&socket, SocketAddr::new(own, 53), b"x").unwrap();
                assert_eq!(answer.server, "outside");
            }
            // Others still reach the pod.
            let door = SocketAddr::new(node.address(v6), number);
            assert!(udp(&stage.outsider, door, b"x").unwrap().server.starts_with("on-n"));
        }
    }
}

/// Case 15: an external IP that is another machine's address, which is down.
#[test]
fn nobody_answers_pings_for_a_machine_that_is_down() {
    let stage = stage(World::new(Cni::Bridge), &[]);
    let (cluster, other) = (&stage.cluster, &stage.cluster.world.nodes[1]);
    let externals: Vec<IpAddr> = vec![other.v4().into(), other.v6().into()];
    let spec = json!({"spec": {"externalIPs": externals}});
    cluster.expose_with("outer", &VIPS.map(|vip| beside(vip, 5)), &[&stage.pods[0]], &spec);
    cluster.wait_backends(other.v4().into(), 1);
    let pod = &stage.pods[0].namespace;
    other.namespace.netlink(async |net| net.remove("eth0").await);
    for (external, own) in externals.into_iter().zip(VIPS) {
        assert!(ping(pod, external, Duration::from_secs(1)).is_err(), "{external}");
        ping(pod, beside(own, 5), Duration::from_secs(20)).unwrap();
    }
}

/// Case 17: `NodeLocal DNSCache` has the `ClusterIP` on the node, with a server of its own.
#[test]
fn a_cluster_ip_that_the_node_serves_itself_is_its_own_while_it_does() {
    let stage = stage(World::new(Cni::Bridge), &[]);
    let (cluster, node) = (&stage.cluster, &stage.cluster.world.nodes[0]);
    let client = cluster.pod(0, "client");
    for vip in [beside(VIPS[0], 1), beside(VIPS[1], 1)] {
        let to = SocketAddr::new(vip, 80);
        let prefix = if vip.is_ipv4() { 32 } else { 128 };
        let asked = |protocol: &str| {
            let from_pod = match protocol {
                "tcp" => tcp(&client.namespace, to).unwrap().server,
                _ => udp(&client.namespace, to, b"x").unwrap().server,
            };
            let from_node = cluster.probe(0, protocol, to).unwrap();
            [from_pod, from_node.split(' ').next().unwrap().to_owned()]
        };
        for protocol in ["tcp", "udp"] {
            assert_eq!(asked(protocol), ["on-n1", "on-n1"]);
        }
        node.namespace.netlink(async |net| net.address("lo", vip, prefix).await);
        server::tcp(&node.namespace, "cache", vip, 80);
        server::udp(&node.namespace, "cache", vip, 80);
        for protocol in ["tcp", "udp"] {
            eventually(&format!("the cache answers by {protocol}"), || {
                (asked(protocol) == ["cache", "cache"]).then_some(())
            });
        }
        node.namespace.netlink(async |net| net.unaddress("lo", vip).await);
        for protocol in ["tcp", "udp"] {
            eventually(&format!("the pod answers by {protocol} again"), || {
                (asked(protocol) == ["on-n1", "on-n1"]).then_some(())
            });
        }
    }
}

/// The addresses of node 0 on its NIC that are in the subnet of a gateway of its own, and the gateway's.
const LEGS: [[IpAddr; 2]; 2] = [
    [
        IpAddr::V4(Ipv4Addr::new(192, 0, 2, 11)),
        IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 0x11)),
    ],
    [
        IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
        IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 1)),
    ],
];

/// Case 13: of the addresses of a NIC pods leave by the one that the gateway, or the server, knows a way to.
#[test]
fn pods_are_masqueraded_by_the_address_that_the_gateway_knows() {
    let world = World::new(Cni::Bridge);
    let server = Namespace::new();
    world.wire.netlink(async |net| {
        net.port("gateway", "eth0", &server, "wire").await;
    });
    server.netlink(async |net| {
        net.up("eth0").await;
        for (own, far) in LEGS[1].into_iter().zip(FAR) {
            net.address("eth0", own, bits(own.is_ipv6())).await;
            net.address("lo", far, if far.is_ipv6() { 128 } else { 32 }).await;
        }
    });
    world.nodes[0].namespace.netlink(async |net| {
        for ((own, gateway), before) in LEGS[0].into_iter().zip(LEGS[1]).zip(ROUTER[0]) {
            net.address("eth0", own, bits(own.is_ipv6())).await;
            net.unroute(any(own.is_ipv6()), 0, before).await;
            net.route(any(own.is_ipv6()), 0, gateway).await;
        }
    });
    let stage = stage(world, &["--masquerade-pods"]);
    let client = stage.cluster.pod(0, "client");
    for (far, own) in FAR.into_iter().zip(LEGS[0]) {
        server::tcp(&server, "far", far, 8085);
        server::udp(&server, "far", far, 8085);
        let to = SocketAddr::new(far, 8085);
        assert_eq!(tcp(&client.namespace, to).unwrap().seen_as.ip(), own);
        assert_eq!(udp(&client.namespace, to, b"x").unwrap().seen_as.ip(), own);
    }
}

/// Settings of hardened nodes, and of those where bridged packets pass iptables.
#[test]
fn strict_filters_of_the_source_and_of_bridges_stop_nobody() {
    for cni in [Cni::Bridge, Cni::Routed] {
        let world = hardened(cni);
        stage(world, &[]).assert_served();
    }
}

/// Whether a pod reaches both Services of a stage, of both families and by both protocols; one VIP of the first is returned
/// with an open connection to it.
fn reaches_services(pod: &Pod, agent: &str) -> Vec<Connection> {
    let mut connections = Vec::new();
    for (number, vip) in (0..2).flat_map(|number| VIPS.map(|vip| (number, beside(vip, number)))) {
        let what = format!("{} reaches {vip} while the agent is {agent}", pod.name);
        let connection = eventually(&what, || tcp(&pod.namespace, at(vip)).ok());
        assert_eq!(connection.server, format!("on-n{number}"));
        connections.push(connection);
        let answer = eventually(&what, || udp(&pod.namespace, at(vip), b"x").ok());
        assert_eq!(answer.from, at(vip), "{what}");
        eventually(&what, || ping(&pod.namespace, vip, Duration::from_secs(1)).ok());
        let closed = SocketAddr::new(vip, 9);
        assert!(is_refused(&pod.namespace, closed), "{what}: {closed} is not refused");
    }
    connections
}

/// Rules of a CNI lead what pods of node 0 send to others than pods and nodes to a gateway that does not answer.
fn leads_pods_to_a_dead_gateway(world: &World) {
    const TABLE: u32 = 100;
    let [node, other] = &world.nodes[..] else { panic!("two nodes") };
    node.namespace.netlink(async |net| {
        for v6 in [false, true] {
            let (own, theirs) = (node.pods(v6), other.pods(v6));
            let node_bits = if v6 { 128 } else { 32 };
            net.route_in(TABLE, any(v6), 0, beside(node.address(v6), 200)).await;
            net.route_in(TABLE, theirs, bits(v6), other.address(v6)).await;
            net.rule_from(own, bits(v6), TABLE).await;
            net.rule_to(own, bits(v6)).await;
            net.rule_to(other.address(v6), node_bits).await;
        }
    });
}

/// Case 3: whatever the CNI is, and however hardened the node. What they have begun goes on when an agent is there again.
#[test]
fn pods_that_start_while_no_agent_runs_have_services() {
    for cni in CNIS {
        let world = World::new(cni);
        for (node, link) in world.nodes.iter().flat_map(|node| [(node, "all"), (node, "default")]) {
            node.namespace.sysctl(&format!("net/ipv4/conf/{link}/rp_filter"), "1");
        }
        if cni == Cni::Bridge {
            // The rules of a CNI, and a node that lets nothing else pass.
            world.nodes[0].namespace.firewall(
                "table inet t {
                    chain f { type filter hook forward priority filter; policy drop; ct state invalid drop;
                        ip saddr 10.244.0.0/16 accept; ip daddr 10.244.0.0/16 accept;
                        ip6 saddr fd00:244::/32 accept; ip6 daddr fd00:244::/32 accept;
                    }
                    chain p { type nat hook postrouting priority srcnat;
                        ip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16 masquerade fully-random;
                        ip6 saddr fd00:244::/32 ip6 daddr != fd00:244::/32 masquerade fully-random;
                    }
                }
            ",
            );
        }
        if cni == Cni::Routed {
            leads_pods_to_a_dead_gateway(&world);
        }
        let rules = |world: &World| world.nodes[0].namespace.netlink(async |net| net.rules().await);
        let before = rules(&world);
        // Nothing is left to the kernel but what the second line has.
        let mut stage = stage(world, &["--takeover-grace=0s"]);
        stage.cluster.agents[0].take().expect("it runs").kill();
        let newborn = stage.cluster.world.pod(0, "newborn");
        let mut connections = reaches_services(&newborn, "away");
        let door = stage.cluster.world.nodes[1].address(false);
        let by_door = tcp(&newborn.namespace, SocketAddr::new(door, NODE_PORT));
        connections.push(by_door.expect("a NodePort of the other node"));
        stage.cluster.start_agent(0);
        eventually("the agent attaches to it", || {
            stage.cluster.world.nodes[0].is_attached(&newborn).then_some(())
        });
        reaches_services(&newborn, "back");
        assert!(stage.cluster.outcomes(0, "caught") > 0);
        for connection in &mut connections {
            assert_eq!(connection.echo(b"still there").unwrap(), b"still there");
        }
        // With one of our own every way that the kernel looks up would take longer, whosever packet it is for.
        assert_eq!(rules(&stage.cluster.world), before, "rules for ways");
    }
}

/// Pods whose links no agent can attach to: macvlan children of the NIC, in the nodes' subnet, whose gateway is the node.
#[test]
fn macvlan_pods_have_services_where_their_traffic_passes_the_host() {
    let world = World::new(Cni::Bridge);
    let pod = Namespace::new();
    let node = &world.nodes[0];
    let shim = [node.address(false), node.address(true)].map(|own| beside(own, 0x40));
    let own = shim.map(|shim| beside(shim, 1));
    node.namespace.netlink(async |net| {
        net.macvlan("shim", "eth0", &node.namespace).await;
        net.up("shim").await;
        for (shim, own) in shim.into_iter().zip(own) {
            let bits = if own.is_ipv6() { 128 } else { 32 };
            net.address("shim", shim, bits).await;
            net.link_route(own, bits, "shim").await;
        }
        net.macvlan("eth0", "eth0", &pod).await;
    });
    pod.netlink(async |net| {
        net.up("eth0").await;
        for (shim, own) in shim.into_iter().zip(own) {
            net.address("eth0", own, bits(own.is_ipv6())).await;
            net.route(any(own.is_ipv6()), 0, shim).await;
        }
    });
    let _stage = stage(world, &[]);
    for (number, vip) in (0..2).flat_map(|number| VIPS.map(|vip| (number, beside(vip, number)))) {
        let server = format!("on-n{number}");
        let connection = eventually(&format!("{vip}"), || tcp(&pod, at(vip)).ok());
        assert_eq!(connection.server, server);
        assert_eq!(udp(&pod, at(vip), b"x").unwrap().from, at(vip));
    }
}

/// Fifty pods that start at once are served from their first packet on, whether an agent runs or not. How long it took from
/// a pod's birth to its first answer is printed (`--nocapture`), for the record and not for a verdict.
#[test]
fn fifty_pods_that_start_at_once_are_served() {
    let mut stage = stage(World::new(Cni::Routed), &[]);
    for agent in ["runs", "is away"] {
        if agent == "is away" {
            stage.cluster.agents[0].take().expect("it runs").kill();
        }
        let world = &stage.cluster.world;
        let births = std::thread::scope(|threads| {
            let born = (0..50).map(|number| {
                threads.spawn(move || {
                    let pod = world.pod(0, &format!("born-{number}"));
                    let birth = Instant::now();
                    let served = tcp(&pod.namespace, at(VIPS[0])).map(|server| server.server);
                    (birth.elapsed(), served, pod)
                })
            });
            let born: Vec<_> = born.collect();
            born.into_iter().map(|birth| birth.join().unwrap()).collect::<Vec<_>>()
        });
        let mut times: Vec<Duration> = births.iter().map(|(time, ..)| *time).collect();
        times.sort_unstable();
        eprintln!("an agent {agent}: median {:?}, longest {:?}", times[25], times[49]);
        assert!(births.iter().all(|(_, served, _)| served.as_deref().is_ok_and(|s| s == "on-n0")));
    }
}

/// Two nodes with `--xdp`, whose frames are as they would be on a wire: with checksums, one by one. Node 0 has a NIC in each of two LANs and
/// answers by the second, or one NIC.
fn on_wires(arguments: &[&str], two_lans: bool) -> Stage {
    let world = World::new(Cni::Routed);
    // A veth link takes what XDP sends to it from its other end if it has a program, too.
    let mut ends: Vec<_> =
        world.nodes.iter().map(|node| Neighbour::at_xdp(&world.wire, &node.name)).collect();
    let far = two_lans.then(|| {
        let TwoLans { others: [router, second], far } = TwoLans::new(&world);
        default_by_second(&world);
        ends.push(Neighbour::at_xdp(&second, "node"));
        router.offload("lan0", false);
        far.offload("eth0", false);
        // They live as long as the process: so does what refers to them.
        std::mem::forget((router, second));
        far
    });
    let mut stage = stage(world, arguments);
    stage.outsider = far.unwrap_or(stage.outsider);
    std::mem::forget(ends);
    stage.outsider.offload("eth0", false);
    stage.pods.iter().for_each(|pod| pod.namespace.offload("eth0", false));
    stage
}

/// Echoes by the door of node 0 to the pod of node 1 until they take the short cut. How many of some packets more the host stack's links have
/// seen then, and how many there were.
fn by_the_short_cut(stage: &Stage, door: SocketAddr, links: &[&str]) -> [usize; 2] {
    const ROUNDS: usize = 400;
    let node = &stage.cluster.world.nodes[0].namespace;
    let mut connection = eventually("it is served", || tcp(&stage.outsider, door).ok());
    let before = stage.cluster.outcomes(0, "short_cut");
    eventually("it takes the short cut", || {
        assert_eq!(connection.echo(&[7; 3000]).unwrap(), [7; 3000]);
        (stage.cluster.outcomes(0, "short_cut") > before + 50).then_some(())
    });
    let captures: Vec<_> = links.iter().map(|link| Capture::start(node, link)).collect();
    for _ in 0..ROUNDS {
        assert_eq!(connection.echo(b"x").unwrap(), b"x");
    }
    let is_ours = |seen: &Seen| seen.sport == door.port() || seen.dport == door.port();
    let seen = captures.iter().map(|capture| capture.seen().iter().filter(|s| is_ours(s)).count());
    [seen.sum(), 2 * ROUNDS]
}

/// What takes a short cut is sent on before the host stack, out of the link it came by, or of another; the rest is as it is without.
#[test]
fn xdp_sends_on_what_takes_a_short_cut() {
    for (mode, two_lans) in
        [("--xdp=native", false), ("--xdp=native", true), ("--xdp=generic", true)]
    {
        let stage = on_wires(&[mode], two_lans);
        stage.assert_served();
        let client = stage.cluster.pod(0, "client");
        let links: &[&str] = if two_lans { &["eth0", "eth1"] } else { &["eth0"] };
        for (door, vip) in stage.doors[2..].iter().zip(VIPS) {
            let [seen, sent] = by_the_short_cut(&stage, *door, links);
            assert!(
                seen < sent / 4,
                "{mode}, {two_lans}, {door}: the stack has seen {seen} of {sent}"
            );
            assert!(tcp(&client.namespace, at(beside(vip, 1))).is_ok());
            assert!(udp(&stage.outsider, *door, b"x").is_ok());
        }
        let metrics = http(&stage.cluster.world.nodes[0], 10249, "/metrics").unwrap();
        let count = if two_lans { 2 } else { 1 };
        assert!(metrics.contains(&format!("portal_xdp_links {count}\n")), "{metrics}");
    }
}

/// What a Service's policies drop is dropped before the host stack, which sees nothing of it.
#[test]
fn policies_drop_at_xdp() {
    let stage = on_wires(&["--xdp=native"], false);
    stage.assert_served();
    let node = &stage.cluster.world.nodes[0].namespace;
    // Node 0 has no pod of the second Service.
    let mut spec = objects::node_ports();
    spec["spec"]["externalTrafficPolicy"] = "Local".into();
    for port in spec["spec"]["ports"].as_array_mut().unwrap() {
        port["nodePort"] = (NODE_PORT + 1).into();
    }
    let vips = VIPS.map(|vip| beside(vip, 1));
    stage.cluster.expose_with("s1", &vips, &[&stage.pods[1]], &spec);
    for door in &stage.doors[2..] {
        eventually("the policy is there", || {
            udp(&stage.outsider, *door, b"x").is_err().then_some(())
        });
        let capture = Capture::start(node, "eth0");
        stage.cluster.assert_dropped(0, "no_local", &stage.outsider, *door);
        // What comes after it is seen, and so would have been what came before.
        let served = SocketAddr::new(door.ip(), NODE_PORT);
        assert!(udp(&stage.outsider, served, b"x").is_ok());
        let to = |door: SocketAddr| {
            let is_to = |seen: &Seen| SocketAddr::new(seen.dst, seen.dport) == door;
            capture.seen().iter().filter(|seen| is_to(seen)).count()
        };
        eventually("it is seen", || (to(served) > 0).then_some(()));
        assert_eq!(to(*door), 0);
    }
}

/// In a flood of new connections from addresses that are not theirs, clients who are there are served, and nothing is kept of the others.
#[test]
fn in_a_flood_clients_show_that_they_are_there() {
    let stage = on_wires(&["--xdp=native", "--syn-guard=1"], false);
    stage.assert_served();
    let count = |outcome| stage.cluster.outcomes(0, outcome);
    let [v4, v6] = [stage.doors[2], stage.doors[3]];
    let forger = Forger::new(&stage.outsider);
    let flood = |count| (0..count).for_each(|number| forger.syn(number, v4));
    // Of each connection's client it is asked anew.
    for door in [v4, v6] {
        let before = count("verified");
        eventually("he is asked, and served", || {
            flood(100);
            let mut connection = tcp(&stage.outsider, door).unwrap();
            assert_eq!(connection.echo(b"x").unwrap(), b"x");
            (count("verified") > before).then_some(())
        });
    }
    let [opened, challenged] = ["opened", "challenged"].map(count);
    eventually("they are asked", || {
        flood(200);
        (count("challenged") > challenged + 2_000).then_some(())
    });
    assert!(count("opened") < opened + 100, "one a second on each CPU");
}

/// A link that has an XDP program already, or is none of a NIC, is served by tc, and the agent says so by name.
#[test]
fn a_link_that_can_have_no_xdp_is_served_by_tc() {
    for (arguments, why) in [
        (&["--xdp=native"][..], ": it has an XDP program of someone else's"),
        (
            &["--xdp=auto", "--syn-guard=1000000"],
            ", without --syn-guard: it is a veth link, where XDP costs more than it saves",
        ),
    ] {
        let world = World::new(Cni::Routed);
        let _other = Neighbour::at_xdp(&world.nodes[0].namespace, "eth0");
        let stage = stage(world, arguments);
        stage.assert_served();
        let [seen, sent] = by_the_short_cut(&stage, stage.doors[2], &["eth0"]);
        assert!(seen > sent / 2, "the stack has seen {seen} of {sent}");
        let log = stage.cluster.agents[0].as_ref().unwrap().log();
        let text = format!("link eth0 is served by tc and not by XDP{why}");
        assert_eq!(log.matches(&text).count(), 1, "{log}");
        let metrics = http(&stage.cluster.world.nodes[0], 10249, "/metrics").unwrap();
        assert!(metrics.contains("portal_xdp_links 0\n"), "{metrics}");
        assert!(metrics.contains("portal_xdp_links_left 1\n"), "{metrics}");
    }
}

/// A link that drops what XDP sends by it, as a veth link does whose other end has no program, is left to tc.
#[test]
fn a_link_that_drops_what_xdp_sends_is_left_to_tc() {
    let stage = stage(World::new(Cni::Routed), &["--xdp=native"]);
    stage.assert_served();
    let mut connection = tcp(&stage.outsider, stage.doors[2]).unwrap();
    let agent = stage.cluster.agents[0].as_ref().unwrap();
    within(Duration::from_mins(2), "it is left", || {
        // What is dropped is sent again, and goes by the stack in the next second.
        assert_eq!(connection.echo(b"x").unwrap(), b"x");
        agent.log().contains("link eth0 is served by tc and not by XDP: it drops").then_some(())
    });
    let [seen, sent] = by_the_short_cut(&stage, stage.doors[2], &["eth0"]);
    assert!(seen > sent / 2, "the stack has seen {seen} of {sent}");
}
