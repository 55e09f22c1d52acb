//! What the host stack sees of flows from outside, and decides: firewalls, the table of connections, policies; and the short cut
//! past it, which is there only as long as it lets them pass.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use portal::testing::client::{Connection, tcp, udp_socket};
use portal::testing::cluster::{Cluster, TARGET, VIPS, at};
use portal::testing::stage::Stage;
use portal::testing::world::{CNIS, Cni, OUTSIDER4, OUTSIDER6, Pod, World};
use portal::testing::{eventually, server, within};

fn stage(world: World, arguments: &[&str]) -> Stage {
    Stage::new(world, Path::new(env!("CARGO_BIN_EXE_portal")), arguments)
}

/// With and without short cuts.
const SHORT_CUTS: [&str; 2] = ["--short-cut=auto", "--short-cut=off"];

/// Connections to every door.
fn connect(stage: &Stage) -> Vec<Connection> {
    stage.doors.iter().map(|door| tcp(&stage.outsider, *door).unwrap()).collect()
}

/// Waits until connections to pods elsewhere take the short cut, if they are to.
fn settle(stage: &Stage, connections: &mut [Connection], is_cut: bool) {
    if !is_cut {
        return;
    }
    // A packet is counted with the next tick.
    let mut before = None;
    within(Duration::from_mins(1), "flows take the short cut", || {
        for connection in &mut *connections {
            for _ in 0..20 {
                assert_eq!(connection.echo(b"x").unwrap(), b"x");
            }
        }
        let count = stage.cluster.outcomes(0, "short_cut");
        // Both directions of both families, most of their packets.
        let first = *before.get_or_insert(count);
        (count > first + 400).then_some(())
    });
}

/// Whether a byte comes back in time that is sent now. One that does not makes the connection one byte late.
fn answers(connection: &mut Connection, patience: Duration) -> bool {
    connection.stream.get_ref().set_read_timeout(Some(patience)).unwrap();
    connection.echo(b"x").is_ok()
}

/// Whether a datagram gets an answer.
fn is_served_by_udp(stage: &Stage, door: SocketAddr) -> bool {
    let socket = udp_socket(&stage.outsider, door.is_ipv6(), 0).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    socket.send_to(b"x", door).unwrap();
    socket.recv(&mut [0; 2048]).is_ok()
}

/// Someone is cut off at every door, and served again when the rules are gone.
fn cuts_off_and_lets_in(stage: &Stage, connections: &mut [Connection], rules: &str) {
    let node = &stage.cluster.world.nodes[0].namespace;
    node.firewall(rules);
    for (door, connection) in stage.doors.iter().zip(&mut *connections) {
        let what = format!("the connection to {door} stands still");
        eventually(&what, || (!answers(connection, Duration::from_millis(500))).then_some(()));
        assert!(!is_served_by_udp(stage, *door), "{door}");
    }
    node.firewall("");
    for (door, connection) in stage.doors.iter().zip(connections) {
        let what = format!("the connection to {door} goes on");
        within(Duration::from_mins(1), &what, || {
            answers(connection, Duration::from_secs(5)).then_some(())
        });
        eventually("and new ones are served", || is_served_by_udp(stage, *door).then_some(()));
    }
}

/// Case 10: who is dropped before routing, or by the FORWARD chain, is dropped wherever the pod is. The same for connections
/// that are under way, also those that took the short cut.
#[test]
fn whom_the_hosts_firewall_drops_is_dropped_wherever_the_pod_is() {
    let client = format!("ip saddr {OUTSIDER4} drop; ip6 saddr {OUTSIDER6} drop");
    let dropping =
        |chain: &str| format!("table inet t {{\nchain c {{\ntype filter hook {chain}\n}}\n}}\n");
    for short_cut in SHORT_CUTS {
        let stage = stage(World::new(Cni::Bridge), &[short_cut]);
        let mut connections = connect(&stage);
        for chain in [
            format!("prerouting priority raw; {client};"),
            "forward priority filter; policy drop;".to_owned(),
            "forward priority filter; tcp dport 8080 drop; udp dport 8080 drop;".to_owned(),
        ] {
            settle(&stage, &mut connections, short_cut == SHORT_CUTS[0]);
            cuts_off_and_lets_in(&stage, &mut connections, &dropping(&chain));
        }
    }
}

/// Rules that nobody who is served should notice: a FORWARD policy with a CNI's accepts, an INPUT chain without any.
#[test]
fn firewalls_with_the_accepts_of_a_cni_let_everyone_be_served() {
    let rules = "table inet t {
        chain f { type filter hook forward priority filter; policy drop; ct state invalid drop;
            ip saddr 10.244.0.0/16 accept; ip daddr 10.244.0.0/16 accept;
            ip6 saddr fd00:244::/32 accept; ip6 daddr fd00:244::/32 accept;
        }
        chain i { type filter hook input priority filter; policy drop;
            iif lo accept; meta l4proto ipv6-icmp accept; ct state established,related accept;
        }
    }
";
    for (cni, short_cut) in CNIS.into_iter().zip(SHORT_CUTS) {
        let world = World::new(cni);
        for node in &world.nodes {
            node.namespace.firewall(rules);
        }
        let stage = stage(world, &[short_cut]);
        stage.assert_served();
        let mut connections = connect(&stage);
        settle(&stage, &mut connections, short_cut == SHORT_CUTS[0]);
    }
}

/// The kernel's table of connections follows each to its end, though most of its packets took the short cut; and nothing of it
/// is taken for invalid, however far it has come meanwhile.
#[test]
fn connections_that_took_the_short_cut_leave_nothing_behind() {
    let rules = "table inet t {
        chain f { type filter hook forward priority filter; ct state invalid drop;
        }
    }
";
    let stage = stage(World::new(Cni::Routed), &[]);
    let node = &stage.cluster.world.nodes[0].namespace;
    node.firewall(rules);
    let mut connections = connect(&stage);
    settle(&stage, &mut connections, true);
    let bytes = vec![7; 8 << 20];
    for connection in &mut connections {
        let mut sender = connection.stream.get_ref().try_clone().unwrap();
        let sent = bytes.clone();
        let sending = std::thread::spawn(move || std::io::Write::write_all(&mut sender, &sent));
        let mut received = vec![0; bytes.len()];
        std::io::Read::read_exact(&mut connection.stream, &mut received).unwrap();
        sending.join().unwrap().unwrap();
        assert!(received == bytes);
    }
    let is_open = |line: &String| line.contains("ESTABLISHED") && line.contains("dport=8080");
    let open = || node.connections().into_iter().filter(is_open).count();
    assert_eq!(open(), connections.len(), "they are followed");
    // What the kernel saw last may never be acknowledged, as far as it can see: no reason to forget them when they are idle.
    let is_kept = |line: &String| {
        let seconds = line.split_whitespace().nth(4).and_then(|word| word.parse::<u32>().ok());
        is_open(line) && seconds.is_some_and(|seconds| seconds > 24 * 3600)
    };
    within(Duration::from_mins(2), "they are kept while they are idle", || {
        let kept = node.connections().into_iter().filter(is_kept).count();
        (kept == connections.len()).then_some(())
    });
    drop(connections);
    eventually("their end is seen", || (open() == 0).then_some(()));
}

/// Fault O: connections that another proxy has led, by the kernel's own NAT, go on when Portal takes over, and new ones are
/// Portal's.
#[test]
fn connections_of_the_proxy_before_go_on() {
    let world = World::new(Cni::Routed);
    let serving = ["one", "two", "three"].map(|name| {
        let pod = world.pod(1, name);
        for v6 in [false, true] {
            server::tcp(&pod.namespace, name, pod.address(v6), TARGET);
        }
        pod
    });
    let client = world.pod(0, "client");
    let node = &world.nodes[0].namespace;
    let [v4, v6] = VIPS;
    let nat = |rule: &str, rule6: &str| {
        let chain = "chain p { type nat hook prerouting priority dstnat; ";
        format!("table ip t {{\n{chain}{rule}\n}}\n}}\ntable ip6 t {{\n{chain}{rule6}\n}}\n}}\n")
    };
    let rules = |to: &Pod| {
        nat(
            &format!("ip daddr {v4} tcp dport 80 dnat to {}:{TARGET};", to.v4),
            &format!("ip6 daddr {v6} tcp dport 80 dnat to [{}]:{TARGET};", to.v6),
        )
    };
    let mut connections = Vec::new();
    for pod in &serving {
        node.firewall(&rules(pod));
        for vip in VIPS.into_iter().cycle().take(6) {
            connections.push(tcp(&client.namespace, at(vip)).unwrap());
        }
    }
    let cluster = Cluster::start_in(world, Path::new(env!("CARGO_BIN_EXE_portal")), &[]);
    let all: Vec<&Pod> = serving.iter().collect();
    cluster.expose("web", &VIPS, &all);
    VIPS.iter().for_each(|vip| cluster.wait_backends(*vip, serving.len()));
    eventually("the client's link is served", || {
        cluster.world.nodes[0].is_attached(&client).then_some(())
    });
    // The rules go, as `kube-proxy --cleanup` has it; what they have led is in the kernel's table of connections, as long as
    // anyone wants one.
    let others = "chain f { type filter hook forward priority filter; ct state invalid drop; }";
    let others = format!("{}table inet f {{\n{others}\n}}\n", nat("", ""));
    cluster.world.nodes[0].namespace.firewall(&others);
    for connection in &mut connections {
        assert_eq!(connection.echo(b"still there").unwrap(), b"still there");
    }
    let opened = cluster.outcomes(0, "opened");
    for vip in VIPS {
        tcp(&client.namespace, at(vip)).unwrap();
    }
    assert_eq!(cluster.outcomes(0, "opened"), opened + 2);
}
