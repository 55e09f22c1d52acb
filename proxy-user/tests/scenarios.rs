//! The scenarios of kube-proxy's end-to-end tests (kube-proxy.md, section 2) that the other files do not
//! have: endpoints in every condition, endpoints on the host's network, datagrams of one port while
//! endpoints come and go, Services that change their type and their policies.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use portal::testing::capture::Capture;
use portal::testing::client::{is_refused, tcp, udp, udp_socket};
use portal::testing::cluster::{Cluster, TARGET, VIPS, at};
use portal::testing::namespace::Namespace;
use portal::testing::objects::{self, NODE_PORT, Port, node_ports};
use portal::testing::server::{self, parse_greeting};
use portal::testing::steady::Steady;
use portal::testing::world::{CNIS, Cni, OUTSIDER4, OUTSIDER6, Pod};
use portal::testing::{agent, eventually};
use proxy_common::tables::Side;
use proxy_common::testing::{Packet, Transport};
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};

const BALANCER: [&str; 2] = ["203.0.113.6", "2001:db8:113::6"];
const PORTS: [Port<'static>; 2] = [("tcp", "TCP", 80), ("udp", "UDP", 80)];
const TARGETS: [Port<'static>; 2] = [("tcp", "TCP", TARGET), ("udp", "UDP", TARGET)];

fn start(cni: Cni) -> Cluster {
    let portal = Path::new(env!("CARGO_BIN_EXE_portal"));
    Cluster::start(cni, portal, &["--cluster-cidr=10.244.0.0/16,fd00:244::/32"])
}

/// Puts the Service "web" with more fields; without `nodePort` it has none.
fn put_service(cluster: &Cluster, more: &Value) {
    let mut service = objects::service("web", &VIPS, &PORTS);
    objects::merge(&mut service, more);
    cluster.api.put(service);
}

/// A load balancer's Service, with more fields.
fn balanced(more: &Value) -> Value {
    let ingress: Vec<Value> = BALANCER.iter().map(|ip| json!({"ip": ip})).collect();
    let mut fields = node_ports();
    fields["spec"]["type"] = "LoadBalancer".into();
    fields["status"] = json!({"loadBalancer": {"ingress": ingress}});
    objects::merge(&mut fields, more);
    fields
}

/// An endpoint: its address of each family, its node, its conditions.
struct Endpoint {
    addresses: [IpAddr; 2],
    node: String,
    conditions: Value,
}

fn ready(pod: &Pod) -> Endpoint {
    in_condition(pod, true, true, false)
}

fn in_condition(pod: &Pod, ready: bool, serving: bool, terminating: bool) -> Endpoint {
    Endpoint {
        addresses: [pod.v4.into(), pod.v6.into()],
        node: pod.node.clone(),
        conditions: json!({"ready": ready, "serving": serving, "terminating": terminating}),
    }
}

fn put_endpoints(cluster: &Cluster, service: &str, ports: &[Port<'_>], endpoints: &[Endpoint]) {
    for (family, name) in [(0, "v4"), (1, "v6")] {
        let object = |endpoint: &Endpoint| {
            let mut object = objects::endpoint(endpoint.addresses[family], &endpoint.node);
            object["conditions"] = endpoint.conditions.clone();
            object
        };
        let found: Vec<Value> = endpoints.iter().map(object).collect();
        let mut slice = objects::slice(&format!("{service}-{name}"), service, ports, &found);
        slice["addressType"] = if family == 1 { "IPv6" } else { "IPv4" }.into();
        cluster.api.put(slice);
    }
}

fn set(cluster: &Cluster, endpoints: &[Endpoint]) {
    put_endpoints(cluster, "web", &TARGETS, endpoints);
}

/// Who answers a connection; `None` if nobody does.
fn asked(from: &Namespace, to: SocketAddr) -> Option<String> {
    tcp(from, to).ok().map(|connection| connection.server)
}

/// 18, 19, 20, 36 and 38 of 2.1: which conditions of an endpoint let it be reached.
#[test]
fn endpoints_are_reached_in_the_conditions_that_allow_it() {
    for cni in CNIS {
        let cluster = start(cni);
        let (near, far) = (cluster.pod(0, "near"), cluster.pod(1, "far"));
        let server = cluster.server(0, "server");
        let outsider = cluster.world.outsider();
        put_service(&cluster, &node_ports());
        for (ready, serving, terminating, reached) in [
            (false, false, false, false),
            (true, false, false, true),
            (false, false, true, false),
            (true, false, true, true),
            (false, true, true, true),
            (false, true, false, false),
        ] {
            set(&cluster, &[in_condition(&server, ready, serving, terminating)]);
            for vip in VIPS {
                cluster.wait_backends(vip, reached.into());
                let v6 = vip.is_ipv6();
                for namespace in [&near.namespace, &far.namespace] {
                    for to in [at(vip), cluster.node_port(0, v6), cluster.node_port(1, v6)] {
                        let who = asked(namespace, to);
                        assert_eq!(who.is_some(), reached, "{to} {ready} {serving} {terminating}");
                    }
                }
                let to = cluster.node_port(1, v6);
                assert_eq!(asked(&outsider, to).is_some(), reached, "{to} from outside");
            }
        }
    }
}

/// 35, 37 and 39 of 2.1: with a Local policy only a node's own endpoints take over while they end.
#[test]
fn terminating_endpoints_of_the_node_take_over_where_a_policy_is_local() {
    for cni in CNIS {
        let cluster = start(cni);
        let (near, far) = (cluster.pod(0, "near"), cluster.pod(1, "far"));
        let server = cluster.server(0, "server");
        let outsider = cluster.world.outsider();
        let more = json!({"spec": {
            "internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local", "healthCheckNodePort": 32_123,
        }});
        put_service(&cluster, &balanced(&more));
        set(&cluster, &[ready(&server)]);
        let health =
            |node: usize| agent::http_status(&cluster.world.nodes[node], 32_123, "/healthz");
        eventually("the balancer may send", || (health(0) == Some(200)).then_some(()));
        eventually("but not to the other node", || (health(1) == Some(503)).then_some(()));
        set(&cluster, &[in_condition(&server, false, true, true)]);
        eventually("the balancer may send no more", || (health(0) == Some(503)).then_some(()));
        for vip in VIPS {
            let v6 = vip.is_ipv6();
            assert_eq!(asked(&near.namespace, at(vip)).as_deref(), Some("server"));
            cluster.assert_dropped(1, "no_local", &far.namespace, at(vip));
            assert_eq!(asked(&outsider, cluster.node_port(0, v6)).as_deref(), Some("server"));
            cluster.assert_dropped(1, "no_local", &outsider, cluster.node_port(1, v6));
            assert_eq!(asked(&far.namespace, cluster.node_port(0, v6)).as_deref(), Some("server"));
            // A pod of another node comes from outside (KP-57), where there is no endpoint.
            cluster.assert_dropped(1, "no_local", &near.namespace, cluster.node_port(1, v6));
        }
    }
}

/// 32, 33 of 2.1 and 20 of 2.3: an endpoint on the host's network.
#[test]
fn endpoints_on_the_hosts_network_are_served() {
    for cni in CNIS {
        let cluster = start(cni);
        let clients = [cluster.pod(0, "c0"), cluster.pod(1, "c1")];
        let outsider = cluster.world.outsider();
        let place = &cluster.world.nodes[0];
        let addresses = [place.address(false), place.address(true)];
        for address in addresses {
            server::tcp(&place.namespace, "host", address, 10_180);
            server::udp(&place.namespace, "host", address, 10_180);
        }
        let endpoint = || Endpoint {
            addresses,
            node: "n0".to_owned(),
            conditions: json!({"ready": true, "serving": true, "terminating": false}),
        };
        let targets = [("tcp", "TCP", 10_180), ("udp", "UDP", 10_180)];
        put_service(&cluster, &node_ports());
        put_endpoints(&cluster, "web", &targets, &[endpoint()]);
        for vip in VIPS {
            cluster.wait_backends(vip, 1);
            let v6 = vip.is_ipv6();
            for to in [at(vip), cluster.node_port(0, v6), cluster.node_port(1, v6)] {
                for namespace in [&clients[0].namespace, &clients[1].namespace, &outsider] {
                    assert_eq!(asked(namespace, to).as_deref(), Some("host"), "TCP {to}");
                    assert_eq!(udp(namespace, to, &[7; 2000]).unwrap().server, "host", "UDP {to}");
                }
                for node in [0, 1] {
                    for protocol in ["tcp", "udp"] {
                        let line = cluster.probe(node, protocol, to).unwrap();
                        assert!(line.starts_with("host "), "{protocol} n{node} {to}: {line}");
                    }
                }
            }
        }
        let mut local = node_ports();
        local["spec"]["internalTrafficPolicy"] = "Local".into();
        put_service(&cluster, &local);
        for vip in VIPS {
            eventually("n1 has no local endpoint", || cluster.probe(1, "tcp", at(vip)).err());
            assert!(cluster.probe(0, "tcp", at(vip)).is_ok());
            assert_eq!(asked(&clients[0].namespace, at(vip)).as_deref(), Some("host"));
            cluster.assert_dropped(1, "no_local", &clients[1].namespace, at(vip));
        }
    }
}

/// Who answers a datagram of a socket now; `None` if nobody does in a moment.
fn answer(socket: &UdpSocket, to: SocketAddr) -> Option<String> {
    socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    socket.send_to(b"x", to).ok()?;
    let mut buffer = [0; 512];
    loop {
        let (length, from) = socket.recv_from(&mut buffer).ok()?;
        // Another door's may be late.
        if from == to {
            return Some(parse_greeting(&String::from_utf8_lossy(&buffer[..length])).0);
        }
    }
}

/// A door, and how to ask there: who answers now, if anybody does.
type Sender<'a> = (&'a str, Box<dyn FnMut() -> Option<String> + 'a>);

/// 1 to 5 and 7 of 2.2, 9 and 10 of 2.7: one source port, from before there is an endpoint.
#[test]
fn datagrams_of_one_port_follow_the_endpoints() {
    for cni in CNIS {
        let cluster = start(cni);
        let client = cluster.pod(0, "client");
        let outsider = cluster.world.outsider();
        let (one, two) = (cluster.server(1, "one"), cluster.server(1, "two"));
        for v6 in [false, true] {
            server::udp(&two.namespace, "two-9090", two.address(v6), 9090);
        }
        for v6 in [false, true] {
            put_service(&cluster, &balanced(&json!({})));
            set(&cluster, &[]);
            let vip = VIPS[usize::from(v6)];
            cluster.wait_backends(vip, 0);
            let balancer = SocketAddr::new(BALANCER[usize::from(v6)].parse().unwrap(), 80);
            let socket = udp_socket(&client.namespace, v6, 12_345).unwrap();
            let outside = udp_socket(&outsider, v6, 12_345).unwrap();
            let mut steady = Steady::new(&cluster, 0, &["steady-udp", &at(vip).to_string()]);
            let mut renewed = Steady::new(&cluster, 0, &["renewed-udp", &at(vip).to_string()]);
            let mut senders: Vec<Sender<'_>> = vec![
                ("ClusterIP", Box::new(|| answer(&socket, at(vip)))),
                ("NodePort", Box::new(|| answer(&socket, cluster.node_port(1, v6)))),
                ("from outside", Box::new(|| answer(&outside, cluster.node_port(0, v6)))),
                ("balancer", Box::new(|| answer(&outside, balancer))),
                ("of the node", Box::new(move || steady.ask())),
                ("of the node, connected", Box::new(move || renewed.ask())),
            ];
            senders.iter_mut().for_each(|(door, send)| assert_eq!(send(), None, "{door}"));
            let mut reach = |name: &str| {
                for (door, send) in &mut senders {
                    let what = format!("{name} is reached: {door}, IPv6 {v6}, {cni:?}");
                    eventually(&what, || (send().as_deref() == Some(name)).then_some(()));
                }
            };
            // Not ready at first.
            set(&cluster, &[in_condition(&one, false, false, false)]);
            set(&cluster, &[ready(&one)]);
            reach("one");
            // Connected to a backend; the one of before is to the VIP, as nobody served then.
            let mut led = Steady::new(&cluster, 0, &["renewed-udp", &at(vip).to_string()]);
            let mut is_led = |name: &str| {
                let what = format!("a connected socket is led to {name}");
                eventually(&what, || (led.ask().as_deref() == Some(name)).then_some(()));
            };
            is_led("one");
            set(&cluster, &[ready(&one), ready(&two)]);
            cluster.wait_backends(vip, 2);
            set(&cluster, &[ready(&two)]);
            reach("two");
            is_led("two");
            // The same pod at another port.
            put_endpoints(
                &cluster,
                "web",
                &[("tcp", "TCP", 9090), ("udp", "UDP", 9090)],
                &[ready(&two)],
            );
            reach("two-9090");
            is_led("two-9090");
        }
    }
}

/// 23, 26, 34 and 43 of 2.1.
#[test]
fn affinity_and_policies_may_be_switched_on_and_off() {
    for cni in CNIS {
        let cluster = start(cni);
        let client = cluster.pod(0, "client");
        let outsider = cluster.world.outsider();
        let servers: Vec<Pod> = (0..3).map(|n| cluster.server(0, &format!("s{n}"))).collect();
        let endpoints: Vec<Endpoint> = servers.iter().map(ready).collect();
        let with = |more: Value| {
            let mut fields = node_ports();
            objects::merge(&mut fields, &json!({"spec": more}));
            put_service(&cluster, &fields);
        };
        with(json!({}));
        set(&cluster, &endpoints);
        for vip in VIPS {
            cluster.wait_backends(vip, 3);
            let v6 = vip.is_ipv6();
            let seen = |from: &Namespace, to| -> BTreeSet<String> {
                (0..30).filter_map(|_| asked(from, to)).collect()
            };
            let own: IpAddr = if v6 { OUTSIDER6.into() } else { OUTSIDER4.into() };
            for round in 0..2 {
                let doors = [
                    (&client.namespace, at(vip)),
                    (&client.namespace, cluster.node_port(0, v6)),
                    (&outsider, cluster.node_port(1, v6)),
                ];
                for (from, to) in doors {
                    with(json!({"sessionAffinity": "ClientIP"}));
                    eventually("they stay", || (seen(from, to).len() == 1).then_some(()));
                    with(json!({}));
                    eventually("they spread", || (seen(from, to).len() > 1).then_some(()));
                }
                // All pods are on n0.
                with(json!({"externalTrafficPolicy": "Local"}));
                eventually("n1 serves nobody outside", || {
                    let socket = udp_socket(&outsider, v6, 0).unwrap();
                    answer(&socket, cluster.node_port(1, v6)).is_none().then_some(())
                });
                let seen_as = tcp(&outsider, cluster.node_port(0, v6)).unwrap().seen_as;
                assert_eq!(seen_as.ip(), own);
                let line = cluster.probe(1, "tcp", cluster.node_port(0, v6)).unwrap();
                assert!(line.starts_with('s'), "the node itself is led on: {line}");
                with(json!({}));
                let to = cluster.node_port(1, v6);
                eventually("n1 serves again", || {
                    let socket = udp_socket(&outsider, v6, 0).unwrap();
                    answer(&socket, to)
                });
                assert!(asked(&outsider, to).is_some(), "round {round}");
            }
        }
    }
}

/// 40 and 46 of 2.1, 10 of 2.3.
#[test]
fn protocols_target_ports_and_services_beside_each_other_do_not_mix() {
    for cni in CNIS {
        let cluster = start(cni);
        let client = cluster.pod(0, "client");
        let (one, two) = (cluster.server(0, "one"), cluster.server(1, "two"));
        for v6 in [false, true] {
            server::tcp(&two.namespace, "two-8000", two.address(v6), 8000);
        }
        let from = &client.namespace;
        let udp_asked = |to| udp(from, to, b"x").ok().map(|answer| answer.server);
        for (number, vip) in VIPS.into_iter().enumerate() {
            let family = if number == 0 { "IPv4" } else { "IPv6" };
            let slice = |name: &str, service: &str, ports: &[Port<'_>], pods: &[&Pod]| {
                let endpoints: Vec<Value> = pods
                    .iter()
                    .map(|pod| objects::endpoint(pod.address(number == 1), &pod.node))
                    .collect();
                let mut slice = objects::slice(name, service, ports, &endpoints);
                slice["addressType"] = family.into();
                cluster.api.put(slice);
            };
            let other: IpAddr = ["10.96.0.20", "fd00:96::20"][number].parse().unwrap();
            // One port for two protocols; then only one of them, then the other.
            slice("web", "web", &TARGETS, &[&one]);
            cluster.api.put(objects::service("web", &[vip], &PORTS));
            cluster.wait_backends(vip, 1);
            assert_eq!(
                (asked(from, at(vip)), udp_asked(at(vip))),
                (Some("one".into()), Some("one".into()))
            );
            for (kept, tcp_reached) in [(&PORTS[..1], true), (&PORTS[1..], false)] {
                cluster.api.put(objects::service("web", &[vip], kept));
                eventually("only one protocol is served", || {
                    let reached = (asked(from, at(vip)).is_some(), udp_asked(at(vip)).is_some());
                    (reached == (tcp_reached, !tcp_reached)).then_some(())
                });
            }
            // One name, two numbers, in two slices.
            cluster.api.put(objects::service("web", &[vip], &PORTS[..1]));
            slice("web-2", "web", &[("tcp", "TCP", 8000)], &[&two]);
            cluster.wait_backends(vip, 2);
            let seen =
                |to| -> BTreeSet<String> { (0..40).filter_map(|_| asked(from, to)).collect() };
            assert_eq!(seen(at(vip)), ["one".to_owned(), "two-8000".to_owned()].into());
            // Two Services with the same endpoints: one goes, the other stays.
            cluster.api.put(objects::service("twin", &[other], &PORTS[..1]));
            slice("twin", "twin", &TARGETS[..1], &[&one]);
            cluster.wait_backends(other, 1);
            cluster.api.delete("Service", "web");
            eventually("the first is gone", || {
                let services = cluster.list(0, "services");
                services.iter().all(|service| service["name"] != "web").then_some(())
            });
            assert_eq!(asked(from, at(other)).as_deref(), Some("one"));
            cluster.api.delete("Service", "twin");
            for name in ["web", "web-2", "twin"] {
                cluster.api.delete("EndpointSlice", name);
            }
        }
    }
}

/// 13 to 16 of 2.1; 1, 2, 3 and 8 of 2.7.
#[test]
fn a_service_may_change_its_type_its_ports_and_who_may_ask() {
    let cluster = start(Cni::Routed);
    let outsider = cluster.world.outsider();
    let (client, other) = (cluster.pod(0, "client"), cluster.pod(1, "other"));
    let server = cluster.server(1, "server");
    let from = &client.namespace;
    set(&cluster, &[ready(&server)]);
    let opens = |from: &Namespace, to| eventually("it opens", || asked(from, to));
    for v6 in [false, true] {
        let family = usize::from(v6);
        let (vip, balancer) = (at(VIPS[family]), at(BALANCER[family].parse().unwrap()));
        let closes = |to: SocketAddr| {
            eventually("it closes", || {
                let listed = cluster.list(0, "services");
                let is_it = |service: &Value| {
                    service["vip"] == to.ip().to_string()
                        && service["port"] == *to.port().to_string()
                };
                (!listed.iter().any(is_it)).then_some(())
            });
        };
        let external = json!({"spec": {"type": "ExternalName", "externalName": "example.org"}});
        put_service(&cluster, &external);
        closes(vip);
        put_service(&cluster, &json!({}));
        opens(from, vip);
        put_service(&cluster, &external);
        closes(vip);
        put_service(&cluster, &node_ports());
        opens(&outsider, cluster.node_port(0, v6));
        // A balancer's Service, at first without a NodePort.
        let mut fields = balanced(&json!({}));
        fields["spec"]["ports"] = json!([{}, {}]);
        put_service(&cluster, &fields);
        opens(&outsider, balancer);
        eventually("the NodePort is the node's again", || {
            is_refused(&outsider, cluster.node_port(0, v6)).then_some(())
        });
        let moved = json!({"spec": {"ports": [{"port": 81, "nodePort": 30_081}, {"port": 81, "nodePort": 30_082}]}});
        put_service(&cluster, &balanced(&moved));
        opens(&outsider, SocketAddr::new(balancer.ip(), 81));
        opens(&outsider, SocketAddr::new(cluster.world.nodes[1].address(v6), 30_081));
        closes(balancer);
        // Who may ask.
        put_service(&cluster, &balanced(&json!({})));
        opens(&outsider, balancer);
        let allow = |ranges: &[String]| {
            put_service(
                &cluster,
                &balanced(&json!({"spec": {"loadBalancerSourceRanges": ranges}})),
            );
        };
        let bits = if v6 { 128 } else { 32 };
        let is_let_in = |from: &Namespace| {
            let socket = udp_socket(from, v6, 0).unwrap();
            answer(&socket, balancer).is_some()
        };
        let let_in = || [&outsider, &client.namespace, &other.namespace].map(&is_let_in);
        let nobody = if v6 { "2001:db8:ffff::1/128" } else { "255.0.0.0/32" };
        let halves = if v6 { ["::/1", "8000::/1"] } else { ["0.0.0.0/1", "128.0.0.0/1"] };
        for (ranges, wanted) in [
            (vec![format!("{}/{bits}", client.address(v6))], [false, true, false]),
            (halves.map(str::to_owned).to_vec(), [true; 3]),
            (vec![nobody.to_owned()], [false; 3]),
            (vec![], [true; 3]),
        ] {
            allow(&ranges);
            let what = format!("only these are let in: {ranges:?}");
            eventually(&what, || (let_in() == wanted).then_some(()));
        }
    }
}

/// 11, 12 of 2.7 and 4 of 2.8: pods are replaced round by round, and nobody notices.
#[test]
fn a_rolling_update_fails_no_connection() {
    for (cni, policy) in [(Cni::Bridge, "Cluster"), (Cni::Routed, "Local")] {
        let cluster = start(cni);
        let client = cluster.pod(0, "client");
        let outsider = cluster.world.outsider();
        let servers: Vec<Pod> = (0..4).map(|n| cluster.server(0, &format!("s{n}"))).collect();
        put_service(&cluster, &balanced(&json!({"spec": {"externalTrafficPolicy": policy}})));
        set(&cluster, &[ready(&servers[0]), ready(&servers[1])]);
        VIPS.iter().for_each(|vip| cluster.wait_backends(*vip, 2));
        let (stop, made) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for v6 in [false, true] {
                let balancer = at(BALANCER[usize::from(v6)].parse().unwrap());
                let (cluster, stop, made) = (&cluster, &stop, &made);
                let doors = [
                    (&client.namespace, at(VIPS[usize::from(v6)])),
                    (&outsider, balancer),
                    (&outsider, cluster.node_port(0, v6)),
                ];
                scope.spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        for (from, to) in doors {
                            let connection = tcp(from, to);
                            if let Err(error) = &connection {
                                stop.store(true, Ordering::Relaxed);
                                panic!("{to}: {error}");
                            }
                            made.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
            for round in 0..5 {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let [old, next] = [round % 4, (round + 2) % 4].map(|n| &servers[n]);
                let other = &servers[(round + 1) % 4];
                // One more is ready, then one ends in grace, then it is gone.
                set(&cluster, &[ready(old), ready(other), ready(next)]);
                VIPS.iter().for_each(|vip| cluster.wait_backends(*vip, 3));
                set(&cluster, &[in_condition(old, false, true, true), ready(other), ready(next)]);
                VIPS.iter().for_each(|vip| cluster.wait_backends(*vip, 2));
                set(&cluster, &[ready(other), ready(next)]);
                let before = made.load(Ordering::Relaxed);
                eventually("connections go on", || {
                    let goes_on = made.load(Ordering::Relaxed) > before + 20;
                    (goes_on || stop.load(Ordering::Relaxed)).then_some(())
                });
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert!(made.load(Ordering::Relaxed) > 100);
    }
}

/// Sends an IP packet as it is.
fn inject(from: &Namespace, packet: &Packet) {
    let domain = Domain::for_address(packet.dst);
    // IPPROTO_RAW: the header is ours.
    let socket = from.run(|| Socket::new(domain, Type::RAW, Some(Protocol::from(255)))).unwrap();
    let to = SocketAddr::new(packet.dst.ip(), 0);
    socket.send_to(&packet.quoted(usize::from(u16::MAX)), &to.into()).unwrap();
}

/// 6 of 2.2: the "invalid conntrack state bug". A segment out of the window comes from the pod; it must
/// reach the client as the VIP's, who ignores it, and not as a stranger's, who is sent a reset.
#[test]
fn a_stray_segment_of_the_pod_resets_nothing() {
    for cni in CNIS {
        let cluster = start(cni);
        let (client, server) = (cluster.pod(0, "client"), cluster.server(1, "server"));
        put_service(&cluster, &json!({}));
        set(&cluster, &[ready(&server)]);
        for vip in VIPS {
            cluster.wait_backends(vip, 1);
            let at_client = Capture::start(&client.namespace, "eth0");
            let mut connection = tcp(&client.namespace, at(vip)).unwrap();
            let own = SocketAddr::new(server.address(vip.is_ipv6()), TARGET);
            let from_vip = || at_client.seen().iter().filter(|packet| packet.src == vip).count();
            let before = from_vip();
            // At most one of them is in the window.
            for quarter in 0..4_u32 {
                let transport = Transport::Tcp {
                    flags: 16,
                    sequence: quarter << 30,
                    acknowledgement: 1,
                    window: 512,
                };
                let segment = Packet::tcp(Side::Egress, own, connection.seen_as, 16);
                let stray = Packet { transport, payload: b"boom!!!".to_vec(), ..segment };
                inject(&server.namespace, &stray);
            }
            eventually("they reach the client", || (from_vip() >= before + 4).then_some(()));
            assert_eq!(connection.echo(b"still here").unwrap(), b"still here");
            let seen = at_client.seen();
            assert!(seen.iter().all(|packet| !packet.rst && packet.src != own.ip()), "{seen:?}");
        }
    }
}

/// KP-27: a process of the node that listens where a Service has its `NodePort` is not heard.
#[test]
fn a_node_port_goes_before_a_process_that_listens_there() {
    let cluster = start(Cni::Bridge);
    let outsider = cluster.world.outsider();
    let server = cluster.server(1, "server");
    put_service(&cluster, &node_ports());
    set(&cluster, &[ready(&server)]);
    for vip in VIPS {
        cluster.wait_backends(vip, 1);
        let to = cluster.node_port(0, vip.is_ipv6());
        server::tcp(&cluster.world.nodes[0].namespace, "process", to.ip(), NODE_PORT);
        assert_eq!(asked(&outsider, to).as_deref(), Some("server"));
        assert!(cluster.probe(0, "tcp", to).unwrap().starts_with("server "));
    }
    // Without the Service it is.
    cluster.api.delete("Service", "web");
    for v6 in [false, true] {
        let to = cluster.node_port(0, v6);
        eventually("the process is heard", || {
            (asked(&outsider, to).as_deref() == Some("process")).then_some(())
        });
    }
}
