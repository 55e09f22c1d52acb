//! A small network scene for any kernel: `cargo xtask vm` runs it on Linux 5.10 and later. A Service of two
//! nodes' pods by its `ClusterIP`, by a `NodePort` of the node without the pod, and for the node's own sockets.

use std::path::Path;

use portal::testing::client::{tcp, udp};
use portal::testing::cluster::{Cluster, VIPS, at};
use portal::testing::eventually;
use portal::testing::objects::node_ports;
use portal::testing::world::Cni;

#[test]
fn a_service_is_reached_by_each_door() {
    let cluster = Cluster::start(Cni::Bridge, Path::new(env!("CARGO_BIN_EXE_portal")), &[]);
    let (client, remote) = (cluster.world.pod(0, "client"), cluster.serve_pod(1, "remote"));
    let outsider = cluster.world.outsider();
    cluster.expose_with("web", &VIPS, &[&remote], &node_ports());
    for vip in VIPS {
        cluster.wait_backends(vip, 1);
        let is_remote =
            |answer: Option<String>| (answer.as_deref() == Some("remote")).then_some(());
        // Here it is not asked how programs are attached, so a link may not have them yet.
        let door = |what: &str, ask: &dyn Fn() -> Option<String>| {
            eventually(&format!("{what} of {vip}"), || is_remote(ask()));
        };
        door("TCP by the ClusterIP", &|| Some(tcp(&client.namespace, at(vip)).ok()?.server));
        door("UDP by the ClusterIP", &|| Some(udp(&client.namespace, at(vip), b"x").ok()?.server));
        let node_port = cluster.node_port(0, vip.is_ipv6());
        door("TCP by the NodePort", &|| Some(tcp(&outsider, node_port).ok()?.server));
        door("UDP by the NodePort", &|| Some(udp(&outsider, node_port, b"x").ok()?.server));
        for protocol in ["tcp", "udp"] {
            let probe = || cluster.probe(0, protocol, at(vip)).ok();
            let name = |line: String| line.split(' ').next().map(str::to_owned);
            door(&format!("{protocol} of the node itself"), &|| name(probe()?));
        }
        // A connection that stays, and one that nobody serves.
        let mut held = tcp(&client.namespace, at(vip)).unwrap();
        assert_eq!(held.echo(b"hello").unwrap(), b"hello");
        let mut unused = at(vip);
        unused.set_port(81);
        assert!(
            tcp(&client.namespace, unused)
                .is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused)
        );
        let refused = cluster.probe(0, "tcp", unused).unwrap_err();
        assert_eq!(refused, "ConnectionRefused");
    }
}
