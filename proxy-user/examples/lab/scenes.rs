//! The scenes, each a question and its answer in packets.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::net::IpAddr;
use std::time::Instant;

use portal::testing::capture::{Capture, Seen};
use portal::testing::client::{Connection, tcp};
use portal::testing::cluster::TARGET;
use portal::testing::eventually;
use portal::testing::world::OUTSIDER4;

use super::show::{Show, bars, command, packets, say, span};
use super::stage::Stage;

/// What one connection looks like at the client, on the wire and to the server.
pub fn one_connection(stage: &Stage, show: &mut Show) {
    show.scene("One connection, seen at three places");
    let node = &stage.cluster.world.nodes[0];
    let at_client = Capture::start(&stage.client.namespace, "eth0");
    let on_wire = Capture::start(&node.namespace, "eth0");
    let (connection, port) = connect_across(stage);
    let first_of = |capture: &Capture| {
        eventually("both directions were captured", || {
            let seen: Vec<Seen> =
                capture.seen().into_iter().filter(|p| p.sport == port || p.dport == port).collect();
            let there = seen.iter().find(|packet| packet.syn)?.clone();
            let back = seen.iter().find(|packet| packet.dport == port)?.clone();
            Some([there, back])
        })
    };
    let (client_side, wire) = (first_of(&at_client), first_of(&on_wire));
    packets("the client's own veth", &client_side);
    packets("the wire between nodes", &wire);
    say(format!(
        "{:<22}{:>24} called {}",
        "the server, accept()", connection.seen_as, connection.server
    ));

    let flows = stage.portal(0, &["flows"]);
    let mine = |line: &&str| line.starts_with("PROTOCOL") || line.contains(&format!(":{port} "));
    let flow: Vec<&str> = flows.lines().filter(mine).collect();
    command("portal flows", &flow.join("\n"));

    let vip = Stage::vip(false);
    let server = stage.web.iter().find(|pod| pod.name == connection.server).expect("one of ours");
    let (own, pod): (IpAddr, IpAddr) = (stage.client.v4.into(), server.v4.into());
    let [there, back] = &client_side;
    let sees_vip = (there.dst, back.src) == (vip.ip(), vip.ip());
    let nothing_else = at_client.seen().iter().all(|packet| packet.src != pod && packet.dst != pod);
    show.check(sees_vip && nothing_else, "the client sees the VIP, and nothing but the VIP");
    let [there, back] = &wire;
    let carries_pod =
        (there.dst, there.dport) == (pod, TARGET) && (back.src, back.dst) == (pod, own);
    show.check(carries_pod, format!("the wire carries the pod's address, port {TARGET}"));
    show.check(connection.seen_as.ip() == own, "the server saw the client pod's own address");
}

/// A connection to a pod of the other node, and the port it comes from.
fn connect_across(stage: &Stage) -> (Connection, u16) {
    eventually("a connection crosses the wire", || {
        let connection = tcp(&stage.client.namespace, Stage::vip(false)).ok()?;
        let server = stage.web.iter().find(|pod| pod.name == connection.server)?;
        let port = connection.stream.get_ref().local_addr().ok()?.port();
        (server.node != stage.client.node).then_some((connection, port))
    })
}

/// How many connections reach which pod.
pub fn spread(stage: &Stage, show: &mut Show) {
    show.scene("100 connections");
    match stage.connect(100) {
        Ok(counts) => {
            let counts = stage.bars(&counts);
            bars(&counts);
            let fair = counts.iter().all(|(_, count)| (5..=50).contains(count));
            show.check(fair, "every pod takes its share");
        }
        Err(error) => show.check(false, format!("all connections succeed ({error})")),
    }
}

/// A pod comes, one goes, all go.
pub fn changes(stage: &mut Stage, show: &mut Show) {
    show.scene("The pods change");
    let mut open = tcp(&stage.client.namespace, Stage::vip(false)).expect("the Service serves");
    let added = stage.cluster.server(1, "web-e");
    stage.web.push(added);
    let took = stage.serve(&stage.web);
    say(format!("web-e is added: in both kernels {} later", span(took)));
    bars(&stage.bars(&stage.connect(100).unwrap_or_default()));
    let reached = stage.connect(100).is_ok_and(|counts| counts.contains_key("web-e"));
    show.check(reached, "new connections reach web-e");

    let left: Vec<_> = stage.web.iter().filter(|pod| pod.name != open.server).cloned().collect();
    let took = stage.serve(&left);
    say(format!("{} is removed: in both kernels {} later", open.server, span(took)));
    bars(&stage.bars(&stage.connect(100).unwrap_or_default()));
    let avoided = stage.connect(100).is_ok_and(|counts| !counts.contains_key(&open.server));
    show.check(avoided, format!("no new connection reaches {}", open.server));
    let goes_on = open.echo(b"still here").is_ok_and(|answer| answer == b"still here");
    show.check(goes_on, "the connection that was open to it goes on");

    let took = stage.serve(&[]);
    say(format!("all pods are removed: in both kernels {} later", span(took)));
    let started = Instant::now();
    let refused = tcp(&stage.client.namespace, Stage::vip(false)).err().map(|error| error.kind());
    let waited = started.elapsed();
    show.check(
        refused == Some(ErrorKind::ConnectionRefused),
        format!("the client is refused at once ({})", span(waited)),
    );
    show.check(
        stage.probe(0, "tcp", 1) == Err("ConnectionRefused".to_owned()),
        "so is a process on the node",
    );
    stage.serve(&stage.web);
}

/// The same for processes of the node itself.
pub fn from_the_node(stage: &Stage, show: &mut Show) {
    show.scene("The same from node n0 itself, translated when the socket connects");
    let lines = match stage.probe(0, "tcp", 100) {
        Ok(lines) => lines,
        Err(error) => return show.check(false, format!("all connections succeed ({error})")),
    };
    let mut counts = BTreeMap::new();
    for [server, ..] in &lines {
        *counts.entry(server.clone()).or_default() += 1;
    }
    bars(&stage.bars(&counts));
    show.check(counts.len() == stage.web.len(), "the node's connections reach every pod");
    let vip = Stage::vip(false).to_string();
    let sees_vip = lines.iter().all(|[_, _, peer]| *peer == vip);
    show.check(sees_vip, "getpeername says the VIP: the process never learns of pods");
}

/// The same for a client that is no pod and no node.
pub fn from_outside(stage: &Stage, show: &mut Show) {
    show.scene("The same from outside the cluster, by node n0's NodePort");
    let outsider = stage.cluster.world.outsider();
    let node = &stage.cluster.world.nodes[0];
    let to = stage.cluster.node_port(0, false);
    let answers: Vec<Connection> = (0..100).filter_map(|_| tcp(&outsider, to).ok()).collect();
    show.check(answers.len() == 100, format!("100 connections to {to} succeed"));
    let mut counts = BTreeMap::new();
    answers.iter().for_each(|answer| *counts.entry(answer.server.clone()).or_default() += 1);
    bars(&stage.bars(&counts));
    let seen_by = |local: bool| -> BTreeSet<IpAddr> {
        let place = |name: &str| stage.web.iter().any(|p| p.name == name && p.node == node.name);
        let those = answers.iter().filter(|answer| place(&answer.server) == local);
        those.map(|answer| answer.seen_as.ip()).collect()
    };
    let own = BTreeSet::from([IpAddr::V4(OUTSIDER4)]);
    show.check(seen_by(true) == own, "pods of n0 see the client's own address");
    let masqueraded = BTreeSet::from([IpAddr::V4(node.v4())]);
    show.check(seen_by(false) == masqueraded, "pods of n1 see n0, to which they must answer");
}

/// The same over UDP and IPv6.
pub fn udp(stage: &mut Stage, show: &mut Show) {
    show.scene("The same over UDP, and over IPv6");
    for v6 in [false, true] {
        say(format!("100 sockets send to {}", Stage::vip(v6)));
        match stage.send(100, v6) {
            Ok(counts) => {
                bars(&stage.bars(&counts));
                show.check(counts.len() == stage.web.len(), "datagrams reach every pod");
            }
            Err(error) => show.check(false, format!("every datagram is answered ({error})")),
        }
    }
    let from_node = stage.probe(0, "udp", 100);
    let answered = from_node
        .is_ok_and(|lines| lines.iter().all(|[_, _, from]| *from == Stage::vip(false).to_string()));
    show.check(answered, "the node's own datagrams are answered by the VIP");
    stage.serve(&[]);
    let refused = stage.send(1, false).err().map(|error| error.kind());
    show.check(
        refused == Some(ErrorKind::ConnectionRefused),
        "without pods a sender hears \"port unreachable\"",
    );
    stage.serve(&stage.web);
}
