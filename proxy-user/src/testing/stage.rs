//! A cluster with doors for everyone: what tests of many kinds of nodes begin with.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use super::client::{tcp, udp};
use super::cluster::{Cluster, VIPS};
use super::eventually;
use super::namespace::Namespace;
use super::objects::{NODE_PORT, node_ports};
use super::world::{Pod, World};

/// Two Services with a `NodePort` each, one with a pod on node 0 and one with a pod on node 1; and someone outside.
pub struct Stage {
    /// The cluster.
    pub cluster: Cluster,
    /// Someone outside.
    pub outsider: Namespace,
    /// The pods, by node.
    pub pods: [Pod; 2],
    /// Where node 0 has them.
    pub doors: Vec<SocketAddr>,
}

impl Stage {
    /// Starts a cluster, with the pods' ranges told to its agents.
    pub fn start(world: World, portal: &Path, arguments: &[&str]) -> Cluster {
        let cidr = ["--cluster-cidr", "10.244.0.0/16,fd00:244::/32"];
        Cluster::start_in(world, portal, &[&cidr, arguments].concat())
    }

    /// Sets the stage in a world.
    ///
    /// # Panics
    /// If the cluster does not come up.
    pub fn new(world: World, portal: &Path, arguments: &[&str]) -> Self {
        let outsider = world.outsider();
        let cluster = Self::start(world, portal, arguments);
        let pods: [Pod; 2] = [0, 1].map(|node| cluster.server(node, &format!("on-n{node}")));
        let mut doors = Vec::new();
        for (number, pod) in (0..).zip(&pods) {
            let vips = VIPS.map(|vip| beside(vip, number));
            let mut spec = node_ports();
            for port in spec["spec"]["ports"].as_array_mut().expect("ports") {
                port["nodePort"] = (NODE_PORT + number).into();
            }
            cluster.expose_with(&format!("s{number}"), &vips, &[pod], &spec);
            vips.iter().for_each(|vip| cluster.wait_backends(*vip, 1));
            let own = [false, true].map(|v6| cluster.world.nodes[0].address(v6));
            doors.extend(own.map(|address| SocketAddr::new(address, NODE_PORT + number)));
        }
        Self { cluster, outsider, pods, doors }
    }

    /// Whether everybody is served by every door of node 0, of the families that it has.
    ///
    /// # Panics
    /// If someone is not.
    pub fn assert_served(&self) {
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
pub fn beside(ip: IpAddr, number: u16) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => Ipv4Addr::from_bits(ip.to_bits() + u32::from(number)).into(),
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() + u128::from(number)).into(),
    }
}
