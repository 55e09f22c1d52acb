//! What the kernel should hold for a cluster, seen from one node: a function without I/O, clock or
//! state.
//!
//! `desired(cluster, node)` is the union of `desired_of` over all Services and pods, and no one's part
//! depends on another's, so that a change costs in proportion to the change. What two Services may not
//! share, a frontend, is settled in [`crate::plan`].

mod doors;
mod eligible;
pub mod health;
mod host_ports;
pub mod node_ports;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use proxy_common::tables::Algorithm;

use crate::model::{Cluster, IpFamily, Node, ObjectName, Owner, Protocol};
use doors::doors;
pub use eligible::Criteria;
use host_ports::{HOST_PORT, host_ports};

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

impl PortId {
    /// Whether it is a pod's port of the node.
    pub fn is_host_port(&self) -> bool {
        self.port.starts_with(HOST_PORT)
    }
}

impl fmt::Display for PortId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { service, port, .. } = self;
        match port.strip_prefix(HOST_PORT) {
            Some(host_port) => write!(f, "Pod {service} host port {host_port}"),
            None => write!(f, "Service {service} port \"{port}\""),
        }
    }
}

/// Where clients send to. At the unspecified address it is a `NodePort`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Frontend {
    /// The virtual IP.
    pub vip: IpAddr,
    /// The port.
    pub port: u16,
    /// The protocol.
    pub protocol: Protocol,
}

/// Through which door of a Service a frontend leads, and what is asked there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
#[allow(clippy::struct_excessive_bools, reason = "independent facts, each with a name")]
pub struct Access {
    /// Unused ports of the address are refused (KP-40).
    pub refuses: bool,
    /// Only this node's endpoints, whoever asks (KP-59).
    pub local_for_all: bool,
    /// Only this node's endpoints for who asks from outside (KP-52).
    pub local_for_outside: bool,
    /// Only for clients in the source ranges (KP-90).
    pub source_ranges: bool,
    /// With source ranges that this node is in (KP-92).
    pub node_allowed: bool,
    /// A pod's port of the node.
    pub host_port: bool,
}

/// An endpoint of a Service port.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[allow(clippy::struct_excessive_bools, reason = "independent facts, each with a name")]
pub struct Backend {
    /// Its address and port.
    pub address: SocketAddr,
    /// Takes new flows.
    pub usable: bool,
    /// Takes new flows that stay on this node.
    pub usable_local: bool,
    /// Keeps the flows that it has.
    pub serving: bool,
    /// Runs on this node (KP-12).
    pub local: bool,
    /// Its share of new flows, beside those of others.
    pub weight: u16,
}

/// In few words: there may be a hundred thousand.
impl Hash for Backend {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let Self { address, usable, usable_local, serving, local, weight } = *self;
        match address.ip() {
            IpAddr::V4(ip) => state.write_u32(ip.to_bits()),
            IpAddr::V6(ip) => state.write_u128(ip.to_bits()),
        }
        let facts = u32::from(usable)
            | u32::from(usable_local) << 1
            | u32::from(serving) << 2
            | u32::from(local) << 3;
        let numbers = u32::from(address.port()) << 16 | u32::from(weight);
        state.write_u64(u64::from(numbers) << 32 | u64::from(facts));
    }
}

/// What the kernel should hold for a Service port.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Port {
    /// When its Service was created.
    pub created: String,
    /// Its frontends.
    pub frontends: BTreeMap<Frontend, Access>,
    /// Its endpoints, sorted by address, each address once (KP-14).
    pub backends: Vec<Backend>,
    /// What was so of all endpoints together when those were judged.
    pub criteria: Criteria,
    /// How an endpoint is chosen.
    pub algorithm: Algorithm,
    /// For how many seconds a client stays with its endpoint; 0 if it does not.
    pub affinity: u32,
    /// Who may come through frontends with source ranges, sorted.
    pub source_ranges: Vec<IpNet>,
}

/// A change of some endpoints of a Service port, all else being as it was.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Patch {
    /// The Service port.
    pub port: PortId,
    /// Where endpoints came, went or changed.
    pub addresses: BTreeSet<IpAddr>,
    /// All that there are at these addresses now, sorted.
    pub backends: Vec<Backend>,
}

/// What the kernel should hold, by Service port.
pub type Tables = BTreeMap<PortId, Port>;

/// What the kernel should hold for the whole cluster.
pub fn desired(cluster: &Cluster, node: &Node) -> Tables {
    cluster.owners().flat_map(|owner| desired_of(cluster, node, &owner)).collect()
}

/// What the kernel should hold for one object; nothing if there is no such object.
pub fn desired_of(cluster: &Cluster, node: &Node, owner: &Owner) -> Tables {
    match owner {
        Owner::Service(name) => desired_service(cluster, node, name),
        Owner::Pod(name) => cluster.pod(name).map(|pod| host_ports(name, pod)).unwrap_or_default(),
    }
}

/// What has changed of a Service port, if that is no more than endpoints at these addresses: those were judged by
/// `criteria` and all others still are. `None` if [`desired_of`] must tell.
pub fn patch_of(
    cluster: &Cluster,
    node: &Node,
    port: &PortId,
    criteria: Criteria,
    addresses: &BTreeSet<IpAddr>,
) -> Option<Patch> {
    let of_family = addresses.iter().filter(|address| IpFamily::of(**address) == port.family);
    let addresses: BTreeSet<IpAddr> = of_family.copied().collect();
    let backends = eligible::backends_at(cluster, node, port, criteria, &addresses)?;
    Some(Patch { port: port.clone(), addresses, backends })
}

fn desired_service(cluster: &Cluster, node: &Node, name: &ObjectName) -> Tables {
    let Some(service) = cluster.service(name) else { return Tables::new() };
    let mut tables = Tables::new();
    for cluster_ip in &service.cluster_ips {
        let doors = doors(service, node, *cluster_ip);
        for port in &service.ports {
            let id = PortId {
                service: name.clone(),
                port: port.name.clone(),
                protocol: port.protocol,
                family: IpFamily::of(*cluster_ip),
            };
            let (backends, criteria) = eligible::backends(cluster, node, &id);
            let wanted = Port {
                created: service.created.clone(),
                frontends: doors.frontends(port),
                backends,
                criteria,
                algorithm: service.algorithm.unwrap_or(node.algorithm),
                affinity: service.affinity.unwrap_or_default(),
                source_ranges: doors.ranges.clone(),
            };
            tables.insert(id, wanted);
        }
    }
    tables
}
