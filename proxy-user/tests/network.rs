//! Real sockets through real agents, over both shapes of CNI and both families.
//!
//! Each test has a cluster of its own: two nodes, an agent on each, an API server stand-in.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use aya::maps::MapInfo;
use portal::testing::client::{Connection, exchange, tcp, tcp_from_port, udp, udp_socket};
use portal::testing::cluster::{Cluster, PORT, VIPS, at};
use portal::testing::namespace::Namespace;
use portal::testing::neighbour::{Conduct, Neighbour, Order};
use portal::testing::objects::node_ports;
use portal::testing::world::{BPFFS, CNIS, Cni, Pod};
use portal::testing::{agent::http, capture::Capture, eventually, objects, server, within};

fn start(cni: Cni) -> Cluster {
    Cluster::start(cni, Path::new(env!("CARGO_BIN_EXE_portal")), &[])
}

const OTHER_VIPS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 96, 0, 20)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 0x20)),
];

/// Runs a test over both shapes of CNI, on one server and one client, both families.
fn over_both_cnis(test: impl Fn(&Cluster, &Pod, &Pod, IpAddr)) {
    for cni in CNIS {
        let cluster = start(cni);
        let (client, server) = (cluster.pod(0, "client"), cluster.server(1, "server"));
        cluster.expose("web", &VIPS, &[&server]);
        for vip in VIPS {
            cluster.wait_backends(vip, 1);
            test(&cluster, &client, &server, vip);
        }
    }
}

#[test]
fn a_pod_reaches_a_pod_of_the_other_node_and_is_seen_with_its_own_address() {
    over_both_cnis(|_, client, server, vip| {
        let own = client.address(vip.is_ipv6());
        let mut connection = tcp(&client.namespace, at(vip)).unwrap();
        assert_eq!((connection.server.as_str(), connection.seen_as.ip()), ("server", own));
        assert_eq!(connection.echo(b"hello").unwrap(), b"hello");
        let peer = connection.stream.get_ref().peer_addr().unwrap();
        assert_eq!(peer, at(vip));

        let answer = udp(&client.namespace, at(vip), b"hello").unwrap();
        assert_eq!((answer.server, answer.seen_as.ip()), (server.name.clone(), own));
        assert_eq!(answer.bytes, b"hello");
    });
}

#[test]
fn the_client_sees_the_vip_and_the_wire_carries_the_pods_address() {
    over_both_cnis(|cluster, client, server, vip| {
        let node = &cluster.world.nodes[0];
        let at_client = Capture::start(&client.namespace, "eth0");
        let at_wire = Capture::start(&node.namespace, "eth0");
        tcp(&client.namespace, at(vip)).unwrap();
        let backend = server.address(vip.is_ipv6());
        let syn = |capture: &Capture| {
            eventually("a SYN passes", || capture.seen().into_iter().find(|packet| packet.syn))
        };
        assert_eq!(syn(&at_client).dst, vip);
        assert_eq!(syn(&at_wire).dst, backend);
        assert!(at_client.seen().iter().all(|p| p.src != backend && p.dst != backend));
        assert!(at_wire.seen().iter().all(|p| p.src != vip && p.dst != vip));
    });
}

#[test]
fn pods_of_one_node_reach_each_other_and_themselves() {
    for cni in CNIS {
        let cluster = start(cni);
        let (one, two) = (cluster.server(0, "one"), cluster.server(0, "two"));
        cluster.expose("one", &VIPS, &[&one]);
        cluster.expose("two", &OTHER_VIPS, &[&two]);
        for (vip, other) in VIPS.into_iter().zip(OTHER_VIPS) {
            cluster.wait_backends(vip, 1);
            cluster.wait_backends(other, 1);
            // A reply that a bridge delivers without the host's stack.
            let mut connection = tcp(&one.namespace, at(other)).unwrap();
            assert_eq!(connection.server, "two");
            assert_eq!(connection.echo(b"same node").unwrap(), b"same node");
            assert_eq!(udp(&one.namespace, at(other), b"u").unwrap().server, "two");
            // Hairpin: the pod must not see itself as the client.
            let mut connection = tcp(&one.namespace, at(vip)).unwrap();
            assert_eq!(connection.server, "one");
            assert_ne!(connection.seen_as.ip(), one.address(vip.is_ipv6()));
            assert_eq!(connection.echo(b"myself").unwrap(), b"myself");
            assert_eq!(udp(&one.namespace, at(vip), b"u").unwrap().bytes, b"u");
        }
    }
}

#[test]
fn connections_spread_over_all_backends() {
    let cluster = start(Cni::Bridge);
    let client = cluster.pod(0, "client");
    let servers: Vec<Pod> =
        (0..4).map(|number| cluster.server(number % 2, &format!("server-{number}"))).collect();
    cluster.expose("web", &VIPS, &servers.iter().collect::<Vec<_>>());
    for vip in VIPS {
        cluster.wait_backends(vip, 4);
        let seen: BTreeSet<String> =
            (0..100).map(|_| tcp(&client.namespace, at(vip)).unwrap().server).collect();
        assert_eq!(seen.len(), 4, "{seen:?}");
    }
}

#[test]
fn what_has_no_endpoint_or_no_such_port_is_refused_at_once() {
    over_both_cnis(|cluster, client, server, vip| {
        let refused = |to: SocketAddr| {
            let refusal = tcp(&client.namespace, to).err().map(|error| error.kind());
            assert_eq!(refusal, Some(ErrorKind::ConnectionRefused), "TCP to {to}");
            let refusal = udp(&client.namespace, to, b"anyone?").err().map(|error| error.kind());
            assert_eq!(refusal, Some(ErrorKind::ConnectionRefused), "UDP to {to}");
        };
        refused(SocketAddr::new(vip, PORT + 1));
        cluster.endpoints("web", &[]);
        cluster.wait_backends(vip, 0);
        refused(at(vip));
        cluster.endpoints("web", &[server]);
        cluster.wait_backends(vip, 1);
        assert_eq!(tcp(&client.namespace, at(vip)).unwrap().server, "server");
    });
}

#[test]
fn twenty_megabytes_pass_each_way_intact() {
    over_both_cnis(|_, client, _, vip| {
        let mut connection = tcp(&client.namespace, at(vip)).unwrap();
        let pattern: Vec<u8> = (0..1024 * 1024_u32).map(|i| (i % 251) as u8).collect();
        let mut writer = connection.stream.get_ref().try_clone().unwrap();
        let sent = pattern.clone();
        let sending = std::thread::spawn(move || {
            for _ in 0..20 {
                std::io::Write::write_all(&mut writer, &sent).unwrap();
            }
        });
        let mut received = vec![0; pattern.len()];
        for _ in 0..20 {
            std::io::Read::read_exact(&mut connection.stream, &mut received).unwrap();
            assert!(received == pattern);
        }
        sending.join().unwrap();
    });
}

#[test]
fn a_datagram_larger_than_the_mtu_passes_both_ways() {
    over_both_cnis(|_, client, _, vip| {
        let datagram: Vec<u8> = (0..4000_u32).map(|i| (i % 251) as u8).collect();
        let socket = udp_socket(&client.namespace, vip.is_ipv6(), 0).unwrap();
        let answer = exchange(&socket, at(vip), &datagram).unwrap();
        assert_eq!(answer.from, at(vip));
        assert!(answer.bytes == datagram);
    });
}

#[test]
fn a_smaller_mtu_on_the_way_is_discovered_through_the_vip() {
    over_both_cnis(|cluster, client, _, vip| {
        let mut connection = tcp(&client.namespace, at(vip)).unwrap();
        let before = vec![7; 200_000];
        assert!(connection.echo(&before[..1000]).unwrap() == before[..1000]);
        // At both ends of the wire, since a link also drops what it receives above its MTU.
        let set_mtu = |mtu| {
            for node in &cluster.world.nodes {
                node.namespace.netlink(async |net| net.mtu("eth0", mtu).await);
            }
        };
        set_mtu(1300);
        // The node answers "too big" about packets to the pod; the client must know them as the VIP's.
        let mut writer = connection.stream.get_ref().try_clone().unwrap();
        let sent = before.clone();
        let sending =
            std::thread::spawn(move || std::io::Write::write_all(&mut writer, &sent).unwrap());
        let mut received = vec![0; before.len()];
        std::io::Read::read_exact(&mut connection.stream, &mut received).unwrap();
        sending.join().unwrap();
        assert!(received == before);
        set_mtu(1500);
    });
}

#[test]
fn one_source_port_through_two_vips_to_one_pod_stays_two_connections() {
    for cni in CNIS {
        let cluster = start(cni);
        let (client, server) = (cluster.pod(0, "client"), cluster.server(1, "server"));
        cluster.expose("one", &VIPS, &[&server]);
        cluster.expose("two", &OTHER_VIPS, &[&server]);
        for (vip, other) in VIPS.into_iter().zip(OTHER_VIPS) {
            cluster.wait_backends(vip, 1);
            cluster.wait_backends(other, 1);
            let mut first = tcp_from_port(&client.namespace, at(vip), 40_000).unwrap();
            let mut second = tcp_from_port(&client.namespace, at(other), 40_000).unwrap();
            assert_eq!(first.seen_as.port(), 40_000);
            assert_ne!(second.seen_as.port(), 40_000);
            for round in 0..3_u8 {
                assert_eq!(first.echo(&[round; 100]).unwrap(), [round; 100]);
                assert_eq!(second.echo(&[!round; 100]).unwrap(), [!round; 100]);
            }
        }
    }
}

/// As a load generator does that goes from a VIP to its pods, and back: to a pod of another node, and of the same bridge.
#[test]
fn one_source_port_to_a_pod_and_to_its_vip_at_once() {
    for (cni, node) in CNIS.into_iter().flat_map(|cni| [(cni, 0), (cni, 1)]) {
        let cluster = start(cni);
        let (client, server) = (cluster.pod(0, "client"), cluster.server(node, "server"));
        cluster.expose("web", &VIPS, &[&server]);
        for (vip, port) in VIPS.into_iter().zip(40_000..) {
            cluster.wait_backends(vip, 1);
            let direct = SocketAddr::new(server.address(vip.is_ipv6()), 8080);
            for (order, port) in
                [[direct, at(vip)], [at(vip), direct]].into_iter().zip([port, port + 10])
            {
                let connect = |to| tcp_from_port(&client.namespace, to, port).unwrap();
                let mut both = order.map(connect);
                for round in 0..3_u8 {
                    for connection in &mut both {
                        assert_eq!(connection.echo(&[round; 100]).unwrap(), [round; 100]);
                    }
                }
            }
            let socket = udp_socket(&client.namespace, vip.is_ipv6(), port).unwrap();
            for to in [direct, at(vip), direct, at(vip)] {
                assert_eq!(exchange(&socket, to, b"x").unwrap().from, to);
            }
        }
    }
}

#[test]
fn other_traffic_is_not_touched() {
    over_both_cnis(|_, client, server, vip| {
        let own = client.address(vip.is_ipv6());
        let to = SocketAddr::new(server.address(vip.is_ipv6()), 8080);
        let direct = tcp(&client.namespace, to).unwrap();
        assert_eq!(direct.seen_as.ip(), own);
        assert_eq!(direct.stream.get_ref().peer_addr().unwrap(), to);
    });
}

#[test]
fn refused_packets_are_logged_if_asked_for() {
    let portal = Path::new(env!("CARGO_BIN_EXE_portal"));
    let cluster = Cluster::start(Cni::Routed, portal, &["--trace"]);
    let client = cluster.pod(0, "client");
    cluster.expose("web", &VIPS, &[]);
    for vip in VIPS {
        cluster.wait_backends(vip, 0);
        assert!(tcp(&client.namespace, at(vip)).is_err());
    }
    let agent = cluster.agents[0].as_ref().unwrap();
    let line = format!("reset, link {}", client.ifindex);
    eventually("both refusals are logged", || {
        (agent.log().matches(&line).count() == 2).then_some(())
    });
}

#[test]
fn a_nodes_own_processes_reach_services_and_see_the_vip() {
    for cni in CNIS {
        let cluster = start(cni);
        let server = cluster.server(1, "server");
        cluster.expose("web", &VIPS, &[&server]);
        let mapped: IpAddr = "::ffff:10.96.0.10".parse().unwrap();
        for vip in VIPS.into_iter().chain([mapped]) {
            cluster.wait_backends(vip.to_canonical(), 1);
            for protocol in ["tcp", "udp", "connected-udp"] {
                for node in 0..2 {
                    let line = cluster.probe(node, protocol, at(vip)).unwrap();
                    let peer = line.rsplit(' ').next().unwrap();
                    assert!(line.starts_with("server "), "{protocol} n{node}: {line}");
                    assert_eq!(peer, at(vip).to_string(), "{protocol} n{node}: {line}");
                }
            }
        }
    }
}

#[test]
fn a_nodes_own_processes_are_refused_at_once() {
    let cluster = start(Cni::Bridge);
    cluster.expose("web", &VIPS, &[]);
    for vip in VIPS {
        cluster.wait_backends(vip, 0);
        for to in [at(vip), SocketAddr::new(vip, PORT + 1)] {
            for protocol in ["tcp", "udp"] {
                assert_eq!(cluster.probe(0, protocol, to), Err("ConnectionRefused".to_owned()));
            }
            // A datagram socket only notes where to: that never fails.
            assert_eq!(cluster.probe(0, "only-connected-udp", to), Ok(to.to_string()));
        }
    }
}

/// Sets a flag when it goes.
struct Stopper<'a>(&'a AtomicBool);

impl Drop for Stopper<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What a socket connected to goes with it, and is not forgotten for others: here there are twice as many as the table has room for.
#[test]
fn sockets_know_what_they_connected_to_whatever_others_send() {
    let portal = Path::new(env!("CARGO_BIN_EXE_portal"));
    let cluster = Cluster::start(Cni::Bridge, portal, &["--table-size=small"]);
    let pod = cluster.server(1, "web");
    cluster.expose("web", &VIPS, &[&pod]);
    let table = Path::new(BPFFS).join("portal/maps/peers_v4");
    let room = || MapInfo::from_pin(&table).unwrap().max_entries();
    let senders = 2 * cluster.world.nodes[0].mounts.run(room);
    for vip in VIPS {
        cluster.wait_backends(vip, 1);
        let peers = cluster.probe_often(0, "crowded", at(vip), senders).unwrap();
        assert_eq!(peers, format!("{0} {0}", at(vip)));
    }
}

#[test]
fn killing_the_agent_loses_no_connection_and_its_successor_catches_up() {
    let mut cluster = start(Cni::Bridge);
    let client = cluster.pod(0, "client");
    let (one, two) = (cluster.server(1, "one"), cluster.server(0, "two"));
    cluster.expose("web", &VIPS, &[&one]);
    let mut connections = Vec::new();
    for vip in VIPS {
        cluster.wait_backends(vip, 1);
        connections.extend((0..100).map(|_| tcp(&client.namespace, at(vip)).unwrap()));
    }
    let ids = |cluster: &Cluster| -> Vec<(String, String)> {
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        let services = cluster.list(0, "services");
        services.iter().map(|s| (text(&s["vip"]), text(&s["id"]))).collect()
    };
    let before = ids(&cluster);
    // All of them keep talking, whatever happens: one after the other, so that the agents get their time.
    let stop = AtomicBool::new(false);
    let talk = |connections: &mut [Connection]| {
        let mut rounds = 0_u64;
        while rounds < 3 || !stop.load(Ordering::Relaxed) {
            for connection in &mut *connections {
                let bytes = rounds.to_be_bytes();
                assert_eq!(connection.echo(&bytes).unwrap(), bytes);
            }
            rounds += 1;
        }
    };
    std::thread::scope(|scope| {
        // A panic here must not leave the others talking for ever.
        let _stopper = Stopper(&stop);
        scope.spawn(|| talk(&mut connections));
        cluster.agents[0].take().unwrap().kill();
        // Meanwhile the backend changes, and a Service comes.
        cluster.endpoints("web", &[&two]);
        cluster.expose("new", &OTHER_VIPS, &[&two]);
        cluster.start_agent(0);
        for vip in VIPS.into_iter().chain(OTHER_VIPS) {
            cluster.wait_backends(vip, 1);
            assert_eq!(tcp(&client.namespace, at(vip)).unwrap().server, "two");
        }
    });
    let after = ids(&cluster);
    assert!(before.iter().all(|id| after.contains(id)), "{before:?} {after:?}");
}

#[test]
fn udp_chooses_anew_when_its_backend_goes_and_tcp_goes_on() {
    over_both_cnis(|cluster, client, server, vip| {
        let other = cluster.server(0, "other");
        let socket = udp_socket(&client.namespace, vip.is_ipv6(), 0).unwrap();
        let mut connection = tcp(&client.namespace, at(vip)).unwrap();
        assert_eq!(exchange(&socket, at(vip), b"1").unwrap().server, "server");
        cluster.endpoints("web", &[&other]);
        eventually("the socket's datagrams reach the other backend", || {
            (exchange(&socket, at(vip), b"2").unwrap().server == "other").then_some(())
        });
        assert_eq!(connection.echo(b"still here").unwrap(), b"still here");
        cluster.endpoints("web", &[server]);
        eventually("the first backend is back", || {
            (exchange(&socket, at(vip), b"3").unwrap().server == "server").then_some(())
        });
    });
}

#[test]
fn pods_come_and_go_at_any_time() {
    for cni in CNIS {
        let cluster = start(cni);
        let server = cluster.server(1, "server");
        cluster.expose("web", &VIPS, &[&server]);
        for vip in VIPS {
            cluster.wait_backends(vip, 1);
            for round in 0..3 {
                let client = cluster.pod(0, &format!("client{round}"));
                assert_eq!(tcp(&client.namespace, at(vip)).unwrap().server, "server");
                let node = &cluster.world.nodes[0];
                node.remove_pod(&client);
                eventually("the pod's pins are gone", || {
                    (!node.is_attached(&client)).then_some(())
                });
            }
        }
    }
}

#[test]
fn several_ports_and_endpoints_with_their_own_numbers() {
    over_both_cnis(|cluster, client, first, vip| {
        let second = cluster.pod(0, "second");
        let address = second.address(vip.is_ipv6());
        server::tcp(&second.namespace, "second", address, 9090);
        server::tcp(&first.namespace, "metrics", first.address(vip.is_ipv6()), 9100);
        let ports = [("http", "TCP", 80), ("metrics", "TCP", 81)];
        cluster.api.put(objects::service("multi", &OTHER_VIPS, &ports));
        let slices = [
            ("multi-a", first, &[("http", "TCP", 8080), ("metrics", "TCP", 9100)][..]),
            ("multi-b", &second, &[("http", "TCP", 9090)]),
        ];
        for (name, pod, ports) in slices {
            let endpoint = objects::endpoint(pod.address(vip.is_ipv6()), &pod.node);
            cluster.api.put(objects::slice(name, "multi", ports, &[endpoint]));
        }
        let [other4, other6] = OTHER_VIPS;
        let vip = if vip.is_ipv6() { other6 } else { other4 };
        eventually("both endpoints of the first port are reached", || {
            let reached: BTreeSet<String> = (0..20)
                .filter_map(|_| Some(tcp(&client.namespace, at(vip)).ok()?.server))
                .collect();
            (reached == ["second".to_owned(), "server".to_owned()].into()).then_some(())
        });
        for _ in 0..5 {
            let metrics = tcp(&client.namespace, SocketAddr::new(vip, 81)).unwrap();
            assert_eq!(metrics.server, "metrics");
        }
        for slice in ["multi-a", "multi-b"] {
            cluster.api.delete("EndpointSlice", slice);
        }
    });
}

#[test]
fn checksums_are_right_without_offload_too() {
    over_both_cnis(|cluster, client, server, vip| {
        // From now on the stack computes every checksum and cuts every segment itself.
        for (pod, peer) in [(client, &cluster.world.nodes[0]), (server, &cluster.world.nodes[1])] {
            pod.namespace.offload("eth0", false);
            peer.namespace.offload(&pod.link, false);
            peer.namespace.offload("eth0", false);
        }
        let bytes: Vec<u8> = (0..300_000_u32).map(|i| (i % 251) as u8).collect();
        let mut connection = tcp(&client.namespace, at(vip)).unwrap();
        for piece in bytes.chunks(60_000) {
            assert!(connection.echo(piece).unwrap() == piece);
        }
        assert_eq!(udp(&client.namespace, at(vip), &bytes[..1000]).unwrap().bytes, &bytes[..1000]);
    });
}

#[test]
fn two_worlds_of_one_kernel_do_not_disturb_each_other() {
    let clusters = CNIS.map(start);
    let actors: Vec<(Pod, Pod)> = clusters
        .iter()
        .map(|cluster| {
            let name = format!("{:?}", cluster.world.cni);
            (cluster.pod(0, "client"), cluster.server(1, &name))
        })
        .collect();
    for (cluster, (_, server)) in clusters.iter().zip(&actors) {
        cluster.expose("web", &VIPS, &[server]);
        VIPS.iter().for_each(|vip| cluster.wait_backends(*vip, 1));
    }
    let reach = |cluster: &Cluster, client: &Pod, vip: IpAddr| {
        let name = format!("{:?}", cluster.world.cni);
        assert_eq!(tcp(&client.namespace, at(vip)).unwrap().server, name);
        assert_eq!(udp(&client.namespace, at(vip), b"x").unwrap().server, name);
        assert!(cluster.probe(0, "tcp", at(vip)).unwrap().starts_with(&name));
    };
    for vip in VIPS {
        for (cluster, (client, _)) in clusters.iter().zip(&actors) {
            reach(cluster, client, vip);
        }
    }
    let [first, second] = clusters;
    drop(first);
    for vip in VIPS {
        reach(&second, &actors[1].0, vip);
    }
}

#[test]
fn a_pods_link_may_come_and_go_and_clsact_serves_where_there_is_no_tcx() {
    let portal = Path::new(env!("CARGO_BIN_EXE_portal"));
    let mut cluster = Cluster::start(Cni::Routed, portal, &["--tc", "clsact"]);
    // Without pins to wait for, by trying.
    let (client, backend) = (cluster.world.pod(0, "client"), cluster.world.pod(1, "server"));
    for v6 in [false, true] {
        server::tcp(&backend.namespace, "server", backend.address(v6), 8080);
    }
    cluster.expose("web", &VIPS, &[&backend]);
    let reach = |cluster: &Cluster, pod: &Pod, vip: IpAddr| {
        cluster.wait_backends(vip, 1);
        eventually("the pod's link is served", || {
            tcp(&pod.namespace, at(vip)).ok().map(|connection| connection.server)
        })
    };
    for vip in VIPS {
        assert_eq!(reach(&cluster, &client, vip), "server");
    }
    // A successor finds the filters and puts its programs there.
    let filters = |cluster: &Cluster| {
        cluster.world.nodes[0].namespace.netlink(async |net| net.filters("eth0").await)
    };
    cluster.agents[0].take().unwrap().kill();
    cluster.start_agent(0);
    cluster.world.nodes[0].remove_pod(&client);
    let next = cluster.world.pod(0, "next");
    for vip in VIPS {
        assert_eq!(reach(&cluster, &next, vip), "server");
    }
    assert_eq!(filters(&cluster), 2);
    // Whoever cleans up after an agent with other pins leaves them alone.
    let node = &cluster.world.nodes[0];
    let other = format!("{BPFFS}/other");
    node.mounts.run(|| std::fs::create_dir_all(format!("{other}/maps")).unwrap());
    let cleanup = portal::testing::agent::command(node, portal, false)
        .args(["cleanup", "--bpffs-root", &other])
        .status();
    assert!(cleanup.unwrap().success());
    assert_eq!(filters(&cluster), 2);
    // One that attaches in another way leaves none of them.
    cluster.agents[0].take().unwrap().kill();
    cluster.arguments = vec!["--tc".to_owned(), "tcx".to_owned()];
    cluster.start_agent(0);
    eventually("the filters are gone", || (filters(&cluster) == 0).then_some(()));
    for vip in VIPS {
        assert_eq!(reach(&cluster, &next, vip), "server");
    }
}

/// Fault M, before Linux 6.6: the CNI's bandwidth plugin gives a pod's link an ingress qdisc right after the link was made, and would fail if
/// there was one of ours. Such a pod is served all the same, and others get our programs.
#[test]
fn a_new_pods_link_is_left_to_the_cnis_own_qdisc_where_it_can_be_shared_by_none() {
    let portal = Path::new(env!("CARGO_BIN_EXE_portal"));
    let cluster = Cluster::start(Cni::Routed, portal, &["--tc", "clsact"]);
    let backend = cluster.serve_pod(1, "server");
    cluster.expose("web", &VIPS, &[&backend]);
    VIPS.iter().for_each(|vip| cluster.wait_backends(*vip, 1));
    let shaped = cluster.world.pod(0, "shaped");
    let node = &cluster.world.nodes[0].namespace;
    // Before the programs of the agent are there. It may know of the link already.
    node.netlink(async |net| net.ingress(&shaped.link, true).await);
    let plain = cluster.world.pod(0, "plain");
    let are_served = || {
        for (pod, vip) in [&shaped, &plain].into_iter().flat_map(|pod| VIPS.map(|vip| (pod, vip))) {
            let served = eventually("it is served", || tcp(&pod.namespace, at(vip)).ok());
            assert_eq!(served.server, "server");
        }
    };
    are_served();
    eventually("others get programs", || {
        (node.netlink(async |net| net.filters(&plain.link).await) == 2).then_some(())
    });
    let agent = cluster.agents[0].as_ref().expect("it runs");
    eventually("the agent has tried", || agent.log().contains("cannot attach to").then_some(()));
    are_served();
}

/// Fault L: who keeps a table of connections where packets leave sees the same addresses there as where they come in, at a pod's
/// link and at an uplink, whether it came before ours or after. One that lets nobody behind it see a packet hides none of ours.
#[test]
fn ours_stands_inside_of_others_at_egress_unless_they_end_the_chain() {
    let portal = Path::new(env!("CARGO_BIN_EXE_portal"));
    // By a short cut packets leave translated by the programs where they came in.
    let mut cluster = Cluster::start(Cni::Routed, portal, &["--short-cut", "off"]);
    let (client, server) = (cluster.pod(0, "client"), cluster.server(1, "server"));
    let (node, outsider) = (cluster.world.nodes[0].namespace.clone(), cluster.world.outsider());
    cluster.expose_with("web", &VIPS, &[&server], &node_ports());
    VIPS.iter().for_each(|vip| cluster.wait_backends(*vip, 1));
    // Each with the link by which its answers leave.
    let doors = VIPS.map(|vip| {
        let node_port = cluster.node_port(0, vip.is_ipv6());
        [(&client.namespace, at(vip), client.link.as_str()), (&outsider, node_port, "eth0")]
    });
    let reach = |from: &Namespace, to: SocketAddr| tcp(from, to).ok().map(|answer| answer.server);
    let mut held = Vec::new();
    for (from, to, _) in doors.as_flattened() {
        held.push(eventually("the door opens", || tcp(from, *to).ok()));
    }
    let mut all_serve = |when: &str| {
        for (from, to, _) in doors.as_flattened() {
            let what = format!("{to} {when}");
            within(Duration::from_mins(2), &what, || reach(from, *to));
        }
        for connection in &mut held {
            assert_eq!(connection.echo(when.as_bytes()).unwrap(), when.as_bytes());
        }
    };
    let neighbours = |doors: &[(&Namespace, SocketAddr, &str)], order: Order| {
        let join = |(_, to, link): &(_, SocketAddr, &str)| {
            Neighbour::join(&node, link, Conduct::Drops(*to), order)
        };
        doors.iter().map(join).collect::<Vec<_>>()
    };
    let restart = |cluster: &mut Cluster| {
        cluster.agents[0].take().unwrap().kill();
        cluster.start_agent(0);
    };
    // They come while no agent runs, and while one does, which then looks with each sweep.
    let first = neighbours(&doors[0], Order::Last);
    restart(&mut cluster);
    all_serve("beside others");
    let second = neighbours(&doors[1], Order::Last);
    all_serve("when more have come");
    drop((first, second));
    for order in [Order::Last, Order::First] {
        let ending = [client.link.as_str(), "eth0"]
            .map(|link| Neighbour::join(&node, link, Conduct::Ends, order));
        restart(&mut cluster);
        all_serve(&format!("beside one that ends the chain and came {order:?}"));
        drop(ending);
    }
}

/// F5: what someone else takes off comes back, and is counted.
#[test]
fn what_is_taken_off_a_link_or_the_cgroup_is_put_back() {
    let cluster = start(Cni::Bridge);
    let (client, server) = (cluster.pod(0, "client"), cluster.server(1, "server"));
    cluster.expose("web", &VIPS, &[&server]);
    cluster.wait_backends(VIPS[0], 1);
    tcp(&client.namespace, at(VIPS[0])).unwrap();
    let node = &cluster.world.nodes[0];
    let pins = node.pins("links");
    let of_client: Vec<&String> = pins
        .iter()
        .filter(|pin| {
            pin.starts_with(&format!("tc-{}-", client.ifindex)) || *pin == "cgroup-connect4"
        })
        .collect();
    assert_eq!(of_client.len(), 3, "{pins:?}");
    let links = Path::new(BPFFS).join("portal/links");
    node.mounts
        .run(|| of_client.iter().for_each(|pin| std::fs::remove_file(links.join(pin)).unwrap()));
    // With the next sweep.
    let counted = "portal_reattached_programs_total 3";
    within(Duration::from_mins(2), "they are put back", || {
        let metrics = http(node, 10249, "/metrics").unwrap();
        metrics.contains(counted).then_some(())
    });
    assert_eq!(tcp(&client.namespace, at(VIPS[0])).unwrap().server, "server");
    assert!(cluster.probe(0, "tcp", at(VIPS[0])).unwrap().starts_with("server "));
}
