//! What the kernel should hold for a cluster, seen from one node: a function without I/O, clock or
//! state.
//!
//! `desired(cluster, node)` is the union of `desired_service` over all Services, and no Service's part
//! depends on another's, so that a change costs in proportion to the change. What two Services may not
//! share, a frontend, is settled in [`crate::plan`].

mod eligible;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use crate::model::{Cluster, IpFamily, Node, ObjectName, Protocol};

/// The identity of a Service port in one family: what keeps its number over changes and restarts.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PortId {
    /// The Service.
    pub service: ObjectName,
    /// The port's name.
    pub port: String,
    /// The port's protocol.
    pub protocol: Protocol,
    /// The family: a dual-stack Service port has two identities (KP-141).
    pub family: IpFamily,
}

/// Where clients send to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Frontend {
    /// The virtual IP.
    pub vip: IpAddr,
    /// The port.
    pub port: u16,
    /// The protocol.
    pub protocol: Protocol,
}

/// An endpoint of a Service port.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Backend {
    /// Its address and port.
    pub address: SocketAddr,
    /// Takes new flows.
    pub usable: bool,
    /// Keeps the flows that it has.
    pub serving: bool,
    /// Runs on this node (KP-12).
    pub local: bool,
}

/// What the kernel should hold for a Service port.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Port {
    /// When its Service was created.
    pub created: String,
    /// Its frontends, sorted.
    pub frontends: Vec<Frontend>,
    /// Its endpoints, sorted by address, each address once (KP-14).
    pub backends: Vec<Backend>,
}

/// What the kernel should hold, by Service port.
pub type Tables = BTreeMap<PortId, Port>;

/// What the kernel should hold for the whole cluster.
pub fn desired(cluster: &Cluster, node: &Node) -> Tables {
    let names = cluster.service_names();
    names.flat_map(|name| desired_service(cluster, node, name)).collect()
}

/// What the kernel should hold for one Service; nothing if there is no such Service.
pub fn desired_service(cluster: &Cluster, node: &Node, name: &ObjectName) -> Tables {
    let Some(service) = cluster.service(name) else { return Tables::new() };
    let mut tables = Tables::new();
    for vip in &service.cluster_ips {
        // SCTP's ports are not translated yet (docs/conformance.md, KP-26).
        for port in service.ports.iter().filter(|port| port.protocol != Protocol::Sctp) {
            let id = PortId {
                service: name.clone(),
                port: port.name.clone(),
                protocol: port.protocol,
                family: IpFamily::of(*vip),
            };
            let frontend = Frontend { vip: *vip, port: port.port, protocol: port.protocol };
            let backends = eligible::backends(cluster, node, &id);
            let created = service.created.clone();
            tables.insert(id, Port { created, frontends: vec![frontend], backends });
        }
    }
    tables
}
