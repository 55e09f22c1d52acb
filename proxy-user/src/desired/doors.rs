//! The doors of a Service: its addresses of one family, and what is asked at each.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use super::{Access, Frontend};
use crate::model::{IpFamily, Node, Service, ServicePort};

/// A Service's addresses of one family.
pub struct Doors {
    addresses: BTreeMap<IpAddr, Access>,
    node_ports: (IpAddr, Access),
    /// Who may come through the load balancer's addresses; everyone if it is empty.
    pub ranges: Vec<IpNet>,
}

/// The doors of a Service in the family of one of its cluster IPs. An address that is listed twice
/// has what was listed first: cluster IP, external IP, load balancer IP.
pub fn doors(service: &Service, node: &Node, cluster_ip: IpAddr) -> Doors {
    let family = IpFamily::of(cluster_ip);
    let ranges = ranges(service, node, family);
    let external = Access { local_for_outside: service.external_local, ..Access::default() };
    let balanced = Access {
        source_ranges: !ranges.is_empty(),
        node_allowed: is_node_in(&ranges, node),
        ..external
    };
    let clustered =
        Access { refuses: true, local_for_all: service.internal_local, ..Access::default() };
    let mut addresses = BTreeMap::from([(cluster_ip, clustered)]);
    for (list, access) in [(&service.external_ips, external), (&service.balancer_ips, balanced)] {
        for address in list.iter().filter(|address| IpFamily::of(**address) == family) {
            addresses.entry(*address).or_insert(access);
        }
    }
    Doors { addresses, node_ports: (family.any(), external), ranges }
}

impl Doors {
    /// The frontends of a port.
    pub fn frontends(&self, port: &ServicePort) -> BTreeMap<Frontend, Access> {
        let frontend = |vip, number| Frontend { vip, port: number, protocol: port.protocol };
        let addresses = self.addresses.iter();
        let mut frontends: BTreeMap<Frontend, Access> =
            addresses.map(|(vip, access)| (frontend(*vip, port.port), *access)).collect();
        if let Some(number) = port.node_port {
            let (any, access) = self.node_ports;
            frontends.insert(frontend(any, number), access);
        }
        frontends
    }
}

/// The Service's source ranges of a family. A range of everything is none (KP-93). If this node is in
/// one, so is a load balancer's agent on it, which has the VIP for its own address (KP-92).
fn ranges(service: &Service, node: &Node, family: IpFamily) -> Vec<IpNet> {
    let of_family = |range: &&IpNet| IpFamily::of(range.addr()) == family;
    let mut ranges: Vec<IpNet> = service.source_ranges.iter().filter(of_family).copied().collect();
    if ranges.iter().any(|range| range.prefix_len() == 0) {
        return Vec::new();
    }
    if is_node_in(&ranges, node) {
        let vips = service.balancer_ips.iter().filter(|vip| IpFamily::of(**vip) == family);
        ranges.extend(vips.map(|vip| IpNet::from(*vip)));
        ranges.sort_unstable();
        ranges.dedup();
    }
    ranges
}

fn is_node_in(ranges: &[IpNet], node: &Node) -> bool {
    node.addresses.iter().any(|address| ranges.iter().any(|range| range.contains(address)))
}
