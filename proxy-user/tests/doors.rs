//! The doors of Services beside the `ClusterIP`, with real sockets: `NodePorts`, external IPs, load
//! balancer IPs; clients outside, in pods and on nodes; policies, affinity, source ranges.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use portal::testing::client::{
    Connection, exchange, is_refused, ping, tcp, tcp_from_port, udp, udp_socket,
};
use portal::testing::cluster::{Cluster, VIPS, at};
use portal::testing::namespace::Namespace;
use portal::testing::objects::node_ports;
use portal::testing::world::{CNIS, Cni, OUTSIDER4, OUTSIDER6, Pod};
use portal::testing::{eventually, objects, server};
use serde_json::{Value, json};

fn start(cni: Cni) -> Cluster {
    Cluster::start(
        cni,
        Path::new(env!("CARGO_BIN_EXE_portal")),
        &["--cluster-cidr", "10.244.0.0/16,fd00:244::/32"],
    )
}

/// A server on node 1, with a `NodePort`, and someone outside.
struct Stage {
    cluster: Cluster,
    server: Pod,
    outsider: Namespace,
}

impl Stage {
    fn new(cni: Cni, more: &Value) -> Self {
        let cluster = start(cni);
        let server = cluster.server(1, "server");
        let mut fields = node_ports();
        objects::merge(&mut fields, more);
        cluster.expose_with("web", &VIPS, &[&server], &fields);
        VIPS.iter().for_each(|vip| cluster.wait_backends(*vip, 1));
        let outsider = cluster.world.outsider();
        let stage = Self { cluster, server, outsider };
        stage.wait_uplinks();
        stage
    }

    /// The `NodePort` of a node.
    fn at(&self, node: usize, v6: bool) -> SocketAddr {
        self.cluster.node_port(node, v6)
    }

    fn own(v6: bool) -> IpAddr {
        if v6 { OUTSIDER6.into() } else { OUTSIDER4.into() }
    }

    /// Leads what goes from node to node through a tunnel from now on.
    fn go_by_overlay(&self) {
        self.cluster.world.overlay();
        for v6 in [false, true] {
            let tunnel: IpAddr = if v6 { "fd00:99::1" } else { "10.99.0.1" }.parse().unwrap();
            eventually("the new way to the pod is taken", || {
                tcp(&self.outsider, self.at(0, v6)).ok().filter(|c| c.seen_as.ip() == tunnel)
            });
        }
    }

    fn wait_uplinks(&self) {
        for node in &self.cluster.world.nodes {
            let index = node.namespace.netlink(async |net| net.index("eth0").await);
            eventually("the agent attaches to the uplink", || {
                node.pins("links").contains(&format!("tc-{index}-ingress")).then_some(())
            });
        }
    }
}

/// As [`over_both`], on plain routes between the nodes and over a vxlan tunnel.
fn over_all_ways(test: impl Fn(&Stage, bool)) {
    over_both(&test);
    for cni in CNIS {
        let stage = Stage::new(cni, &json!({}));
        stage.go_by_overlay();
        [false, true].into_iter().for_each(|v6| test(&stage, v6));
    }
}

fn over_both(test: impl Fn(&Stage, bool)) {
    for cni in CNIS {
        let stage = Stage::new(cni, &json!({}));
        [false, true].into_iter().for_each(|v6| test(&stage, v6));
    }
}

#[test]
fn a_node_port_of_any_node_leads_to_the_pod() {
    over_both(|stage, v6| {
        // By the node without the pod, which masquerades; by the pod's own, which does not (KP-51).
        for (node, seen_as) in [(0, stage.cluster.world.nodes[0].address(v6)), (1, Stage::own(v6))]
        {
            let to = stage.at(node, v6);
            let mut connection = tcp(&stage.outsider, to).unwrap();
            assert_eq!(connection.echo(b"hello").unwrap(), b"hello");
            assert_eq!((connection.server.as_str(), connection.seen_as.ip()), ("server", seen_as));
            let answer = udp(&stage.outsider, to, b"hello").unwrap();
            assert_eq!((answer.server.as_str(), answer.seen_as.ip()), ("server", seen_as));
        }
    });
}

#[test]
fn pods_and_nodes_reach_node_ports_of_their_own_node_and_of_others() {
    over_both(|stage, v6| {
        let client = stage.cluster.pod(0, &format!("client{v6}"));
        for node in [0, 1] {
            let to = stage.at(node, v6);
            assert_eq!(tcp(&client.namespace, to).unwrap().server, "server");
            assert_eq!(udp(&client.namespace, to, b"x").unwrap().server, "server");
            for protocol in ["tcp", "udp"] {
                let line = stage.cluster.probe(0, protocol, to).unwrap();
                assert!(line.starts_with("server "), "{protocol} to n{node}: {line}");
            }
        }
    });
}

#[test]
fn thirty_megabytes_pass_each_way_through_a_node_without_the_pod() {
    over_all_ways(|stage, v6| {
        let sent: Vec<u8> =
            (0..30_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let connection = tcp(&stage.outsider, stage.at(0, v6)).unwrap();
        let mut writer = connection.stream.get_ref().try_clone().unwrap();
        let mut reader = connection.stream;
        let bytes = sent.clone();
        let sending = std::thread::spawn(move || writer.write_all(&bytes).unwrap());
        let mut received = vec![0; sent.len()];
        reader.read_exact(&mut received).unwrap();
        sending.join().unwrap();
        assert!(received == sent);
    });
}

#[test]
fn two_thousand_connections_of_one_client_through_one_node() {
    let stage = Stage::new(Cni::Routed, &json!({}));
    for (overlay, v6) in [(false, false), (false, true), (true, false), (true, true)] {
        if overlay && !v6 {
            stage.go_by_overlay();
        }
        let open = || tcp(&stage.outsider, stage.at(0, v6)).unwrap();
        let mut connections: Vec<_> = (0..2000).map(|_| open()).collect();
        let ports: BTreeSet<SocketAddr> = connections.iter().map(|c| c.seen_as).collect();
        assert_eq!(ports.len(), connections.len(), "the pod can't tell them apart");
        for (number, connection) in connections.iter_mut().enumerate() {
            let bytes = number.to_be_bytes();
            assert_eq!(connection.echo(&bytes).unwrap(), bytes);
        }
    }
}

#[test]
fn one_source_port_to_two_nodes_at_once() {
    over_all_ways(|stage, v6| {
        let mut connections =
            [0, 1].map(|node| tcp_from_port(&stage.outsider, stage.at(node, v6), 45_000).unwrap());
        for round in 0..3_u8 {
            for connection in &mut connections {
                assert_eq!(connection.echo(&[round; 32]).unwrap(), [round; 32]);
            }
        }
    });
}

#[test]
fn a_datagram_in_fragments_passes_through_a_node_without_the_pod() {
    over_all_ways(|stage, v6| {
        let datagram: Vec<u8> = (0..4000_u32).map(|i| (i % 251) as u8).collect();
        let socket = udp_socket(&stage.outsider, v6, 0).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        // By a tunnel with a smaller MTU the first may be lost: its sender is told, and cuts it smaller.
        let answer = eventually("it passes", || exchange(&socket, stage.at(0, v6), &datagram).ok());
        assert_eq!(answer.from, stage.at(0, v6));
        assert!(answer.bytes == datagram);
    });
}

#[test]
fn a_smaller_mtu_before_the_pod_is_told_through_the_masquerade() {
    for (cni, overlay) in CNIS.into_iter().flat_map(|cni| [(cni, false), (cni, true)]) {
        let stage = Stage::new(cni, &json!({}));
        if overlay {
            stage.go_by_overlay();
        }
        let node = &stage.cluster.world.nodes[1].namespace;
        node.netlink(async |net| net.mtu("veth0", 1300).await);
        stage.server.namespace.netlink(async |net| net.mtu("eth0", 1300).await);
        for v6 in [false, true] {
            let mut connection = tcp(&stage.outsider, stage.at(0, v6)).unwrap();
            let bytes = vec![7; 100_000];
            assert!(connection.echo(&bytes).unwrap() == bytes);
        }
    }
}

#[test]
fn through_an_overlay_its_smaller_mtu_is_told() {
    let stage = Stage::new(Cni::Routed, &json!({}));
    stage.go_by_overlay();
    for v6 in [false, true] {
        // Longer than the tunnel takes; and not to be cut, as a connected socket's.
        let long = vec![7; 1470 - if v6 { 48 } else { 28 }];
        let socket = udp_socket(&stage.outsider, v6, 0).unwrap();
        stage.outsider.run(|| socket.connect(stage.at(0, v6))).unwrap();
        socket.send(&long).unwrap();
        eventually("the node says so", || {
            (stage.cluster.outcomes(0, "icmp_error") > u64::from(v6)).then_some(())
        });
        // The sender has learnt, and cuts it.
        eventually("it arrives in pieces", || {
            socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
            socket.send(&long).ok()?;
            socket.recv(&mut [0; 2048]).ok()
        });
    }
}

#[test]
fn through_a_tunnel_without_ethernet_headers_and_with_a_smaller_mtu() {
    for cni in CNIS {
        let stage = Stage::new(cni, &json!({}));
        let _tunnel = stage.cluster.world.tunnel(1300);
        for v6 in [false, true] {
            let to = stage.at(0, v6);
            let tunnel: IpAddr = if v6 { "fd00:99::1" } else { "10.99.0.1" }.parse().unwrap();
            eventually("the new way to the pod is taken", || {
                tcp(&stage.outsider, to).ok().filter(|c| c.seen_as.ip() == tunnel)
            });
            let mut connection = tcp(&stage.outsider, to).unwrap();
            let bytes: Vec<u8> = (0..300_000_u32).map(|i| (i % 251) as u8).collect();
            assert!(connection.echo(&bytes).unwrap() == bytes);
            assert_eq!(udp(&stage.outsider, to, b"x").unwrap().server, "server");
            // Clients of the tunnel itself: a pod's packets to the other node's port.
            let client = stage.cluster.pod(0, &format!("client{v6}"));
            assert_eq!(tcp(&client.namespace, stage.at(1, v6)).unwrap().server, "server");
        }
        assert!(
            stage.cluster.outcomes(0, "icmp_error") > 0,
            "the smaller MTU was told by the node"
        );
    }
}

#[test]
fn external_and_balancer_ips_are_reached_from_everywhere() {
    let addresses = ["203.0.113.5", "2001:db8:113::5", "203.0.113.6", "2001:db8:113::6"];
    let [external4, external6, balancer4, balancer6] = addresses;
    let more = json!({
        "spec": {"type": "LoadBalancer", "externalIPs": [external4, external6]},
        "status": {"loadBalancer": {"ingress": [
            {"ip": balancer4}, {"ip": balancer6, "ipMode": "VIP"},
            {"ip": "203.0.113.7", "ipMode": "Proxy"}, {"hostname": "example.org"},
        ]}},
    });
    for cni in CNIS {
        let stage = Stage::new(cni, &more);
        let client = stage.cluster.pod(0, "client");
        for address in addresses {
            let to = at(address.parse().unwrap());
            for namespace in [&stage.outsider, &client.namespace] {
                assert_eq!(tcp(namespace, to).unwrap().server, "server", "{to}");
                assert_eq!(udp(namespace, to, b"x").unwrap().server, "server", "{to}");
            }
            assert!(stage.cluster.probe(0, "tcp", to).unwrap().starts_with("server "), "{to}");
        }
        // KP-39: mode Proxy is not ours.
        let services = stage.cluster.list(0, "services");
        assert!(services.iter().all(|service| service["vip"] != "203.0.113.7"));
    }
}

#[test]
fn vips_answer_when_they_are_pinged() {
    let stage = Stage::new(Cni::Bridge, &json!({}));
    let client = stage.cluster.pod(0, "client");
    for vip in VIPS {
        for from in [&client.namespace, &stage.outsider] {
            ping(from, vip, Duration::from_secs(20))
                .unwrap_or_else(|error| panic!("{vip}: {error}"));
        }
    }
}

#[test]
fn external_policy_local_keeps_the_clients_address_and_drops_where_there_is_no_pod() {
    let more = json!({"spec": {"externalTrafficPolicy": "Local"}});
    for cni in CNIS {
        let stage = Stage::new(cni, &more);
        for v6 in [false, true] {
            let client = stage.cluster.pod(0, &format!("client{v6}"));
            let connection = tcp(&stage.outsider, stage.at(1, v6)).unwrap();
            assert_eq!(connection.seen_as.ip(), Stage::own(v6));
            // KP-55; but pods and the node itself are led on (KP-53, 54).
            stage.cluster.assert_dropped(0, "no_local", &stage.outsider, stage.at(0, v6));
            assert_eq!(tcp(&client.namespace, stage.at(0, v6)).unwrap().server, "server");
            assert!(stage.cluster.probe(0, "tcp", stage.at(0, v6)).unwrap().starts_with("server "));
        }
    }
}

#[test]
fn the_balancer_is_told_which_node_has_pods_kp_101_to_108() {
    let more = json!({"spec": {
        "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 32_123,
    }});
    let stage = Stage::new(Cni::Routed, &more);
    let ask = |node: usize, v6: bool| -> Option<String> {
        let to = SocketAddr::new(stage.cluster.world.nodes[node].address(v6), 32_123);
        let connect = || std::net::TcpStream::connect_timeout(&to, Duration::from_secs(20));
        let mut stream = stage.outsider.run(connect).ok()?;
        // A port that is closed meanwhile resets who has just come in.
        stream.write_all(b"POST /any HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    };
    let body = |count: usize| {
        format!(
            "{{\n\t\"service\": {{\n\t\t\"namespace\": \"default\",\n\t\t\"name\": \"web\"\n\t}},\n\
             \t\"localEndpoints\": {count},\n\t\"serviceProxyHealthy\": true\n}}"
        )
    };
    for v6 in [false, true] {
        for (node, status, count) in [(0, "503", 0), (1, "200", 1)] {
            let answer = ask(node, v6).unwrap();
            let (head, text) = answer.split_once("\r\n\r\n").unwrap();
            assert_eq!(text, body(count));
            assert_eq!(head.split(' ').nth(1), Some(status), "{head}");
            let head = head.to_lowercase();
            for header in [
                "content-type: application/json".to_owned(),
                "x-content-type-options: nosniff".to_owned(),
                format!("x-load-balancing-endpoint-weight: {count}"),
            ] {
                assert!(head.contains(&header), "no {header} in {head}");
            }
        }
    }
    // KP-108: with the policy goes the port, and comes back.
    let mut cluster_wide = node_ports();
    cluster_wide["spec"]["type"] = "LoadBalancer".into();
    stage.cluster.expose_with("web", &VIPS, &[&stage.server], &cluster_wide);
    eventually("the port is closed", || ask(1, false).is_none().then_some(()));
    let mut fields = node_ports();
    objects::merge(&mut fields, &more);
    stage.cluster.expose_with("web", &VIPS, &[&stage.server], &fields);
    eventually("the port is open again", || ask(1, true));
}

/// The e2e scenarios 3, 6, 7, 12 and 17 of kube-proxy's own tests.
#[test]
fn services_and_their_ports_come_go_and_come_back() {
    let stage = Stage::new(Cni::Bridge, &json!({}));
    let cluster = &stage.cluster;
    let client = cluster.pod(0, "client");
    let [vip, _] = VIPS;
    let other: IpAddr = "10.96.0.77".parse().unwrap();
    let reached = |to| tcp(&client.namespace, to).is_ok_and(|c| c.server == "server");
    let closes =
        |to| eventually("the port is closed", || is_refused(&client.namespace, to).then_some(()));
    let opens = |to| eventually("the port is open", || reached(to).then_some(()));

    // A port more, and a port less.
    let second = SocketAddr::new(vip, 81);
    let ports = [("tcp", "TCP", 80), ("udp", "UDP", 80), ("more", "TCP", 81)];
    let targets = [("tcp", "TCP", 8080), ("udp", "UDP", 8080), ("more", "TCP", 8080)];
    let endpoint = objects::endpoint(stage.server.v4.into(), &stage.server.node);
    cluster.api.put(objects::service("web", &[vip], &ports));
    cluster.api.put(objects::slice("web-v4", "web", &targets, std::slice::from_ref(&endpoint)));
    opens(second);
    assert!(reached(at(vip)));
    // As it had no NodePort any more: that is the node's own port again (KP-27).
    eventually("the NodePort is released", || {
        is_refused(&stage.outsider, stage.at(0, false)).then_some(())
    });
    cluster.api.put(objects::service("web", &[vip], &ports[..2]));
    closes(second);
    assert!(reached(at(vip)));

    // Deleted: packets to its address are nobody's. Then again under the same name, elsewhere.
    cluster.api.delete("Service", "web");
    eventually("the kernel forgets it", || cluster.list(0, "services").is_empty().then_some(()));
    cluster.api.put(objects::service("web", &[other], &ports[..2]));
    opens(at(other));
    assert!(stage.cluster.probe(0, "tcp", at(other)).unwrap().starts_with("server "));
}

#[test]
fn internal_policy_local_asks_for_a_pod_of_the_clients_own_node() {
    let stage = Stage::new(Cni::Bridge, &json!({"spec": {"internalTrafficPolicy": "Local"}}));
    for vip in VIPS {
        let clients =
            [0, 1].map(|node| stage.cluster.pod(node, &format!("c{node}-{}", vip.is_ipv6())));
        stage.cluster.assert_dropped(0, "no_local", &clients[0].namespace, at(vip));
        assert_eq!(tcp(&clients[1].namespace, at(vip)).unwrap().server, "server");
        assert!(stage.cluster.probe(0, "tcp", at(vip)).is_err());
        assert!(stage.cluster.probe(1, "tcp", at(vip)).unwrap().starts_with("server "));
        // KP-61: not for the other doors.
        let to = stage.at(0, vip.is_ipv6());
        assert_eq!(tcp(&clients[0].namespace, to).unwrap().server, "server");
    }
}

#[test]
fn source_ranges_let_in_and_keep_out() {
    let balancer: IpAddr = "203.0.113.6".parse().unwrap();
    let more = json!({
        "spec": {"type": "LoadBalancer", "loadBalancerSourceRanges": ["10.244.0.0/24", "192.168.50.1/32"]},
        "status": {"loadBalancer": {"ingress": [{"ip": balancer}]}},
    });
    let stage = Stage::new(Cni::Routed, &more);
    let (inside, outside) = (stage.cluster.pod(0, "inside"), stage.cluster.pod(1, "outside"));
    assert_eq!(tcp(&inside.namespace, at(balancer)).unwrap().server, "server");
    stage.cluster.assert_dropped(1, "not_allowed", &outside.namespace, at(balancer));
    stage.cluster.assert_dropped(0, "not_allowed", &stage.outsider, at(balancer));
    assert!(stage.cluster.probe(0, "tcp", at(balancer)).is_ok(), "the node is in a range");
    assert!(stage.cluster.probe(1, "tcp", at(balancer)).is_err(), "this one is not");
    // KP-90: the other doors are open.
    assert_eq!(tcp(&stage.outsider, stage.at(0, false)).unwrap().server, "server");
}

#[test]
fn a_client_stays_with_its_pod_over_all_doors_and_a_restart() {
    let cni = Cni::Bridge;
    let mut cluster = start(cni);
    let servers: Vec<Pod> = (0..3).map(|n| cluster.server(n % 2, &format!("s{n}"))).collect();
    let servers: Vec<&Pod> = servers.iter().collect();
    let mut fields = node_ports();
    fields["spec"]["sessionAffinity"] = "ClientIP".into();
    cluster.expose_with("web", &VIPS, &servers, &fields);
    VIPS.iter().for_each(|vip| cluster.wait_backends(*vip, 3));
    let client = cluster.pod(0, "client");
    for vip in VIPS {
        let node_port = cluster.node_port(0, vip.is_ipv6());
        let chosen = tcp(&client.namespace, at(vip)).unwrap().server;
        let stays = |cluster: &Cluster| {
            for _ in 0..8 {
                for to in [at(vip), node_port] {
                    let reached = tcp(&client.namespace, to).unwrap().server;
                    assert_eq!(reached, chosen, "{to} of {:?}", cluster.world.cni);
                }
            }
        };
        stays(&cluster);
        cluster.agents[0].take().unwrap().kill();
        cluster.start_agent(0);
        stays(&cluster);
    }
}

#[test]
fn hints_keep_traffic_in_its_zone_kp_65_and_69() {
    let cluster = start(Cni::Routed);
    let near = cluster.server(0, "near");
    let far = cluster.server(1, "far");
    let client = cluster.pod(0, "client");
    let [vip, _] = VIPS;
    cluster.api.put(objects::service("web", &[vip], &[("tcp", "TCP", 80)]));
    let endpoint = |pod: &Pod| {
        let mut endpoint = objects::endpoint(pod.v4.into(), &pod.node);
        endpoint["hints"] = json!({"forZones": [{"name": pod.node}]});
        endpoint
    };
    let endpoints = [endpoint(&near), endpoint(&far)];
    cluster.api.put(objects::slice("web", "web", &[("tcp", "TCP", 8080)], &endpoints));
    cluster.wait_backends(vip, 1);
    let reached = || -> BTreeSet<String> {
        (0..16).map(|_| tcp(&client.namespace, at(vip)).unwrap().server).collect()
    };
    assert_eq!(reached(), ["near".to_owned()].into());
    // The node's zone changes: no restart is needed.
    let mut node = objects::node("n0", &[]);
    node["metadata"]["labels"]["topology.kubernetes.io/zone"] = "n1".into();
    cluster.api.put(node);
    eventually("the other zone's pod is reached", || {
        (reached() == ["far".to_owned()].into()).then_some(())
    });
}

#[test]
fn services_choose_as_their_annotations_say() {
    let cluster = start(Cni::Bridge);
    let client = cluster.pod(0, "client");
    let servers: Vec<Pod> = (0..3).map(|n| cluster.server(n % 2, &format!("s{n}"))).collect();
    let [vip, _] = VIPS;
    let expose = |pods: &[Pod], algorithm: &str, weights: &str| {
        let mut service = objects::service("web", &[vip], &[("tcp", "TCP", 80)]);
        service["metadata"]["annotations"] = json!({"portal.dev/lb-algorithm": algorithm});
        cluster.api.put(service);
        let endpoints: Vec<Value> =
            pods.iter().map(|pod| objects::endpoint(pod.v4.into(), &pod.node)).collect();
        let mut slice = objects::slice("web", "web", &[("tcp", "TCP", 8080)], &endpoints);
        slice["metadata"]["annotations"] = json!({"portal.dev/weights": weights});
        cluster.api.put(slice);
        cluster.wait_backends(vip, pods.len());
        eventually("the algorithm is in force", || {
            let services = cluster.list(0, "services");
            (services[0]["algorithm"] == algorithm).then_some(())
        });
    };
    let reach = |times: usize| -> Vec<Connection> {
        (0..times).map(|_| tcp(&client.namespace, at(vip)).unwrap()).collect()
    };
    let counts = |connections: &[Connection]| -> Vec<usize> {
        let count = |pod: &Pod| connections.iter().filter(|c| c.server == pod.name).count();
        servers.iter().map(count).collect()
    };
    expose(&servers, "round-robin", "");
    assert_eq!(counts(&reach(9)), [3, 3, 3]);
    expose(&servers, "round-robin", &format!("{}=4", servers[1].v4));
    eventually("the weights are in force", || (counts(&reach(6)) == [1, 4, 1]).then_some(()));
    // Connections that are held are a load; of two backends the less busy one is always found.
    expose(&servers[..2], "least-conn", "");
    let mut held = reach(20);
    assert_eq!(counts(&held), [10, 10, 0]);
    held.retain(|connection| connection.server != "s0");
    eventually("the kernel has seen them end", || {
        let flows = cluster.list(0, "flows");
        let backend = format!("{}:8080", servers[0].v4);
        let open = |flow: &&Value| flow["backend"] == backend && flow["state"] == "established";
        (flows.iter().filter(open).count() == 0).then_some(())
    });
    assert_eq!(counts(&reach(6)), [6, 0, 0]);
}

#[test]
fn host_ports_lead_to_the_pods_that_ask_for_them() {
    for cni in CNIS {
        let cluster = start(cni);
        let (one, two) = (cluster.server(0, "one"), cluster.server(0, "two"));
        let near = cluster.pod(0, "near");
        let far = cluster.pod(1, "far");
        let outsider = cluster.world.outsider();
        let place = &cluster.world.nodes[0];
        let own = |pod: &Pod| [pod.v4.into(), pod.v6.into()];
        // As the e2e test of host ports has it: one port, apart by address and by protocol.
        let ports = json!([
            {"containerPort": 8080, "hostPort": 5432},
            {"containerPort": 8080, "hostPort": 5432, "protocol": "UDP", "hostIP": place.v4()},
        ]);
        cluster.api.put(objects::pod("one", "n0", &own(&one), &ports));
        let ports = json!([{"containerPort": 8080, "hostPort": 5433, "hostIP": "127.0.0.1"}]);
        cluster.api.put(objects::pod("two", "n0", &own(&two), &ports));
        eventually("the kernel knows", || (cluster.list(0, "services").len() == 4).then_some(()));
        let server_of =
            |answer: Result<String, String>| answer.unwrap().split(' ').next().map(str::to_owned);
        for v6 in [false, true] {
            let to = SocketAddr::new(place.address(v6), 5432);
            for (who, namespace) in [
                ("outside", &outsider),
                ("near", &near.namespace),
                ("far", &far.namespace),
                ("itself", &one.namespace),
            ] {
                let connection = tcp(namespace, to).unwrap_or_else(|e| panic!("{who}, {to}: {e}"));
                assert_eq!(connection.server, "one", "{who}, {to}");
            }
            let connection = tcp(&outsider, to).unwrap();
            assert_eq!(connection.seen_as.ip(), Stage::own(v6), "its own address is kept");
            let loopback: IpAddr = if v6 { "::1" } else { "127.0.0.1" }.parse().unwrap();
            for at in [to, SocketAddr::new(loopback, 5432)] {
                assert_eq!(server_of(cluster.probe(0, "tcp", at)).as_deref(), Some("one"), "{at}");
            }
        }
        let (v4, v6) =
            (SocketAddr::new(place.v4().into(), 5432), SocketAddr::new(place.v6().into(), 5432));
        assert_eq!(udp(&outsider, v4, b"x").unwrap().server, "one");
        assert!(udp(&outsider, v6, b"x").is_err(), "only at the IPv4 address");
        let loopback = SocketAddr::new("127.0.0.1".parse().unwrap(), 5433);
        assert_eq!(server_of(cluster.probe(0, "tcp", loopback)).as_deref(), Some("two"));
        assert!(is_refused(&outsider, SocketAddr::new(place.v4().into(), 5433)));
        // With the pod goes its port.
        cluster.api.delete("Pod", "one");
        eventually("the port is the node's again", || is_refused(&outsider, v4).then_some(()));
    }
}

#[test]
fn pods_leave_the_cluster_with_the_nodes_address_if_that_is_asked_for() {
    for cni in CNIS {
        let arguments = [
            "--cluster-cidr=10.244.0.0/16,fd00:244::/32",
            "--masquerade-pods",
            "--masquerade-except=192.168.50.200/32",
        ];
        let cluster = Cluster::start(cni, Path::new(env!("CARGO_BIN_EXE_portal")), &arguments);
        let (pod, far) = (cluster.pod(0, "pod"), cluster.server(1, "far"));
        let outsider = cluster.world.outsider();
        let excepted: IpAddr = "192.168.50.200".parse().unwrap();
        outsider.netlink(async |net| net.address("eth0", excepted, 24).await);
        let serve = |address: IpAddr| {
            server::tcp(&outsider, "outsider", address, 443);
            server::udp(&outsider, "outsider", address, 443);
        };
        serve(excepted);
        for v6 in [false, true] {
            let node = cluster.world.nodes[0].address(v6);
            let to = SocketAddr::new(Stage::own(v6), 443);
            serve(to.ip());
            let mut connection = tcp(&pod.namespace, to).unwrap();
            assert_eq!(connection.seen_as.ip(), node);
            let bytes = vec![7; 100_000];
            assert!(connection.echo(&bytes).unwrap() == bytes);
            let socket = udp_socket(&pod.namespace, v6, 0).unwrap();
            for datagram in [&bytes[..10], &bytes[..4000]] {
                let answer = exchange(&socket, to, datagram).unwrap();
                assert_eq!((answer.seen_as.ip(), answer.bytes.len()), (node, datagram.len()));
            }
            ping(&pod.namespace, to.ip(), Duration::from_secs(20)).unwrap();
            // Within the cluster pods keep their address; and so does who asks them from outside.
            let to = SocketAddr::new(far.address(v6), 8080);
            assert_eq!(tcp(&pod.namespace, to).unwrap().seen_as.ip(), pod.address(v6));
            let asked = tcp(&outsider, SocketAddr::new(far.address(v6), 8080)).unwrap();
            assert_eq!(asked.seen_as.ip(), Stage::own(v6));
        }
        // Datagrams that come in for a pod are answered as they came: from other nodes' processes, and
        // from other nodes that masquerade.
        cluster.expose_with("web", &VIPS, &[&far], &node_ports());
        for vip in VIPS {
            cluster.wait_backends(vip, 1);
            let v6 = vip.is_ipv6();
            let to = cluster.node_port(0, v6);
            for _ in 0..3 {
                assert!(cluster.probe(0, "udp", at(vip)).unwrap().starts_with("far "));
                assert_eq!(udp(&outsider, to, b"x").unwrap().server, "far");
                let direct = udp(&outsider, SocketAddr::new(far.address(v6), 8080), b"x").unwrap();
                assert_eq!(direct.server, "far");
            }
        }
        let kept = tcp(&pod.namespace, SocketAddr::new(excepted, 443)).unwrap();
        assert_eq!(kept.seen_as.ip(), pod.address(false));
    }
}

#[test]
fn kp_82_pods_are_masqueraded_even_to_cluster_ips_if_that_is_asked_for() {
    for cni in CNIS {
        let portal = Path::new(env!("CARGO_BIN_EXE_portal"));
        let cluster = Cluster::start(cni, portal, &["--masquerade-all"]);
        let (client, server) = (cluster.pod(0, "client"), cluster.server(1, "server"));
        cluster.expose("web", &VIPS, &[&server]);
        for vip in VIPS {
            cluster.wait_backends(vip, 1);
            let mut connection = tcp(&client.namespace, at(vip)).unwrap();
            assert_eq!(connection.seen_as.ip(), cluster.world.nodes[0].address(vip.is_ipv6()));
            let bytes = vec![7; 100_000];
            assert!(connection.echo(&bytes).unwrap() == bytes);
            let answer = udp(&client.namespace, at(vip), b"x").unwrap();
            assert_eq!(answer.seen_as.ip(), cluster.world.nodes[0].address(vip.is_ipv6()));
        }
    }
}
